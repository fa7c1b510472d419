"""The EAGLE-3 head (Li et al. 2025, arXiv 2503.01840): three fused layers of the target, trained over its own steps
("training-time test"), its own LM head.

It reads the target's hidden states at a low, a middle and a high layer: its *auxiliary hidden states* in the words of
vLLM, SGLang and speculators. The layers whose inputs they are, and for short the states, are called taps.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from jaxspec.base import Array, Params, SharedTables
from jaxspec.drafters.eagle import FUSION, EagleConfig
from jaxspec.drafters.module import TargetShape
from jaxspec.drafters.one_layer import HEAD_LAYER, LayerOptions, OneLayer
from jaxspec.drafters.recurrent import Recurrent
from jaxspec.nn.lm_head import score_tokens
from jaxspec.nn.matmul import multiply
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.weights import NORM, TABLE, Shape, Weight, declare, last_axis, uniform

WEIGHTS = (
    FUSION
    | HEAD_LAYER
    | declare(
        {
            "embed": TABLE,
            "input_norm": NORM,
            "taps_norm": NORM,
            "feature_norm": NORM,
            "norm": NORM,
            "head": dataclasses.replace(TABLE, init=uniform(last_axis)),
        }
    )
)
"""Weights that an EAGLE-3 head may have."""


def default_taps(layers: int) -> tuple[int, int, int]:
    """The reference's auxiliary hidden states: inputs of layers 2, `L // 2` and `L - 3`, which are the outputs of those
    before them.

    Raises ValueError for targets too shallow for three of them.
    """
    taps = (2, layers // 2, layers - 3)
    if not taps[0] < taps[1] < taps[2]:
        raise ValueError(
            f"a target of {layers} layers is too shallow for EAGLE-3's three taps, inputs of layers {taps}: name taps "
            "in head.taps"
        )
    return taps


@dataclasses.dataclass(frozen=True)
class TapOptions(LayerOptions):
    """Options of a head that reads the target's auxiliary hidden states; see `Eagle3Config`."""

    width: int | None = None
    vocab: int | None = None
    taps: tuple[int, ...] | None = None
    norm_before_residual: bool | None = None
    input_norm: bool | None = None  # speculators' norm_before_fc
    tap_norms: bool | None = None  # EAGLE-3.1's fc_norm

    def follow(self, target: TargetShape) -> dict[str, Any]:
        """Its layer's shape, the target's taps, and an embedding of its own where it is of another width."""
        narrow = self.width not in (None, target.width)
        return {
            **super().follow(target),
            "vocab": target.scored,
            "taps": () if self.taps is not None else default_taps(target.layers),
            "target_width": target.width if narrow else None,
            "embed_vocab": target.vocab if narrow else 0,
        }


@dataclasses.dataclass(frozen=True)
class Eagle3Options(TapOptions):
    """Options of an EAGLE-3 head, see `Eagle3Config`; None follows the target or the default there."""

    normed_feature: bool | None = None  # EAGLE-3.1's norm_output


@dataclasses.dataclass(frozen=True)
class Eagle3Config(EagleConfig):
    """The shape of an EAGLE-3 head, which may be narrower or wider than its target: then embeddings are its own."""

    bias: bool = False
    vocab: int = 0
    """Tokens that its own LM head scores: the target's, or those of a draft vocabulary."""
    taps: tuple[int, ...] = ()
    """Layers of the target whose inputs it reads (EAGLE-3's auxiliary hidden states), ascending."""
    norm_before_residual: bool = False
    """Whether the stream itself is the normed feature, as in heads that speculators trains by default."""
    input_norm: bool = False
    """An RMSNorm over all taps together before `fc` (speculators' `norm_before_fc`)."""
    tap_norms: bool = False
    """An RMSNorm over each tap before `fc` (EAGLE-3.1's `fc_norm`)."""
    normed_feature: bool = False
    """Whether the feature for the next step is the normed output (EAGLE-3.1's `norm_output`)."""
    target_width: int | None = None
    """Of the target's features, where it is not the head's."""
    embed_vocab: int = 0
    """Tokens of its own embedding: the target's; 0: it reads the target's embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias or self.embedding_norm or self.head_norm:
            raise ValueError("an EAGLE-3 head has no bias, and norms of its own: leave bias and norms off")
        if self.vocab < 1 or not self.taps or list(self.taps) != sorted(set(self.taps)):
            raise ValueError(
                f"an EAGLE-3 head needs a vocab and ascending taps, not vocab={self.vocab}, taps={self.taps}"
            )
        if self.feature_width != self.width and not self.embed_vocab:
            raise ValueError(
                f"a head of width {self.width} cannot read the embedding of a target of width {self.target_width}: set "
                "embed_vocab to the target's tokens, for one of its own"
            )

    @property
    def feature_width(self) -> int:
        """Width of the target's features."""
        return self.target_width or self.width

    def shapes(self) -> dict[str, Shape]:
        """Returns the shape of every weight."""
        norms: dict[str, Shape] = {}
        if self.input_norm:
            norms["input_norm"] = (len(self.taps) * self.feature_width,)
        if self.tap_norms:
            norms["taps_norm"] = (len(self.taps), self.feature_width)
        return {
            **norms,
            **({"embed": (self.embed_vocab, self.width)} if self.embed_vocab else {}),
            "fc": (len(self.taps) * self.feature_width, self.width),
            "embedding_norm": (self.width,),
            "feature_norm": (self.width,),
            **self.layer_shapes(),
            "qkv": (2 * self.width, self.kv_heads, self.group + 2, self.head_dim),
            "norm": (self.width,),
            "head": (self.vocab, self.width),
        }


class TapReader(OneLayer):
    """A head over the target's auxiliary hidden states, with an LM head of its own (EAGLE-3, P-EAGLE). Abstract."""

    declarations: ClassVar[dict[str, Weight]] = WEIGHTS

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target whose inputs it reads."""
        return self.config.taps

    @property
    def vocab(self) -> int | None:
        """Tokens that its own LM head scores."""
        return self.config.vocab

    @property
    def feature_width(self) -> int | None:
        """Width of the target's features."""
        return self.config.feature_width

    def embedding(self, shared: SharedTables, tokens_BL: Array) -> Array:
        """Embeddings of tokens: its own, or the target's."""
        return self.weights["embed"][tokens_BL] if self.config.embed_vocab else super().embedding(shared, tokens_BL)

    def read(self, features_BLD: Array) -> Array:
        """`fc` over the taps, normed where the head norms them; only what comes from the target passes it."""
        w, c, x_BLE = self.weights, self.config, features_BLD.astype(self.dtype)
        if c.input_norm:
            x_BLE = rms_norm(x_BLE, w["input_norm"], c.norm_eps)
        if c.tap_norms:
            each = x_BLE.reshape(*x_BLE.shape[:-1], len(c.taps), c.feature_width)
            x_BLE = rms_norm(each, w["taps_norm"], c.norm_eps).reshape(x_BLE.shape)
        return multiply(w, "fc", x_BLE)

    def fuse(self, embedding_BLD: Array, feature_BLD: Array) -> tuple[Array, Array]:
        """The feature is the stream; the attention reads `[norm(e); norm(f)]`."""
        w, eps = self.weights, self.config.norm_eps
        embedding = rms_norm(embedding_BLD.astype(self.dtype), w["embedding_norm"], eps)
        normed = rms_norm(feature_BLD, w["feature_norm"], eps)
        stream = normed if self.config.norm_before_residual else feature_BLD
        return stream, jnp.concatenate([embedding, normed], axis=-1)

    def scoring(self, params: Params) -> Params:
        """Its own LM head and the norm before it."""
        return {"norm": params["norm"], "head": params["head"]}

    def score(self, hidden_BLD: Array, head_VD: Array) -> Array:
        """fp32 logits of its own LM head."""
        return score_tokens(rms_norm(hidden_BLD, self.weights["norm"], self.config.norm_eps), self.weights["head"])

    def init_params(self, key: Array, shared: SharedTables | None = None) -> Params:
        """Random weights; its own embedding as the target's, if that is given and as wide."""
        params, c = super().init_params(key), self.config
        if shared is not None and c.embed_vocab and c.feature_width == c.width:
            params["embed"] = jnp.array(shared.embed_VD, jnp.float32)  # a copy, for training donates it
        return params


class Eagle3(TapReader, Recurrent):
    """The EAGLE-3 head as pure functions of its weights. Gradients flow through the features from step to step."""

    detach = False

    def finish(self, stream_BLD: Array) -> tuple[Array, Array]:
        """The layer's output before its norm, which is also the feature unless the head hands on the normed one."""
        out = stream_BLD + self.feed_forward(stream_BLD)
        return out, rms_norm(out, self.weights["norm"], self.config.norm_eps) if self.config.normed_feature else out

    def regressed(self, features_TBLD: Array) -> Array | None:
        """No feature is held to the target's."""
        return None
