"""A head of one decoder layer: its shape, weights, projections, and the parts of the contract that all such heads
share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Protocol

from jaxspec.base import Array, Frontier, Params, SharedTables
from jaxspec.drafters.module import DrafterModule, DrafterOptions, TargetShape
from jaxspec.nn.decoder_layer import merge_heads, project_qkv
from jaxspec.nn.layer_weights import LAYER
from jaxspec.nn.lm_head import score_tokens
from jaxspec.nn.mlp import gated_mlp
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.rope import RopeScaling, rope, rope_frequencies
from jaxspec.nn.weights import Shape, Weight, all_but_last, uniform, with_init
from jaxspec.parallel.rows import look_up

HEAD_LAYER = with_init(LAYER, {"out": uniform(all_but_last), **dict.fromkeys(("qkv", "gate", "up", "down"), uniform())})
"""The weights of a head's decoder layer with EAGLE's initial values: matrices as PyTorch's linear layers begin, norms
one. Biases of the attention, which EAGLE's head has not, begin at zero."""


class HeadShape(Protocol):
    """The shape of a head of one layer."""

    @property
    def width(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> RopeScaling | None: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def qk_norm(self) -> bool: ...
    def shapes(self) -> dict[str, Shape]:
        """The shape of every weight."""
        ...


@dataclasses.dataclass(frozen=True)
class LayerOptions(DrafterOptions):
    """Options of a head's decoder layer; None follows the target's."""

    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp: int | None = None
    rope_theta: float | None = None
    qk_norm: bool | None = None  # as Qwen3's layers have it

    def follow(self, target: TargetShape) -> dict[str, Any]:
        """The layer's sizes, rotary positions and norm."""
        sizes = ("width", "heads", "kv_heads", "head_dim", "mlp")
        return target.pick(*sizes, "rope_theta", "rope_scaling", "norm_eps")


class OneLayer(DrafterModule):
    """A head of one decoder layer, as pure functions of its weights. Abstract: see `Recurrent` and `MaskTokens`."""

    config: Any
    """A `HeadShape`."""

    declarations: ClassVar[dict[str, Weight]] = HEAD_LAYER

    def embedding(self, shared: SharedTables, tokens_BL: Array) -> Array:
        """Embeddings `[B, L, D]` of tokens: the target's."""
        return look_up(shared.embed_VD, tokens_BL)

    def turn(self, positions_BL: Array) -> tuple[Array, Array]:
        """Cosine and sine of rotary positions."""
        c = self.config
        return rope(positions_BL, rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))

    def project(self, x_BLD: Array, positions_BL: Array, weights: Params | None = None) -> tuple[Array, Array, Array]:
        """Queries, keys and values at rotary positions, of the layer with these weights (default: the one there is)."""
        c = self.config
        norm = functools.partial(rms_norm, eps=c.norm_eps) if c.qk_norm else None
        return project_qkv(weights or self.weights, x_BLD, *self.turn(positions_BL), norm)

    def mix(self, stream_BLD: Array, mixed_BLKGC: Array, weights: Params | None = None) -> Array:
        """The residual stream behind the attention."""
        return stream_BLD + merge_heads(weights or self.weights, mixed_BLKGC)

    def feed_forward(self, stream_BLD: Array, weights: Params | None = None) -> Array:
        """`mlp(norm(x))`, which a layer adds to its residual stream."""
        w = weights or self.weights
        return gated_mlp(w, rms_norm(stream_BLD, w["mlp_norm"], self.config.norm_eps))

    # The parts of the contract that all of them share.

    def extend(
        self, params: Params, shared: SharedTables, state: Any, tokens_BL: Array, features_BLD: Array, count_B: Array
    ) -> tuple[Any, Array]:
        """Take in up to `L` pairs (feature, next token), `count` of them real, and score the root's children.

        Returns the new state and logits `[B, V]`. Rows with count 0 keep their state.
        """
        return self.apply({"params": params}, shared, state, tokens_BL, features_BLD, count_B, method="_extend")  # type: ignore[return-value]

    def expand(
        self, params: Params, shared: SharedTables, state: Any, scratch: Any, frontier: Frontier
    ) -> tuple[Array, Any]:
        """Logits `[B, W, V]` of the children of one level's nodes."""
        return self.apply({"params": params}, shared, state, scratch, frontier, method="_expand")  # type: ignore[return-value]

    def logits(self, params: Params, shared: SharedTables, hidden_BLD: Array, step: int = 0) -> Array:
        """fp32 logits `[B, L, V]` of outputs `[B, L, D]`."""
        return self.apply({"params": params}, hidden_BLD, shared.head_VD, method="score")  # type: ignore[return-value]

    def score(self, hidden_BLD: Array, head_VD: Array) -> Array:
        """fp32 logits of outputs under the target's LM head."""
        return score_tokens(hidden_BLD, head_VD)
