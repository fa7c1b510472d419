"""Answers: what decoding a request gives back to the host, and figures over several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Answer(NamedTuple):
    """The target's tokens behind one prompt, and what they took. `ChatTokenizer.decode(answer.tokens)` is the text."""

    tokens: np.ndarray
    """New tokens `[N]`, the stop id included."""
    finish: str
    """`stop` at a stop id, `length` at the budget; `running` while the answer is being streamed."""
    calls: int
    """Target calls, prefill not counted."""
    accepted: np.ndarray
    """`[P]`: rounds that accepted 0, 1, .. T drafted tokens."""
    call_of: np.ndarray = np.zeros(0, np.int32)
    """`[N]`: the target call that gave each token; 0 for prefill. Empty for answers of other programs."""
    drafted: np.ndarray = np.zeros((0, 2), np.int32)
    """`[calls, 2]`: drafted tokens that each target call verified, and the depth of the deepest. Empty as `call_of`."""

    @property
    def tau(self) -> float:
        """Tokens per target call, bonus tokens included; the prefill call and the token it gives are not counted."""
        return total_tau([self])


def total_tau(answers: Iterable[Answer]) -> float:
    """Returns tokens per target call over all answers, counted as `Answer.tau` counts them."""
    answers = list(answers)
    return block_efficiency(sum(len(a.tokens) - 1 for a in answers), sum(int(a.calls) for a in answers))


def total_tokens(answers: Iterable[Answer]) -> int:
    """Returns the new tokens of all answers."""
    return sum(len(answer.tokens) for answer in answers)


def block_efficiency(tokens: int, calls: int) -> float:
    """Returns tokens per target call, bonus tokens included; 0 where no call was made.

    This is tau by the name of the direct-alignment paper (arXiv 2403.00858); at most one more than the draft is deep.
    """
    return tokens / calls if calls else 0.0
