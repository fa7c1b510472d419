"""Medusa heads (Cai et al. 2024, arXiv 2401.10774): each predicts a later token from the target's feature alone.

The target is frozen: the paper's Medusa-1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Params, SharedTables, Unrolled, UnrollInputs
from jaxspec.drafters.module import DrafterOptions, TargetShape
from jaxspec.drafters.one_pass import OnePass, ParallelState
from jaxspec.nn.lm_head import score_tokens
from jaxspec.nn.remat import recompute
from jaxspec.nn.weights import BIAS, TABLE, Shape, Weight, declare, uniform, zeros

WEIGHTS = declare(
    {
        "block": Weight(zeros, (None, "width"), (-2,)),
        "block_bias": BIAS,
        "heads": dataclasses.replace(TABLE, init=uniform()),
    }
)
"""Weights that Medusa heads may have."""


@dataclasses.dataclass(frozen=True)
class MedusaOptions(DrafterOptions):
    """Options of Medusa heads, see `MedusaConfig`; None follows the target or the default there."""

    tokens: int | None = None
    layers: int | None = None
    vocab: int | None = None  # 0: share the target's LM head

    def follow(self, target: TargetShape) -> dict[str, Any]:
        """The features' width, and an LM head each for the tokens that are scored."""
        return {"width": target.width, "vocab": target.scored}


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """The shape of Medusa heads."""

    width: int
    tokens: int = 4
    """How many heads there are: head `k` of `1 .. K` predicts the token `k` places behind the target's own next."""
    layers: int = 1
    """Times that a head's residual block is applied; the released code repeats one block, so weights do not grow."""
    vocab: int = 0
    """Tokens that the heads' own LM heads score; 0 where they share the target's (its later, lighter form)."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.layers < 1 or self.vocab < 0:
            raise ValueError(
                f"tokens={self.tokens} and layers={self.layers} must be at least 1, and vocab={self.vocab} at least 0"
            )

    def shapes(self) -> dict[str, Shape]:
        """Returns the shape of every weight."""
        shapes: dict[str, Shape] = {
            "block": (self.tokens, self.width, self.width),
            "block_bias": (self.tokens, self.width),
        }
        return shapes | ({"heads": (self.tokens, self.vocab, self.width)} if self.vocab else {})


class Medusa(OnePass):
    """Medusa heads as pure functions of their weights."""

    config: MedusaConfig

    declarations: ClassVar[dict[str, Weight]] = WEIGHTS

    @property
    def vocab(self) -> int | None:
        """Tokens that the heads' own LM heads score; None where they share the target's."""
        return self.config.vocab or None

    def predict(self, feature_BLD: Array) -> Array:
        """Every head's output, `[K, B, L, D]`: `x + silu(W x + b)`."""
        w = self.weights

        def residual(out: Array) -> Array:
            inner = jnp.einsum("TBLD,TDE->TBLE", out, w["block"].astype(self.dtype))
            return out + jax.nn.silu(inner + w["block_bias"].astype(self.dtype)[:, None, None])

        out = jnp.broadcast_to(feature_BLD.astype(self.dtype), (self.config.tokens, *feature_BLD.shape))
        for _ in range(self.config.layers):
            out = recompute(self.remat, residual)(out)
        return out

    def score(self, hidden_BLD: Array, head_VD: Array, head: int) -> Array:
        """fp32 logits of a head's outputs."""
        return score_tokens(hidden_BLD, self.weights["heads"][head] if self.config.vocab else head_VD)

    # The drafter contract, as functions of explicit weights.

    def init_params(self, key: Array, shared: SharedTables | None = None) -> Params:
        """Blocks that begin near the identity (weights 0, biases random), LM heads as the target's if it is given."""
        params = super().init_params(key)
        bound = self.config.width**-0.5
        params["block_bias"] = jax.random.uniform(key, params["block_bias"].shape, jnp.float32, -bound, bound)
        if self.config.vocab and shared is not None:
            head_VD = shared.head_VD.astype(jnp.float32)
            params["heads"] = jnp.broadcast_to(head_VD, params["heads"].shape)
        return params

    def init_state(self, params: Params, shared: SharedTables, first_B: Array, capacity: int) -> ParallelState:
        """Empty state: nothing but the outputs at the newest feature is kept."""
        c, batch = self.config, first_B.shape[0]
        return ParallelState(None, jnp.zeros(batch, jnp.int32), jnp.zeros((batch, c.tokens, c.width), self.dtype))

    def extend(
        self,
        params: Params,
        shared: SharedTables,
        state: ParallelState,
        tokens_BL: Array,
        features_BLD: Array,
        count_B: Array,
    ) -> tuple[ParallelState, Array]:
        """Take in the newest feature and score the root's children. Rows with count 0 keep their state."""
        last = jnp.maximum(count_B - 1, 0)[:, None, None]
        feature_B1D = jnp.take_along_axis(features_BLD, last, axis=1)
        hidden: Any = self.apply({"params": params}, feature_B1D, method="predict")
        hidden_BTD = jnp.where((count_B > 0)[:, None, None], jnp.swapaxes(hidden[:, :, 0], 0, 1), state.hidden_BTD)
        state = ParallelState(None, state.length_B + count_B, hidden_BTD)
        return state, self.logits(params, shared, hidden_BTD[:, :1])[:, 0]

    def _unroll(self, shared: SharedTables, inputs: UnrollInputs, steps: int) -> Unrolled:
        """The first `steps` heads' outputs at every position."""
        return Unrolled(self.predict(inputs.features_BLD)[:steps])

    def scoring(self, params: Params) -> Params:
        """The heads' own LM heads, where there are any."""
        return {"heads": params["heads"]} if self.config.vocab else {}

    def logits(self, params: Params, shared: SharedTables, hidden_BLD: Array, step: int = 0) -> Array:
        """fp32 logits `[B, L, V]` of the outputs of head `step`."""
        return self.apply({"params": params}, hidden_BLD, shared.head_VD, step, method="score")  # type: ignore[return-value]

    def score_below(self, params: Params, shared: SharedTables, hidden_BTD: Array) -> Array:
        """Logits `[B, T, V]` of the outputs for depths 1, 2 ..., each depth's by its own LM head if there are such."""
        if self.vocab is None:
            return super().score_below(params, shared, hidden_BTD)
        depths = range(hidden_BTD.shape[1])
        return jnp.concatenate([self.logits(params, shared, hidden_BTD[:, d : d + 1], d + 1) for d in depths], axis=1)
