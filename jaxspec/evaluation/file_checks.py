"""Invariants of a file of rows, ours or a server's."""

from __future__ import annotations

from pathlib import Path

from jaxspec.evaluation.row_checks import check, partial
from jaxspec.evaluation.rows import read_evaluation
from jaxspec.evaluation.served_checks import check_served_file
from jaxspec.evaluation.served_rows import is_served, read_served
from jaxspec.evaluation.summary_checks import check_summary

FILES = ("rows.jsonl", "served.jsonl")
"""Files of rows in the folder of a run."""


def check_file(path: Path) -> tuple[list[str], int]:
    """Returns what does not hold of a file of rows, or of those in a folder, and how many rows there are.

    Raises ValueError for a file that holds no rows, and FileNotFoundError where there is none.
    """
    if inside := [path / name for name in FILES if (path / name).is_file()]:
        found = [check_file(one) for one in inside]
        return [problem for problems, _ in found for problem in problems], sum(count for _, count in found)
    if is_served(path):
        served = read_served(path)
        return check_served_file(served), len(served.rows)
    evaluation = read_evaluation(path)
    left = partial(evaluation)
    problems = [*([left] if left else []), *check(evaluation), *check_summary(evaluation, path)]
    return problems, len(evaluation.rows)
