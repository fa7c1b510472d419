"""ParallelSpec (Xiao et al. 2024, arXiv 2410.05589): one decoder layer drafts all steps in one pass, by mask tokens.

The paper's text and code were not found. Known are one target-shaped layer, distinct trainable mask tokens appended to
the real ones, knowledge distillation, group-wise training under a mask that keeps groups apart, and the frameworks
Medusa and EAGLE as hosts. The rest is a reconstruction, from three published successors that make the same construction
(PARD, P-EAGLE, BiTA): what mask tokens have in place of a feature, which of them are trained, in-group attention, and
what the Medusa host's real slots read.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from jaxspec.base import Array, SharedTables
from jaxspec.drafters.eagle import FUSION, EagleConfig, PairReader
from jaxspec.drafters.mask_tokens import MaskTokens, SlotOptions
from jaxspec.drafters.one_layer import HEAD_LAYER, LayerOptions
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.weights import Shape, Weight, declare

Host = Literal["eagle", "medusa"]
MaskFeature = Literal["shared", "per_depth", "anchor_copy", "zeros"]
# Looked up by depth and never multiplied, so Adam's.
WEIGHTS = FUSION | HEAD_LAYER | declare({"mask_tokens": Weight(), "mask_features": Weight()})
"""Weights that a ParallelSpec drafter may have."""


@dataclasses.dataclass(frozen=True)
class ParallelSpecOptions(LayerOptions):
    """Options of a ParallelSpec drafter, see `ParallelSpecConfig`; None follows the target or the default there."""

    bias: bool | None = None
    embedding_norm: bool | None = None
    tokens: int | None = None
    keep: float | None = None
    keep_least: float | None = None
    host: Host | None = None
    attention_norm: bool | None = None
    mask_feature: MaskFeature | None = None
    shared_mask: bool | None = None
    bidirectional: bool | None = None


@dataclasses.dataclass(frozen=True)
class ParallelSpecConfig(SlotOptions, EagleConfig):
    """The shape of a ParallelSpec drafter."""

    host: Host = "eagle"
    """Content of a real slot. `eagle`: `fc([embedding; feature])` and EAGLE's losses. `medusa`: the embedding plus
    the feature, no `fc`, so that the drafter is one target-shaped layer, and losses on tokens alone. (The sum is
    reconstruction: the source does not say what it reads there.)"""
    mask_feature: MaskFeature = "shared"
    """A mask token's stand-in for the target's feature (reconstruction): one trained vector, one a depth, the feature
    of the last real slot, or nothing. P-EAGLE found `shared` best."""
    shared_mask: bool = False
    """One mask embedding for all depths (PARD, P-EAGLE) instead of one a depth."""
    attention_norm: bool = False
    """An RMSNorm before the layer's attention, as the target's own layers have and EAGLE's head does not
    (reconstruction: known is that the layer is of the target's shape)."""
    bidirectional: bool = False
    """Mask tokens of a group see each other both ways instead of causally (reconstruction; DFlash does)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_norm or self.zero_logits or self.embed_vocab:
            raise ValueError(
                "a ParallelSpec drafter has no head_norm, no zero_logits and no embedding of its own: leave them off"
            )
        self.check_slots()
        if self.bidirectional and self.keep < 1:
            raise ValueError("bidirectional groups need all their slots: set keep to 1, or bidirectional to false")

    def shapes(self) -> dict[str, Shape]:
        """Returns the shape of every weight."""
        shapes = self.fusion_shapes()
        if self.host == "medusa":
            shapes = {name: shape for name, shape in shapes.items() if name == "embedding_norm"}
        masks = self.tokens - 1
        shapes["mask_tokens"] = (1 if self.shared_mask else masks, self.width)
        if self.mask_feature in ("shared", "per_depth"):
            shapes["mask_features"] = (1 if self.mask_feature == "shared" else masks, self.width)
        if self.attention_norm:
            shapes["attention_norm"] = (self.width,)
        return shapes | self.layer_shapes()


class ParallelSpec(PairReader, MaskTokens):
    """The ParallelSpec drafter as pure functions of its weights."""

    declarations: ClassVar[dict[str, Weight]] = WEIGHTS

    @property
    def bidirectional(self) -> bool:  # type: ignore[override]
        """See `ParallelSpecConfig`."""
        return self.config.bidirectional

    def fuse(self, embedding_BLD: Array, feature_BLD: Array) -> Array:
        """The layer's input at a slot; with `embedding_norm` (reconstruction) embeddings weigh as much as features."""
        embedding_BLD = self.normed(embedding_BLD)
        if self.config.host == "medusa":
            return embedding_BLD.astype(self.dtype) + feature_BLD.astype(self.dtype)
        return self.fuse_pair(embedding_BLD, feature_BLD)

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
