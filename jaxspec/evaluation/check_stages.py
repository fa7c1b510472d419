"""Stages of a check of a served drafter, and the limits that they share."""

from __future__ import annotations

from typing import Any, NamedTuple

EQUAL_DRAFTS = {"float32": 1.0, "bfloat16": 0.98}
"""Share of drafts that must be equal or differ at a tie, by the dtype that is served."""


class Stage(NamedTuple):
    """One stage; `passed` is None where the server does not show what it needs."""

    stage: str
    passed: bool | None
    figure: Any
    expected: Any
    note: str = ""


Found = tuple[Stage, str | None]
"""A stage, and the likely cause where it failed."""


def not_given(stage: str, reason: str, expected: Any = None) -> Found:
    """Returns a stage whose data the server does not give, with the reason."""
    return Stage(stage, None, None, expected, f"not given by this server: {reason}"), None
