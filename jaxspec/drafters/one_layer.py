"""A head of one decoder layer: its weights, its projections, and the parts of the contract that all such heads
share."""

from __future__ import annotations

import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Frontier, Mask, Params, SharedTables, Unrolled
from jaxspec.drafters.module import DrafterModule
from jaxspec.nn.decoder_layer import merge_heads, project_qkv
from jaxspec.nn.lm_head import score_tokens
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.rope import RopeScaling, rope, rope_frequencies
from jaxspec.parallel.rows import look_up


class HeadConfig(Protocol):
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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight."""
        ...


def init_weight(key: Array, name: str, shape: tuple[int, ...]) -> Array:
    """EAGLE's initialisation: norms one, all else U(-1/sqrt(fan_in), 1/sqrt(fan_in)); mask slots and embeddings are
    normal(0.02), and biases of the attention, which are ours to choose, zero."""
    if name.endswith("norm"):
        return jnp.ones(shape, jnp.float32)
    if name in ("qkv_bias", "out_bias"):
        return jnp.zeros(shape, jnp.float32)
    if name.startswith("mask") or name == "embed":
        return 0.02 * jax.random.normal(key, shape, jnp.float32)
    fan_in = {"out": math.prod(shape[:-1]), "fc_bias": 2 * shape[0], "head": shape[-1]}.get(name, shape[0])
    return jax.random.uniform(key, shape, jnp.float32, -(fan_in**-0.5), fan_in**-0.5)


class OneLayer(DrafterModule):
    """A head of one decoder layer, as pure functions of its weights. Abstract: see `Recurrent` and `MaskTokens`."""

    config: Any
    """A `HeadConfig`."""

    def setup(self) -> None:
        self.weights = {
            name: self.param(name, init_weight, name, shape)
            for name, shape in self.config.shapes().items()
            if self.is_given(name)
        }

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

    def mix(self, stream_BLD: Array, mixed_BLKGC: Array) -> Array:
        """The residual stream behind the attention."""
        return stream_BLD + merge_heads(self.weights, mixed_BLKGC)

    # The parts of the contract that all of them share.

    def init_params(self, key: Array, shared: SharedTables | None = None) -> Params:
        """Random weights as the reference initialises them."""
        return {
            name: init_weight(jax.random.fold_in(key, i), name, shape)
            for i, (name, shape) in enumerate(self.config.shapes().items())
        }

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

    def unroll(
        self,
        params: Params,
        shared: SharedTables,
        tokens_BL: Array,
        features_BLD: Array,
        positions_BL: Array,
        mask_BLM: Mask,
        steps: int,
        keys_B: Array | None = None,
    ) -> Unrolled:
        """`steps` draft steps from every position at once (HASS's context alignment, row layout).

        Row `i` at step `j` is what drafting from `f_i` puts out after reading `x_{i+1} .. x_{i+j+1}`; it predicts
        `f_{i+j+1}` and the token after. Rows whose tokens run past the document are garbage for the loss mask to drop.
        """
        arguments = (shared, tokens_BL, features_BLD, positions_BL, mask_BLM, steps, keys_B)
        return self.apply({"params": params}, *arguments, method="_unroll")  # type: ignore[return-value]

    def logits(self, params: Params, shared: SharedTables, hidden_BLD: Array, step: int = 0) -> Array:
        """fp32 logits `[B, L, V]` of outputs `[B, L, D]`."""
        return self.apply({"params": params}, hidden_BLD, shared.head_VD, method="score")  # type: ignore[return-value]

    def score(self, hidden_BLD: Array, head_VD: Array) -> Array:
        """fp32 logits of outputs under the target's LM head."""
        return score_tokens(hidden_BLD, head_VD)
