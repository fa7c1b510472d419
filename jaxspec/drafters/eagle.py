"""The EAGLE-1/2 head: one decoder layer over (next token's embedding, target feature) below the target's LM head.

EAGLE (Li et al. 2024, section 4) and EAGLE-2 share this network; EAGLE-2 differs in the tree. Unrolled for several
steps with `unroll` it is the network HASS trains.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxspec.base import Array, Params
from jaxspec.drafters.recurrent import Recurrent
from jaxspec.nn.decoder_layer import layer_shapes
from jaxspec.nn.lm_head import score_tokens
from jaxspec.nn.mlp import constrain_rows, gated_mlp
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.options import Options
from jaxspec.nn.rope import RopeScaling


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

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")

    @property
    def group(self) -> int:
        """Query heads per key-value head, `G`."""
        return self.heads // self.kv_heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight. There is no attention norm: the head reads post-norm features (EAGLE issue 91)."""
        shapes: dict[str, tuple[int, ...]] = {"fc": (2 * self.width, self.width)}
        if self.bias:
            shapes["fc_bias"] = (self.width,)
        if self.embedding_norm:
            shapes["embedding_norm"] = (self.width,)
        shapes |= layer_weights(self)
        if self.head_norm:
            shapes["head_norm"] = (self.width,)
        return shapes


def layer_weights(c: EagleConfig) -> dict[str, tuple[int, ...]]:
    """Weights of the decoder layer, without a norm before its attention."""
    shapes = layer_shapes(c, layer_options(c))
    return {name: shape for name, shape in shapes.items() if name != "attention_norm"}


def layer_options(c: EagleConfig) -> Options:
    """What its decoder layers have beyond Llama's."""
    return Options(qkv_bias=c.qkv_bias, out_bias=c.out_bias, qk_norm=c.qk_norm)


class Eagle(Recurrent):
    """The EAGLE-1/2 head as pure functions of its weights."""

    @property
    def zero_logits(self) -> bool:  # type: ignore[override]
        """See `EagleConfig`."""
        return self.config.zero_logits

    def fuse(self, embedding_BLD: Array, feature_BLD: Array) -> tuple[Array, Array]:
        """`fc([embedding; feature])`, the embedding first."""
        w = self.weights
        if self.config.embedding_norm:
            embedding_BLD = rms_norm(embedding_BLD, w["embedding_norm"], self.config.norm_eps)
        fused = concatenate_and_project(w, embedding_BLD, feature_BLD, self.dtype)
        return fused, fused

    def finish(self, stream_BLD: Array) -> tuple[Array, Array]:
        """The layer's output is both what is scored and the predicted feature."""
        out = stream_BLD + gated_mlp(self.weights, rms_norm(stream_BLD, self.weights["mlp_norm"], self.config.norm_eps))
        return out, out

    def scoring(self, params: Params) -> Params:
        """The norm before the target's LM head, where there is one."""
        return {"head_norm": params["head_norm"]} if self.config.head_norm else {}

    def score(self, hidden_BLD: Array, head_VD: Array) -> Array:
        """fp32 logits of outputs under the target's LM head."""
        if self.config.head_norm:
            hidden_BLD = rms_norm(hidden_BLD, self.weights["head_norm"], self.config.norm_eps)
        return score_tokens(hidden_BLD, head_VD)


def concatenate_and_project(weights: dict[str, Array], embedding: Array, feature: Array, dtype: Any) -> Array:
    """`fc([embedding; feature])`, with the bias where there is one."""
    pair = jnp.concatenate([embedding.astype(dtype), feature.astype(dtype)], axis=-1)
    fused = constrain_rows(jnp.einsum("BLE,ED->BLD", constrain_rows(pair), weights["fc"].astype(dtype)))
    return fused + weights["fc_bias"].astype(dtype) if "fc_bias" in weights else fused
