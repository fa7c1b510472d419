"""FSPAD (Gui et al. 2024, arXiv 2408.15562): EAGLE's head with feature sampling and partial alignment distillation.

Feature sampling (`Fspad.fuse`) lets the token's embedding gate the fused pair in a wide space, so that the feature says
which token was drawn. Partial alignment distillation (`Fspad.finish`) splits the layer's output: one half is scored,
only the other is held to the target's feature and handed on, so that the logits' loss and the features' do not pull at
the same numbers.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.drafters import eagle
from jaxspec.drafters.eagle import Eagle, EagleConfig
from jaxspec.drafters.one_layer import LayerOptions
from jaxspec.nn.matmul import multiply
from jaxspec.nn.mlp import WIDE, constrain_rows
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.weights import NORM, Shape, Weight, declare, uniform
from jaxspec.parallel.mesh import constrain

WEIGHTS = eagle.WEIGHTS | declare(
    {
        "sampling_norm": NORM,
        "sampling_gate": Weight(uniform(), ("width", "mlp"), (-2,), multiplied=True),
        "sampling_up": Weight(uniform(), ("width", "mlp"), (-2,), multiplied=True),
        "sampling_down": Weight(uniform(), ("mlp", "width"), (-2,), multiplied=True),
    }
)
"""Weights that an FSPAD head may have."""


@dataclasses.dataclass(frozen=True)
class FspadOptions(LayerOptions):
    """Options of an FSPAD head, see `FspadConfig`; None follows the target or the default there."""

    bias: bool | None = None
    embedding_norm: bool | None = None
    zero_logits: bool | None = None
    feature_sampling: bool | None = None
    partial_alignment: bool | None = None


@dataclasses.dataclass(frozen=True)
class FspadConfig(EagleConfig):
    """The shape of an FSPAD head. Without both of its parts it is an EAGLE head."""

    feature_sampling: bool = True
    """Whether the embedding gates the fused pair."""
    partial_alignment: bool = True
    """Whether the output has two halves, of which one is scored and the other aligned with the target's feature."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_norm:
            raise ValueError("an FSPAD head has no head_norm: leave it off")

    def shapes(self) -> dict[str, Shape]:
        """Returns the shape of every weight."""
        shapes = self.fusion_shapes()
        if self.feature_sampling:
            shapes |= {
                "sampling_norm": (self.width,),
                "sampling_gate": (self.width, self.mlp),
                "sampling_up": (self.width, self.mlp),
                "sampling_down": (self.mlp, self.width),
            }
        shapes |= self.layer_shapes()
        if self.partial_alignment:
            shapes["down"] = (self.mlp, 2 * self.width)
        return shapes


class Fspad(Eagle):
    """The FSPAD head as pure functions of its weights."""

    declarations: ClassVar[dict[str, Weight]] = WEIGHTS

    def fuse(self, embedding_BLD: Array, feature_BLD: Array) -> tuple[Array, Array]:
        """`h = fc([e; f])`; with feature sampling `h + down(silu(gate(e)) * up(norm(h)))`.

        The paper's code takes the embedding `e` as it is; with `embedding_norm` it is normalised, which is ours.
        """
        w, embedding_BLD = self.weights, self.normed(embedding_BLD)
        h = self.fuse_pair(embedding_BLD, feature_BLD)
        if not self.config.feature_sampling:
            return h, h
        normed = rms_norm(h, w["sampling_norm"], self.config.norm_eps)
        # Of a table whose width is spread over the chips: left as it is, XLA would send the wide gates of all rows.
        embedding_BLD = constrain_rows(embedding_BLD.astype(self.dtype))
        gate_BLF = constrain(multiply(w, "sampling_gate", embedding_BLD), *WIDE)
        inner_BLF = jax.nn.silu(gate_BLF) * constrain(multiply(w, "sampling_up", normed), *WIDE)
        h = h + constrain_rows(multiply(w, "sampling_down", inner_BLF))
        return h, h

    def finish(self, stream_BLD: Array) -> tuple[Array, Array]:
        """Partial alignment, `[a; a] + mlp(norm(a))`: the first half is scored, the second aligned and handed on."""
        if not self.config.partial_alignment:
            return super().finish(stream_BLD)
        scored, aligned = jnp.split(self.feed_forward(stream_BLD), 2, axis=-1)
        return stream_BLD + scored, stream_BLD + aligned
