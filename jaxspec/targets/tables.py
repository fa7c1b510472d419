"""A frozen target of which embedding and LM head are all there is: its features were computed before."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxspec.base import Array, KVCache, Params, SharedTables, TargetOutput
from jaxspec.nn.attention import cap
from jaxspec.nn.lm_head import score_tokens
from jaxspec.targets.decoder import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Tables:
    """See `base.Target`. Weights: `embed [V, D]`, and `head [V, D]` unless tied."""

    config: LlamaConfig

    def clone(self, **_: Any) -> Tables:
        """Itself: there is no layer that could be run otherwise."""
        return self

    def forward(self, params: Params, *_: Any, **__: Any) -> TargetOutput:
        """ValueError: there are no layers to run."""
        raise ValueError("this target has no layers; give its features with data.features, or load it whole")

    def logits(self, params: Params, features_BLD: Array) -> Array:
        """fp32 logits `[B, L, V]` of the token after each feature: those of the whole target, bit for bit."""
        head_VD = params["embed" if self.config.tied else "head"]
        return cap(score_tokens(features_BLD, head_VD), self.config.options.logit_cap)

    def scoring(self, params: Params) -> Params:
        """The weights that `logits` reads: the LM head, or the embedding where they are one table."""
        name = "embed" if self.config.tied else "head"
        return {name: params[name]}

    def shared_tables(self, params: Params) -> SharedTables:
        """The embedding and LM head (one table when tied)."""
        return SharedTables(params["embed"], params["embed"] if self.config.tied else params["head"])

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """ValueError: there are no layers to keep keys and values of."""
        raise ValueError("this target has no layers, so it cannot decode; load it whole")
