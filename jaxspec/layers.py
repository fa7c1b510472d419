"""The pieces of a decoder layer: norms, rotary positions, attention over (cached prefix + tree), gated MLP."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxspec.base import Array, KVCache, Mask, Packed, Params
from jaxspec.kernels import Kernel, attend_packed, takes
from jaxspec.quantization import rescale
from jaxspec.sharding import AXIS_RULES, constrain, splits

MASKED = -1e30
"""Score of a key that a query does not see: far below any real score, and finite, so a row without keys is not NaN."""
FEW_ROWS = 32
"""Up to so many rows an LM head is the left operand: XLA:CPU would transpose it on every call as the right one."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretraining length.

    `linear` divides every frequency by `factor`; `llama3` (Llama 3.1 model card) leaves wavelengths below
    `original_positions / high_freq_factor` alone, divides those above `original_positions / low_freq_factor` and
    interpolates between; `yarn` (arXiv 2309.00071) interpolates by channel, between `low` and `high`, from frequencies
    left alone to divided ones; `longrope` (arXiv 2402.13753) divides each frequency by its own of `factors`, in texts
    that may become longer than `original_positions` by that of `long_factors`; `dynamic` (NTK) raises the base by how
    far a text may go beyond `original_positions`.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    low: float = dataclasses.field(default=0.0, repr=False)
    high: float = dataclasses.field(default=1.0, repr=False)
    turns: tuple[float, float] = dataclasses.field(default=(32.0, 1.0), repr=False)
    """Within the original length, of the channels `low` and `high` (`beta_fast` and `beta_slow` of config.json)."""
    truncate: bool = dataclasses.field(default=True, repr=False)
    """Whether `low` and `high` were rounded to whole channels."""
    factors: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    long_factors: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    amplitude: float = dataclasses.field(default=1.0, repr=False)
    """Queries and keys are longer by this where they are rotated."""

    def __post_init__(self) -> None:
        for name in ("turns", "factors", "long_factors"):  # lists in a file that a drafter was saved with
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclasses.dataclass(frozen=True)
class Options:
    """Where a decoder departs from Llama's; each as it stands here leaves no trace in a program."""

    windows: tuple[int | None, ...] = ()
    """For each layer how many tokens, its own included, a query sees at most; None: all. Empty: all, in every layer."""
    local_theta: float | None = None
    """Base of the rotary frequencies, unscaled, of layers with a window; None: as in the others."""
    rotary: int | None = None
    """So many channels of a head are rotated, from the first; None: all."""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    """RMS norms over the channels of every query and key, before they are rotated."""
    norms_behind: bool = False
    """Attention and MLP each have a norm of their own behind them too."""
    centred_norms: bool = False
    """Norms multiply by `1 + weight`, in fp32."""
    activation: str = "silu"
    """Of the MLP; one of `ACTIVATIONS`."""
    score_scale: float | None = None
    """Of attention scores, instead of `1 / sqrt(C)`."""
    score_cap: float | None = None
    """Attention scores become `cap * tanh(score / cap)`."""
    logit_cap: float | None = None
    """Logits likewise."""
    embed_scale: float = 1.0
    """What embeddings are multiplied by, rounded to the activations' dtype."""
    experts: int = 0
    """MLPs of a layer, of which a router chooses for every token; 0: one MLP and no router."""
    chosen: int = 0
    expert_mlp: int = 0
    """Inner width of each expert."""
    renormalize: bool = True
    """The chosen experts' weights sum to 1; else they are their part of a softmax over all."""


PLAIN = Options()
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


EXPERTS = ("expert_gate", "expert_up", "expert_down")
"""Weights of a layer that have an axis over its experts, in front."""
WIDE = ("batch", None, "mlp")
"""Logical axes of what is inside an MLP."""


def hold_rows(x_BLD: Array) -> Array:
    """Activations, held to rows over `data` and `fsdp`: so XLA gathers weights and never activations."""
    return constrain(x_BLD, "batch", None, None)


def rms_norm(x: Array, weight: Array, eps: float, *, centred: bool = False) -> Array:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis, statistics in fp32, in `x`'s dtype.

    Where `centred`, by `1 + weight` in fp32 (Gemma's).
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if centred:
        return ((1 + weight.astype(jnp.float32)) * wide).astype(x.dtype)
    return weight.astype(x.dtype) * wide.astype(x.dtype)


def rope_frequencies(channels: int, theta: float, scaling: RopeScaling | None = None, length: int = 0) -> Array:
    """Angular frequencies `[C / 2]`, radians a position, in texts of at most `length` tokens."""
    if scaling is not None and scaling.kind == "dynamic":
        ratio = max(length, scaling.original_positions) / scaling.original_positions
        theta *= (scaling.factor * ratio - (scaling.factor - 1)) ** (channels / (channels - 2))
    frequency = 1.0 / theta ** (jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
    if scaling is None or scaling.kind == "dynamic":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        beyond = length > scaling.original_positions and scaling.long_factors
        return frequency / jnp.asarray(scaling.long_factors if beyond else scaling.factors, jnp.float32)
    if scaling.kind == "yarn":
        part = jnp.clip((jnp.arange(channels // 2) - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        return frequency / scaling.factor * part + frequency * (1 - part)
    turns = scaling.original_positions * frequency / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def rope(positions_BL: Array, frequencies: Array, amplitude: float = 1.0) -> tuple[Array, Array]:
    """Cosine and sine `[B, L, C / 2]`, fp32, of every position, times `amplitude`."""
    angle = positions_BL[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if amplitude == 1 else (amplitude * cos, amplitude * sin)


def rotate(x_BLKJC: Array, cos_BLC: Array, sin_BLC: Array) -> Array:
    """Rotate channel `i` with channel `i + C/2` by the position's angle (the half-split form of Llama checkpoints).

    Where there are angles for fewer channels, only so many, from the first, are rotated.
    """
    turned = 2 * cos_BLC.shape[-1]
    if turned < x_BLKJC.shape[-1]:
        first = rotate(x_BLKJC[..., :turned], cos_BLC, sin_BLC)
        return jnp.concatenate([first, x_BLKJC[..., turned:]], axis=-1)
    first, second = jnp.split(x_BLKJC.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BLC[:, :, None, None, :], sin_BLC[:, :, None, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLKJC.dtype)


def add_bias(layer: Params, name: str, product: Array) -> Array:
    """What a matmul with the matrix `name` gave, and its bias where it has one."""
    bias = layer.get(f"{name}_bias")
    return product if bias is None else product + bias.astype(product.dtype)


def project_qkv(
    layer: Params, x_BLD: Array, cos: Array, sin: Array, norm: Callable[[Array, Array], Array] | None = None
) -> tuple[Array, Array, Array]:
    """Rotated queries `[B, L, K, G, C]`, rotated keys `[B, K, C, L]` and values `[B, K, L, C]`.

    With `norm(x, weight)`, queries and keys are normed by the layer's `q_norm` and `k_norm` before.

    One fused weight `qkv [D, K, G + 2, C]` (queries of the group, its key, its value): one matmul, and it shards over
    the key-value heads as it stands.
    """
    qkv_BLKJC = rescale(layer, "qkv", jnp.einsum("BLD,DKJC->BLKJC", x_BLD, layer["qkv"].astype(x_BLD.dtype)))
    qkv_BLKJC = constrain(add_bias(layer, "qkv", qkv_BLKJC), "batch", None, "kv_heads", None, None)
    qk_BLKJC = qkv_BLKJC[..., :-1, :]
    if norm is not None:
        each = [layer["q_norm"]] * (qk_BLKJC.shape[-2] - 1) + [layer["k_norm"]]
        qk_BLKJC = norm(qk_BLKJC, jnp.stack(each))
    turned = rotate(qk_BLKJC, cos, sin)
    k_BKCL = jnp.transpose(turned[..., -1, :], (0, 2, 3, 1))
    v_BKLC = jnp.transpose(qkv_BLKJC[..., -1, :], (0, 2, 1, 3))
    return turned[..., :-1, :], k_BKCL, v_BKLC


class _Part(NamedTuple):
    """Softmax attention over some of the keys, not yet normalised: parts with other keys can be merged exactly."""

    mixed_BKQC: Array
    top_BKQ: Array
    total_BKQ: Array


def cap(x: Array, limit: float | None) -> Array:
    """`limit * tanh(x / limit)`: between `-limit` and `limit`; `x` where there is none."""
    return x if limit is None else limit * jnp.tanh(x / limit)


def _attend_part(q_BKQC: Array, k_BKCM: Array, v_BKMC: Array, seen: Array, score_cap: float | None = None) -> _Part:
    """One part; `seen` is a mask that broadcasts to the scores `[B, K, Q, M]`."""
    scores = jnp.einsum("BKQC,BKCM->BKQM", q_BKQC, k_BKCM.astype(q_BKQC.dtype), preferred_element_type=jnp.float32)
    scores = cap(scores, score_cap)
    scores = jnp.where(seen, scores, MASKED)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    weight = jnp.exp(scores - top[..., None])
    mixed = jnp.einsum(
        "BKQM,BKMC->BKQC", weight.astype(q_BKQC.dtype), v_BKMC.astype(q_BKQC.dtype), preferred_element_type=jnp.float32
    )
    return _Part(mixed, top, jnp.sum(weight, axis=-1))


def _merge(a: _Part, b: _Part) -> _Part:
    top = jnp.maximum(a.top_BKQ, b.top_BKQ)
    x, y = jnp.exp(a.top_BKQ - top), jnp.exp(b.top_BKQ - top)
    mixed = a.mixed_BKQC * x[..., None] + b.mixed_BKQC * y[..., None]
    return _Part(mixed, top, a.total_BKQ * x + b.total_BKQ * y)


def _grouped(q_BLKGC: Array, scale: float | None = None) -> Array:
    """Scaled queries `[B, K, G * L, C]`: one plain batched matmul for all the queries a key serves."""
    batch, length, kv_heads, group, channels = q_BLKGC.shape
    q = q_BLKGC * jnp.asarray(channels**-0.5 if scale is None else scale, q_BLKGC.dtype)
    return jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(batch, kv_heads, group * length, channels)


def _finish(part: _Part, like_BLKGC: Array) -> Array:
    batch, length, kv_heads, group, channels = like_BLKGC.shape
    mixed = part.mixed_BKQC / part.total_BKQ[..., None]
    mixed = mixed.reshape(batch, kv_heads, group, length, channels).astype(like_BLKGC.dtype)
    return jnp.transpose(mixed, (0, 3, 1, 2, 4))


class Own(NamedTuple):
    """What each query sees besides the keys that its row shares: of other draft steps those at its own position."""

    pairs: tuple[tuple[Array, Array], ...] = ()
    """Keys `[B, K, C, L]` and values `[B, K, L, C]`, of which query `i` sees the `i`-th."""
    zeros_BL: Array | None = None
    """So many further keys of score 0 that carry no value."""

    def cut(self, begin: int, end: int) -> Own:
        """That of the queries from `begin` to `end`."""
        pairs = tuple((k[..., begin:end], v[:, :, begin:end]) for k, v in self.pairs)
        return Own(pairs, None if self.zeros_BL is None else self.zeros_BL[:, begin:end])


NOTHING = Own()


def _attend_own(part: _Part, q_BKQC: Array, own: Own, score_cap: float | None) -> _Part:
    """`part` and what the queries see besides."""
    batch, kv_heads, queries, channels = q_BKQC.shape
    if own.pairs:
        q_BKGLC = q_BKQC.reshape(batch, kv_heads, -1, own.pairs[0][0].shape[-1], channels)
        scores_JBKGL = cap(
            jnp.stack(
                [jnp.einsum("BKGLC,BKCL->BKGL", q_BKGLC, k, preferred_element_type=jnp.float32) for k, _ in own.pairs]
            ),
            score_cap,
        )
        top_BKGL = jax.lax.stop_gradient(jnp.max(scores_JBKGL, axis=0))
        weight_JBKGL = jnp.exp(scores_JBKGL - top_BKGL)
        mixed = sum(
            jnp.einsum("BKGL,BKLC->BKGLC", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
            for w, (_, v) in zip(weight_JBKGL, own.pairs, strict=True)
        )
        flat = (batch, kv_heads, queries)
        seen = _Part(
            jnp.reshape(mixed, (*flat, channels)), top_BKGL.reshape(flat), jnp.sum(weight_JBKGL, axis=0).reshape(flat)
        )
        part = _merge(part, seen)
    if own.zeros_BL is not None:
        group = queries // own.zeros_BL.shape[1]
        count_BKQ = jnp.broadcast_to(jnp.tile(own.zeros_BL[:, None], (1, 1, group)), part.top_BKQ.shape)
        top_BKQ = jnp.where(count_BKQ > 0, 0.0, MASKED)
        part = _merge(part, _Part(jnp.zeros_like(part.mixed_BKQC), top_BKQ, count_BKQ.astype(jnp.float32)))
    return part


class Prefix(NamedTuple):
    """The committed tokens as one layer sees them."""

    cache: KVCache
    layer: Array | int
    length_B: Array
    """Each row's queries see its first `length` slots."""
    first_BL: Array | None = None
    """Of these each query sees those from this slot on; None: all."""


PREFIX_BLOCK = 64
"""Slots of the prefix that XLA:CPU attends at once, doubled from the second time on: it copies what a matmul reads."""
PREFIX_BYTES = 8 * 2**20
"""Keys and values that accelerators attend at once, likewise: a branch costs them more than to read so much."""


def _attend_prefix(q_BKQC: Array, prefix: Prefix, score_cap: float | None = None) -> _Part:
    """The queries over the committed tokens, in the way that suits the platform the program is lowered for."""
    k_YBKCS, v_YBKSC = prefix.cache
    capacity, longest = prefix.cache.capacity, jnp.max(prefix.length_B)

    def over(begin: int, end: int) -> _Part:
        seen_BS = jnp.arange(begin, end) < prefix.length_B[:, None]
        # One slice for layer and slots: a conditional would be handed a copy of the whole layer.
        k_BKCS, v_BKSC = k_YBKCS[prefix.layer, ..., begin:end], v_YBKSC[prefix.layer, :, :, begin:end]
        seen = seen_BS[:, None, None]
        if prefix.first_BL is not None:
            inside_BLS = jnp.arange(begin, end) >= prefix.first_BL[..., None]
            group = q_BKQC.shape[2] // prefix.first_BL.shape[1]
            seen = seen & jnp.tile(inside_BLS[:, None], (1, 1, group, 1))
        return _attend_part(q_BKQC, k_BKCS, v_BKSC, seen, score_cap)

    def behind(begin: int, part: _Part) -> _Part:
        # What is summed together is fixed, so a row's result depends neither on the capacity nor on longer rows.
        if begin >= capacity:
            return part
        end = min(2 * begin, capacity)
        more = functools.partial(behind, end)
        return jax.lax.cond(longest > begin, lambda p: more(_merge(p, over(begin, end))), lambda p: p, part)

    def used(first: int) -> _Part:
        first = min(first, capacity)
        return behind(first, over(0, first))

    slot_bytes = 2 * k_YBKCS.size // (k_YBKCS.shape[0] * capacity) * k_YBKCS.dtype.itemsize
    wide = max(512, 2 ** (PREFIX_BYTES // slot_bytes).bit_length() // 2)
    return jax.lax.platform_dependent(cpu=functools.partial(used, PREFIX_BLOCK), default=functools.partial(used, wide))


def attend(
    q_BLKGC: Array,
    k_BKCM: Array,
    v_BKMC: Array,
    mask_BLM: Array,
    prefix: Prefix | None = None,
    *,
    own: Own = NOTHING,
    scale: float | None = None,
    score_cap: float | None = None,
) -> Array:
    """Attention of `L` queries over the call's own keys (by mask) and the whole committed prefix: `[B, L, K, G, C]`.

    A tree needs only its own ancestor mask, for every query sees all of its row's prefix. One fp32 softmax spans all
    parts, `own` too. Scale `1 / sqrt(C)`, unless another is given; see `cap` for `score_cap`.
    """
    q = _grouped(q_BLKGC, scale)
    group = q_BLKGC.shape[3]
    part = _attend_part(q, k_BKCM, v_BKMC, jnp.tile(mask_BLM[:, None], (1, 1, group, 1)), score_cap)
    if prefix is not None:
        part = _merge(part, _attend_prefix(q, prefix, score_cap))
    return _finish(_attend_own(part, q, own, score_cap), q_BLKGC)


def attend_causal(
    q_BLKGC: Array,
    k_BKCL: Array,
    v_BKLC: Array,
    mask_BLL: Array,
    *,
    block: int,
    by_row: bool = False,
    own: Own = NOTHING,
    scale: float | None = None,
    score_cap: float | None = None,
) -> Array:
    """`attend` for long sequences whose mask is causal: in blocks of `block` queries, scores recomputed backward.

    A block scores only the keys up to its own end, and `block * L` scores a head are alive at once. `by_row` takes the
    batch rows one after another, which keeps the scores in cache: several times faster on a CPU, and wrong for a
    batch that is spread over devices.
    """
    length = q_BLKGC.shape[1]
    mask_BLL = jnp.broadcast_to(mask_BLL, (q_BLKGC.shape[0], length, length))
    outputs = []

    def mix(q: Array, k: Array, v: Array, mask: Array, own: Own) -> Array:
        return attend(q, k, v, mask, own=own, scale=scale, score_cap=score_cap)

    if own.zeros_BL is not None:
        own = own._replace(zeros_BL=jnp.broadcast_to(own.zeros_BL, q_BLKGC.shape[:2]))
    for begin in range(0, length, block):
        end = min(begin + block, length)
        args = (q_BLKGC[:, begin:end], k_BKCL[..., :end], v_BKLC[:, :, :end], mask_BLL[:, begin:end, :end])
        args = (*args, own.cut(begin, end))
        if by_row:
            one = jax.checkpoint(lambda row: mix(*jax.tree.map(lambda x: x[None], row))[0])
            outputs.append(jax.lax.map(one, args))
        else:
            outputs.append(jax.checkpoint(mix)(*args))
    return jnp.concatenate(outputs, axis=1)


def attend_text(
    q_BLKGC: Array,
    k_BKCL: Array,
    v_BKLC: Array,
    mask_BLL: Mask,
    *,
    kernel: Kernel = "xla",
    block: int | None = None,
    by_row: bool = False,
    own: Own = NOTHING,
    scale: float | None = None,
    score_cap: float | None = None,
) -> Array:
    """`attend` of whole training rows, whose mask is causal: by the kernel where it takes them packed as they are, else
    `attend_causal` in blocks, if any."""
    how: dict[str, Any] = {"own": own, "scale": scale, "score_cap": score_cap}
    usual = scale is None and score_cap is None and own.zeros_BL is None
    if (
        usual
        and isinstance(mask_BLL, Packed)
        and kernel != "xla"
        and takes(kernel, q_BLKGC.shape[1], q_BLKGC.shape[-1], own.pairs)
    ):
        return attend_packed(kernel, q_BLKGC, k_BKCL, v_BKLC, mask_BLL.segments_BL, own.pairs)
    mask_BLL = as_mask(mask_BLL)
    if block:
        return attend_causal(q_BLKGC, k_BKCL, v_BKLC, mask_BLL, block=block, by_row=by_row, **how)
    return attend(q_BLKGC, k_BKCL, v_BKLC, mask_BLL, **how)


Remat = Literal["none", "dots", "full"]
"""What the backward pass of a layer computes again: nothing; what is no product with a weight; all of it."""
Function = TypeVar("Function", bound=Callable[..., Any])


def recompute(remat: Remat, function: Function) -> Function:
    """`function`, whose backward pass makes again what `remat` says and keeps the rest."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(function, policy=policy)  # type: ignore[return-value]


def merge_heads(layer: Params, mixed_BLKGC: Array) -> Array:
    """The attention output projection, `[B, L, D]`."""
    out = layer["out"].astype(mixed_BLKGC.dtype)
    # As one contracted axis: of three, XLA:CPU makes one by copying the weight, each call.
    mixed_BLE = mixed_BLKGC.reshape(*mixed_BLKGC.shape[:2], -1)
    out_BLD = rescale(layer, "out", jnp.einsum("BLE,ED->BLD", mixed_BLE, out.reshape(-1, out.shape[-1])))
    return hold_rows(add_bias(layer, "out", out_BLD))


def gated_mlp(layer: Params, x_BLD: Array, activation: str = "silu") -> Array:
    """`down(silu(gate(x)) * up(x))`, or with another of `ACTIVATIONS`."""

    def times(x: Array, name: str) -> Array:
        return rescale(layer, name, x @ layer[name].astype(x.dtype))

    inner_BLF = ACTIVATIONS[activation](constrain(times(x_BLD, "gate"), *WIDE)) * constrain(times(x_BLD, "up"), *WIDE)
    return hold_rows(times(inner_BLF, "down"))


def expert_mlp(layer: Params, x_BLD: Array, options: Options) -> Array:
    """A mixture of gated MLPs: the sum of those that the router chooses for a token, by its softmax over all of them.

    Under a mesh each device takes its own rows through those experts that `jaxspec.sharding` puts there, and what the
    devices along the experts' axis make is summed: XLA, left alone, would gather the rows of all of them to sort.
    """
    weights = {name: layer[name] for name in ("router", *EXPERTS)}
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return _mix_experts(weights, x_BLD, options)
    rows = P(None if x_BLD.shape[0] % splits("batch") else AXIS_RULES["batch"])
    over = AXIS_RULES["experts"]

    def part(weights: Params, x_BLD: Array) -> Array:
        first = jax.lax.axis_index(over) * weights[EXPERTS[0]].shape[0]
        return jax.lax.psum(_mix_experts(weights, x_BLD, options, first), over)

    lie = {"router": P(), **dict.fromkeys(EXPERTS, P(over))}
    return hold_rows(jax.shard_map(part, in_specs=(lie, rows), out_specs=rows, check_vma=False)(weights, x_BLD))


def _mix_experts(layer: Params, x_BLD: Array, options: Options, first: Array | int = 0) -> Array:
    """What the experts from number `first` on add to the mixture, as many as `layer` has.

    Rows are sorted by expert and multiplied in groups, so a token costs as many MLPs as it is given.
    """
    (batch, length, width), held = x_BLD.shape, layer["expert_gate"].shape[0]
    x_ND = x_BLD.reshape(-1, width)
    scores_NE = jax.nn.softmax((x_ND @ layer["router"].astype(x_ND.dtype)).astype(jnp.float32), axis=-1)
    weight_NR, expert_NR = jax.lax.top_k(scores_NE, options.chosen)
    if options.renormalize:
        weight_NR = weight_NR / jnp.sum(weight_NR, axis=-1, keepdims=True)
    expert_NR = (expert_NR - first) % options.experts  # those that are here come first
    order = jnp.argsort(expert_NR.reshape(-1), stable=True)
    sizes_E = jnp.bincount(expert_NR.reshape(-1), length=options.experts)[:held].astype(jnp.int32)

    def times(rows: Array, name: str) -> Array:
        return jax.lax.ragged_dot(rows, layer[name].astype(rows.dtype), sizes_E)

    rows_MD = x_ND[order // options.chosen]
    inner_MF = ACTIVATIONS[options.activation](times(rows_MD, "expert_gate")) * times(rows_MD, "expert_up")
    made_MD = times(inner_MF, "expert_down")[jnp.argsort(order)]
    made_NRD = made_MD.reshape(-1, options.chosen, width)
    if held < options.experts:
        made_NRD = jnp.where(expert_NR[..., None] < held, made_NRD, 0)
    mixed_ND = jnp.einsum("NRD,NR->ND", made_NRD, weight_NR.astype(x_BLD.dtype))
    return mixed_ND.reshape(batch, length, width)


class LayerShape(Protocol):
    """What shapes a decoder layer."""

    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mlp(self) -> int: ...


def layer_shapes(c: LayerShape, options: Options = PLAIN) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of one decoder layer."""
    group = c.heads // c.kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (c.width,),
        "qkv": (c.width, c.kv_heads, group + 2, c.head_dim),
        "out": (c.kv_heads, group, c.head_dim, c.width),
        "mlp_norm": (c.width,),
        "gate": (c.width, c.mlp),
        "up": (c.width, c.mlp),
        "down": (c.mlp, c.width),
    }
    if options.qkv_bias:
        shapes["qkv_bias"] = shapes["qkv"][1:]
    if options.out_bias:
        shapes["out_bias"] = (c.width,)
    if options.qk_norm:
        shapes |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    if options.norms_behind:
        shapes |= {"attention_out_norm": (c.width,), "mlp_out_norm": (c.width,)}
    if options.experts:
        for name in ("gate", "up", "down"):
            del shapes[name]
        into = (options.experts, c.width, options.expert_mlp)
        shapes |= {"router": (c.width, options.experts), "expert_gate": into, "expert_up": into}
        shapes["expert_down"] = (options.experts, options.expert_mlp, c.width)
    return shapes


def init_weight(
    key: Array, name: str, shape: tuple[int, ...], layers: int, dtype: Any, *, centred: bool = False
) -> Array:
    """Ones for norms (zeros where `centred`), zeros for biases, else normal(0.02), residual outputs scaled by
    `1 / sqrt(2 * layers)` (GPT-2's rule)."""
    if name.endswith("bias") or (centred and name.endswith("norm")):
        return jnp.zeros(shape, dtype)
    if name.endswith("norm"):
        return jnp.ones(shape, dtype)
    scale = 0.02 / math.sqrt(2 * layers) if name in ("out", "down", "expert_down") else 0.02
    return scale * jax.random.normal(key, shape, dtype)


Kept = TypeVar("Kept")


def decoder_layer(
    layer: Params,
    x_BLD: Array,
    turn: tuple[Array, Array],
    eps: float,
    mix: Callable[[Array, Array, Array], tuple[Array, Kept]],
    options: Options = PLAIN,
) -> tuple[Array, Kept]:
    """A Llama's layer: `x += out(mix(qkv(norm(x))))`, then `x += mlp(norm(x))`; `turn` is what `rope` gave.

    With `options` another family's: norms behind attention and MLP, norms of queries and keys, experts.

    `mix` is the attention: from queries, keys and values as `project_qkv` puts them out to `[B, L, K, G, C]` and
    whatever else the caller wants of them, which is returned beside the stream.
    """

    def norm(x: Array, weight: Array) -> Array:
        return rms_norm(x, weight, eps, centred=options.centred_norms)

    def behind(x: Array, name: str) -> Array:
        return norm(x, layer[name]) if options.norms_behind else x

    heads = project_qkv(layer, norm(x_BLD, layer["attention_norm"]), *turn, norm if options.qk_norm else None)
    mixed, kept = mix(*heads)
    x_BLD = x_BLD + behind(merge_heads(layer, mixed), "attention_out_norm")
    inner_BLD = norm(x_BLD, layer["mlp_norm"])
    if options.experts:
        made_BLD = expert_mlp(layer, inner_BLD, options)
    else:
        made_BLD = gated_mlp(layer, inner_BLD, options.activation)
    return x_BLD + behind(made_BLD, "mlp_out_norm"), kept


def score_tokens(x_BLD: Array, table_VD: Array) -> Array:
    """fp32 logits `[B, L, V]` under an LM head."""
    table_VD = table_VD.astype(x_BLD.dtype)
    if x_BLD.shape[0] * x_BLD.shape[1] > FEW_ROWS:
        logits_BLV = jnp.einsum("BLD,VD->BLV", x_BLD, table_VD, preferred_element_type=jnp.float32)
        return constrain(logits_BLV, "batch", None, "vocab")
    scores_VBL = jnp.einsum("VD,BLD->VBL", table_VD, x_BLD, preferred_element_type=jnp.float32)
    return jnp.transpose(scores_VBL, (1, 2, 0))


def causal_mask(length: int) -> Array:
    """`[1, L, L]`: a token sees itself and those before it."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def segment_mask(segments_BL: Array) -> Array:
    """`[B, L, L]`: causal, and within one packed document. Segment 0 is padding and sees only itself."""
    same = segments_BL[:, :, None] == segments_BL[:, None, :]
    real = (segments_BL > 0)[:, :, None]
    return (same & real & causal_mask(segments_BL.shape[1])) | jnp.eye(segments_BL.shape[1], dtype=bool)[None]


def as_mask(mask: Mask) -> Array:
    """The array that a mask stands for."""
    return segment_mask(mask.segments_BL) if isinstance(mask, Packed) else mask
