"""ParallelSpec (Xiao et al. 2024): one decoder layer that predicts all draft steps in one pass, by mask tokens.

The paper's text and code are not to be had: what is known is one target-shaped layer, distinct trainable mask tokens
appended to the real ones, knowledge distillation, group-wise training under a mask that keeps groups apart, and the
frameworks Medusa and EAGLE as hosts. The rest is a reconstruction, from three published successors that make the same
construction (PARD, P-EAGLE, BiTA): what mask slots read in place of a feature, which slots are trained, in-group
attention, and what the Medusa host's real slots read.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxspec import cache as kv
from jaxspec.base import Array, Borrowed, KVCache, Mask, Unrolled
from jaxspec.drafters.eagle import EagleConfig, concatenate_and_project, layer_shapes
from jaxspec.drafters.heads import OneLayer, OnePass, ParallelState
from jaxspec.layers import Prefix, as_mask, attend, gated_mlp, recompute, rms_norm
from jaxspec.sharding import look_up


@dataclasses.dataclass(frozen=True)
class ParallelSpecConfig(EagleConfig):
    """The shape of a ParallelSpec drafter."""

    tokens: int = 4
    """Tokens drafted in a pass, `k`: the last real slot predicts one, `k - 1` mask slots the others."""
    host: Literal["eagle", "medusa"] = "eagle"
    """What a real slot is made of. `eagle`: `fc([embedding; feature])` and EAGLE's losses. `medusa`: the embedding plus
    the feature, no `fc`, so that the drafter is one target-shaped layer, and losses on tokens alone. (The sum is
    reconstruction: the source does not say what it reads there.)"""
    mask_feature: Literal["shared", "per_depth", "anchor_copy", "zeros"] = "shared"
    """What stands in a mask slot where a real one has the target's feature (reconstruction): one trained vector, one a
    depth, the feature of the last real slot, or nothing. P-EAGLE found `shared` best."""
    shared_mask: bool = False
    """One mask embedding for all depths (PARD, P-EAGLE) instead of one a depth."""
    bidirectional: bool = False
    """Mask slots of a group see each other both ways instead of causally (reconstruction; DFlash does)."""
    keep: float = 1.0
    """Training: share of the positions that are kept from one depth to the next, at random and nested (PARD's
    conditional drop, 0.7 there), so that memory and time grow linearly in `tokens` no more."""
    keep_least: float = 0.2
    """Share of the positions that every depth keeps at least."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_norm or self.zero_logits:
            raise ValueError("a ParallelSpec drafter has no head_norm and no zero_logits: leave them off")
        if self.tokens < 1 or not 0 < self.keep_least <= 1 or not 0 < self.keep <= 1:
            raise ValueError(
                f"tokens={self.tokens} must be at least 1, keep={self.keep} and keep_least={self.keep_least} in (0, 1]"
            )
        if self.bidirectional and self.keep < 1:
            raise ValueError("bidirectional groups need all their slots: set keep to 1, or bidirectional to false")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.host == "eagle":
            shapes["fc"] = (2 * self.width, self.width)
            if self.bias:
                shapes["fc_bias"] = (self.width,)
        if self.embedding_norm:
            shapes["embedding_norm"] = (self.width,)
        masks = self.tokens - 1
        shapes["mask_tokens"] = (1 if self.shared_mask else masks, self.width)
        if self.mask_feature in ("shared", "per_depth"):
            shapes["mask_features"] = (1 if self.mask_feature == "shared" else masks, self.width)
        return shapes | layer_shapes(self)

    def kept(self, length: int, depth: int) -> int:
        """Positions of a row of `length` that are trained at a depth."""
        return math.ceil(length * max(self.keep**depth, self.keep_least)) if depth and self.keep < 1 else length


class ParallelSpec(OnePass, OneLayer):
    """The ParallelSpec drafter as pure functions of its weights."""

    def fuse(self, embedding_BLD: Array, feature_BLD: Array) -> Array:
        """The layer's input at a slot; with `embedding_norm` (reconstruction) embeddings weigh as much as features."""
        if self.config.embedding_norm:
            embedding_BLD = rms_norm(embedding_BLD, self.weights["embedding_norm"], self.config.norm_eps)
        if self.config.host == "medusa":
            return embedding_BLD.astype(self.dtype) + feature_BLD.astype(self.dtype)
        return concatenate_and_project(self.weights, embedding_BLD, feature_BLD, self.dtype)

    def mask_slots(self, anchor_BLD: Array, depth: int) -> Array:
        """The layer's input at the mask slot of a depth, for anchors with these features: `[B, L, D]`."""
        w, index = self.weights, depth - 1
        embedding = w["mask_tokens"][0 if self.config.shared_mask else index]
        if self.config.mask_feature == "anchor_copy":
            feature = anchor_BLD
        elif self.config.mask_feature == "zeros":
            feature = jnp.zeros_like(anchor_BLD)
        else:
            feature = w["mask_features"][0 if self.config.mask_feature == "shared" else index]
        return self.fuse(jnp.broadcast_to(embedding, anchor_BLD.shape), jnp.broadcast_to(feature, anchor_BLD.shape))

    def finish(self, stream_BLD: Array, mixed_BLKGC: Array) -> Array:
        """The layer's output: the predicted feature."""
        x = self.mix(stream_BLD, mixed_BLKGC)
        return x + gated_mlp(self.weights, rms_norm(x, self.weights["mlp_norm"], self.config.norm_eps))

    def _extend(
        self, borrowed: Borrowed, state: ParallelState, tokens_BL: Array, features_BLD: Array, count_B: Array
    ) -> tuple[ParallelState, Array]:
        assert state.cache is not None
        batch, length = tokens_BL.shape
        masks = self.config.tokens - 1
        last = jnp.maximum(count_B - 1, 0)
        anchor_B1D = jnp.take_along_axis(features_BLD, last[:, None, None], axis=1)
        slots = [self.fuse(look_up(borrowed.embed_VD, tokens_BL), features_BLD)]
        slots += [self.mask_slots(anchor_B1D, d) for d in range(1, masks + 1)]
        stream = jnp.concatenate(slots, axis=1)
        offset_BL = jnp.concatenate(
            [
                jnp.broadcast_to(jnp.arange(length), (batch, length)),
                last[:, None] + 1 + jnp.arange(masks),
            ],
            axis=1,
        )
        q, k, v = self.project(stream, state.length_B[:, None] + offset_BL)
        past = Prefix(state.cache, 0, state.length_B)
        hidden = self.finish(stream, attend(q, k, v, self._one_pass_mask(length, count_B), past))
        at_BT = jnp.concatenate([last[:, None], jnp.broadcast_to(length + jnp.arange(masks), (batch, masks))], axis=1)
        hidden_BTD = jnp.take_along_axis(hidden, at_BT[..., None], axis=1)
        hidden_BTD = jnp.where((count_B > 0)[:, None, None], hidden_BTD, state.hidden_BTD)
        # Mask slots are cropped: no real slot ever sees one, so what is cached stays right for ever.
        fresh = KVCache(k[None, ..., :length], v[None, :, :, :length])
        cache = kv.commit(state.cache, fresh, state.length_B, jnp.argmax(hidden_BTD[:, 0], axis=-1))
        logits_BV = self.score(hidden_BTD[:, :1], borrowed.head_VD)[:, 0]
        return ParallelState(cache, state.length_B + count_B, hidden_BTD), logits_BV

    def _one_pass_mask(self, length: int, count_B: Array) -> Array:
        """`[B, L + k - 1, L + k - 1]`: real slots causally; mask slots the real ones of their row and their group."""
        masks = self.config.tokens - 1
        total = length + masks
        row, column = jnp.arange(total)[:, None], jnp.arange(total)[None]
        real = (row < length) & (column <= row)
        group = (row >= length) & (column >= length)
        if not self.config.bidirectional:
            group &= column <= row
        sees_real = (row >= length) & (column < count_B[:, None, None])
        return real | group | sees_real

    def _unroll(
        self,
        borrowed: Borrowed,
        tokens_BL: Array,
        features_BLD: Array,
        positions_BL: Array,
        mask_BLM: Mask,
        steps: int,
        keys_B: Array | None,
    ) -> Unrolled:
        """A group a position: slot `(i, j)` sees the real slots up to `i` and its own group.

        That is the row layout of HASS: causal over the real slots, and one more key a depth at the row's own index.
        """
        c = self.config
        batch, length = tokens_BL.shape
        token = jnp.pad(tokens_BL[:, 1:], ((0, 0), (0, 1)))
        stream = self.fuse(look_up(borrowed.embed_VD, token), features_BLD)
        q, k, v = self.project(stream, positions_BL)

        def read(stream: Array, q: Array, mask: Mask, own: list[tuple[Array, Array]]) -> Array:
            return self.finish(stream, self.attend_row(q, k, v, mask, own))

        read = recompute(self.remat, read)
        outputs = [read(stream, q, mask_BLM, [])]
        kept = [jnp.ones((batch, length), bool)]
        order_BL = jnp.broadcast_to(jnp.arange(length), (batch, length))
        if keys_B is not None and c.keep < 1:
            order_BL = jnp.argsort(jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys_B), axis=1)
        rows = jnp.arange(batch)[:, None]
        mask_BLL = jnp.broadcast_to(as_mask(mask_BLM), (batch, length, length))
        slots = []
        for depth in range(1, c.tokens):
            # The first so many of one order: every depth's positions are among those of the depth before.
            at = order_BL[:, : c.kept(length, depth) if keys_B is not None else length]
            stream = self.mask_slots(features_BLD[rows, at], depth)
            slots.append((at, stream, self.project(stream, positions_BL[rows, at] + depth)))
        for depth, (at, stream, (q, _, _)) in list(enumerate(slots, 1))[: steps - 1]:
            group = slots if c.bidirectional else slots[:depth]
            own = [(k_own[..., : at.shape[1]], v_own[:, :, : at.shape[1]]) for _, _, (_, k_own, v_own) in group]
            hidden = read(stream, q, mask_BLL[rows, at], own)
            outputs.append(jnp.zeros_like(outputs[0]).at[rows, at].set(hidden))
            kept.append(jnp.zeros_like(kept[0]).at[rows, at].set(True))
        hidden_TBLD = jnp.stack(outputs)
        return Unrolled(hidden_TBLD, hidden_TBLD if c.host == "eagle" else None, jnp.stack(kept))

    def init_state(self, params: object, borrowed: Borrowed, first_B: Array, capacity: int) -> ParallelState:
        """Empty state for contexts of up to `capacity` tokens."""
        c, batch = self.config, first_B.shape[0]
        cache = kv.empty(1, batch, c.kv_heads, c.head_dim, capacity, self.dtype)
        return ParallelState(cache, jnp.zeros(batch, jnp.int32), jnp.zeros((batch, c.tokens, c.width), self.dtype))
