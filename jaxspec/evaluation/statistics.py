"""Statistics over prompts: tau with bootstrap intervals, paired ratios, acceptance by depth."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES = 5000
"""Bootstrap samples of the prompts."""
CONFIDENCE = 0.95
FEWEST = 4
"""Units below which there is no interval: of three units every 27th sample holds one alone, and of so many samples more
than `(1 - CONFIDENCE) / 2`, so that the ends would be the least and the greatest unit."""
FEW = 30
"""Units below which percentiles are corrected for bias and skewness (BCa; Efron 1987)."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""`[K, P]`, how often each of `P` units counts in each of `K` samples -> the figure of each sample `[K]`."""


class Interval(NamedTuple):
    """An estimate with its percentile bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Counts(NamedTuple):
    """Tokens and target calls of some decoded prompts, one row a prompt, in one order for all that is compared."""

    tokens_P: np.ndarray
    """New tokens, the one that prefill gives not counted."""
    calls_P: np.ndarray
    """Target calls, prefill not counted."""
    accepted_PA: np.ndarray
    """Rounds by how many drafted tokens they accepted: 0, 1 .. T."""

    def of(self, chosen_P: np.ndarray) -> Counts:
        """Returns the counts of the chosen prompts, a mask or indices."""
        return Counts(*(x[chosen_P] for x in self))


def pool(counts: Sequence[Counts]) -> Counts:
    """Returns the sum, prompt by prompt, of several decodings of the same prompts."""
    return Counts(*(np.sum(parts, axis=0) for parts in zip(*counts, strict=True)))


@functools.lru_cache(maxsize=8)
def resamples(prompts: int, draws: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Returns `[draws, prompts]`: how often each prompt stands in each bootstrap sample; equal for equal arguments."""
    drawn = np.random.default_rng((seed, prompts)).multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)
    return drawn.astype(np.float64)  # for the matrix product; whole numbers stay exact


def tau_interval(counts: Counts, confidence: float = CONFIDENCE) -> Interval:
    """Returns tau, tokens per target call over all prompts, and its interval over resampled prompts.

    The bootstrap of a ratio of sums: tokens and calls of a prompt stay together. NaN where no call was made.
    """
    return _interval(_quotient(*_totals(counts)), confidence)


def ratio_interval(counts: Counts, baseline: Counts, confidence: float = CONFIDENCE) -> Interval:
    """Returns tau over the baseline's tau, and its interval over the same resampled prompts in both (paired).

    Differences between prompts cancel, so it is far tighter than two intervals side by side. Raises ValueError for
    different numbers of prompts.
    """
    if len(counts.tokens_P) != len(baseline.tokens_P):
        raise ValueError(f"{len(counts.tokens_P)} prompts cannot be paired with {len(baseline.tokens_P)}")
    ours, theirs = _quotient(*_totals(counts)), _quotient(*_totals(baseline))
    return _interval(_quotient(ours, theirs), confidence)


def _totals(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and calls: of the prompts themselves first, then of every bootstrap sample."""
    weights = resamples(len(counts.tokens_P))
    sums = (x_P.astype(np.float64) for x_P in (counts.tokens_P, counts.calls_P))
    tokens, calls = (np.concatenate([[x_P.sum()], weights @ x_P]) for x_P in sums)
    return tokens, calls


def _quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _interval(values: np.ndarray, confidence: float) -> Interval:
    """Returns the interval of an estimate and, behind it, those of the samples; samples without a call are left out."""
    drawn = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not drawn.size:
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values[0]), float(low), float(high))


def share_interval(share: float, trials: float, confidence: float = CONFIDENCE) -> Interval:
    """Returns a share of independent trials with its score interval (Wilson 1927), which holds at 0 and 1 too."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


class Acceptance(NamedTuple):
    """Acceptance by depth 1 .. T."""

    rate_T: np.ndarray
    """Of the rounds that kept a path down to depth t - 1, the share that kept a token at t; NaN where none got there.
    A path the tree did not continue counts as one that ended."""
    rounds_T: np.ndarray
    """Rounds that kept a path down to depth t - 1."""


def acceptance(accepted_A: np.ndarray) -> Acceptance:
    """Returns conditional acceptance by depth from a histogram of rounds that accepted 0, 1 .. T tokens."""
    reached = np.cumsum(np.asarray(accepted_A, np.float64)[::-1])[::-1]
    return Acceptance(_quotient(reached[1:], reached[:-1]), reached[:-1].astype(np.int64))


def quotient(above_P: np.ndarray, below_P: np.ndarray) -> Statistic:
    """Returns the statistic of a ratio of sums: numerator and denominator of a unit stay together."""
    above_P, below_P = (np.asarray(x, np.float64) for x in (above_P, below_P))
    return lambda weights_KP: _quotient(weights_KP @ above_P, weights_KP @ below_P)


def over(ours: Statistic, theirs: Statistic) -> Statistic:
    """Returns the paired ratio of two statistics: both of the same resampled units."""
    return lambda weights_KP: _quotient(ours(weights_KP), theirs(weights_KP))


def resampled(statistic: Statistic, strata: Sequence[Hashable]) -> Interval:
    """Returns a figure of `len(strata)` units with its bootstrap interval; each stratum keeps its number of units.

    Strata of one unit, in which nothing varies, are drawn from together. Of fewer than `FEW` units it is the BCa
    interval, of more the percentile interval; of fewer than `FEWEST` the ends are NaN.
    """
    units = len(strata)
    if not units:
        return Interval(float("nan"), float("nan"), float("nan"))
    if units < FEWEST:
        return Interval(float(statistic(np.ones((1, units)))[0]), float("nan"), float("nan"))
    values = np.concatenate([statistic(np.ones((1, units))), statistic(_stratified(tuple(strata)))])
    if units >= FEW:
        return _interval(values, CONFIDENCE)
    return _bca(values, statistic(1 - np.eye(units)))


@functools.lru_cache(maxsize=8)
def _stratified(strata: tuple[Hashable, ...]) -> np.ndarray:
    """Returns `[draws, units]` as `resamples`, drawn within each stratum; those of one unit are one stratum."""
    counts = collections.Counter(strata)
    together = [(s,) if counts[s] > 1 else () for s in strata]
    weights = np.zeros((RESAMPLES, len(strata)))
    for number, name in enumerate(dict.fromkeys(together)):
        mine = np.flatnonzero([s == name for s in together])
        weights[:, mine] = resamples(len(mine), seed=number)
    return weights


def _bca(values: np.ndarray, without_P: np.ndarray) -> Interval:
    """Returns the bias-corrected and accelerated interval; `without` are the figures without each unit."""
    value, drawn = float(values[0]), values[1:][np.isfinite(values[1:])]
    without_P = without_P[np.isfinite(without_P)]
    if not np.isfinite(value) or not drawn.size or not without_P.size:
        return Interval(float("nan"), float("nan"), float("nan"))
    if np.ptp(drawn) == 0:
        return Interval(value, value, value)
    normal, away_P = NormalDist(), np.mean(without_P) - without_P
    # Half of the samples that equal the figure count as below it, as with figures that take few values.
    below = (np.mean(drawn < value) + np.mean(drawn <= value)) / 2
    bias = normal.inv_cdf(float(np.clip(below, 1 / len(drawn), 1 - 1 / len(drawn))))
    spread = float(np.sum(away_P**2)) ** 1.5
    skew = float(np.sum(away_P**3)) / (6 * spread) if spread else 0.0
    ends = []
    for side in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2):
        z = bias + normal.inv_cdf(side)
        ends.append(float(np.quantile(drawn, normal.cdf(bias + z / (1 - skew * z)))))
    return Interval(value, ends[0], ends[1])
