"""List the runs below a folder, with their progress, how they ended, and their best tau."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from jaxspec.checkpoints import tracking
from jaxspec.console import cli, results, tables
from jaxspec.evaluation import comparison

MEASURED = "compare.json"
COLUMNS = {
    "name": "run",
    "kind": "kind",
    "step": "step",
    "steps": "of",
    "loss": "loss",
    "simulated_tau": "simulated tau",
    "tau": "measured tau",
    "state": "state",
    "date": "date",
    "folder": "folder",
}
NOTES = """\
simulated tau: the best of the run's evaluations on held-out text; measured: the best that jaxspec compare decoded with
state: killed if a run ended without a record, or runs on a machine whose locks are not visible here
"""


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of `jaxspec runs`."""

    folder: Positional[Path] = Path("runs")
    """Folder to search, at any depth."""
    json: Path | None = None
    """Write the result here."""


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec runs", description=__doc__ or "")
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder; name one that runs were written below")
    rows = sorted(map(summarize, find_runs(args.folder)), key=lambda row: row["date"])
    tables.print_table(
        f"{len(rows)} runs below {args.folder}",
        list(COLUMNS.values()),
        [[row[key] for key in COLUMNS] for row in rows],
    )
    sys.stdout.write(NOTES)
    if args.json:
        results.write_json(args.json, results.result("runs", dtype="various", seed=None, started=started, runs=rows))
    return 0


def find_runs(folder: Path) -> Iterator[Path]:
    """Yields the folders of runs below `folder` and itself; a run's own folder is not searched further."""
    for path, inner, files in os.walk(folder):
        if tracking.RECORD in files:
            inner.clear()
            yield Path(path)
        inner.sort()


def summarize(folder: Path) -> dict[str, Any]:
    """Returns the row of one run in the list; `state` says if its record cannot be read."""
    row: dict[str, Any] = dict.fromkeys(("name", "kind", "step", "steps", "loss", "simulated_tau", "tau"))
    row |= {"name": folder.name, "state": "unknown", "date": "", "folder": folder}
    try:
        record = tracking.read_record(folder) or {}
    except ValueError:
        return row | {"state": "damaged record"}
    try:
        lines = tracking.read_metrics(folder)
    except ValueError:
        return row | {"state": "damaged metrics"}
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    taus = [line["eval"]["simulated_tau"] for line in lines if line.get("eval", {}).get("simulated_tau") is not None]
    latest = record["sessions"][-1]
    return row | {
        "name": record["name"],
        "kind": record["kind"],
        "step": max((line["step"] for line in lines), default=0),
        "steps": record["steps"],
        "loss": losses[-1] if losses else None,
        "simulated_tau": max(taus, default=None),
        "tau": measured_tau(folder),
        "state": latest.get("end") or ("running" if tracking.is_held(folder) else "killed"),
        "date": latest.get("ended", latest["started"]),
    }


def measured_tau(folder: Path) -> float | None:
    """Returns the best tau that `jaxspec compare` measured with the drafter of `OUT/RECIPE/seed-N/run`, or None."""
    seed = folder.absolute().parent
    recipe, out = seed.parent, seed.parent.parent
    if not (out / MEASURED).is_file():
        return None
    of = (recipe.name, seed.name, comparison.EVERY)
    rows = json.loads((out / MEASURED).read_text(encoding="utf-8"))["rows"]
    taus = [row["tau"] for row in rows if (row["recipe"], f"seed-{row['seed']}", row["source"]) == of]
    return max((tau for tau in taus if tau is not None), default=None)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
