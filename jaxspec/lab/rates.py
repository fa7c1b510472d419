"""Acceptance by depth and rank of a profile, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxspec.evaluation.statistics import CONFIDENCE, resamples
from jaxspec.lab.profile import BEYOND, Profile


class Rates(NamedTuple):
    """Probability that the child of rank `K` of a node at depth `D - 1` is accepted once the node is; `D` from 1 on.

    NaN where nothing was tried.
    """

    rate_DK: np.ndarray
    low_DK: np.ndarray
    """Ends of the percentile bootstrap interval over prompts."""
    high_DK: np.ndarray
    tries_DK: np.ndarray
    """Places that the rate is the mean over; of rounds that were counted, turns of the child."""


def measure_rates(profile: Profile) -> Rates:
    """Returns the rates of a profile: means over all places of its texts, or those of the rounds that it counts.

    At depth 1 the target's own probabilities take the hits' place where the profile has them: the mean is the same, and
    varies far less. A mean over places is not one over rounds, which stand closer where the text is hard: for tau
    replay a tree.
    """
    if profile.counts is not None:
        return rates_of(profile.counts.hits_PDK, profile.counts.turns_PDK, in_turn=True)
    if not profile.replayable:
        names = ("rates_DK", "lows_DK", "highs_DK", "tries_DK")
        return Rates(*(np.array(profile.facts[name], np.float64) for name in names))  # null becomes NaN
    return rates_of(*count_hits(profile))


def count_hits(profile: Profile) -> tuple[np.ndarray, np.ndarray]:
    """Returns each prompt's hits of every rank, `[P, D, K]`, and its places that have a depth at all, `[P, D, 1]`.

    Hits of depth 1 are expected ones where the target's probabilities are known.
    """
    prompts, (_, depths) = len(profile.sources), profile.rank_TD.shape
    hits_PDK = np.zeros((prompts, depths, profile.ranks))
    tries_PD1 = np.zeros((prompts, depths, 1))
    for d, rank_T in enumerate(profile.rank_TD.T):
        there = rank_T >= 0
        np.add.at(hits_PDK[:, d], (profile.prompt_T[there], rank_T[there]), 1)
        tries_PD1[:, d, 0] = np.bincount(profile.prompt_T[rank_T != BEYOND], minlength=prompts)
    if profile.p_TK is not None:
        hits_PDK[:, 0] = 0
        np.add.at(hits_PDK[:, 0], profile.prompt_T, profile.p_TK)
    return hits_PDK, tries_PD1


def rates_of(hits_PDK: np.ndarray, tries_PDK: np.ndarray, *, in_turn: bool = False) -> Rates:
    """Returns the pooled rates of some prompts, and their intervals over resampled prompts.

    Tries are places, or with `in_turn` turns, see `profile.RoundCounts`.
    """
    rate = rates_in_turn if in_turn else _share
    tries_PDK = np.broadcast_to(tries_PDK, hits_PDK.shape)
    pooled, tries_DK = rate(hits_PDK.sum(0), tries_PDK.sum(0)), tries_PDK.sum(0)
    weights = resamples(len(hits_PDK))
    # A depth at a time: all resamples of all cells at once would be large.
    drawn = [
        rate(weights @ hits_PDK[:, d].astype(np.float64), weights @ tries_PDK[:, d].astype(np.float64))
        for d in range(hits_PDK.shape[1])
    ]
    ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.stack([_quantiles(x, ends) for x in drawn], axis=1)
    return Rates(pooled, low, high, tries_DK.astype(np.int64))


def rates_in_turn(hits: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Returns the rates of ranks, the last axis, out of hits and turns; a row sums to 1 at most.

    The product-limit estimate (Kaplan and Meier 1958): a child's share of its turns, times the share of rounds that
    left all elder siblings. A parent that lacks the later ranks counts for those it has. NaN where no turn was had.
    """
    share = _share(hits, turns)
    passed = np.cumprod(1 - share[..., :-1], axis=-1)
    return share * np.concatenate([np.ones_like(share[..., :1]), passed], axis=-1)


def _share(hits: np.ndarray, tries: np.ndarray) -> np.ndarray:
    return np.divide(hits, tries, out=np.full(hits.shape, np.nan), where=tries > 0)


def _quantiles(x_SK: np.ndarray, ends: Sequence[float]) -> np.ndarray:
    """Returns quantiles over the samples that have a value, NaN where none has one."""
    found = np.full((len(ends), x_SK.shape[1]), np.nan)
    for k, x_S in enumerate(x_SK.T):
        some_S = x_S[np.isfinite(x_S)]
        if some_S.size:
            found[:, k] = np.quantile(some_S, ends)
    return found
