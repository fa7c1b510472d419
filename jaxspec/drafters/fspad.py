"""FSPAD (Gui et al. 2024): EAGLE's head with feature sampling and partial alignment distillation.

Feature sampling lets the token's embedding gate the fused pair in a wide space, so that the feature says which token
was drawn. Partial alignment splits the layer's output: one half is scored, only the other is held to the target's
feature and handed on, so that the logits' loss and the features' do not pull at the same numbers.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.drafters.eagle import EagleConfig, concatenate_and_project, layer_weights
from jaxspec.drafters.recurrent import Recurrent
from jaxspec.nn.mlp import WIDE, constrain_rows, gated_mlp
from jaxspec.nn.norm import rms_norm
from jaxspec.parallel.mesh import constrain


@dataclasses.dataclass(frozen=True)
class FspadConfig(EagleConfig):
    """The shape of an FSPAD head. Without both of its parts it is an EAGLE head."""

    feature_sampling: bool = True
    partial_alignment: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_norm:
            raise ValueError("an FSPAD head has no head_norm: leave it off")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight."""
        shapes: dict[str, tuple[int, ...]] = {"fc": (2 * self.width, self.width)}
        if self.bias:
            shapes["fc_bias"] = (self.width,)
        if self.embedding_norm:
            shapes["embedding_norm"] = (self.width,)
        if self.feature_sampling:
            shapes |= {
                "sampling_norm": (self.width,),
                "sampling_gate": (self.width, self.mlp),
                "sampling_up": (self.width, self.mlp),
                "sampling_down": (self.mlp, self.width),
            }
        shapes |= layer_weights(self)
        if self.partial_alignment:
            shapes["down"] = (self.mlp, 2 * self.width)
        return shapes


class Fspad(Recurrent):
    """The FSPAD head as pure functions of its weights."""

    @property
    def zero_logits(self) -> bool:  # type: ignore[override]
        """See `EagleConfig`."""
        return self.config.zero_logits

    def fuse(self, embedding_BLD: Array, feature_BLD: Array) -> tuple[Array, Array]:
        """`h = fc([e; f])`; with feature sampling `h + down(silu(gate(e)) * up(norm(h)))`.

        The paper's code takes the embedding `e` as it is; with `embedding_norm` it is normalised, which is ours.
        """
        w = self.weights
        if self.config.embedding_norm:
            embedding_BLD = rms_norm(embedding_BLD, w["embedding_norm"], self.config.norm_eps)
        h = concatenate_and_project(w, embedding_BLD, feature_BLD, self.dtype)
        if not self.config.feature_sampling:
            return h, h
        gate, up, down = (w[f"sampling_{name}"].astype(self.dtype) for name in ("gate", "up", "down"))
        normed = rms_norm(h, w["sampling_norm"], self.config.norm_eps)
        # Of a table whose width is spread over the chips: left as it is, XLA would send the wide gates of all rows.
        embedding_BLD = constrain_rows(embedding_BLD.astype(self.dtype))
        gate_BLF = constrain(embedding_BLD @ gate, *WIDE)
        h = h + constrain_rows((jax.nn.silu(gate_BLF) * constrain(normed @ up, *WIDE)) @ down)
        return h, h

    def finish(self, stream_BLD: Array) -> tuple[Array, Array]:
        """`[a; a] + mlp(norm(a))`: the first half is scored, the second aligned with the target and handed on."""
        out = gated_mlp(self.weights, rms_norm(stream_BLD, self.weights["mlp_norm"], self.config.norm_eps))
        if not self.config.partial_alignment:
            return stream_BLD + out, stream_BLD + out
        scored, aligned = jnp.split(out, 2, axis=-1)
        return stream_BLD + scored, stream_BLD + aligned
