"""P-EAGLE (arXiv 2602.01469): an EAGLE-3 head of several layers that drafts all tokens in one pass, by mask tokens.

A mask token is the embedding of one token set aside for that, and one trained vector in place of the target's auxiliary
hidden states, which passes `fc` as they do. The first layer reads both as an EAGLE-3 head's does, and those above it
are a Llama's. So speculators and SpecForge train such heads and vLLM serves them; the paper's text was not found.
Reconstruction are the weights that training begins from (speculators' vector of N(0, 1), EAGLE's uniform ones for the
rest), that a head may go without an embedding of its own, and that the positions which a depth is trained at are drawn
by row.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Params, SharedTables
from jaxspec.drafters import eagle3
from jaxspec.drafters.eagle3 import Eagle3Config, TapOptions, TapReader
from jaxspec.drafters.mask_tokens import MaskTokens, SlotOptions
from jaxspec.drafters.module import TargetShape
from jaxspec.nn.layer_weights import layer_shapes
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.weights import Shape, Weight, declare, normal

WEIGHTS = eagle3.WEIGHTS | declare({"mask_feature": Weight(normal(1.0))})
"""Weights that a P-EAGLE head may have, those of the layers above the first too."""


@dataclasses.dataclass(frozen=True)
class PEagleOptions(TapOptions):
    """Options of a P-EAGLE head, see `PEagleConfig`; None follows the target or the default there."""

    tokens: int | None = None
    keep: float | None = None
    keep_least: float | None = None
    layers: int | None = None
    mask_token: int | None = None

    def follow(self, target: TargetShape) -> dict[str, Any]:
        """As for EAGLE-3, and always an embedding of its own, which the mask's token needs."""
        return {**super().follow(target), "embed_vocab": target.vocab}


@dataclasses.dataclass(frozen=True)
class PEagleConfig(SlotOptions, Eagle3Config):
    """The shape of a P-EAGLE head, defaults those of speculators and of the published heads."""

    tokens: int = 8
    keep: float = 0.7
    layers: int = 4
    mask_token: int = -1
    """Id of the token whose embedding mask tokens have. No text should hold it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_slots()
        if self.layers < 1:
            raise ValueError(f"layers={self.layers} must be at least 1")
        if not 0 <= self.mask_token < (self.embed_vocab or self.mask_token + 1):
            raise ValueError(
                f"a P-EAGLE head needs in mask_token the id of a token that no text holds, not {self.mask_token}: its "
                "embedding is that of mask tokens"
            )
        if self.normed_feature:
            raise ValueError("a P-EAGLE head reads no feature of its own: leave normed_feature off")

    def shapes(self) -> dict[str, Shape]:
        """Returns the shape of every weight but those of the layers above the first."""
        return {**super().shapes(), "mask_feature": (len(self.taps) * self.feature_width,)}

    def upper_shapes(self) -> dict[str, Shape]:
        """Returns the shape of every weight of a layer above the first."""
        return layer_shapes(self, self.layer_options)


class PEagle(TapReader, MaskTokens):
    """The P-EAGLE head as pure functions of its weights: its first layer's, and `layers`, a list of those above."""

    config: PEagleConfig

    declarations: ClassVar[dict[str, Weight]] = WEIGHTS

    def setup(self) -> None:
        super().setup()
        self.upper = ()
        if self.has_variable("params", "layers"):  # taken as they are: laid out for a CPU, their shapes are others
            self.upper = self.get_variable("params", "layers")
        elif self.config.layers > 1 and self.is_initializing():
            self.upper = self.param("layers", self._init_upper)

    @property
    def layer_count(self) -> int:
        """Decoder layers."""
        return self.config.layers

    @property
    def layer_weights(self) -> list[Params]:
        """The weights of each."""
        return [self.weights, *self.upper]

    def real_slots(self, shared: SharedTables, tokens_BL: Array, features_BLD: Array) -> Array:
        """`[embedding; fc(taps)]`."""
        return jnp.concatenate([self.embedding(shared, tokens_BL).astype(self.dtype), self.read(features_BLD)], axis=-1)

    def mask_tokens(self, shared: SharedTables, anchor_BLD: Array, depth: int) -> Array:
        """The same of the mask's token and its vector, alike for all groups and depths."""
        shape = anchor_BLD.shape[:2]
        embedding = self.embedding(shared, jnp.full(shape, self.config.mask_token)).astype(self.dtype)
        feature = self.read(self.weights["mask_feature"][None, None])
        return jnp.concatenate([embedding, jnp.broadcast_to(feature, embedding.shape)], axis=-1)

    def enter(self, layer: int, x_BLE: Array) -> tuple[Array, Array]:
        """Embedding and feature into the first layer, the stream into the others."""
        if layer == 0:
            return self.fuse(*jnp.split(x_BLE, 2, axis=-1))
        return x_BLE, rms_norm(x_BLE, self.layer_weights[layer]["attention_norm"], self.config.norm_eps)

    def init_params(self, key: Array, shared: SharedTables | None = None) -> Params:
        """Random weights; its own embedding as the target's, if that is given and as wide."""
        params = super().init_params(key, shared)
        params["mask_feature"] = WEIGHTS["mask_feature"].init(key, params["mask_feature"].shape)
        return params | ({"layers": self._init_upper(key)} if self.config.layers > 1 else {})

    def _init_upper(self, key: Array) -> list[dict[str, Any]]:
        shapes = self.config.upper_shapes()
        return [
            {
                name: WEIGHTS[name].init(jax.random.fold_in(key, 100 * i + j), shape)
                for j, (name, shape) in enumerate(shapes.items())
            }
            for i in range(1, self.config.layers)
        ]
