"""A frozen target that has an embedding and an LM head and no layers: its features were computed before."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxspec.base import Array, Cache, Params, SharedTables, TargetOutput
from jaxspec.nn.attention import cap
from jaxspec.nn.lm_head import score_tokens
from jaxspec.targets.decoder import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Tables:
    """A `base.Target` without layers. Weights: `embed [V, D]`, and `head [V, D]` unless tied."""

    config: LlamaConfig

    def clone(self, **_: Any) -> Tables:
        """Returns itself, because fields of `Decoder` such as its dtype concern layers alone."""
        return self

    def forward(self, params: Params, *_: Any, **__: Any) -> TargetOutput:
        """Raises ValueError: there are no layers to run."""
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
        """Returns the embedding and the LM head `[V, D]`, which are one table when tied."""
        return SharedTables(params["embed"], params["embed"] if self.config.tied else params["head"])

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """Raises ValueError: there are no layers whose keys and values could be cached."""
        raise ValueError("this target has no layers, so it cannot decode; load it whole")
