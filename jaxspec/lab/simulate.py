"""Simulated profiles: ranks drawn from given rates, for published acceptance, for what-if questions and for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxspec.lab.profile import BEYOND, MISSED, Profile

TAIL = 1000.0
"""Tokens that share the probability which the ranks of a simulated draft leave."""


def simulate(
    rates: ArrayLike,
    *,
    prompts: int = 100,
    tokens: int = 129,
    seed: int = 0,
    source: str = "simulated",
    facts: dict[str, object] | None = None,
) -> Profile:
    """Returns a profile of `prompts` answers of `tokens` tokens each, whose ranks are drawn from `rates`, `[D, K]`.

    `rates[d, r]` is the probability that the text's token at depth `d + 1` is the rank-`r` child; what a row leaves
    is missed. Draws are independent. The draft is calibrated: its log-probabilities are those of the rates. `facts`
    are added to the profile's; it is replayed under any rule, for the rates are of that rule. Raises ValueError for
    rates that are no probabilities, and sizes below 1.
    """
    rates_DK = np.atleast_2d(np.asarray(rates, np.float64))
    if not np.all((rates_DK >= 0) & (rates_DK <= 1)) or np.any(rates_DK.sum(1) > 1 + 1e-9) or not rates_DK.size:
        raise ValueError("the rates of a depth must lie between 0 and 1 and sum to 1 at most: mend the rates")
    if prompts < 1 or tokens < 1:
        raise ValueError(f"{prompts} prompts of {tokens} tokens cannot be simulated: give at least one of each")
    (depths, ranks), starts = rates_DK.shape, prompts * (tokens - 1)
    rng = np.random.default_rng(seed)
    rank_TD = np.full((starts, depths), MISSED, np.int16)
    for depth, row_K in enumerate(rates_DK):
        drawn_T = np.searchsorted(np.cumsum(row_K), rng.random(starts), side="right")
        rank_TD[:, depth] = np.where(drawn_T < ranks, drawn_T, MISSED)
    # At depth d the text has ended where fewer than d tokens are left behind the start.
    left_T = np.tile(np.arange(tokens - 1, 0, -1), prompts)
    rank_TD[left_T[:, None] < np.arange(1, depths + 1)] = BEYOND
    logp_TD, top_TDK, entropy_TD = _draft(rates_DK, rank_TD)
    described = {
        "kind": "simulated",
        "temperature": 0.0,
        "mode": "topk",
        "rule": "target-draw",
        "one_pass": False,
        "target": "simulated",
        "drafter": "simulated",
        "prompts": f"simulated, seed {seed}",
        "ranks": ranks,
        "simulated_rates": rates_DK.tolist(),
        **(facts or {}),
    }
    prompt_T = np.repeat(np.arange(prompts, dtype=np.int32), tokens - 1)
    return Profile(prompt_T, rank_TD, logp_TD, top_TDK, entropy_TD, (source,) * prompts, described)


def _draft(rates_DK: np.ndarray, rank_TD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns log-probabilities of the text and of the ranks, and entropies, of a draft that is as good as it says."""
    left_D1 = np.maximum(1 - rates_DK.sum(1, keepdims=True), 0) / TAIL
    with np.errstate(divide="ignore", invalid="ignore"):
        logs_DK = np.log(np.concatenate([rates_DK, left_D1], axis=1))
        spent_DK = np.where(np.isfinite(logs_DK), -np.exp(logs_DK) * logs_DK, 0.0)
    entropy_D = spent_DK[:, :-1].sum(1) + spent_DK[:, -1] * TAIL
    ended_TD = rank_TD == BEYOND
    # MISSED, -1, reads the last column.
    logp_TD = np.where(ended_TD, np.nan, logs_DK[np.arange(len(rates_DK)), np.maximum(rank_TD, MISSED)])
    top_DK = np.maximum(-np.sort(-logs_DK[:, :-1], axis=1), -60.0).astype(np.float16)
    top_TDK = np.where(ended_TD[..., None], np.float16(np.nan), top_DK)
    entropy_TD = np.where(ended_TD, np.nan, entropy_D).astype(np.float16)
    return logp_TD.astype(np.float32), top_TDK, entropy_TD


def join(profiles: Sequence[Profile]) -> Profile:
    """Returns one profile of the prompts of all, in turn, with the facts of the first.

    The target's probabilities are left out. Raises ValueError for profiles of different depths or ranks, and for none.
    """
    if not profiles or len({(p.rank_TD.shape[1], p.ranks, p.top_TDK.shape[1:]) for p in profiles}) > 1:
        raise ValueError("profiles of different depths or ranks cannot be joined: make them alike")
    before = np.cumsum([0, *(len(p.sources) for p in profiles[:-1])])
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(p, name) for p in profiles])
        for name in ("rank_TD", "logp_TD", "top_TDK", "entropy_TD")
    }
    prompt_T = np.concatenate([p.prompt_T + n for p, n in zip(profiles, before, strict=True)]).astype(np.int32)
    sources = tuple(source for p in profiles for source in p.sources)
    return Profile(prompt_T, **arrays, sources=sources, facts=dict(profiles[0].facts))
