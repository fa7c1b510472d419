"""Predictions beside what `bench decode` or `lab check` measured of the same trees on the same device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxspec.lab.devices import CPU, KINDS
from jaxspec.lab.findings import SearchFinding
from jaxspec.lab.grown import replayed_tree
from jaxspec.lab.search import Rated

NEEDED = ("arm", "batch", "prefix", "tokens_per_second", "tau")
"""Keys of a row of `bench decode` that are compared."""


class MeasuredArm(NamedTuple):
    """An arm of a bench."""

    file: Path
    arm: str
    tree: str | None
    """None: plain decoding."""
    drafter: str | None
    batch: int
    context: int
    """Tokens of prompt and half an answer, in the mean."""
    tokens_per_second: float
    tau: float
    temperature: float
    device: str


class Compared(NamedTuple):
    """A measured arm beside a prediction of it."""

    measured: MeasuredArm
    finding: SearchFinding
    predicted: Rated

    @property
    def error(self) -> float:
        """Predicted tokens a second over measured ones, less 1."""
        return self.predicted.tokens_per_second.value / self.measured.tokens_per_second - 1


class Comparison(NamedTuple):
    """Arms that are compared, and those that are not, with the reason."""

    compared: list[Compared]
    left_out: list[tuple[MeasuredArm, str]]


def read_bench(path: Path) -> list[MeasuredArm]:
    """Returns the arms of a result of `bench decode` or `lab check`. Raises ValueError where the file is neither."""
    remedy = "make it with `jaxspec bench decode --json FILE` or `jaxspec lab check --json FILE`"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such result; {remedy}") from None
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path}: is no JSON ({problem}); {remedy}") from problem
    if not isinstance(found, dict) or found.get("command") not in ("bench decode", "lab check"):
        raise ValueError(f"{path}: is no result of bench decode or lab check; {remedy}")
    rows, machine = found.get("rows"), found.get("machine")
    if not isinstance(rows, list) or not rows or not isinstance(machine, dict):
        raise ValueError(f"{path}: has no rows or no machine; {remedy}")
    if found.get("simulated_acceptance") is not None:
        raise ValueError(
            f"{path}: its acceptance is simulated, so that tau says nothing: leave out --simulate-acceptance"
        )
    kind = machine.get("accelerator")
    device = CPU if kind is None else KINDS.get(kind, str(kind))
    try:
        if found["command"] == "lab check":
            rows = [_checked(row, found["drafter"]) for row in rows]
        return [_arm(path, row, float(found.get("temperature") or 0), device) for row in rows]
    except (KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"{path}: a row lacks one of {', '.join(NEEDED)}, or it is no number; {remedy}") from problem


def _checked(row: dict[str, Any], drafter: str) -> dict[str, Any]:
    """Returns a row of `lab check` by the keys of `bench decode`."""
    measured = {name: row[f"measured_{name}"] for name in ("tokens_per_second", "tau")}
    tree = row["spec"] if row["nodes"] > 1 else None
    named = {"arm": tree or "plain", "tree": tree, "drafter": tree and drafter}
    return {**named, "batch": row["batch"], "prefix": row["context"], **measured}


def _arm(path: Path, row: dict[str, Any], temperature: float, device: str) -> MeasuredArm:
    sizes = int(row["batch"]), int(row["prefix"]), float(row["tokens_per_second"]), float(row["tau"] or 1)
    if not min(sizes) > 0:
        raise ValueError("a figure is not above 0")
    return MeasuredArm(path, str(row["arm"]), row.get("tree"), row.get("drafter"), *sizes, temperature, device)


def compare(measured: Sequence[MeasuredArm], findings: Sequence[SearchFinding]) -> Comparison:
    """Returns each measured arm with the prediction of every search on its device, or why there is none."""
    found = Comparison([], [])
    for arm in measured:
        suited, problem = _suited(arm, findings)
        for finding in suited:
            try:
                found.compared.append(Compared(arm, finding, _predict(arm, finding)))
                problem = ""
            except ValueError as reason:
                problem = problem and str(reason)
        if problem:
            found.left_out.append((arm, problem))
    return found


def _suited(arm: MeasuredArm, findings: Sequence[SearchFinding]) -> tuple[list[SearchFinding], str]:
    """Returns the searches on an arm's device and of its temperature, those of its drafter where there are some, and
    why there may be none.

    Given rates are of any temperature. Plain decoding needs no acceptance: one search a file of costs is enough.
    """
    here = [f for f in findings if f.flags.inputs.costs.facts.get("device") == arm.device]
    if arm.tree is None:
        return list({f.flags.cost: f for f in reversed(here)}.values()), "no file of costs is of this device"
    about = [(f, f.flags.inputs.profile.facts) for f in here]
    warm = [(f, of) for f, of in about if of.get("kind") == "simulated" or of.get("temperature") == arm.temperature]
    if here and not warm:
        return [], f"no profile is of temperature {arm.temperature:g}"
    same = [f for f, of in warm if of.get("drafter") == arm.drafter]
    return same or [f for f, _ in warm], "no file of costs is of this device"


def mismatches(compared: Sequence[Compared]) -> list[str]:
    """Returns a sentence for each drafter that was measured and stands beside the acceptance of another."""
    found = []
    for c in compared:
        of = c.finding.flags.inputs.profile.facts.get("drafter")
        if c.measured.tree is not None and of != c.measured.drafter:
            found.append(f"Measured with {c.measured.drafter}, predicted with the acceptance of {of}.")
    return list(dict.fromkeys(found))


def _predict(arm: MeasuredArm, finding: SearchFinding) -> Rated:
    """Returns an arm's prediction. Raises ValueError where it cannot be replayed or costed."""
    return finding.search.rate(replayed_tree(arm.tree or "none"), finding.flags.cost_at(arm.batch, arm.context))
