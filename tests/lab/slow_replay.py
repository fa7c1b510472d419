"""The plainest replay of a tree on a profile, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxspec.evaluation.statistics import Counts
from jaxspec.lab.profile import Profile


def replay_paths(profile: Profile, paths: Sequence[tuple[int, ...]]) -> Counts:
    """Returns tokens and calls of every prompt when a static tree of these paths drafts along its text.

    The plain loop, which the library's look-ups are held to: a round accepts the longest path of the text's ranks that
    is a node.
    """
    nodes, prompts = set(paths), len(profile.sources)
    deepest = max(map(len, paths), default=0)
    accepted_PA = np.zeros((prompts, deepest + 1), np.int64)
    tokens_P = np.bincount(profile.prompt_T, minlength=prompts)
    for prompt, rank_TD in enumerate(_of_prompts(profile)):
        at, ranks = 0, rank_TD[:, :deepest].tolist()
        while at < len(ranks):
            accepted = 0
            while accepted < len(ranks[at]) and tuple(ranks[at][: accepted + 1]) in nodes:
                accepted += 1
            accepted_PA[prompt, accepted] += 1
            at += 1 + accepted
    return Counts(tokens_P, accepted_PA.sum(axis=1), accepted_PA)


def _of_prompts(profile: Profile) -> list[np.ndarray]:
    """Returns the ranks of every prompt's starts."""
    ends = np.cumsum(np.bincount(profile.prompt_T, minlength=len(profile.sources)))
    return np.split(profile.rank_TD, ends[:-1])
