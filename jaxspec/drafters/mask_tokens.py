"""Drafting of all steps in one pass by mask tokens (ParallelSpec, P-EAGLE, PARD), and their group-wise training.

Slot `(i, 0)` is real: it holds what was read at position `i`. Slot `(i, d)` holds a mask token: it stands `d` further,
sees the real slots up to `i` and its own group `(i, 1) .. (i, d)`, and predicts the token `d` later than slot `(i, 0)`
does. No real slot ever sees a mask token, so mask tokens are never cached, and what is cached stays right for ever.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array, KVCache, Mask, Params, SharedTables, Unrolled, UnrollInputs
from jaxspec.drafters.one_layer import OneLayer
from jaxspec.drafters.one_pass import OnePass, ParallelState
from jaxspec.nn import cache as kv
from jaxspec.nn.attention import PerQueryKeys, Prefix, as_mask, attend
from jaxspec.nn.remat import recompute
from jaxspec.parallel.rows import gather_rows, scatter_rows


@dataclasses.dataclass(frozen=True)
class SlotOptions:
    """Number of mask tokens, and which of them are trained."""

    tokens: int = 4
    """Tokens drafted in a pass, `k`: the last real slot predicts one, `k - 1` mask tokens the others."""
    keep: float = 1.0
    """Training: share of the positions that are kept from one depth to the next, at random and nested (PARD's
    conditional drop, 0.7 there), so that memory and time grow linearly in `tokens` no more."""
    keep_least: float = 0.2
    """Share of the positions that every depth keeps at least."""

    def check_slots(self) -> None:
        """ValueError naming a field out of range."""
        if self.tokens < 1 or not 0 < self.keep_least <= 1 or not 0 < self.keep <= 1:
            raise ValueError(
                f"tokens={self.tokens} must be at least 1, keep={self.keep} and keep_least={self.keep_least} in (0, 1]"
            )

    def kept(self, length: int, depth: int) -> int:
        """Positions of a row of `length` that are trained at a depth."""
        return math.ceil(length * max(self.keep**depth, self.keep_least)) if depth and self.keep < 1 else length


class Group(NamedTuple):
    """The slots of one depth in training, at `A` positions of each row."""

    at_BA: Array
    x_BAE: Array
    """Inputs of the next layer."""
    positions_BA: Array
    mask: Mask
    """Which real slots they see."""


class MaskTokens(OnePass, OneLayer):
    """Drafting by mask tokens as pure functions of the weights.

    Abstract: a drafter says what its slots hold (`real_slots`, `mask_tokens`), how that enters a layer (`enter`), of
    which there may be several (`layer_weights`), and how logits are made (`score`). Its config has `SlotOptions`.
    """

    bidirectional = False
    """Whether the mask tokens of a group see each other both ways."""

    @property
    def layer_count(self) -> int:
        """Decoder layers."""
        return 1

    @property
    def layer_weights(self) -> list[Params]:
        """The weights of each."""
        return [self.weights]

    def real_slots(self, shared: SharedTables, tokens_BL: Array, features_BLD: Array) -> Array:
        """Contents of the slots of pairs (feature, next token), `[B, L, E]`."""
        raise NotImplementedError

    def mask_tokens(self, shared: SharedTables, anchor_BLD: Array, depth: int) -> Array:
        """Mask tokens of a depth, for groups whose real slots read these features: `[B, L, E]`."""
        raise NotImplementedError

    def enter(self, layer: int, x_BLE: Array) -> tuple[Array, Array]:
        """The residual stream of a layer, and what its queries, keys and values are made of."""
        return x_BLE, x_BLE

    def regressed(self, hidden_TBLD: Array) -> Array | None:
        """Returns the outputs that should equal the target's features; None for none."""
        return None

    def heads(self, layer: int, seen_BLE: Array, positions_BL: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values of a layer."""
        return self.project(seen_BLE, positions_BL, self.layer_weights[layer])

    def finish(self, layer: int, stream_BLD: Array, mixed_BLKGC: Array) -> Array:
        """A layer's output."""
        w = self.layer_weights[layer]
        x = self.mix(stream_BLD, mixed_BLKGC, w)
        return x + self.feed_forward(x, w)

    def _extend(
        self, shared: SharedTables, state: ParallelState, tokens_BL: Array, features_BLD: Array, count_B: Array
    ) -> tuple[ParallelState, Array]:
        assert state.cache is not None
        batch, length = tokens_BL.shape
        masks = self.config.tokens - 1
        last = jnp.maximum(count_B - 1, 0)
        anchor_B1D = jnp.take_along_axis(features_BLD, last[:, None, None], axis=1)
        slots = [self.real_slots(shared, tokens_BL, features_BLD)]
        slots += [self.mask_tokens(shared, anchor_B1D, d) for d in range(1, masks + 1)]
        offset_BL = jnp.concatenate(
            [
                jnp.broadcast_to(jnp.arange(length), (batch, length)),
                last[:, None] + 1 + jnp.arange(masks),
            ],
            axis=1,
        )
        x, fresh = self._read(jnp.concatenate(slots, axis=1), state, offset_BL, self._one_pass_mask(length, count_B))
        at_BT = jnp.concatenate([last[:, None], jnp.broadcast_to(length + jnp.arange(masks), (batch, masks))], axis=1)
        hidden_BTD = jnp.take_along_axis(x, at_BT[..., None], axis=1)
        hidden_BTD = jnp.where((count_B > 0)[:, None, None], hidden_BTD, state.hidden_BTD)
        real = KVCache(fresh.k_YBKCS[..., :length], fresh.v_YBKSC[..., :length, :])
        cache = kv.commit(state.cache, real, state.length_B, jnp.argmax(hidden_BTD[:, 0], axis=-1))
        logits_BV = self.score(hidden_BTD[:, :1], shared.head_VD)[:, 0]
        return ParallelState(cache, state.length_B + count_B, hidden_BTD), logits_BV

    def _read(self, x: Array, state: ParallelState, offset_BL: Array, mask_BLL: Array) -> tuple[Array, KVCache]:
        """The slots behind the committed ones, through all layers: outputs, and every layer's keys and values."""
        assert state.cache is not None
        keys, values = [], []
        for layer in range(self.layer_count):
            stream, seen = self.enter(layer, x)
            q, k, v = self.heads(layer, seen, state.length_B[:, None] + offset_BL)
            x = self.finish(layer, stream, attend(q, k, v, mask_BLL, Prefix(state.cache, layer, state.length_B)))
            keys.append(k)
            values.append(v)
        return x, KVCache(jnp.stack(keys), jnp.stack(values))

    def _one_pass_mask(self, length: int, count_B: Array) -> Array:
        """`[B, L + k - 1, L + k - 1]`: real slots causally; mask tokens the real slots of their row and their group."""
        total = length + self.config.tokens - 1
        row, column = jnp.arange(total)[:, None], jnp.arange(total)[None]
        real = (row < length) & (column <= row)
        group = (row >= length) & (column >= length)
        if not self.bidirectional:
            group &= column <= row
        sees_real = (row >= length) & (column < count_B[:, None, None])
        return real | group | sees_real

    def _unroll(self, shared: SharedTables, inputs: UnrollInputs, steps: int) -> Unrolled:
        """Group-wise training, a group a position: slot `(i, j)` sees the real slots up to `i` and its own group.

        That is the row layout of HASS: causal over the real slots, and one more key a depth at the row's own index.
        """
        tokens_BL, features_BLD, positions_BL, mask_BLM, keys_B = inputs
        c, (batch, length) = self.config, tokens_BL.shape
        token = jnp.pad(tokens_BL[:, 1:], ((0, 0), (0, 1)))
        order_BL = jnp.broadcast_to(jnp.arange(length), (batch, length))
        groups = [Group(order_BL, self.real_slots(shared, token, features_BLD), positions_BL, mask_BLM)]
        if keys_B is not None and c.keep < 1:
            order_BL = jnp.argsort(jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys_B), axis=1)
        mask_BLL = jnp.broadcast_to(as_mask(mask_BLM), (batch, length, length))
        for depth in range(1, c.tokens if self.bidirectional else min(c.tokens, steps)):
            # The first so many of one order: every depth's positions are among those of the depth before.
            at = order_BL[:, : c.kept(length, depth) if keys_B is not None else length]
            x = self.mask_tokens(shared, gather_rows(features_BLD, at), depth)
            groups.append(Group(at, x, gather_rows(positions_BL, at) + depth, gather_rows(mask_BLL, at)))
        for layer in range(self.layer_count):
            groups = self._through(layer, groups)
        hidden, kept = [groups[0].x_BAE], [jnp.ones((batch, length), bool)]
        for group in groups[1:steps]:
            hidden.append(scatter_rows(jnp.zeros_like(hidden[0]), group.at_BA, group.x_BAE))
            kept.append(scatter_rows(jnp.zeros_like(kept[0]), group.at_BA, jnp.ones(group.at_BA.shape, bool)))
        hidden_TBLD = jnp.stack(hidden)
        return Unrolled(hidden_TBLD, self.regressed(hidden_TBLD), jnp.stack(kept))

    def _through(self, layer: int, groups: list[Group]) -> list[Group]:
        """The slots of all depths behind a layer."""
        entered = [self.enter(layer, group.x_BAE) for group in groups]
        heads = [self.heads(layer, seen, g.positions_BA) for g, (_, seen) in zip(groups, entered, strict=True)]
        _, k, v = heads[0]

        def read(stream: Array, q: Array, mask: Mask, own: PerQueryKeys) -> Array:
            mixed = attend(q, k, v, as_mask(mask), per_query=own) if own.pairs else self.attend_text(q, k, v, mask)
            return self.finish(layer, stream, mixed)

        read = recompute(self.remat, read)
        out = []
        for depth, (group, (stream, _), (q, _, _)) in enumerate(zip(groups, entered, heads, strict=True)):
            seen = heads[1:] if self.bidirectional and depth else heads[1 : depth + 1]
            count = group.at_BA.shape[1]
            own = PerQueryKeys(tuple((k_own, v_own) for _, k_own, v_own in seen)).cut(0, count)
            out.append(group._replace(x_BAE=read(stream, q, group.mask, own)))
        return out

    def init_state(self, params: Params, shared: SharedTables, first_B: Array, capacity: int) -> ParallelState:
        """Empty state for contexts of up to `capacity` tokens."""
        c, batch = self.config, first_B.shape[0]
        cache = kv.empty(self.layer_count, batch, c.kv_heads, c.head_dim, capacity, self.dtype, self.token_major)
        return ParallelState(cache, jnp.zeros(batch, jnp.int32), jnp.zeros((batch, c.tokens, c.width), self.dtype))
