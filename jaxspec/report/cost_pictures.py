"""Figures of a report about cost: the parts of a round, and tau and tokens/s by the size of the tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxspec.pages.axes import axis_over, doubling_axis
from jaxspec.pages.lines import Frame, Series, legend_of, line_plot
from jaxspec.pages.page import DataTable, Picture
from jaxspec.pages.whiskers import StackedBar, numbered_legend, stacked_bars
from jaxspec.report.given_files import PARTS, PredictedTree, TimedArm
from jaxspec.report.runs import Method, Report
from jaxspec.report.wording import at_temperature

Sized = tuple[int, Method, Mapping[str, Any]]
"""Nodes of the tree, the method, its figures."""


def round_picture(arms: Sequence[TimedArm]) -> Picture:
    """Returns the parts of a round in milliseconds, a bar an arm and batch."""
    axis = axis_over("ms of a round", [sum(max(p, 0.0) for p in arm.parts_ms) for arm in arms])
    files = len({arm.file for arm in arms}) > 1
    names = [f"{f'{arm.file}: ' if files else ''}{arm.arm}, batch {arm.batch}" for arm in arms]
    bars = [
        StackedBar(name, arm.parts_ms, f"{arm.round_ms:.3g} ms, tau {arm.tau:.2f}")
        for name, arm in zip(names, arms, strict=True)
    ]
    caption = "Cost of a round"
    told = "; ".join(
        f"{name}: {', '.join(f'{part} {ms:.3g}' for part, ms in zip(PARTS, arm.parts_ms, strict=True))}"
        for name, arm in zip(names, arms, strict=True)
    )
    numbers = [[arm.file, arm.arm, arm.batch, *arm.parts_ms, arm.round_ms, arm.tau, arm.device] for arm in arms]
    negative = any(ms < 0 for arm in arms for ms in arm.parts_ms)
    note = "Parts are timed by themselves; overhead is what is left of the round."
    note += " A negative overhead, of parts that overlap, has no length." if negative else ""
    return Picture(
        "round",
        caption,
        stacked_bars(caption, told, axis, bars),
        DataTable(caption, ["file", "method", "batch", *(f"{p} ms" for p in PARTS), "round ms", "tau", "machine"],
                  numbers),
        note,
        numbered_legend(PARTS),
    )  # fmt: skip


def budget_pictures(
    report: Report, temperature: float, number: int, trees: Sequence[PredictedTree] = ()
) -> list[Picture]:
    """Returns tau and tokens/s by the nodes of the tree, a line a run and drafter, predicted trees as points beside
    them; none where no drafter has two sizes and nothing is predicted."""
    groups = _sizes(report, temperature)
    mine = _predicted(report, trees)
    if not mine and not any(len({one[0] for one in sized}) > 1 for sized in groups.values()):
        return []
    tau = ("tau_micro", "tau: tokens per target call"), [[float(t.nodes), t.tau] for t in mine]
    speed = ("tokens_per_second", "tokens/s, prefill in"), [[float(t.nodes), t.tokens_per_second] for t in mine]
    return [_budget(groups, *one, temperature, number) for one in (tau, speed) if groups or mine]


def _sizes(report: Report, temperature: float) -> dict[str, list[Sized]]:
    groups: dict[str, list[Sized]] = {}
    for method in report.methods:
        if (figures := method.figures(temperature)) is not None:
            drafter = str(method.facts.get("drafter") or "drafts")
            name = f"{drafter} ({method.run.name})" if len(report.runs) > 1 else drafter
            groups.setdefault(name, []).append((int(method.facts["nodes"]), method, figures))
    return {name: sorted(sized, key=lambda one: one[0]) for name, sized in groups.items()}


def _predicted(report: Report, trees: Sequence[PredictedTree]) -> list[PredictedTree]:
    """Returns the trees that are predicted for a batch that a run has."""
    batches = {run.width for run in report.runs}
    return sorted((t for t in trees if t.batch in batches), key=lambda t: t.nodes)


def other_batches(report: Report, trees: Sequence[PredictedTree]) -> int:
    """Returns the number of predicted trees that no run has the batch of."""
    return len(trees) - len(_predicted(report, trees))


def _budget(
    groups: Mapping[str, Sequence[Sized]],
    of: tuple[str, str],
    predicted: Sequence[Sequence[float]],
    temperature: float,
    number: int,
) -> Picture:
    key, label = of
    series = [
        Series(name, [float(n) for n, _, _ in sized], [f[key] for _, _, f in sized]) for name, sized in groups.items()
    ]
    if predicted:
        series.append(
            Series("predicted by the lab", [p[0] for p in predicted], [p[1] for p in predicted], joined=False)
        )
    x = doubling_axis("nodes of the tree, root included", [v for s in series for v in s.x])
    y = axis_over(label, [v for s in series for v in s.y])
    short = label.split(":")[0].split(",")[0]
    caption = f"{short} by size of the tree, {at_temperature(temperature)}"
    numbers = [[name, m.arm, nodes, f[key]] for name, sized in groups.items() for nodes, m, f in sized]
    numbers += [["predicted", "", int(nodes), value] for nodes, value in predicted]
    told = "; ".join(f"{row[0]}, {row[2]} nodes: {row[3]:.3g}" for row in numbers)
    return Picture(
        f"budget-{key.split('_')[0]}-{number}",
        caption,
        line_plot(caption, told, Frame(x, y), series),
        DataTable(caption, ["drafter", "method", "nodes", short], numbers),
        "Lines: measured by the runs. Points: the trees of the files given, at a batch of the runs."
        if predicted
        else None,
        legend_of(series),
    )
