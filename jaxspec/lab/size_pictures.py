"""Figures of a report: tokens per call and per second against the size of the tree, and what errors would change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxspec.lab.findings import SearchFinding
from jaxspec.lab.search import ERROR, Rated
from jaxspec.pages.axes import Axis, axis_over, doubling_axis
from jaxspec.pages.charts import Bar, bar_chart
from jaxspec.pages.lines import Frame, Reference, Series, legend, line_plot
from jaxspec.pages.page import DataTable, Picture

FIGURES = ["tau", "tau low", "tau high", "tokens/s", "tokens/s low", "tokens/s high", "x plain", "tree"]


def size_pictures(findings: Sequence[SearchFinding], number: int) -> list[list[Picture]]:
    """Returns the figures of the searches in one profile: tau of all machines and tokens/s of each, by nodes; then by
    depth."""
    nodes = _pictures(findings, f"nodes-{number}", "nodes", lambda f: f.by_nodes, lambda rated: rated.tree.nodes)
    depths = _pictures(findings, f"depth-{number}", "levels", lambda f: f.by_depth, lambda rated: rated.tree.depth)
    return [nodes, depths]


def _pictures(
    findings: Sequence[SearchFinding],
    anchor: str,
    unit: str,
    points: Callable[[SearchFinding], list[Rated]],
    size: Callable[[Rated], int],
) -> list[Picture]:
    sizes = [size(rated) for finding in findings for rated in points(finding)]
    x = (
        axis_over("levels of the tree", sizes, whole=True)
        if unit == "levels"
        else doubling_axis("nodes of the tree, root included", sizes)
    )
    found = [_tau_picture(findings, anchor, x, points, size)]
    for number, finding in enumerate(findings):
        found.append(_speed_picture(finding, anchor, number, x, points(finding), size))
    return found


def _tau_picture(
    findings: Sequence[SearchFinding],
    anchor: str,
    x: Axis,
    points: Callable[[SearchFinding], list[Rated]],
    size: Callable[[Rated], int],
) -> Picture:
    """Returns tau of the fastest tree of each size, a line a machine."""
    series = []
    for finding in findings:
        rated, chosen = points(finding), finding.choice.chosen
        best = size(chosen), chosen.tau.value
        series.append(_series(finding.names.machine, rated, size, [r.tau for r in rated], best))
    y = axis_over("tau: tokens per target call", _values(series))
    rows = [[f.names.machine, size(r), *_figures(f, r)] for f in findings for r in points(f)]
    unit = x.label.split(" ")[0]
    caption = f"Tokens per target call by {unit}"
    return Picture(
        anchor,
        caption,
        line_plot(caption, _told(series, unit), Frame(x, y), series),
        DataTable(caption, ["machine", unit, *FIGURES], rows),
        "Of each size the tree that is fastest for the prompts that choose; the figures are of the others. Ringed, and "
        f"in {unit} beside its name: the chosen one. Band: 95 % over prompts.",
        legend([f"{one.name}: {one.best_name}" for one in series]),
    )


def _speed_picture(
    finding: SearchFinding, anchor: str, number: int, x: Axis, rated: list[Rated], size: Callable[[Rated], int]
) -> Picture:
    """Returns tokens a second of the fastest tree of each size on one machine, beside plain decoding; `number` is the
    machine's."""
    chosen, plain = finding.choice.chosen, finding.choice.plain
    best = size(chosen), chosen.tokens_per_second.value
    series = [_series(finding.names.machine, rated, size, [r.tokens_per_second for r in rated], best, number)]
    y = axis_over("tokens/s of all rows", _values(series))
    level = plain.tokens_per_second.value
    unit = x.label.split(" ")[0]
    caption = f"Tokens/s by {unit}: {finding.names.machine}"
    return Picture(
        f"{anchor}-{number + 1}",
        caption,
        line_plot(
            caption,
            _told(series, unit),
            Frame(x, y),
            series,
            [Reference("plain decoding", (x.low, x.high), (level, level))],
        ),
        DataTable(caption, [unit, *FIGURES], [[size(r), *_figures(finding, r)] for r in rated]),
        f"Batch {chosen.batch}, context {chosen.context:,}; ringed: the chosen tree. Trees are chosen on one half of "
        "the prompts and rated on the other, where another may be faster.",
    )


def _series(
    name: str,
    rated: list[Rated],
    size: Callable[[Rated], int],
    values: Sequence[Any],
    best: tuple[float, float],
    look: int | None = None,
) -> Series:
    x = [float(size(r)) for r in rated]
    y, low, high = ([float(v[i]) for v in values] for i in range(3))
    return Series(name, x, y, low, high, best=best, best_name=f"{best[0]:g}", look=look)


def _values(series: Sequence[Series]) -> list[float]:
    return [
        v for one in series for values in (one.y, one.high or [], [one.best[1]] if one.best else []) for v in values
    ]


def _told(series: Sequence[Series], unit: str) -> str:
    """Returns the plot in words."""
    return "; ".join(
        f"{one.name}: chosen at {one.best_name} {unit}, {one.best[1]:.4g}" for one in series if one.best is not None
    )


def _figures(finding: SearchFinding, rated: Rated) -> list[Any]:
    plain = finding.choice.plain.tokens_per_second.value
    speed = rated.tokens_per_second
    return [*rated.tau, *speed, speed.value / plain, rated.tree.spec]


def sensitivity_picture(finding: SearchFinding, number: int) -> Picture:
    """Returns what the chosen tree loses to the best one where acceptance or a part of the cost is off."""
    parts = {"acceptance": "acceptance", "target": "target's time", "draft": "drafter's time", "other": "other time"}
    rows = [(f"{parts[e['error']]} {e['factor'] - 1:+.0%}".replace("-", "−"), e) for e in finding.sensitivity]
    bars = [Bar(name, e["lost"], _lost(finding, e)) for name, e in rows]
    full = max([0.01, *(e["lost"] for _, e in rows)])
    caption = f"Lost if a figure were {ERROR:.0%} off: {finding.names.whole}"
    told = "; ".join(f"{bar.name}: {bar.text}" for bar in bars)
    columns = ["error", "tokens/s of the chosen tree", "best tree's", "lost", "best tree's nodes", "best tree then"]
    lines = [
        [
            name,
            e["predicted_tokens_per_second"],
            e["best_tokens_per_second"],
            e["lost"],
            e["best_nodes"],
            e["best_spec"],
        ]
        for name, e in rows
    ]
    chosen = _nodes(finding.choice.chosen.tree.nodes)
    note = f"Share of tokens/s that the chosen tree of {chosen} gives away to the best tree then."
    return Picture(
        f"errors-{number}", caption, bar_chart(caption, told, bars, full=full), DataTable(caption, columns, lines), note
    )


def _lost(finding: SearchFinding, error: dict[str, Any]) -> str:
    text = f"{100 * error['lost']:.1f} %"
    same = error["best_nodes"] == finding.choice.chosen.tree.nodes
    return text if same else f"{text}, {_nodes(error['best_nodes'])}"


def _nodes(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"
