"""Calibration of a drafter: how often the children that it gives a probability are the text's, by isotonic regression.

Every place of a text gives a pair for each of its `K` likeliest children: its draft probability, and whether it is the
text's token. The curve that does not fall and is nearest to these pairs turns one into the other, at each depth.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxspec.lab.profile import BEYOND, Profile

BINS = 15
"""Bins of the calibration error, of equal numbers of pairs."""
MOST_POINTS = 200
"""Breakpoints of a stored curve."""
DIGITS = 6


class CalibrationCurve(NamedTuple):
    """A curve that does not fall: straight between its breakpoints, level outside them."""

    q_X: np.ndarray
    """Draft probabilities, ascending."""
    p_X: np.ndarray
    """Probability of a hit there."""

    def __call__(self, q: np.ndarray) -> np.ndarray:
        """Returns the calibrated probability of draft probabilities."""
        return np.interp(q, self.q_X, self.p_X)


class Pairs(NamedTuple):
    """Draft probabilities of children, and whether each is the text's token."""

    q_X: np.ndarray
    hit_X: np.ndarray


def isotonic(q_X: np.ndarray, hit_X: np.ndarray) -> CalibrationCurve:
    """Returns the curve nearest to the pairs in the mean of squares: pool adjacent violators.

    Raises ValueError without a pair.
    """
    if not len(q_X):
        raise ValueError("there is no pair of a draft probability and a hit to calibrate by")
    known_U, at_X = np.unique(q_X, return_inverse=True)
    count_U = np.bincount(at_X)
    mean_U = np.bincount(at_X, weights=hit_X) / count_U
    blocks: list[list[float]] = []  # mean, pairs, first and last place
    for place, (mean, count) in enumerate(zip(mean_U.tolist(), count_U.tolist(), strict=True)):
        block = [mean, count, place, place]
        while blocks and blocks[-1][0] >= block[0]:
            before = blocks.pop()
            total = before[1] + block[1]
            block = [(before[0] * before[1] + block[0] * block[1]) / total, total, before[2], block[3]]
        blocks.append(block)
    mean_E, _, first_E, last_E = np.array(blocks).T
    ends = np.stack([first_E, last_E], axis=1).astype(int)
    q_Y, p_Y = known_U[ends].reshape(-1), np.repeat(mean_E, 2)
    different = np.append(True, np.diff(q_Y) > 0)  # a block of one probability has one end
    return CalibrationCurve(q_Y[different], p_Y[different])


def calibration_error(q_X: np.ndarray, hit_X: np.ndarray, bins: int = BINS) -> float:
    """Returns the expected calibration error: the mean distance of a bin's mean probability from its share of hits.

    Bins hold equal numbers of pairs, in order of probability. NaN without a pair.
    """
    if not len(q_X):
        return float("nan")
    order = np.argsort(q_X, kind="stable")
    parts = zip(np.array_split(q_X[order], bins), np.array_split(hit_X[order], bins), strict=True)
    return float(sum(abs(q.sum() - hit.sum()) for q, hit in parts if len(q)) / len(q_X))


def pairs_of(profile: Profile, depth: int, prompts: np.ndarray | None = None, ranks: int | None = None) -> Pairs:
    """Returns the pairs of a depth, from 1 on; of these prompts, a mask `[P]`, and of the first `ranks` children."""
    rank_T = profile.rank_TD[:, depth - 1]
    there_T = rank_T != BEYOND
    if prompts is not None:
        there_T = there_T & prompts[profile.prompt_T]
    q_TK = np.exp(profile.top_TDK[there_T, depth - 1, :ranks].astype(np.float64))
    hit_TK = rank_T[there_T, None] == np.arange(q_TK.shape[1])
    return Pairs(q_TK.reshape(-1), hit_TK.reshape(-1).astype(np.float64))


def calibrate(profile: Profile, seed: int = 0) -> list[dict[str, Any]]:
    """Returns for each depth, as JSON, its curve, the errors before and after it, and the entropy of its drafts.

    The curve is of all prompts. The errors are measured on each half of the prompts with the curve of the other half:
    of all children, and of the likeliest alone (`first`). They are NaN with fewer than two prompts. Empty for a profile
    without `top_TDK`.
    """
    if not profile.top_TDK.size:
        return []
    order = np.random.default_rng(seed).permutation(len(profile.sources))
    half = np.isin(np.arange(len(order)), order[: len(order) // 2])
    found = []
    for depth in range(1, profile.rank_TD.shape[1] + 1):
        every = pairs_of(profile, depth)
        if not len(every.q_X):
            break
        curve = _thinned(isotonic(*every))
        found.append(
            {
                "depth": depth,
                "pairs": len(every.q_X),
                "q": np.round(curve.q_X, DIGITS).tolist(),
                "p": np.round(curve.p_X, DIGITS).tolist(),
                **_errors(profile, depth, half),
                "entropy": _entropy(profile.entropy_TD[:, depth - 1]),
            }
        )
    return found


def curves(facts: dict[str, Any]) -> list[CalibrationCurve]:
    """Returns the curves that a profile's facts hold, depth by depth."""
    return [CalibrationCurve(np.array(row["q"]), np.array(row["p"])) for row in facts.get("calibration", [])]


def mean_error(calibration: list[dict[str, Any]], name: str) -> float:
    """Returns an error, such as `ece_before`, as the mean over all pairs of all depths; NaN where there is none."""
    rows = [row for row in calibration if row[name] is not None and np.isfinite(row[name])]
    pairs = sum(row["pairs"] for row in rows)
    return sum(row[name] * row["pairs"] for row in rows) / pairs if pairs else float("nan")


def _errors(profile: Profile, depth: int, half: np.ndarray) -> dict[str, float]:
    """Returns the errors of the children of a depth, and of the likeliest alone, before and after the other half's."""
    errors: dict[str, list[float]] = {}
    for fitted, tested in ((half, ~half), (~half, half)):
        known = pairs_of(profile, depth, fitted)
        curve = isotonic(*known) if len(known.q_X) else None
        for name, ranks in (("ece", None), ("ece_first", 1)):
            q_X, hit_X = pairs_of(profile, depth, tested, ranks)
            errors.setdefault(f"{name}_before", []).append(calibration_error(q_X, hit_X))
            after = float("nan") if curve is None else calibration_error(curve(q_X), hit_X)
            errors.setdefault(f"{name}_after", []).append(after)
    return {name: float(np.mean(both)) for name, both in errors.items()}


def _entropy(entropy_T: np.ndarray) -> dict[str, float]:
    """Returns the mean and quantiles of entropies, in nats."""
    some = entropy_T[np.isfinite(entropy_T)].astype(np.float64)
    low, middle, high = np.quantile(some, [0.1, 0.5, 0.9])
    return {"mean": float(some.mean()), "p10": float(low), "p50": float(middle), "p90": float(high)}


def _thinned(curve: CalibrationCurve) -> CalibrationCurve:
    """Returns a curve of at most `MOST_POINTS` breakpoints, evenly spread over those it has."""
    if len(curve.q_X) <= MOST_POINTS:
        return curve
    kept = np.unique(np.linspace(0, len(curve.q_X) - 1, MOST_POINTS).round().astype(int))
    return CalibrationCurve(curve.q_X[kept], curve.p_X[kept])
