"""A table of other libraries beside this one, made from a result of `jaxspec bench peers`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxspec.report.wording import counted, ends, known, medians, per_second, unsteady

OPTIONS = ()


def by_peer(options: Mapping[str, str], found: Mapping[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Returns the columns, a line for each peer, and what their numbers depend on."""
    columns = ["peer", "version", "tokens/s", "x plain", "decode tokens/s", "x plain", "tau", "identical"]
    return columns, [_line(row) for row in found["rows"]], _about(found)


def _line(row: Mapping[str, Any]) -> list[str]:
    ties = f", {counted(row['near_ties'], 'near tie')}" if row["near_ties"] else ""
    return [
        row["peer"],
        str(row["version"]),
        per_second(row["tokens_per_second"]) + ends(row, "tokens_per_second"),
        _ratio(row["x_plain"]),
        per_second(row["decode_tokens_per_second"]) + ends(row, "decode_tokens_per_second"),
        _ratio(row["x_plain_decode"]),
        _ratio(row["tau"]),
        f"{100 * row['identical_fraction']:.4g} %{ties}",
    ]


def _ratio(value: Any) -> str:
    return f"{value:.2f}" if known(value) else "-"


def _about(found: Mapping[str, Any]) -> str:
    """Returns what stands below a table: everything that its numbers depend on."""
    machine = found["machine"]
    return (
        f"Target {Path(found['target']).name}, {counted(found['count'], 'prompt')} of {Path(found['prompts']).name}, "
        f"batch 1, greedy, {found['dtype']}, up to {found['max_new_tokens']} new tokens, "
        f"{counted(found['threads'], 'thread')} each, a process each, prompt by prompt in turns, "
        f"{medians(found['repeats'])}{_ends(found)}, {machine.get('cpu')}{unsteady(found)}:"
    )


def _ends(found: Mapping[str, Any]) -> str:
    """Returns what stands in brackets behind the figures, where that is kept."""
    return " (least to greatest)" if any(ends(row, "tokens_per_second") for row in found["rows"]) else ""
