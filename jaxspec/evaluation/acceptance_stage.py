"""A server's acceptance by position held to the predicted one, and what its form says of the cause."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxspec.evaluation.check_stages import Found, Stage, not_given
from jaxspec.evaluation.statistics import share_interval
from jaxspec.serving.served_acceptance import Counters

ACCEPTANCE = "acceptance by position"
TOLERANCE = 0.03
"""Difference of acceptance at a position that is none, of `MANY` rounds."""
MANY = 4000
"""Rounds from which on the share at a position has a standard deviation below 0.008."""


def check_acceptance(expected: dict[str, Any], served: Counters | None) -> Found:
    """Returns whether the acceptance by position is the one that was predicted.

    Of `MANY` rounds it must be within `TOLERANCE`. Of fewer it must be within the interval over prompts, or within that
    of as many rounds that are accepted as predicted. Chains of two depths are compared at the positions of both.
    """
    if not expected["survival"] or None in expected["survival"]:
        note = "nothing was predicted: every answer ends with its first token"
        return Stage(ACCEPTANCE, None, None, None, note), None
    if served is None:
        return not_given(ACCEPTANCE, "it shows no counters of speculative decoding", expected["survival"])
    if not served.drafts:
        cause = "the server runs without its drafter: its counters have gained no draft"
        return Stage(ACCEPTANCE, False, None, expected["survival"], "no round was drafted"), cause
    if served.accepted_tokens and not served.by_position:
        return not_given(ACCEPTANCE, "it counts accepted tokens, and not their positions", expected["survival"])
    # Rounds at the end of a budget draft less, and positions that are never accepted are not told by all servers.
    drafted = max(len(served.by_position), round(served.draft_tokens / served.drafts))
    depth = min(len(expected["survival"]), drafted)
    wanted = [round(s, 4) for s in expected["survival"][:depth]]
    found = [kept / served.drafts for kept in served.by_position]
    survival = [*found, *[0.0] * (depth - len(found))][:depth]
    rounds = int(served.drafts)
    many = rounds >= MANY
    bounds = [_bounds(expected, i, rounds) for i in range(depth)]
    passed = all(
        abs(a - b) <= TOLERANCE if many else low <= a <= high
        for a, b, (low, high) in zip(survival, expected["survival"], bounds, strict=False)
    )
    how = f"within {TOLERANCE:g}" if many else f"fewer than {MANY:,}, so within intervals {_shown(bounds)}"
    note = f"{rounds:,} rounds, {how}; {expected['rounds']:,} were predicted"
    stage = Stage(ACCEPTANCE, passed, [round(s, 4) for s in survival], wanted, note)
    return stage, None if passed else likely_cause(np.asarray(survival), np.asarray(expected["survival"][:depth]))


def _bounds(expected: dict[str, Any], position: int, rounds: int) -> tuple[float, float]:
    """Returns the ends between which a share of so many rounds is as predicted."""
    value = expected["survival"][position]
    counted = share_interval(value, rounds)
    low, high = (expected[name][position] for name in ("low", "high"))
    return min(counted.low, value if low is None else low), max(counted.high, value if high is None else high)


def _shown(bounds: list[tuple[float, float]]) -> str:
    return ", ".join(f"[{low:.3f}, {high:.3f}]" for low, high in bounds)


def likely_cause(served_D: np.ndarray, expected_D: np.ndarray) -> str:
    """Returns the likely cause of a wrong acceptance by position `S_1 .. S_D`."""
    if served_D[0] < 0.02:
        return (
            "nothing is accepted: the fusion layer is skipped (an EAGLE-3 head run as EAGLE), d2t is read as absolute "
            "ids, features are shifted by one token, or a head is missing"
        )
    if np.all(served_D > expected_D + TOLERANCE) and served_D[-1] > 0.95:
        return "too good: the draft sees the answer, or the verification mask is wrong; compare ids with plain ones"
    first = served_D[0] / max(expected_D[0], 1e-6)
    c, e = _conditional(served_D), _conditional(expected_D)
    fallen = [i for i in range(1, len(c)) if c[i] < 0.6 * e[i]]
    if first < 0.8:
        return (
            "the first position is poor: auxiliary layers (entering or leaving), the final norm, the order of "
            "concatenation, or a quantized target"
        )
    if first > 0.95 and fallen and fallen[0] == 1:
        return (
            "the second position collapses: the feature is fed back around the wrong norm, positions or the cache "
            "index stand still, or siblings are visible"
        )
    if first > 0.95 and fallen:
        return (
            f"acceptance falls from position {fallen[0] + 1} on: trained with {fallen[0]} draft steps, which is then "
            "expected, or a window or mask is too short"
        )
    if np.all(served_D < expected_D):
        return (
            "everything is somewhat low: chat template, system prompt, thinking switch, BOS twice, another fine-tune "
            "of the target, or the draft's RoPE base"
        )
    return "no known pattern: compare first drafts and features with the golden file"


def _conditional(survival_D: np.ndarray) -> np.ndarray:
    before_D = np.concatenate([[1.0], survival_D[:-1]])
    return np.divide(survival_D, before_D, out=np.zeros_like(survival_D), where=before_D > 0)
