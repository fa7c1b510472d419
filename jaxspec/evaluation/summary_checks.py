"""Checks of the figures that were written beside a file of rows: they must be those of its rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxspec.console.results import jsonable
from jaxspec.evaluation.metrics import summarize_all
from jaxspec.evaluation.rows import PLAIN, Evaluation
from jaxspec.evaluation.served_rows import FORMAT as SERVED

SUMMARY = "summary.json"
OF_ROWS = ("asked", "passes", "machine", "dtype")
"""Settings that `summary.json` does not repeat, or has in a form of its own."""
SAME = 1e-6
"""Relative difference below which two figures are one: sums may be rounded otherwise on another machine."""


def check_summary(evaluation: Evaluation, rows: Path) -> list[str]:
    """Returns a sentence for everything in the `summary.json` beside a file of rows that is not of these rows.

    None where there is no such file, which a run writes when its last answer is there, or where it is of a server's
    answers in the same folder.
    """
    path = (rows if rows.is_dir() else rows.parent) / SUMMARY
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return [f"{SUMMARY} is not valid JSON ({error})"]
    if isinstance(found, dict) and found.get("format") == SERVED:
        return []
    if not isinstance(found, dict) or not isinstance(found.get("summary"), list):
        return [f"{SUMMARY} holds no figures of an evaluation"]
    return [f"{SUMMARY}: {problem}" for problem in _differing(evaluation, found)]


def _differing(evaluation: Evaluation, found: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is not that of the rows."""
    for name, value in evaluation.settings.items():
        if name not in OF_ROWS and found.get(name) != value:
            yield f"has another {name} than the rows"
    failed = sum(bool(row.error) for row in evaluation.rows if row.arm == PLAIN)
    if found.get("failed") != failed:
        yield f"says that {found.get('failed')} turns failed, and {failed} rows of plain decoding have an error"
    known = [row for row in evaluation.rows if row.arm in evaluation.arms]
    ours = {_key(row): row for row in jsonable(summarize_all(known, evaluation.arms))}
    theirs = {_key(row): row for row in found["summary"] if isinstance(row, dict)}
    if len(theirs) != len(found["summary"]):
        yield "has figures that stand twice, or are none"
    for key in sorted(ours.keys() ^ theirs.keys(), key=str):
        yield f"{_named(key)}: has {'no figures' if key in ours else 'figures, and no rows'}"
    for key in [key for key in ours if key in theirs]:
        if wrong := [name for name, value in ours[key].items() if not _same(value, theirs[key].get(name))]:
            shown = ", ".join(f"{name} {theirs[key].get(name)} and not {ours[key][name]}" for name in wrong[:3])
            yield f"{_named(key)}: says {shown}"


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row.get("task"), row.get("method"), row.get("temperature")


def _named(key: tuple[Any, ...]) -> str:
    return f"task {key[0]}, method {key[1]}, temperature {key[2]}"


def _same(one: Any, other: Any) -> bool:
    """Returns whether two figures are the same, up to rounding."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=SAME, abs_tol=1e-12)
    return one == other
