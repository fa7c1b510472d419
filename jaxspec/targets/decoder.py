"""The one forward of all families of targets: Llama's decoder, with the options by which a family departs from it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec.base import Array, KVCache, Mask, Params, SharedTables, TargetOutput
from jaxspec.nn import cache as kv
from jaxspec.nn.attention import Prefix, as_mask, attend, attend_text, cap
from jaxspec.nn.decoder_layer import decoder_layer
from jaxspec.nn.kernels import Kernel
from jaxspec.nn.layer_weights import layer_shapes, layer_weights
from jaxspec.nn.lm_head import score_tokens
from jaxspec.nn.mlp import constrain_rows
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.options import PLAIN, Options
from jaxspec.nn.remat import Remat, recompute
from jaxspec.nn.rope import RopeScaling, rope, rope_frequencies
from jaxspec.nn.weights import NORM, TABLE, declare
from jaxspec.parallel.rows import gather_width, look_up

DRAFTER_ROPES = ("linear", "llama3")
"""Kinds of rotary scaling that drafters have too."""


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
    """What other families have instead, see `DecoderConfig`."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions")

    @property
    def group(self) -> int:
        """Query heads per key-value head, `G`."""
        return self.heads // self.kv_heads

    @property
    def drafter_rope(self) -> RopeScaling | None:
        """The rotary scaling that a drafter can share."""
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
    """How layers of one kind see the text: their rotary positions, their own mask, and how far back the prefix."""

    turn: tuple[Array, Array]
    mask_BLM: Mask
    first_BL: Array | None


def view(config: LlamaConfig, window: int | None, positions_BL: Array, mask_BLM: Mask, length: int) -> View:
    """The view of the layers with this window: they see tokens that are less than `window` positions before theirs.

    A cache slot is the position of what it holds; `length` is that of the longest text that there is room for.
    """
    c, local = config, config.options.local_theta
    theta, scaling = (c.rope_theta, c.rope_scaling) if window is None or local is None else (local, None)
    frequencies = rope_frequencies(c.options.rotary or c.head_dim, theta, scaling, length)
    turn = rope(positions_BL, frequencies, 1.0 if scaling is None else scaling.amplitude)
    if window is None:
        return View(turn, mask_BLM, None)
    near_BLM = positions_BL[:, :, None] - positions_BL[:, None, :] < window
    return View(turn, as_mask(mask_BLM) & near_BLM, positions_BL - window + 1)


def stack_views(views: list[View]) -> View:
    """Views of several kinds on a leading axis, for a scan to choose from."""
    first_BL, mask_BLM = next((v.first_BL, as_mask(v.mask_BLM)) for v in views if v.first_BL is not None)

    def whole(v: View) -> View:
        first = jnp.zeros_like(first_BL) if v.first_BL is None else v.first_BL
        return View(v.turn, jnp.broadcast_to(as_mask(v.mask_BLM), mask_BLM.shape), first)

    return jax.tree.map(lambda *a: jnp.stack(a), *map(whole, views))


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
"""Shapes to measure with random weights: the bundled target, GPT-2's smallest size, Llama 3.2 and 3.1."""


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

    Weights: `embed [V, D]`, `norm [D]`, `head [V, D]` unless tied, and `layers`, either one dict of arrays stacked on a
    leading `Y` axis (`stacked=True`: training, sharding) or a list of one dict a layer (`stacked=False`: decoding,
    where a stacked weight would be copied every step; see `unstack`).
    """

    config: LlamaConfig
    stacked: bool = True
    remat: Remat = "none"
    """What the backward pass of each layer computes again, see `recompute`."""
    dtype: Any = jnp.float32
    """Dtype of activations and of the cache; softmax, norms and logits are fp32 throughout."""
    param_dtype: Any = jnp.float32
    query_block: int | None = None
    """Training only (no prefix, a causal mask): attend in blocks of so many queries, see `attend_causal`."""
    row_by_row: bool = False
    """Attend one batch row after another where `query_block` applies: keeps the scores in a CPU's cache."""
    kernel: Kernel = "xla"
    """What attends over packed training rows, see `attend_text`."""
    taps: tuple[int, ...] = ()
    """Layers whose inputs (the residual stream, no norm) are put out as `TargetOutput.taps_BLD`, in this order."""

    def setup(self) -> None:
        c = self.config
        self.embed_table = self._weight("embed", self._init_table)
        self.layers = self._weight("layers", self._init_layers)
        self.norm = self._weight(
            "norm", lambda key: jnp.full((c.width,), not c.options.centred_norms, self.param_dtype)
        )
        if not c.tied:
            self.head_table = self._weight("head", self._init_table)

    def _weight(self, name: str, init: Callable[[Array], Any]) -> Any:
        """A weight as it is given: in a `shard_map` a device's part of it, which `param` would refuse for its shape."""
        return self.param(name, init) if self.is_initializing() else self.get_variable("params", name)

    def _init_table(self, key: Array) -> Array:
        return TABLE.init(key, (self.config.vocab, self.config.width), self.param_dtype)

    def _init_layers(self, key: Array) -> Any:
        keys = jax.random.split(key, self.config.layers)
        if self.stacked:
            return jax.vmap(lambda k: init_layer(k, self.config, self.param_dtype))(keys)
        return [init_layer(k, self.config, self.param_dtype) for k in keys]

    def __call__(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        mask_BLM: Mask,
        prefix: tuple[KVCache, Array] | None = None,
        keep_kv: bool = False,
    ) -> TargetOutput:
        """See `forward`."""
        c, options = self.config, self.config.options
        x = constrain_rows(look_up(self.embed_table, tokens_BL).astype(self.dtype))
        if options.embed_scale != 1:
            x = x * jnp.asarray(options.embed_scale, self.dtype)
        windows = options.windows or (None,) * c.layers
        kinds = list(dict.fromkeys(windows))
        length = tokens_BL.shape[1] if prefix is None else prefix[0].capacity
        views = [view(c, window, positions_BL, mask_BLM, length) for window in kinds]
        kind_of = [kinds.index(window) for window in windows]

        def block(seen: View, x: Array, layer: Params, past: Prefix | None) -> tuple[Array, Any]:
            def mix(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
                scores: dict[str, Any] = {"scale": options.score_scale, "score_cap": options.score_cap}
                if past is None:
                    how = {"kernel": self.kernel, "block": self.query_block, "by_row": self.row_by_row}
                    mixed = attend_text(q, k, v, seen.mask_BLM, **how, **scores)
                else:
                    mixed = attend(q, k, v, as_mask(seen.mask_BLM), past._replace(first_BL=seen.first_BL), **scores)
                return mixed, ((k, v) if keep_kv else None)

            return decoder_layer(gather_width(layer), x, seen.turn, c.norm_eps, mix, options)

        blocks = [recompute(self.remat, functools.partial(block, seen)) for seen in views]
        several = stack_views(views) if self.stacked and len(views) > 1 else None

        def run(x: Array, layer: Params, at: Array | int) -> tuple[Array, Any]:
            past = None if prefix is None else Prefix(prefix[0], at, prefix[1])
            if several is None:
                return blocks[kind_of[at] if isinstance(at, int) else 0](x, layer, past)
            seen = jax.tree.map(lambda a: a[jnp.asarray(kind_of)[at]], several)
            return recompute(self.remat, functools.partial(block, seen))(x, layer, past)

        tapped: list[Array] = [jnp.zeros_like(x) for _ in self.taps]
        if self.stacked:

            def tapping(carry: tuple[Array, list[Array]], row: Any) -> tuple[tuple[Array, list[Array]], Any]:
                x, tapped = carry
                tapped = [jnp.where(row[1] == at, x, t) for at, t in zip(self.taps, tapped, strict=True)]
                x, fresh = run(x, row[0], row[1])
                return (x, tapped), fresh

            (x, tapped), fresh = jax.lax.scan(tapping, (x, tapped), (self.layers, jnp.arange(c.layers)))
        else:
            rows = []
            for i, layer in enumerate(self.layers):
                tapped = [x if i == at else t for at, t in zip(self.taps, tapped, strict=True)]
                x, row = run(x, layer, i)
                rows.append(row)
            fresh = jax.tree.map(lambda *a: jnp.stack(a), *rows) if keep_kv else None
        features = rms_norm(x, self.norm, c.norm_eps, centred=options.centred_norms)
        taps = jnp.concatenate(tapped, axis=-1) if self.taps else None
        return TargetOutput(features, None if fresh is None else KVCache(*fresh), taps)

    def score(self, features_BLD: Array) -> Array:
        """See `logits`."""
        table = self.embed_table if self.config.tied else self.head_table
        return cap(score_tokens(features_BLD, table), self.config.options.logit_cap)

    def init_params(self, key: Array) -> Params:
        """Random weights (normal 0.02; residual outputs scaled by depth)."""
        token = jnp.zeros((1, 1), jnp.int32)
        return self.init(key, token, token, jnp.ones((1, 1, 1), bool))["params"]

    def forward(
        self,
        params: Params,
        tokens_BL: Array,
        positions_BL: Array,
        mask_BLM: Mask,
        prefix: tuple[KVCache, Array] | None = None,
        *,
        keep_kv: bool = False,
    ) -> TargetOutput:
        """Features `[B, L, D]` of `L` tokens at absolute `positions`, and with `keep_kv` their keys and values.

        `mask_BLM` says which of the call's own tokens each one sees (`[1, L, L]` for all rows alike; `Packed` for
        documents in rows, without a prefix); `prefix` is `(cache, length_B)`, seen by every token up to `length`.
        """
        out = self.apply({"params": params}, tokens_BL, positions_BL, mask_BLM, prefix, keep_kv)
        assert isinstance(out, TargetOutput)
        return out

    def logits(self, params: Params, features_BLD: Array) -> Array:
        """fp32 logits `[B, L, V]` of the token after each feature."""
        out = self.apply({"params": params}, features_BLD, method="score")
        assert isinstance(out, jax.Array)
        return out

    def shared_tables(self, params: Params) -> SharedTables:
        """The embedding and LM head (one table when tied)."""
        return SharedTables(params["embed"], params["embed"] if self.config.tied else params["head"])

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A zeroed cache in the activations' dtype."""
        c = self.config
        return kv.empty(c.layers, batch, c.kv_heads, c.head_dim, capacity, self.dtype)


def unstack(params: Params) -> Params:
    """The same weights with `layers` as a list of one dict a layer, for `Decoder(stacked=False)`.

    Done once before decoding: slicing a stacked weight inside the decode loop copies it at every step.
    """
    if isinstance(params["layers"], list):
        return params
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = [jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(count)]
    return {**params, "layers": layers}


def parameter_count(config: LlamaConfig) -> int:
    """Weights of the model; a tied table counts once."""
    per_layer = sum(math.prod(s) for s in layer_shapes(config, config.options).values())
    return config.layers * per_layer + config.vocab * config.width * (1 if config.tied else 2) + config.width
