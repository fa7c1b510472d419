"""Texts for profiles of rates alone: each prompt's ranks drawn from the rounds that were counted of it.

A search chooses on one half of the prompts, reports on the other, and resamples prompts. So a prompt's text tells of
its own rounds alone, but for a thin prior; what prompts differ in, texts differ in too.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxspec.lab.profile import Profile, split_prompts
from jaxspec.lab.rates import rates_in_turn
from jaxspec.lab.simulate import join, simulate

PRIOR = 1.0
"""Turns that the shares of all prompts of a half count for in each prompt's own: a child that had no turn there needs
one."""
DRAWN = 50_000
"""Least starts of all texts together: of short answers several texts are drawn, so that the draws add little noise."""


def with_texts(profile: Profile, *, seed: int = 0) -> Profile:
    """Returns the profile itself, or for one of rates alone a profile of its prompts with texts drawn from its counts.

    A prompt's texts are as long as its answer. The prior of its rates is of the half of the prompts that it belongs to
    in a search of the same `seed`. Rates that are not known count as 0. Raises ValueError where there are neither
    texts nor counts, and for a single prompt.
    """
    if len(profile.prompt_T):
        return profile
    if profile.counts is None and "rates_DK" in profile.facts:
        raise ValueError(
            "the profile is of an earlier version and holds rates without the counts of each prompt, so that prompts "
            "cannot choose and report apart: make it anew with `jaxspec lab profile`"
        )
    if profile.counts is None:
        raise ValueError("the profile holds neither starts nor rates: its answers need two tokens at least")
    rate_PDK, tokens_P = _rates_by_prompt(profile, seed), profile.counts.tokens_P
    if not tokens_P.sum():
        raise ValueError("the profile holds no starts: its answers need two tokens at least")
    copies = max(1, -(-DRAWN // int(tokens_P.sum())))
    rng = np.random.default_rng(seed)
    drawn = join(
        [
            simulate(rate_DK, prompts=copies, tokens=int(tokens) + 1, seed=int(rng.integers(2**32)))
            for rate_DK, tokens in zip(rate_PDK, tokens_P, strict=True)
        ]
    )
    about = {name: value for name, value in profile.facts.items() if not name.endswith("_DK")}
    return dataclasses.replace(
        drawn,
        prompt_T=drawn.prompt_T // copies,
        sources=profile.sources,
        facts={**about, "kind": "simulated", "simulated_texts": True},
    )


def _rates_by_prompt(profile: Profile, seed: int) -> np.ndarray:
    """Returns `[P, D, K]`: the rates of each prompt's rounds, none of them unknown."""
    assert profile.counts is not None
    hits_PDK, turns_PDK = (np.asarray(x, np.float64) for x in profile.counts[:2])
    rate_PDK = np.zeros_like(hits_PDK)
    for half in split_prompts(profile, seed):
        hits_DK, turns_DK = hits_PDK[half].sum(0), turns_PDK[half].sum(0)
        share_DK = np.divide(hits_DK, turns_DK, out=np.zeros_like(hits_DK), where=turns_DK > 0)
        rate_PDK[half] = rates_in_turn(hits_PDK[half] + PRIOR * share_DK, turns_PDK[half] + PRIOR)
    return rate_PDK
