"""Figures of a generation."""

from __future__ import annotations


def block_efficiency(tokens: int, calls: int) -> float:
    """Tokens per target call, bonus token included: tau by the name that the direct-alignment paper gives it.

    At most one more than the draft is deep; 0 where no call was made.
    """
    return tokens / calls if calls else 0.0
