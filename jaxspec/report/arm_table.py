"""A table of decoding arms, made from a result of `jaxspec bench decode`: tokens/s, tau, the parts of a round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxspec.report.wording import at_temperature, device, figure_names, known, medians, per_second, unsteady

OPTIONS = ("figures", "batch", "arms")
FIGURES = {
    "nodes": ("nodes", "{:,.0f}"),
    "tokens_per_second": ("tokens/s", ""),
    "speedup": ("x plain", "{:.2f}"),
    "tau": ("tau", "{:.2f}"),
    "efficiency": ("efficiency", "{:.2f}"),
    "identical": ("identical", ""),
    "round_ms": ("round, ms", "{:.1f}"),
    "draft_ms": ("draft", "{:.1f}"),
    "target_ms": ("target", "{:.1f}"),
    "verify_ms": ("verify", "{:.2f}"),
    "commit_ms": ("commit", "{:.2f}"),
    "overhead_ms": ("overhead", "{:.1f}"),
    "outside": ("outside, %", "{:.1f}"),
    "capacity": ("slots", "{:,}"),
}
"""Figure of an arm in the option `figures` -> its column, and the form of its number."""
BY_DEFAULT = "nodes,tokens_per_second,speedup,tau,efficiency,identical"


def by_arm(options: Mapping[str, str], found: Mapping[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Returns the columns, the lines, one an arm and the peer's last, and what their numbers depend on.

    Raises ValueError naming an option that the result has nothing for.
    """
    names = figure_names(options, FIGURES, BY_DEFAULT)
    batches = list(dict.fromkeys(str(row["batch"]) for row in found["rows"]))
    batch = options.get("batch", batches[0])
    rows = [row for row in found["rows"] if str(row["batch"]) == batch]
    if not rows:
        raise ValueError(f"nothing was measured in a batch of {batch}; there are {', '.join(batches)}")
    arms = options["arms"].split(",") if "arms" in options else [row["arm"] for row in rows]
    if stranger := next((arm for arm in arms if arm not in [row["arm"] for row in rows]), None):
        raise ValueError(f"there is no arm {stranger!r}; there are {', '.join(row['arm'] for row in rows)}")
    lines = [[f"`{row['arm']}`", *(_cell(row, name) for name in names)] for row in rows if row["arm"] in arms]
    if (peer := found.get("peer")) and batch == batches[0]:
        moved = found.get("copy_bandwidth", {}).get("steady") is False
        over = None if moved else peer["tokens_per_second"] / rows[0]["tokens_per_second"]
        shown = peer | {"speedup": over, "nodes": 1, "tau": 1.0}
        lines.append([f"{peer['name']} {peer['version']}", *(_cell(shown, name) for name in names)])
    return ["arm", *(FIGURES[name][0] for name in names)], lines, _about(found, batch)


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = _outside(row) if name == "outside" else row.get("identical_fraction" if name == "identical" else name)
    if value is None or not known(value):
        return "-"
    if name == "identical":
        return f"{100 * value:.4g} %"
    return per_second(value) if name == "tokens_per_second" else FIGURES[name][1].format(value)


def _outside(row: Mapping[str, Any]) -> float | None:
    """Returns the percentage of a round that is no forward pass of either model; None where it was not timed."""
    parts: list[Any] = [row.get(f"{part}_ms") for part in ("verify", "commit", "overhead")]
    return 100 * sum(parts) / row["round_ms"] if all(map(known, [*parts, row.get("round_ms")])) else None


def _about(found: Mapping[str, Any], batch: str) -> str:
    """Returns what stands below a table: everything that its numbers depend on."""
    gigabytes, gigaflops = (found[f"machine_{key}_per_second"] / 1e9 for key in ("copy_bytes", "matmul_flops"))
    return (
        f"Target {Path(found.get('target') or 'of that shape').name}, {_drawn(found)}, batch "
        f"{batch}, {found['dtype']}, up to {found['max_new_tokens']:,} new tokens, "
        f"{medians(found['repeats'])}, arms in turns, {device(found['machine'])}, which copied "
        f"{gigabytes:.1f} GB/s and multiplied {gigaflops:.0f} GFLOP/s meanwhile{unsteady(found)}:"
    )


def _drawn(found: Mapping[str, Any]) -> str:
    """Returns the temperature; children and rule where tokens are drawn, and an acceptance that is simulated."""
    how = f", {found['draft_mode']} children, {found['rule']}" if found["temperature"] else ""
    simulated = ", ".join(f"{rate:g}" for rate in found.get("simulated_acceptance") or ())
    return at_temperature(found["temperature"]) + how + (f", acceptance simulated at {simulated}" if simulated else "")
