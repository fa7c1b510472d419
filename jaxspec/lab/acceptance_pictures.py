"""Figures of a report: acceptance by depth and rank, and calibration, of a profile."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxspec.lab.calibration import calibrate
from jaxspec.lab.profile import Profile
from jaxspec.lab.rates import Rates, measure_rates
from jaxspec.pages.axes import Axis, axis_over
from jaxspec.pages.charts import Cell, GridAxis, cell_grid
from jaxspec.pages.lines import Frame, Reference, Series, legend, line_plot
from jaxspec.pages.page import DataTable, Picture

SHOWN_RANKS = 3
"""Ranks that have a line of their own."""
SHOWN_CURVES = 4
"""Depths whose calibration is drawn."""
MOST_POINTS = 40
"""Breakpoints of a curve in a table."""
SHARES = tuple(i / 5 for i in range(6))


def acceptance_pictures(profile: Profile, name: str, number: int) -> list[Picture]:
    """Returns acceptance by depth, a line a rank, and by both as a grid."""
    rates = measure_rates(profile)
    rows = [
        [
            d + 1,
            r,
            float(rates.rate_DK[d, r]),
            float(rates.low_DK[d, r]),
            float(rates.high_DK[d, r]),
            _tries(rates, d, r),
        ]
        for d, r in np.ndindex(*rates.rate_DK.shape)
    ]
    columns = ["depth", "rank", "acceptance", "low", "high", "places"]
    return [_by_depth(rates, name, number, columns, rows), _by_both(rates, name, number, columns, rows)]


def _tries(rates: Rates, depth: int, rank: int) -> int:
    return int(np.broadcast_to(rates.tries_DK, rates.rate_DK.shape)[depth, rank])


def _by_depth(rates: Rates, name: str, number: int, columns: list[str], rows: list[list[Any]]) -> Picture:
    depths = [float(d + 1) for d in range(len(rates.rate_DK))]
    shown = range(min(SHOWN_RANKS, rates.rate_DK.shape[1]))
    any_D = np.where(np.isfinite(rates.rate_DK).any(1), np.nansum(rates.rate_DK, axis=1), np.nan)
    series = [
        Series(
            f"rank {r}", depths, *(x[:, r].astype(float).tolist() for x in (rates.rate_DK, rates.low_DK, rates.high_DK))
        )
        for r in shown
    ]
    series.append(Series(f"any of {rates.rate_DK.shape[1]} ranks", depths, any_D.tolist()))
    x = axis_over("depth of the child", depths, whole=True, from_zero=False)
    y = Axis("accepted, of children of accepted nodes", 0, 1, percent=True, ticks=SHARES)
    caption = f"Acceptance by depth: {name}"
    told = "; ".join(f"{one.name}: {', '.join(f'{v:.2f}' for v in one.y)}" for one in series)
    drawing = line_plot(caption, told, Frame(x, y), series)
    note = "A mean over places of the text; rounds stand denser where text is hard. Band: 95 % over prompts."
    return Picture(
        f"acceptance-{number}",
        caption,
        drawing,
        DataTable(caption, columns, rows),
        note,
        legend([s.name for s in series]),
    )


def _by_both(rates: Rates, name: str, number: int, columns: list[str], rows: list[list[Any]]) -> Picture:
    depths, ranks = rates.rate_DK.shape
    cells = [[_cell(float(rates.rate_DK[d, r]), d, r) for d in range(depths)] for r in range(ranks)]
    caption = f"Acceptance by depth and rank, %: {name}"
    drawing = cell_grid(
        caption,
        f"{depths} depths across, {ranks} ranks down",
        GridAxis("rank", [str(r) for r in range(ranks)]),
        GridAxis("depth", [str(d + 1) for d in range(depths)]),
        cells,
    )
    table = DataTable(caption, columns, rows)
    return Picture(
        f"ranks-{number}",
        caption,
        drawing,
        table,
        "A column sums to at most 100: one child at most is accepted.",
        scrolls=True,
    )


def _cell(rate: float, depth: int, rank: int) -> Cell:
    if not math.isfinite(rate):
        return Cell("–", told=f"depth {depth + 1}, rank {rank}: nothing was tried")
    text = f"{100 * rate:.0f}" if rate >= 0.0995 else f"{100 * rate:.1f}"
    return Cell(text, strength=math.sqrt(rate), told=f"depth {depth + 1}, rank {rank}: {100 * rate:.2f} %")


def calibration_pictures(profile: Profile, name: str, number: int) -> list[Picture]:
    """Returns the curves from draft probability to acceptance, and the error before and after them; none without."""
    known = [row for row in profile.facts.get("calibration") or calibrate(profile) if len(row["q"])]
    if not known:
        return []
    return [_curves(known, name, number), _errors(known, name, number)]


def _curves(known: list[dict[str, Any]], name: str, number: int) -> Picture:
    series = [Series(f"depth {row['depth']}", row["q"], row["p"]) for row in known[:SHOWN_CURVES]]
    share = Axis("accepted", 0, 1, percent=True, ticks=SHARES)
    caption = f"Accepted share by draft probability: {name}"
    drawing = line_plot(
        caption,
        "Isotonic curves; below the dotted diagonal the drafter is too sure of itself",
        Frame(Axis("draft probability", 0, 1, percent=True, ticks=SHARES), share),
        series,
        [Reference("as likely as drafted", (0, 1), (0, 1))],
    )
    rows = []
    for row in known:
        kept = np.unique(np.linspace(0, len(row["q"]) - 1, MOST_POINTS).round().astype(int))
        rows += [[row["depth"], row["q"][i], row["p"][i]] for i in kept]
    note = "Isotonic regression over all children and places. Below the diagonal the drafter is too sure of itself."
    table = DataTable(caption, ["depth", "draft probability", "accepted"], rows)
    return Picture(f"calibration-{number}", caption, drawing, table, note, legend([s.name for s in series]))


def _errors(known: list[dict[str, Any]], name: str, number: int) -> Picture:
    depths = [float(row["depth"]) for row in known]
    named = {
        "likeliest child, before": "ece_first_before",
        "likeliest child, after": "ece_first_after",
        "all children, before": "ece_before",
        "all children, after": "ece_after",
    }
    series = [Series(told, depths, [_number(row.get(key)) for row in known]) for told, key in named.items()]
    y = axis_over("expected calibration error", [v for s in series for v in s.y], percent=True)
    caption = f"Calibration error before and after: {name}"
    told = "; ".join(f"{s.name}: {', '.join(f'{v:.4f}' for v in s.y)}" for s in series)
    drawing = line_plot(caption, told, Frame(axis_over("depth", depths, whole=True, from_zero=False), y), series)
    columns = ["depth", "pairs", *(f"ECE, {told}" for told in named), "mean entropy, nats"]
    rows = [
        [row["depth"], row["pairs"], *(row.get(key) for key in named.values()), (row.get("entropy") or {}).get("mean")]
        for row in known
    ]
    note = (
        "Mean distance of draft probability from the accepted share over bins of equal size. After: by the curve of "
        "the other half of the prompts."
    )
    return Picture(
        f"ece-{number}", caption, drawing, DataTable(caption, columns, rows), note, legend([s.name for s in series])
    )


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
