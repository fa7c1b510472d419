"""Distillation losses: each a short function with its equation, per token; `distill` masks, sums and counts."""

from __future__ import annotations

from jaxspec.losses.divergence import agreement, expected_acceptance, soft_cross_entropy
from jaxspec.losses.feature import smooth_l1

FEATURE_LOSSES = {"smooth_l1": smooth_l1}
"""Name -> loss of (draft feature, target feature), `[..., D] -> [...]`."""
LOGIT_LOSSES = {"soft_cross_entropy": soft_cross_entropy}
"""Name -> loss of (draft logits, target logits), `[..., V] -> [...]`."""

__all__ = ["FEATURE_LOSSES", "LOGIT_LOSSES", "agreement", "expected_acceptance", "smooth_l1", "soft_cross_entropy"]
