"""The EAGLE-1/2 head: one decoder layer over (next token's embedding, target feature) below the target's LM head.

EAGLE (Li et al. 2024, arXiv 2401.15077) and EAGLE-2 (arXiv 2406.16858) share this network; EAGLE-2 differs in the tree,
`trees.dynamic`. HASS (Zhang et al. 2024, arXiv 2408.15766) trains the same network by harmonized context alignment,
which is `Recurrent`'s unrolling, and harmonized objective distillation, which is the loss `top_k`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from jaxspec.base import Array, Params, SharedTables
from jaxspec.drafters.one_layer import HEAD_LAYER, LayerOptions, OneLayer
from jaxspec.drafters.recurrent import Recurrent
from jaxspec.nn.layer_weights import check_layer, layer_shapes
from jaxspec.nn.lm_head import score_tokens
from jaxspec.nn.matmul import multiply
from jaxspec.nn.mlp import constrain_rows
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.options import Options
from jaxspec.nn.rope import RopeScaling
from jaxspec.nn.weights import BIAS, NORM, TABLE, Shape, Weight, declare, uniform

FUSION = declare(
    {
        "fc": Weight(uniform(), (None, "width"), (-2,), multiplied=True),
        "fc_bias": dataclasses.replace(BIAS, init=uniform(lambda shape: 2 * shape[0])),
        "embedding_norm": NORM,
    },
    {
        "fc": "reads the next token's embedding and the target's feature, in this order; in eagle3 and peagle the "
        "target's auxiliary hidden states"
    },
)
"""The fusion layer, which makes one vector of embedding and feature, or of EAGLE-3's features."""
WEIGHTS = FUSION | HEAD_LAYER | declare({"embed": TABLE, "head_norm": NORM})
"""Weights that an EAGLE head may have."""


@dataclasses.dataclass(frozen=True)
class EagleOptions(LayerOptions):
    """Options of an EAGLE head, see `EagleConfig`; None follows the target or the default there."""

    bias: bool | None = None
    embedding_norm: bool | None = None
    head_norm: bool | None = None
    zero_logits: bool | None = None


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """The shape of an EAGLE head. `width` is the target's; the heads need not be."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    bias: bool = True
    """Whether the fusion layer `fc` has a bias: Llama-2 and Vicuna heads do, Llama-3 heads do not."""
    embedding_norm: bool = False
    """An RMSNorm on the token embedding before fusion, which some published HASS heads have."""
    head_norm: bool = False
    """An RMSNorm between the layer's output and the LM head, likewise; the recurrent feature is taken before it."""
    zero_logits: bool = False
    """Training only: count keys that a query must not see with score 0, as HASS's released attention does; decoding
    masks them. For comparisons with that code."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases, as in heads for Qwen2."""
    out_bias: bool = False
    """Whether the attention's output has one too, as where `attention_bias` is set."""
    qk_norm: bool = False
    """RMSNorms over the channels of every query and key before they are rotated, as in heads of Qwen3's layers."""
    embed_vocab: int = 0
    """Tokens of an embedding of its own, as some published files have it; 0: it reads the target's."""

    def __post_init__(self) -> None:
        check_layer(self)

    @property
    def group(self) -> int:
        """Query heads per key-value head, `G`."""
        return self.heads // self.kv_heads

    def shapes(self) -> dict[str, Shape]:
        """Returns the shape of every weight; their order numbers the keys of initial values."""
        return self.fusion_shapes() | self.layer_shapes() | ({"head_norm": (self.width,)} if self.head_norm else {})

    def fusion_shapes(self) -> dict[str, Shape]:
        """Returns the shapes of what makes one vector of embedding and feature."""
        shapes: dict[str, Shape] = {"fc": (2 * self.width, self.width)}
        if self.bias:
            shapes["fc_bias"] = (self.width,)
        if self.embedding_norm:
            shapes["embedding_norm"] = (self.width,)
        if self.embed_vocab:
            shapes["embed"] = (self.embed_vocab, self.width)
        return shapes

    def layer_shapes(self) -> dict[str, Shape]:
        """Returns the shapes of the decoder layer.

        It has no norm before its attention, for it reads features behind the target's last norm (EAGLE issue 91).
        """
        shapes = layer_shapes(self, self.layer_options)
        del shapes["attention_norm"]
        return shapes

    @property
    def layer_options(self) -> Options:
        """Departures of its decoder layers from Llama's."""
        return Options(qkv_bias=self.qkv_bias, out_bias=self.out_bias, qk_norm=self.qk_norm)


class PairReader(OneLayer):
    """A head whose slots hold (next token's embedding, feature): the pair that EAGLE shifts by one token. Abstract."""

    def embedding(self, shared: SharedTables, tokens_BL: Array) -> Array:
        """Embeddings of tokens: its own, or the target's."""
        return self.weights["embed"][tokens_BL] if self.config.embed_vocab else super().embedding(shared, tokens_BL)

    def normed(self, embedding_BLD: Array) -> Array:
        """The embedding, by its norm where the head has one."""
        if not self.config.embedding_norm:
            return embedding_BLD
        return rms_norm(embedding_BLD, self.weights["embedding_norm"], self.config.norm_eps)

    def fuse_pair(self, embedding_BLD: Array, feature_BLD: Array) -> Array:
        """`fc([embedding; feature])`, the embedding first, with the bias where there is one."""
        w = self.weights
        pair = jnp.concatenate([embedding_BLD.astype(self.dtype), feature_BLD.astype(self.dtype)], axis=-1)
        fused = constrain_rows(multiply(w, "fc", constrain_rows(pair)))
        return fused + w["fc_bias"].astype(self.dtype) if "fc_bias" in w else fused


class Eagle(PairReader, Recurrent):
    """The EAGLE-1/2 head as pure functions of its weights."""

    config: Any
    """An `EagleConfig`."""

    declarations: ClassVar[dict[str, Weight]] = WEIGHTS

    @property
    def zero_logits(self) -> bool:  # type: ignore[override]
        """See `EagleConfig`."""
        return self.config.zero_logits

    def fuse(self, embedding_BLD: Array, feature_BLD: Array) -> tuple[Array, Array]:
        """The fused pair is the stream, and what the attention reads."""
        fused = self.fuse_pair(self.normed(embedding_BLD), feature_BLD)
        return fused, fused

    def finish(self, stream_BLD: Array) -> tuple[Array, Array]:
        """The layer's output is both what is scored and the predicted feature."""
        out = stream_BLD + self.feed_forward(stream_BLD)
        return out, out

    def scoring(self, params: Params) -> Params:
        """The norm before the target's LM head, where there is one."""
        return {"head_norm": params["head_norm"]} if self.config.head_norm else {}

    def score(self, hidden_BLD: Array, head_VD: Array) -> Array:
        """fp32 logits of outputs under the target's LM head."""
        if self.config.head_norm:
            hidden_BLD = rms_norm(hidden_BLD, self.weights["head_norm"], self.config.norm_eps)
        return score_tokens(hidden_BLD, head_VD)
