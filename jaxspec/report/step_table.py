"""A table of training steps, made from a result of `jaxspec bench train`: what each recipe computes, and its time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxspec.report.wording import counted, device, figure_names, three_digits

OPTIONS = ("figures",)
Row = Mapping[str, Any]
COUNTED = {
    "draft_steps": "draft steps",
    "parameters": "parameters",
    "total": "GFLOP a token",
    "target": "target",
    "drafter": "drafter",
    "head_and_loss": "head and loss",
    "ratio": "FLOPs over {first}",
    "optimizer": "optimizer",
}
TIMED = {
    "time_ratio": "time over {first}",
    "step_ms": "step, ms",
    "target_ms": "target, ms",
    "drafter_ms": "drafter, ms",
    "head_and_loss_ms": "head and loss, ms",
    "optimizer_ms": "optimizer, ms",
    "rest_ms": "rest, ms",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
}
"""Figure in the option `figures` -> its column, for what is counted and what is timed."""
PARTS = ("target", "drafter", "head_and_loss")
"""Parts of a step whose matmuls grow with its tokens. The optimizer's, which only Muon has, do not, and stand apart."""
BY_DEFAULT = "draft_steps,total,target,drafter,head_and_loss,ratio,optimizer"
TIMED_BY_DEFAULT = "draft_steps,ratio,time_ratio,step_ms,target_ms,drafter_ms,head_and_loss_ms,optimizer_ms,rest_ms,mfu"


def by_step(options: Mapping[str, str], found: Mapping[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Returns the columns, a line for each recipe, and what their numbers depend on; ratios are to the first recipe.

    Raises ValueError naming a figure that there is not, or that was not timed.
    """
    titles, timed = COUNTED | TIMED, found["repeats"] is not None
    names = figure_names(options, titles, TIMED_BY_DEFAULT if timed else BY_DEFAULT)
    if not timed and (untimed := next((name for name in names if name in TIMED), None)):
        raise ValueError(f"figure {untimed!r} was not timed (--count-only); there are {', '.join(COUNTED)}")
    first, tokens = found["rows"][0], found["batch"] * found["length"]
    lines = [[f"`{row['recipe']}`", *(_cell(row, name, first, tokens) for name in names)] for row in found["rows"]]
    columns = [titles[name].format(first=f"`{first['recipe']}`") for name in names]
    return ["recipe", *columns], lines, _about(found)


def _cell(row: Row, name: str, first: Row, tokens: int) -> str:
    """Returns the text of a figure; FLOPs are those of a token."""
    if name in ("draft_steps", "parameters"):
        return f"{row[name]:,}"
    if name == "total":
        return three_digits(_total(row) / tokens / 1e9)
    if name == "ratio":
        return f"{_total(row) / _total(first):.2f}"
    if name in COUNTED:
        return three_digits(row[f"{name}_flops"] / tokens / 1e9)
    if name == "mfu":
        return f"{100 * row[name]:.0f} %"
    return f"{row[name]:.2f}" if name == "time_ratio" else three_digits(row[name])


def _total(row: Row) -> int:
    return sum(row[f"{part}_flops"] for part in PARTS)


def _about(found: Mapping[str, Any]) -> str:
    """Returns what stands below a table: everything that its numbers depend on."""
    scored = f", a draft vocabulary of {found['draft_vocab']:,}" if found["draft_vocab"] else ""
    how = "counted and not run"
    if found["repeats"] is not None:
        gigaflops = found["machine_matmul_flops_per_second"] / 1e9
        how = (
            f"medians of {counted(found['repeats'], 'step')} in turns, {device(found['machine'])}, whose large matmul "
            f"reached {gigaflops:.0f} GFLOP/s meanwhile"
        )
    return (
        f"Target {found['target']}, a step of {counted(found['batch'], 'row')} of {found['length']:,} tokens{scored}, "
        f"{found['dtype']}; FLOPs are of matmuls, the optimizer's left out of total and ratio; {how}:"
    )
