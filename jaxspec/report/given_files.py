"""Files that a report is given beside its runs: results of `bench decode`, acceptance profiles, predicted trees."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxspec.lab.flags import digest
from jaxspec.lab.profile import Profile, load_profile

PARTS = ("draft", "target", "verify", "commit", "overhead")
"""Parts of a round, in order; their milliseconds are the keys `draft_ms` and so on of a row."""
LAB_VERBS = ("lab search", "lab table", "lab report")


class TimedArm(NamedTuple):
    """The parts of a round of an arm, as a bench timed them."""

    file: str
    arm: str
    batch: int
    tau: float
    round_ms: float
    parts_ms: tuple[float, ...]
    """Of each of `PARTS`."""
    device: str


class PredictedTree(NamedTuple):
    """A tree as the lab predicts it."""

    file: str
    batch: int
    nodes: int
    tau: float
    tokens_per_second: float


class GivenFiles(NamedTuple):
    """All such files, read."""

    arms: Sequence[TimedArm] = ()
    left_out: Sequence[str] = ()
    """Arms without the parts of a round, with the reason."""
    profiles: Sequence[tuple[str, Profile]] = ()
    trees: Sequence[PredictedTree] = ()
    hashes: Sequence[tuple[str, str]] = ()
    """Path and first digits of the SHA-256 of every file."""


def read_given(benches: Sequence[str], lab: Sequence[str]) -> GivenFiles:
    """Returns the files of `--bench` and `--lab`. Raises ValueError naming one that is of no known kind."""
    arms, left_out, profiles, trees = [], [], [], []
    for path in map(Path, benches):
        mine, lacking = _read_bench(path)
        arms += mine
        left_out += lacking
    for path in map(Path, lab):
        if path.suffix == ".npz":
            profiles.append((path.name, load_profile(path)))
        else:
            trees += _read_trees(path)
    hashes = [(str(path), digest(Path(path))) for path in (*benches, *lab)]
    return GivenFiles(arms, left_out, profiles, trees, hashes)


def read_result(path: Path, verbs: Sequence[str]) -> dict[str, Any]:
    """Returns the JSON of one of these verbs. Raises ValueError where the file is none."""
    remedy = f"make it with `jaxspec {verbs[0]} --json FILE`"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; {remedy}") from None
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path}: is no JSON ({problem}); {remedy}") from problem
    if not isinstance(found, dict) or found.get("command") not in verbs:
        raise ValueError(f"{path}: is no result of {' or '.join(verbs)}; {remedy}")
    return found


def _read_bench(path: Path) -> tuple[list[TimedArm], list[str]]:
    found = read_result(path, ("bench decode",))
    machine = found.get("machine") or {}
    device = str(machine.get("accelerator") or machine.get("cpu") or "unknown machine")
    arms, lacking = [], []
    for row in _rows(path, found):
        try:
            name, batch = str(row["arm"]), int(row["batch"])
            if row.get("round_ms") is None:
                lacking.append(f"{path.name}: {name}, batch {batch}: no parts of a round")
                continue
            parts = tuple(_number(row[f"{part}_ms"]) for part in PARTS)
            arms.append(
                TimedArm(path.name, name, batch, _number(row.get("tau") or 1), _number(row["round_ms"]), parts, device)
            )
        except (KeyError, TypeError, ValueError) as problem:
            raise ValueError(f"{path}: a row lacks arm, batch, or a number of a part ({problem})") from problem
    return arms, lacking


def _read_trees(path: Path) -> list[PredictedTree]:
    found = read_result(path, LAB_VERBS)
    rows = [found] if found["command"] == "lab search" else _rows(path, found)
    keys = ("expected_tau", "predicted_tokens_per_second")
    try:
        return [
            PredictedTree(path.name, int(row["batch"]), int(row["nodes"]), *(_number(row[key]) for key in keys))
            for row in rows
        ]
    except (KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"{path}: a row lacks batch, nodes, {' or '.join(keys)} ({problem})") from problem


def _rows(path: Path, found: dict[str, Any]) -> list[Any]:
    rows = found.get("rows")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: has no rows")
    return rows


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is no number")
    return number
