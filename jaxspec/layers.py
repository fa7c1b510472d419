"""The pieces of a decoder layer but its attention: norms, rotary positions, projections, gated MLPs, experts."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxspec.base import Array, Params
from jaxspec.parallel.mesh import AXIS_RULES, constrain, splits
from jaxspec.quantization import rescale

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

    Under a mesh each device takes its own rows through the experts that it holds, and what the
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
