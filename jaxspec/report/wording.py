"""Figures as words: intervals, temperatures, tasks, and how answers compare with plain decoding's."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any


def interval(figures: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """Returns a figure and the ends of its interval; NaN where one is not known.

    An interval without a width is none: it is of one prompt, or of prompts that do not differ at all.
    """
    value, low, high = (
        float(v) if known(v) else float("nan") for v in (figures[name], figures[f"{name}_low"], figures[f"{name}_high"])
    )
    return (value, low, high) if low < high else (value, float("nan"), float("nan"))


def spread(figures: Mapping[str, Any] | None, name: str) -> str:
    """Returns a figure with its 95 % interval, such as `1.83 [1.70, 1.96]`; a dash where it is not known."""
    if figures is None or not known(figures[name]):
        return "-"
    value, low, high = interval(figures, name)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]" if known(low) else f"{value:.2f}"


def known(value: Any) -> bool:
    """Returns whether a figure is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def at_temperature(temperature: float) -> str:
    """Returns a temperature as the title of a table says it."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def spoken(name: str) -> str:
    """Returns a task's name as words."""
    return name.replace("_", " ")


def identical(figures: Mapping[str, Any] | None) -> str:
    """Returns how many answers are plain decoding's, token for token; ties are told apart from faults."""
    if figures is None:
        return "-"
    if figures["identical_fraction"] is None:
        return "not needed"
    text = f"{100 * figures['identical_fraction']:.4g} %"
    if figures["near_ties"]:
        text += f", {figures['near_ties']} near ties"
    if figures["differing"]:
        text += f", {figures['differing']} differ"
    return text


def per_second(value: float) -> str:
    """Returns tokens a second in three digits or more; a dash where they are not known."""
    return three_digits(value) if known(value) else "-"


def three_digits(value: float) -> str:
    """Returns a quantity in three digits, or in all of its whole ones."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def device(machine: Mapping[str, Any]) -> str:
    """Returns the accelerator of a machine, or its processor with the number of cores."""
    return machine.get("accelerator") or f"{machine.get('cpu')}, {machine.get('cores')} cores"


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, which takes an s unless it is one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def medians(repeats: int) -> str:
    """Returns what the figures of timed passes are."""
    return "one pass" if repeats == 1 else f"medians of {repeats} passes"


def ends(figures: Mapping[str, Any], name: str) -> str:
    """Returns the least and greatest of a figure's repeats, such as ` (29 to 31)`; nothing where there are none."""
    low, high = (figures.get(f"{name}_{end}", math.nan) for end in ("min", "max"))
    return f" ({per_second(low)} to {per_second(high)})" if known(low) and known(high) else ""


def unsteady(found: Mapping[str, Any]) -> str:
    """Returns why a result of timed passes has no ratios; nothing where the machine was steady or that is not known."""
    about = found.get("copy_bandwidth") or {}
    if about.get("steady") is not False:
        return ""
    return f"; no ratios, for the copy bandwidth moved by {100 * about['moved']:.0f} % meanwhile"


def figure_names(options: Mapping[str, str], known_names: Collection[str], by_default: str) -> list[str]:
    """Returns the figures that the option `figures` of a table names. Raises ValueError for one that is not known."""
    names = options.get("figures", by_default).split(",")
    if stranger := next((name for name in names if name not in known_names), None):
        raise ValueError(f"there is no figure {stranger!r}; there are {', '.join(known_names)}")
    return names
