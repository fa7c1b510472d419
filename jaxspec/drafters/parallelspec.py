"""ParallelSpec (Xiao et al. 2024): one decoder layer that predicts all draft steps in one pass, by mask tokens.

The paper's text and code are not to be had: what is known is one target-shaped layer, distinct trainable mask tokens
appended to the real ones, knowledge distillation, group-wise training under a mask that keeps groups apart, and the
frameworks Medusa and EAGLE as hosts. The rest is a reconstruction, from three published successors that make the same
construction (PARD, P-EAGLE, BiTA): what mask slots read in place of a feature, which slots are trained, in-group
attention, and what the Medusa host's real slots read.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from jaxspec.base import Array, SharedTables
from jaxspec.drafters.eagle import EagleConfig, concatenate_and_project, layer_weights
from jaxspec.drafters.mask_tokens import MaskTokens, SlotOptions
from jaxspec.nn.norm import rms_norm


@dataclasses.dataclass(frozen=True)
class ParallelSpecConfig(SlotOptions, EagleConfig):
    """The shape of a ParallelSpec drafter."""

    host: Literal["eagle", "medusa"] = "eagle"
    """What a real slot is made of. `eagle`: `fc([embedding; feature])` and EAGLE's losses. `medusa`: the embedding plus
    the feature, no `fc`, so that the drafter is one target-shaped layer, and losses on tokens alone. (The sum is
    reconstruction: the source does not say what it reads there.)"""
    mask_feature: Literal["shared", "per_depth", "anchor_copy", "zeros"] = "shared"
    """What stands in a mask slot where a real one has the target's feature (reconstruction): one trained vector, one a
    depth, the feature of the last real slot, or nothing. P-EAGLE found `shared` best."""
    shared_mask: bool = False
    """One mask embedding for all depths (PARD, P-EAGLE) instead of one a depth."""
    attention_norm: bool = False
    """An RMSNorm before the layer's attention, as the target's own layers have and EAGLE's head does not
    (reconstruction: known is that the layer is of the target's shape)."""
    bidirectional: bool = False
    """Mask slots of a group see each other both ways instead of causally (reconstruction; DFlash does)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_norm or self.zero_logits:
            raise ValueError("a ParallelSpec drafter has no head_norm and no zero_logits: leave them off")
        self.check_slots()
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
        if self.attention_norm:
            shapes["attention_norm"] = (self.width,)
        return shapes | layer_weights(self)


class ParallelSpec(MaskTokens):
    """The ParallelSpec drafter as pure functions of its weights."""

    @property
    def bidirectional(self) -> bool:  # type: ignore[override]
        """See `ParallelSpecConfig`."""
        return self.config.bidirectional

    def fuse(self, embedding_BLD: Array, feature_BLD: Array) -> Array:
        """The layer's input at a slot; with `embedding_norm` (reconstruction) embeddings weigh as much as features."""
        if self.config.embedding_norm:
            embedding_BLD = rms_norm(embedding_BLD, self.weights["embedding_norm"], self.config.norm_eps)
        if self.config.host == "medusa":
            return embedding_BLD.astype(self.dtype) + feature_BLD.astype(self.dtype)
        return concatenate_and_project(self.weights, embedding_BLD, feature_BLD, self.dtype)

    def real_slots(self, shared: SharedTables, tokens_BL: Array, features_BLD: Array) -> Array:
        """The next token's embedding and the feature."""
        return self.fuse(self.embedding(shared, tokens_BL), features_BLD)

    def enter(self, layer: int, x_BLE: Array) -> tuple[Array, Array]:
        """The slots are the stream; the attention reads them, normed if the head does so."""
        if not self.config.attention_norm:
            return x_BLE, x_BLE
        return x_BLE, rms_norm(x_BLE, self.weights["attention_norm"], self.config.norm_eps)

    def mask_tokens(self, shared: SharedTables, anchor_BLD: Array, depth: int) -> Array:
        """A trained embedding and what stands for the feature."""
        w, index = self.weights, depth - 1
        embedding = w["mask_tokens"][0 if self.config.shared_mask else index]
        if self.config.mask_feature == "anchor_copy":
            feature = anchor_BLD
        elif self.config.mask_feature == "zeros":
            feature = jnp.zeros_like(anchor_BLD)
        else:
            feature = w["mask_features"][0 if self.config.mask_feature == "shared" else index]
        return self.fuse(jnp.broadcast_to(embedding, anchor_BLD.shape), jnp.broadcast_to(feature, anchor_BLD.shape))

    def regressed(self, hidden_TBLD: Array) -> Array | None:
        """In EAGLE's place all of them."""
        return hidden_TBLD if self.config.host == "eagle" else None
