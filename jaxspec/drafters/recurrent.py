"""Drafting step by step, each step from the feature that the step before put out (EAGLE).

In training the steps are unrolled, so that each sees what the steps before it would have left when decoding: HASS's
harmonized context alignment, EAGLE-3's training-time test.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import ROOT, Array, Cache, Frontier, KVCache, Params, SharedTables, Unrolled, UnrollInputs
from jaxspec.drafters.module import at_newest
from jaxspec.drafters.one_layer import OneLayer
from jaxspec.nn import cache as kv
from jaxspec.nn.attention import PerQueryKeys, Prefix, attend, causal_mask
from jaxspec.nn.remat import recompute


class RecurrentState(NamedTuple):
    """The committed pairs of a row, from which it drafts."""

    cache: Cache
    """One layer's keys and values of the committed (feature, next token) pairs."""
    length_B: Array
    """Committed pairs; the pair of feature `f_t` sits in slot `t` and has rotary position `t`."""
    hidden_BD: Array
    """The head's output at the last pair, which its root's children are scored by."""
    feature_BD: Array
    """The feature that goes with it, which its root's children are drafted with."""


class RecurrentScratch(NamedTuple):
    """Keys, values and features of the nodes expanded this round, by scratch slot."""

    k_BKCM: Array
    v_BKMC: Array
    feature_BMD: Array


class Recurrent(OneLayer):
    """A head that drafts step by step, each from the feature the step before put out (EAGLE).

    Abstract: a head says how a pair becomes the layer's input (`fuse`), what comes out of it (`finish`) and, if need
    be, how logits are made (`score`) and what it makes of the target's features first (`read`).
    """

    detach = True
    """Whether features handed from one training step to the next carry no gradient."""
    zero_logits = False
    """Training only: keys that a query must not see count with score 0, as in HASS's released code."""

    def read(self, features_BLD: Array) -> Array:
        """The target's features as the head takes them for its own."""
        return features_BLD

    def fuse(self, embedding_BLD: Array, feature_BLD: Array) -> tuple[Array, Array]:
        """The residual stream, and what queries, keys and values are made of."""
        raise NotImplementedError

    def finish(self, stream_BLD: Array) -> tuple[Array, Array]:
        """From the stream behind the attention: the output that is scored, and the feature for the next step."""
        raise NotImplementedError

    def regressed(self, features_TBLD: Array) -> Array | None:
        """Returns the outputs that should equal the target's features; None for none."""
        return features_TBLD

    def _extend(
        self, shared: SharedTables, state: RecurrentState, tokens_BL: Array, features_BLD: Array, count_B: Array
    ) -> tuple[RecurrentState, Array]:
        length = tokens_BL.shape[1]
        stream, seen = self.fuse(self.embedding(shared, tokens_BL), self.read(features_BLD))
        positions_BL = state.length_B[:, None] + jnp.arange(length)
        q, k, v = self.project(seen, positions_BL)
        past = Prefix(state.cache, 0, state.length_B)
        stream = self.mix(stream, attend(q, k, v, causal_mask(length), past))
        hidden, feature = self.finish(stream)
        hidden_BD, feature_BD = self._at_last(hidden, feature, state, count_B)
        cache = kv.commit(state.cache, KVCache(k[None], v[None]), state.length_B, jnp.argmax(hidden_BD, axis=-1))
        logits_BV = self.score(hidden_BD[:, None], shared.head_VD)[:, 0]
        return RecurrentState(cache, state.length_B + count_B, hidden_BD, feature_BD), logits_BV

    def _at_last(
        self, hidden_BLD: Array, feature_BLD: Array, state: RecurrentState, count_B: Array
    ) -> tuple[Array, Array]:
        """Both at each row's last real pair; what the state has where there is none."""
        hidden_BD = at_newest(hidden_BLD, count_B, state.hidden_BD)
        same = feature_BLD is hidden_BLD
        return hidden_BD, hidden_BD if same else at_newest(feature_BLD, count_B, state.feature_BD)

    def _expand(
        self, shared: SharedTables, state: RecurrentState, scratch: RecurrentScratch, frontier: Frontier
    ) -> tuple[Array, RecurrentScratch]:
        width = frontier.token_BW.shape[1]
        begin, end = frontier.slot, frontier.slot + width
        parent = jnp.maximum(frontier.parent_BW, 0)[..., None]
        drafted = jnp.take_along_axis(scratch.feature_BMD, parent, axis=1)
        feature = jnp.where((frontier.parent_BW == ROOT)[..., None], state.feature_BD[:, None], drafted)
        stream, seen = self.fuse(self.embedding(shared, frontier.token_BW), feature)
        positions_BW = jnp.broadcast_to((state.length_B + frontier.depth - 1)[:, None], frontier.token_BW.shape)
        q, k, v = self.project(seen, positions_BW)
        keys = scratch.k_BKCM.at[..., begin:end].set(k)
        values = scratch.v_BKMC.at[:, :, begin:end].set(v)
        past = Prefix(state.cache, 0, state.length_B)
        mixed = attend(q, keys[..., :end], values[:, :, :end], frontier.visible_BWM, past)
        hidden, feature = self.finish(self.mix(stream, mixed))
        scratch = RecurrentScratch(keys, values, scratch.feature_BMD.at[:, begin:end].set(feature))
        return self.score(hidden, shared.head_VD), scratch

    def _unroll(self, shared: SharedTables, inputs: UnrollInputs, steps: int) -> Unrolled:
        """Harmonized context alignment: a row sees step 0's keys by the mask, and those of later steps at its own index
        alone, which are what drafting from that row would have put there."""
        length = inputs.tokens_BL.shape[1]

        def draft(step: int, token_BL: Array, feature_BLD: Array, before: list[tuple[Array, Array]]) -> Any:
            stream, seen = self.fuse(self.embedding(shared, token_BL), feature_BLD)
            q, k, v = self.project(seen, inputs.positions_BL + step)
            (first_k, first_v), *own = [*before, (k, v)]
            hidden_keys = jnp.maximum(length - 1 - step - jnp.arange(length), 0)[None] if self.zero_logits else None
            mixed = self.attend_text(q, first_k, first_v, inputs.mask_BLM, PerQueryKeys(tuple(own), hidden_keys))
            return *self.finish(self.mix(stream, mixed)), (k, v)

        outputs, features, pairs = [], [], []
        feature, token = self.read(inputs.features_BLD), inputs.tokens_BL
        for step in range(steps):
            token = jnp.pad(token[:, 1:], ((0, 0), (0, 1)))
            hidden, feature, pair = recompute(self.remat, functools.partial(draft, step))(token, feature, pairs)
            pairs.append(pair)
            outputs.append(hidden)
            features.append(feature)
            feature = jax.lax.stop_gradient(feature) if self.detach else feature
        return Unrolled(jnp.stack(outputs), self.regressed(jnp.stack(features)))

    def init_state(self, params: Params, shared: SharedTables, first_B: Array, capacity: int) -> RecurrentState:
        """Empty state for contexts of up to `capacity` tokens; no pair carries the first one's embedding."""
        c, batch = self.config, first_B.shape[0]
        cache = kv.empty(1, batch, c.kv_heads, c.head_dim, capacity, self.dtype, self.token_major)
        nothing = jnp.zeros((batch, c.width), self.dtype)
        return RecurrentState(cache, jnp.zeros(batch, jnp.int32), nothing, nothing)

    def scratch(self, state: RecurrentState, slots: int) -> RecurrentScratch:
        """Working memory for `slots` expanded nodes."""
        c, batch = self.config, state.length_B.shape[0]
        return RecurrentScratch(
            jnp.zeros((batch, c.kv_heads, c.head_dim, slots), self.dtype),
            jnp.zeros((batch, c.kv_heads, slots, c.head_dim), self.dtype),
            jnp.zeros((batch, slots, c.width), self.dtype),
        )
