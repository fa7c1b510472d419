"""Figures of a comparison as PNG files, drawn with matplotlib (the `plot` extra)."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.evaluation.comparison import EVERY, FEWEST_ROUNDS, named_temperature

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; its yellow is too pale for a line."""
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SPREAD = 10
"""Losses further apart than so many times are drawn on a logarithmic axis."""
SMOOTHED = 20
"""The loss is a moving mean over one part in so many of the run."""


class Curve(NamedTuple):
    """The metric log of one training run."""

    recipe: str
    loss_tokens: np.ndarray
    loss: np.ndarray
    eval_tokens: np.ndarray
    simulated_tau: np.ndarray
    joined: tuple[float, ...] = ()
    """Tokens after which another loss joined the objective."""


def missing() -> str | None:
    """Returns a sentence on what to install for figures; None where it is installed."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return 'no figures are drawn, for matplotlib is not installed: pip install -e ".[plot]", and give the command again'


def read_curve(recipe: str, log: str | Path, tokens_per_step: float, joined: tuple[float, ...] = ()) -> Curve:
    """Returns a run's curve from its `metrics.jsonl`; see `Curve` for `joined`."""
    lines = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines() if line]
    trained = [(x["step"] * tokens_per_step, x["loss"]) for x in lines if "loss" in x]
    evals = [(x["step"] * tokens_per_step, x["eval"]["simulated_tau"]) for x in lines if "eval" in x]
    return Curve(recipe, *np.reshape(trained, (-1, 2)).T, *np.reshape(evals, (-1, 2)).T, joined=joined)


def draw_learning_curves(path: Path, curves: Sequence[Curve], recipes: Sequence[str] = ()) -> None:
    """Draws loss and simulated tau by trained tokens; a recipe's seeds share their colour.

    `recipes`, drawn or not, fix the looks, so that a recipe looks the same in all figures.
    """
    figure, (left, right) = _canvas(1, 2, width=11.5, height=4.4)
    looks = _looks([curve.recipe for curve in curves], recipes)
    unit, name = _tokens_unit(max(float(c.eval_tokens.max(initial=0)) for c in curves))
    for curve in curves:
        look = looks[curve.recipe]
        line = {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 1.4}
        left.plot(curve.loss_tokens / unit, _smooth(curve.loss), **line)
        for tokens in curve.joined:
            left.axvline(tokens / unit, **{**line, "linewidth": 0.8, "alpha": 0.6})
        right.plot(curve.eval_tokens / unit, curve.simulated_tau, markersize=4, **line, marker=look["marker"])
    lowest = min((float(c.loss.min(initial=math.inf)) for c in curves), default=1.0)
    highest = max((float(c.loss.max(initial=-math.inf)) for c in curves), default=1.0)
    if 0 < SPREAD * lowest < highest:
        left.set_yscale("log")
        ticker = importlib.import_module("matplotlib.ticker")
        plain = ticker.FuncFormatter(lambda value, _: f"{value:g}")
        crowded = highest > SPREAD**2 * lowest
        left.yaxis.set(major_formatter=plain, minor_formatter=ticker.NullFormatter() if crowded else plain)
    joins = " (upright: a loss joins)" if any(curve.joined for curve in curves) else ""
    left.set(title=f"Training loss, each its own{joins}", ylabel="loss a token (moving mean)")
    right.set(title="Held-out conversations", ylabel="simulated tau (tokens per target call)")
    for axes in (left, right):
        axes.set_xlabel(f"trained tokens{name}")
    _finish(figure, path, looks)


def draw_acceptance(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Draws conditional acceptance by depth of `comparison.summaries`, a panel for each tree and temperature."""
    whole = [row for row in found if row["source"] == EVERY]
    settings = list(dict.fromkeys(map(_setting, whole)))
    columns = min(2, len(settings))
    figure, panels = _canvas(-(-len(settings) // columns), columns, width=3.0 + 4.3 * columns, height=4.2)
    looks = _looks([row["recipe"] for row in whole])
    rates = [np.where(row["rounds_by_depth"] >= FEWEST_ROUNDS, row["acceptance_by_depth"], np.nan) for row in whole]
    drawn = np.concatenate(rates)
    seen = drawn[np.isfinite(drawn)]
    limits = (np.floor(10 * seen.min() - 0.5) / 10, np.ceil(10 * seen.max() + 0.5) / 10) if seen.size else (0, 1)
    for axes in panels[len(settings) :]:
        axes.set_visible(False)
    for axes, setting in zip(panels, settings, strict=False):
        lines = [(row["recipe"], rate) for row, rate in zip(whole, rates, strict=True) if _setting(row) == setting]
        for recipe, rate in lines:
            axes.plot(np.arange(1, len(rate) + 1), rate, linewidth=1.4, markersize=5, **looks[recipe])
        deepest = max(len(rate) for _, rate in lines)
        axes.set(xticks=range(1, deepest + 1), xlim=(0.7, deepest + 0.3), ylim=(max(0, limits[0]), min(1, limits[1])))
        axes.set_title(f"{setting[0]}, {named_temperature(setting[1])}")
        axes.set(xlabel="depth in the tree (drafted tokens)", ylabel="acceptance, given all above accepted")
    _finish(figure, path, looks)


def _setting(row: Mapping[str, Any]) -> tuple[str, float]:
    return row["tree"], row["temperature"]


def draw_plan(path: Path, title: str, memory: Mapping[str, float], seconds: Mapping[str, float]) -> None:
    """Draws the bytes of a chip's HBM by part, beside its `capacity`, and the seconds of a step by part."""
    figure, (left, right) = _canvas(1, 2, width=10.5, height=3.2)
    begin = 0.0
    for (part, size), colour in zip(((k, v) for k, v in memory.items() if k != "capacity"), COLOURS, strict=False):
        left.barh([0], [size / 1e9], left=[begin], color=colour, height=0.5, label=f"{part} {size / 1e9:.3g}")
        begin += size / 1e9
    left.axvline(
        memory["capacity"] / 1e9, color="black", linestyle="--", label=f"capacity {memory['capacity'] / 1e9:.3g}"
    )
    left.set(xlabel="GB of a chip", yticks=[], ylim=(-0.4, 1.6))
    left.legend(frameon=False, ncols=2, loc="upper left", fontsize=8)
    names = list(seconds)
    right.barh(names, [1e3 * seconds[name] for name in names], color=COLOURS[0], height=0.5)
    right.set(xlabel="ms of a step")
    right.invert_yaxis()
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _canvas(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    """Returns a figure without a window, and its panels."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height * rows), layout="constrained")
    panels = list(np.ravel(figure.subplots(rows, columns)))
    for axes in panels:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _looks(drawn: Sequence[str], recipes: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Returns colour, dashes and marker of each drawn recipe; all differ up to the number of colours times dashes."""
    return {
        recipe: {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
            "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
        }
        for i, recipe in enumerate(dict.fromkeys([*recipes, *drawn]))
        if recipe in drawn
    }


def _finish(figure: Any, path: Path, looks: dict[str, dict[str, Any]]) -> None:
    """Puts the legend beside the data, and writes the file whole or not at all."""
    line = importlib.import_module("matplotlib.lines").Line2D
    handles = [line([], [], label=recipe, linewidth=1.4, markersize=5, **look) for recipe, look in looks.items()]
    figure.legend(
        handles=handles, loc="outside right upper", frameon=False, title="recipe", alignment="left", handlelength=3
    )
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Writes the file whole or not at all."""
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, dpi=150, format="png")
    draft.replace(path)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns means over a window that ends at each value."""
    width = max(1, len(values) // SMOOTHED)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _tokens_unit(most: float) -> tuple[float, str]:
    """Returns the unit that tokens are counted in, and its name in a label."""
    units = ((1e9, ", billions"), (1e6, ", millions"), (1e3, ", thousands"))
    return next(((unit, name) for unit, name in units if most >= unit), (1.0, ""))
