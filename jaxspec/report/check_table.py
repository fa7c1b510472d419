"""A table of predictions beside measurements, made from a result of `jaxspec lab check`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxspec.report.wording import at_temperature, counted, medians, per_second

OPTIONS = ("batches",)


def by_tree(options: Mapping[str, str], found: Mapping[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Returns the columns, a line for each tree of each batch, and what their numbers depend on.

    Raises ValueError naming a batch that was not checked.
    """
    known = list(dict.fromkeys(str(row["batch"]) for row in found["rows"]))
    batches = options["batches"].split(",") if "batches" in options else known
    if stranger := next((batch for batch in batches if batch not in known), None):
        raise ValueError(f"nothing was checked in a batch of {stranger}; there are {', '.join(known)}")
    lines = [_line(row) for row in found["rows"] if str(row["batch"]) in batches]
    columns = ["tree", "batch", "tau predicted", "measured", "round, ms, predicted", "measured"]
    return [*columns, "tokens/s predicted", "measured", "error"], lines, _about(found)


def _line(row: Mapping[str, Any]) -> list[str]:
    return [
        "plain" if row["nodes"] == 1 else f"`{row['spec']}`",
        str(row["batch"]),
        f"{row['expected_tau']:.2f}",
        f"{row['measured_tau']:.2f}",
        f"{1e3 * row['round_seconds']:.1f}",
        f"{1e3 * row['measured_round_seconds']:.1f}",
        per_second(row["predicted_tokens_per_second"]),
        per_second(row["measured_tokens_per_second"]),
        f"{row['error_of_tokens_per_second']:+.1%}",
    ]


def _about(found: Mapping[str, Any]) -> str:
    """Returns what stands below a table: the errors of all batches, and everything that the numbers depend on."""
    picked = ", ".join(f"{share:.1%} at batch {batch}" for batch, share in found["picked_share"].items())
    machine, warm = found["machine"], at_temperature(found["temperature"] or 0.0)
    off = {name: f"{error:.1%} ({_worst(name, found):+.1%})" for name, error in found["median_error"].items()}
    return (
        f"{counted(len(found['rows']), 'prediction')} at all batches, off in the median (at worst): tokens/s by "
        f"{off['tokens_per_second']}, tau by {off['tau']}, a round by {off['round_seconds']}, times plain decoding by "
        f"{off['speedup']}; the tree predicted best reaches of the best measured {picked}. Target "
        f"{Path(found['target']).name}, {warm}, {found['dtype']}, up to {found['max_new_tokens']} new tokens, "
        f"{medians(found['repeats'])}, trees in turns, prefill left out, "
        f"{machine.get('accelerator') or machine.get('cpu')}, {machine.get('cores')} cores:"
    )


def _worst(name: str, found: Mapping[str, Any]) -> float:
    """Returns the error of one figure that is farthest from 0, of all batches."""
    return max((row[f"error_of_{name}"] for row in found["rows"]), key=abs)
