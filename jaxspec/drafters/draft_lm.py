"""An independent small language model as drafter: the target's tokenizer, its own weights and cache (Goel et al. 2024,
arXiv 2403.00858).

It reads tokens alone. As every drafter it is handed (feature, next token) pairs, so the first token of a context, which
is no token's next, comes with the empty state.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Cache, Frontier, KVCache, Mask, Params, SharedTables, Unrolled, UnrollInputs
from jaxspec.drafters.module import DrafterModule, DrafterOptions, TargetShape, at_newest
from jaxspec.nn import cache as kv
from jaxspec.nn.attention import Prefix, as_mask, attend, causal_mask
from jaxspec.nn.decoder_layer import decoder_layer
from jaxspec.nn.layer_weights import check_layer, layer_shapes, layer_weights
from jaxspec.nn.lm_head import score_tokens
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.remat import recompute
from jaxspec.nn.rope import RopeScaling, rope, rope_frequencies
from jaxspec.nn.weights import NORM, TABLE, Shape, declare

WEIGHTS = declare({"embed": TABLE, "norm": NORM, "head": TABLE})
"""A draft model's weights besides those of its layers, which are `layer_weights`."""


@dataclasses.dataclass(frozen=True)
class DraftLMOptions(DrafterOptions):
    """Options of a draft model, see `DraftLMConfig`. All sizes have to be given."""

    vocab: int | None = None
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp: int | None = None
    rope_theta: float | None = None
    tied: bool | None = None

    def follow(self, target: TargetShape) -> dict[str, Any]:
        """Rotary positions, norm, and all tokens: it reads them by the table that it may score them with."""
        return {"vocab": target.vocab, **target.pick("rope_theta", "rope_scaling", "norm_eps")}


@dataclasses.dataclass(frozen=True)
class DraftLMConfig:
    """The shape of a Llama-like draft model."""

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

    def __post_init__(self) -> None:
        check_layer(self)


class DraftLMState(NamedTuple):
    """The tokens that a row has read, as keys and values."""

    cache: Cache
    length_B: Array
    hidden_BD: Array
    """The output at the newest token."""


class DraftLMScratch(NamedTuple):
    """Keys and values of the nodes expanded this round, by layer and scratch slot."""

    k_YBKCM: Array
    v_YBKMC: Array


class DraftLM(DrafterModule):
    """A small Llama as a drafter, as pure functions of its weights.

    Weights: `embed [V, D]`, `norm [D]`, `head [V, D]` unless tied, and `layers`, a list of one dict a layer: those of a
    `decoder.Decoder` that is not stacked.
    """

    config: DraftLMConfig

    @property
    def feature_width(self) -> int | None:
        """It reads tokens alone."""
        return None

    @property
    def vocab(self) -> int | None:
        """Tokens that its LM head scores."""
        return self.config.vocab

    def run(
        self,
        params: Params,
        tokens_BL: Array,
        positions_BL: Array,
        mask_BLM: Mask,
        past: tuple[Cache, Array] | None = None,
        scratch: tuple[DraftLMScratch, int] | None = None,
    ) -> tuple[Array, KVCache]:
        """Outputs behind the final norm, and every layer's keys and values.

        `past` is `(cache, length_B)`. With a scratch and its first slot, the tokens' own keys are written there and
        seen together with those before.
        """
        c = self.config
        x = params["embed"][tokens_BL].astype(self.dtype)
        turn = rope(positions_BL, rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))

        def mix(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            prefix = None if past is None else Prefix(past[0], layer, past[1])
            if scratch is not None:
                begin, end = scratch[1], scratch[1] + tokens_BL.shape[1]
                k = scratch[0].k_YBKCM[layer].at[..., begin:end].set(k)
                v = scratch[0].v_YBKMC[layer].at[:, :, begin:end].set(v)
                return attend(q, k[..., :end], v[:, :, :end], as_mask(mask_BLM), prefix), (k, v)
            if prefix is None:
                return self.attend_text(q, k, v, mask_BLM), (k, v)
            return attend(q, k, v, as_mask(mask_BLM), prefix), (k, v)

        def block(i: int, layer: Params, x: Array) -> tuple[Array, tuple[Array, Array]]:
            return decoder_layer(layer, x, turn, c.norm_eps, functools.partial(mix, i))

        fresh = []
        for i, layer in enumerate(params["layers"]):
            x, row = recompute(self.remat, functools.partial(block, i))(layer, x)
            fresh.append(row)
        keys, values = (jnp.stack(rows) for rows in zip(*fresh, strict=True))
        return rms_norm(x, params["norm"], c.norm_eps), KVCache(keys, values)

    # The drafter contract.

    def init_params(self, key: Array, shared: SharedTables | None = None) -> Params:
        """Random weights: norms one, all else normal(0.02), residual outputs scaled by depth (GPT-2's rule)."""
        c = self.config

        weights, shapes = WEIGHTS | layer_weights(c.layers), layer_shapes(c)

        def weight(at: int, name: str, shape: Shape) -> Array:
            return weights[name].init(jax.random.fold_in(key, at), shape)

        layers = [
            {name: weight(100 * (i + 1) + j, name, shape) for j, (name, shape) in enumerate(shapes.items())}
            for i in range(c.layers)
        ]
        table = (c.vocab, c.width)
        params = {"embed": weight(0, "embed", table), "layers": layers, "norm": jnp.ones(c.width, jnp.float32)}
        return params if c.tied else {**params, "head": weight(1, "head", table)}

    def init_state(self, params: Params, shared: SharedTables, first_B: Array, capacity: int) -> DraftLMState:
        """The state that has read the first token."""
        c, batch = self.config, first_B.shape[0]
        cache = kv.empty(c.layers, batch, c.kv_heads, c.head_dim, capacity, self.dtype, self.token_major)
        nothing = jnp.zeros(batch, jnp.int32)
        state = DraftLMState(cache, nothing, jnp.zeros((batch, c.width), self.dtype))
        return self._take_in(params, state, first_B[:, None], nothing + 1)

    def _take_in(self, params: Params, state: DraftLMState, tokens_BL: Array, count_B: Array) -> DraftLMState:
        length = tokens_BL.shape[1]
        positions_BL = state.length_B[:, None] + jnp.arange(length)
        past = (state.cache, state.length_B)
        hidden, fresh = self.run(params, tokens_BL, positions_BL, causal_mask(length), past)
        hidden_BD = at_newest(hidden, count_B, state.hidden_BD)
        cache = kv.commit(state.cache, fresh, state.length_B, jnp.argmax(hidden_BD, axis=-1))
        return DraftLMState(cache, state.length_B + count_B, hidden_BD)

    def extend(
        self,
        params: Params,
        shared: SharedTables,
        state: DraftLMState,
        tokens_BL: Array,
        features_BLD: Array,
        count_B: Array,
    ) -> tuple[DraftLMState, Array]:
        """Read up to `L` tokens, `count` of them real, and score the root's children; features are not looked at."""
        state = self._take_in(params, state, tokens_BL, count_B)
        return state, self.logits(params, shared, state.hidden_BD[:, None])[:, 0]

    def scratch(self, state: DraftLMState, slots: int) -> DraftLMScratch:
        """Working memory for `slots` expanded nodes."""
        c, batch = self.config, state.length_B.shape[0]
        return DraftLMScratch(
            jnp.zeros((c.layers, batch, c.kv_heads, c.head_dim, slots), self.dtype),
            jnp.zeros((c.layers, batch, c.kv_heads, slots, c.head_dim), self.dtype),
        )

    def expand(
        self, params: Params, shared: SharedTables, state: DraftLMState, scratch: DraftLMScratch, frontier: Frontier
    ) -> tuple[Array, DraftLMScratch]:
        """Logits `[B, W, V]` of the children of one level's nodes."""
        positions_BW = jnp.broadcast_to((state.length_B + frontier.depth - 1)[:, None], frontier.token_BW.shape)
        hidden, written = self.run(
            params,
            frontier.token_BW,
            positions_BW,
            frontier.visible_BWM,
            (state.cache, state.length_B),
            (scratch, frontier.slot),
        )
        return self.logits(params, shared, hidden), DraftLMScratch(*written)

    def unroll(self, params: Params, shared: SharedTables, inputs: UnrollInputs, steps: int) -> Unrolled:
        """Its outputs on the text: as it reads tokens alone, step `j` at row `i` is step 0 at row `i + j`."""
        hidden, _ = self.run(params, inputs.tokens_BL, inputs.positions_BL, inputs.mask_BLM)
        ahead = [jnp.pad(hidden[:, 1 + j :], ((0, 0), (0, 1 + j), (0, 0))) for j in range(steps)]
        return Unrolled(jnp.stack(ahead))

    def scoring(self, params: Params) -> Params:
        """Its LM head: the embedding, where they are one table."""
        name = "embed" if self.config.tied else "head"
        return {name: params[name]}

    def logits(self, params: Params, shared: SharedTables, hidden_BLD: Array, step: int = 0) -> Array:
        """fp32 logits `[B, L, V]` of its own LM head."""
        return score_tokens(hidden_BLD, params["embed"] if self.config.tied else params["head"])
