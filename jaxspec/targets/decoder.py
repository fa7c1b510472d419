"""The one decoder of all target families: Llama's, with the options by which a family departs from it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec.base import Array, Cache, KVCache, Mask, Params, Ragged, SharedTables, TargetOutput
from jaxspec.nn import cache as kv
from jaxspec.nn.attention import AttentionOptions, Prefix, as_mask, attend, attend_text, cap
from jaxspec.nn.decoder_layer import decoder_layer
from jaxspec.nn.kernels import Kernel
from jaxspec.nn.layer_weights import check_layer, layer_shapes, layer_weights
from jaxspec.nn.lm_head import score_tokens
from jaxspec.nn.mlp import constrain_rows
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.options import PLAIN, Options
from jaxspec.nn.ragged import pack, unpack
from jaxspec.nn.remat import Remat, recompute
from jaxspec.nn.rope import RopeScaling, rope, rope_frequencies
from jaxspec.nn.weights import NORM, TABLE, declare
from jaxspec.parallel.rows import gather_width, look_up

DRAFTER_ROPES = ("linear", "llama3")
"""Kinds of rotary scaling that drafters can share."""


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama-family model, and the ids that end its text."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    max_positions: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    options: ClassVar[Options] = PLAIN
    """No departure. A config of another family has its own, see `DecoderConfig`."""

    def __post_init__(self) -> None:
        check_layer(self)

    @property
    def group(self) -> int:
        """Query heads of one key-value head, `G`."""
        return self.heads // self.kv_heads

    @property
    def drafter_rope(self) -> RopeScaling | None:
        """The rotary scaling, where drafters can share it."""
        scaling = self.rope_scaling
        return scaling if scaling is not None and scaling.kind in DRAFTER_ROPES else None


@dataclasses.dataclass(frozen=True)
class DecoderConfig(LlamaConfig):
    """The shape of a model of another family: Llama's, with `options`."""

    family: str = ""
    """The `model_type` of its config.json."""
    options: Options = PLAIN  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.options.windows and len(self.options.windows) != self.layers:
            raise ValueError(f"options.windows has {len(self.options.windows)} entries for layers={self.layers}")


class View(NamedTuple):
    """The text as the layers of one kind see it."""

    turn: tuple[Array, Array]
    """Cosine and sine of the rotary positions, `[B, L, C / 2]` each."""
    mask_BLM: Mask
    first_BL: Array | None
    """First slot of the prefix that each token sees; None: slot 0."""


def view(config: LlamaConfig, window: int | None, positions_BL: Array, mask_BLM: Mask, length: int) -> View:
    """Returns the view of the layers with this window, which see tokens less than `window` positions before theirs.

    A cache slot has the position of the token it holds. `length` is the longest text that there is room for.
    """
    c, local = config, config.options.local_theta
    theta, scaling = (c.rope_theta, c.rope_scaling) if window is None or local is None else (local, None)
    # Scaling that depends on the text's length goes by the capacity, so a text keeps its frequencies while it grows.
    frequencies = rope_frequencies(c.options.rotary or c.head_dim, theta, scaling, length)
    turn = rope(positions_BL, frequencies, 1.0 if scaling is None else scaling.amplitude)
    if window is None:
        return View(turn, mask_BLM, None)
    if isinstance(mask_BLM, Ragged):
        positions_BL = unpack(mask_BLM, positions_BL[0])
    near_BLM = positions_BL[:, :, None] - positions_BL[:, None, :] < window
    seen_BLM: Mask = as_mask(mask_BLM) & near_BLM
    if isinstance(mask_BLM, Ragged):
        seen_BLM = mask_BLM._replace(mask_BNN=seen_BLM)
    return View(turn, seen_BLM, positions_BL - window + 1)


def stack_views(views: list[View]) -> View:
    """Returns the views of several kinds on a leading axis, for a scan to choose from."""
    like = next(v for v in views if v.first_BL is not None)
    return jax.tree.map(lambda *a: jnp.stack(a), *(_whole_view(v, like) for v in views))


def _whole_view(v: View, like: View) -> View:
    """Returns `v` with the mask and first slots as arrays of the shapes that `like`, which has a window, has."""
    first_BL = jnp.zeros_like(jnp.asarray(like.first_BL)) if v.first_BL is None else v.first_BL
    if isinstance(v.mask_BLM, Ragged):
        return View(v.turn, v.mask_BLM, first_BL)
    return View(v.turn, jnp.broadcast_to(as_mask(v.mask_BLM), as_mask(like.mask_BLM).shape), first_BL)


def run_layer(
    config: LlamaConfig,
    attention: AttentionOptions,
    keep_kv: bool,
    seen: View,
    x_BLD: Array,
    layer: Params,
    past: Prefix | None,
) -> tuple[Array, Any]:
    """Returns the residual stream behind one layer, and with `keep_kv` the keys and values it computed, else None."""
    mix = functools.partial(_attend, attention, keep_kv, seen, past)
    return decoder_layer(gather_width(layer), x_BLD, seen.turn, config.norm_eps, mix, config.options)


def _attend(
    attention: AttentionOptions,
    keep_kv: bool,
    seen: View,
    past: Prefix | None,
    q_BLKGC: Array,
    k_BKCL: Array,
    v_BKLC: Array,
) -> tuple[Array, Any]:
    """Attends as `seen` says: within whole training rows without a prefix, else over the prefix too."""
    ragged = seen.mask_BLM if isinstance(seen.mask_BLM, Ragged) else None
    if ragged is not None:
        q_BLKGC, k_BKCL, v_BKLC = (unpack(ragged, x[0], axis) for x, axis in ((q_BLKGC, 0), (k_BKCL, 2), (v_BKLC, 1)))
    if past is None:
        mixed = attend_text(q_BLKGC, k_BKCL, v_BKLC, seen.mask_BLM, options=attention)
    else:
        past = past._replace(first_BL=seen.first_BL)
        mixed = attend(q_BLKGC, k_BKCL, v_BKLC, as_mask(seen.mask_BLM), past, options=attention)
    if ragged is not None:
        mixed = pack(ragged, mixed)
    return mixed, ((k_BKCL, v_BKLC) if keep_kv else None)


class LayerStack(NamedTuple):
    """The layers of one call: what they have in common, and the view that each of them has."""

    block: Callable[[View, Array, Params, Prefix | None], tuple[Array, Any]]
    """`run_layer` of the call."""
    remat: Remat
    views: list[View]
    view_of: list[int]
    """Index in `views` of each layer's view."""
    prefix: tuple[Cache, Array] | None

    def past(self, at: Array | int) -> Prefix | None:
        """Returns the prefix as layer number `at` sees it."""
        return None if self.prefix is None else Prefix(self.prefix[0], at, self.prefix[1])

    def scan(self, x_BLD: Array, layers: Params, taps: tuple[int, ...]) -> tuple[Array, list[Array], Any]:
        """Runs stacked weights by a scan. Returns the stream, the inputs of the layers `taps`, and keys and values."""
        several = stack_views(self.views) if len(self.views) > 1 else None
        only = recompute(self.remat, functools.partial(self.block, self.views[0]))

        def step(carry: tuple[Array, list[Array]], row: tuple[Params, Array]) -> tuple[tuple[Array, list[Array]], Any]:
            (x, tapped), (layer, at) = carry, row
            # The layer's number is traced, so every step writes or keeps every auxiliary hidden state.
            tapped = [jnp.where(at == tap, x, t) for tap, t in zip(taps, tapped, strict=True)]
            past, block = self.past(at), only
            if several is not None:
                seen = jax.tree.map(lambda a: a[jnp.asarray(self.view_of)[at]], several)
                block = recompute(self.remat, functools.partial(self.block, seen))
            x, fresh = block(x, layer, past)
            return (x, tapped), fresh

        tapped = [jnp.zeros_like(x_BLD) for _ in taps]
        (x_BLD, tapped), fresh = jax.lax.scan(step, (x_BLD, tapped), (layers, jnp.arange(len(self.view_of))))
        return x_BLD, tapped, fresh

    def loop(self, x_BLD: Array, layers: list[Params], taps: tuple[int, ...]) -> tuple[Array, list[Array], Any]:
        """Runs one dict of weights a layer, one after another; returns what `scan` returns."""
        # One function a view, so that JAX traces layers of one kind once where they are recomputed.
        blocks = [recompute(self.remat, functools.partial(self.block, seen)) for seen in self.views]
        tapped = [jnp.zeros_like(x_BLD) for _ in taps]
        rows = []
        for i, layer in enumerate(layers):
            tapped = [x_BLD if i == tap else t for tap, t in zip(taps, tapped, strict=True)]
            x_BLD, row = blocks[self.view_of[i]](x_BLD, layer, self.past(i))
            rows.append(row)
        # A tree of None, where nothing is kept, stays None.
        return x_BLD, tapped, jax.tree.map(lambda *a: jnp.stack(a), *rows)


_LLAMA3 = RopeScaling("llama3", 8.0)
SHAPES = {
    "tiny": LlamaConfig(4096, 256, 7, 4, 2, 64, 640, tied=True),
    "125m": LlamaConfig(50304, 768, 12, 12, 12, 64, 2048, tied=True),
    "llama2-7b": LlamaConfig(32000, 4096, 32, 32, 32, 128, 11008, norm_eps=1e-5, max_positions=4096),
    "vicuna-7b": LlamaConfig(32000, 4096, 32, 32, 32, 128, 11008, norm_eps=1e-5, max_positions=4096),
    "vicuna-13b": LlamaConfig(32000, 5120, 40, 40, 40, 128, 13824, norm_eps=1e-5, max_positions=4096),
    "vicuna-33b": LlamaConfig(32000, 6656, 60, 52, 52, 128, 17920, norm_eps=1e-6, max_positions=2048),
    "llama3-1b": LlamaConfig(
        128256, 2048, 16, 32, 8, 64, 8192, 5e5, dataclasses.replace(_LLAMA3, factor=32.0), tied=True,
        max_positions=131072,
    ),
    "llama3-8b": LlamaConfig(128256, 4096, 32, 32, 8, 128, 14336, 5e5, _LLAMA3, max_positions=131072),
    "llama3-70b": LlamaConfig(128256, 8192, 80, 64, 8, 128, 28672, 5e5, _LLAMA3, max_positions=131072),
}  # fmt: skip
"""Shapes to measure with random weights: the bundled target, GPT-2 small, Llama 2, Vicuna, Llama 3.2 and 3.1."""


WEIGHTS = declare({"embed": TABLE, "norm": NORM, "head": TABLE})
"""A decoder's weights besides those of its layers."""


def init_layer(key: Array, config: LlamaConfig, dtype: Any) -> dict[str, Array]:
    """Returns fresh weights of one layer."""
    shapes = layer_shapes(config, config.options)
    weights = layer_weights(config.layers, centred=config.options.centred_norms)
    keys = jax.random.split(key, len(shapes))
    return {name: weights[name].init(k, shapes[name], dtype) for name, k in zip(shapes, keys, strict=True)}


class Decoder(nn.Module):
    """A Llama decoder, or with `config.options` one of another family, as pure functions of its weights.

    Weights: `embed [V, D]`, `norm [D]`, `head [V, D]` unless tied, and `layers`. `stacked=True`, for training and
    sharding, has one dict of arrays with a leading axis `Y`. `stacked=False`, for decoding, has a list of one dict a
    layer: the decode loop would copy a stacked weight at every step (see `unstack`).
    """

    config: LlamaConfig
    stacked: bool = True
    remat: Remat = "none"
    """The part of each layer that the backward pass computes again, see `recompute`."""
    dtype: Any = jnp.float32
    """Dtype of activations and of the cache; softmax, norms and logits are fp32 throughout."""
    param_dtype: Any = jnp.float32
    token_major: bool = False
    """Decoding only: keys lie token by token in the cache, for CPUs (`base.TokenMajorCache`)."""
    query_block: int | None = None
    """Training only (no prefix, a causal mask): queries that XLA attends at a time, see `attend_causal`."""
    row_by_row: bool = False
    """With `query_block`, attends one batch row after another, which keeps the scores in a CPU's cache."""
    kernel: Kernel = "xla"
    """Training only: the kernel that attends within packed rows, see `attend_text`."""
    taps: tuple[int, ...] = ()
    """Layers whose inputs (the residual stream, not normed) are returned as `TargetOutput.taps_BLD`, in this order."""

    def setup(self) -> None:
        """Takes the weights from the variables, or initializes them."""
        c = self.config
        self.embed_table = self._weight("embed", self._init_table)
        self.layers = self._weight("layers", self._init_layers)
        self.norm = self._weight(
            "norm", lambda key: jnp.full((c.width,), not c.options.centred_norms, self.param_dtype)
        )
        if not c.tied:
            self.head_table = self._weight("head", self._init_table)

    def _weight(self, name: str, init: Callable[[Array], Any]) -> Any:
        """Returns a weight as it is given."""
        # In a `shard_map` that is a device's part of it, whose shape `param` would refuse.
        return self.param(name, init) if self.is_initializing() else self.get_variable("params", name)

    def _init_table(self, key: Array) -> Array:
        return TABLE.init(key, (self.config.vocab, self.config.width), self.param_dtype)

    def _init_layers(self, key: Array) -> Any:
        """Returns fresh layers, stacked or as a list of one dict a layer."""
        keys = jax.random.split(key, self.config.layers)
        if self.stacked:
            return jax.vmap(lambda k: init_layer(k, self.config, self.param_dtype))(keys)
        return [init_layer(k, self.config, self.param_dtype) for k in keys]

    @property
    def attention(self) -> AttentionOptions:
        """Options of the layers' attention."""
        o = self.config.options
        return AttentionOptions(o.score_scale, o.score_cap, self.query_block, self.row_by_row, self.kernel)

    def __call__(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        mask_BLM: Mask,
        prefix: tuple[Cache, Array] | None = None,
        keep_kv: bool = False,
    ) -> TargetOutput:
        """Implements `forward`, whose docstring says the arguments."""
        c, options = self.config, self.config.options
        # Rows are constrained from the start, so that XLA gathers weights and not activations.
        x_BLD = constrain_rows(look_up(self.embed_table, tokens_BL).astype(self.dtype))
        if options.embed_scale != 1:
            x_BLD = x_BLD * jnp.asarray(options.embed_scale, self.dtype)
        windows = options.windows or (None,) * c.layers
        # Rotary positions and masks are made once for each kind of layer, not once a layer.
        kinds = list(dict.fromkeys(windows))
        length = tokens_BL.shape[1] if prefix is None else prefix[0].capacity
        stack = LayerStack(
            block=functools.partial(run_layer, c, self.attention, keep_kv),
            remat=self.remat,
            views=[view(c, window, positions_BL, mask_BLM, length) for window in kinds],
            view_of=[kinds.index(window) for window in windows],
            prefix=prefix,
        )
        run = stack.scan if self.stacked else stack.loop
        x_BLD, taps, fresh = run(x_BLD, self.layers, self.taps)
        features_BLD = rms_norm(x_BLD, self.norm, c.norm_eps, centred=options.centred_norms)
        taps_BLD = jnp.concatenate(taps, axis=-1) if taps else None
        return TargetOutput(features_BLD, None if fresh is None else KVCache(*fresh), taps_BLD)

    def score(self, features_BLD: Array) -> Array:
        """Implements `logits`."""
        table = self.embed_table if self.config.tied else self.head_table
        return cap(score_tokens(features_BLD, table), self.config.options.logit_cap)

    def init_params(self, key: Array) -> Params:
        """Returns random weights: normal(0.02), residual outputs scaled by depth."""
        token = jnp.zeros((1, 1), jnp.int32)
        return self.init(key, token, token, jnp.ones((1, 1, 1), bool))["params"]

    def forward(
        self,
        params: Params,
        tokens_BL: Array,
        positions_BL: Array,
        mask_BLM: Mask,
        prefix: tuple[Cache, Array] | None = None,
        *,
        keep_kv: bool = False,
    ) -> TargetOutput:
        """Returns features `[B, L, D]` of `L` tokens at absolute positions, and with `keep_kv` their keys and values.

        `mask_BLM` says which of the call's own tokens each one sees: `[1, L, L]` where all rows are alike, `Packed`
        for documents in rows without a prefix. `prefix` is `(cache, length_B)`; every token sees its first `length`
        slots. `Ragged` is for tokens of several rows in one axis, as `Target.forward` says.
        """
        out = self.apply({"params": params}, tokens_BL, positions_BL, mask_BLM, prefix, keep_kv)
        assert isinstance(out, TargetOutput)
        return out

    def logits(self, params: Params, features_BLD: Array) -> Array:
        """Returns fp32 logits `[B, L, V]` of the token after each feature."""
        out = self.apply({"params": params}, features_BLD, method="score")
        assert isinstance(out, jax.Array)
        return out

    def scoring(self, params: Params) -> Params:
        """The weights that `logits` reads: the LM head, or the embedding where they are one table."""
        name = "embed" if self.config.tied else "head"
        return {name: params[name]}

    def shared_tables(self, params: Params) -> SharedTables:
        """Returns the embedding and the LM head `[V, D]`, which are one table when tied."""
        return SharedTables(params["embed"], params["embed"] if self.config.tied else params["head"])

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """Returns a zeroed cache in the activations' dtype, with `capacity` slots for each of `batch` rows."""
        c = self.config
        return kv.empty(c.layers, batch, c.kv_heads, c.head_dim, capacity, self.dtype, self.token_major)


def unstack(params: Params) -> Params:
    """Returns the same weights with `layers` as a list of one dict a layer, for `Decoder(stacked=False)`.

    Programs call it once, before decoding: slicing a stacked weight inside the decode loop copies it at every step.
    """
    if isinstance(params["layers"], list):
        return params
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = [jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(count)]
    return {**params, "layers": layers}
