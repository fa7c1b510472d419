"""Axes of a plot: where a value stands between its ends, and the ticks of round numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

STEPS = (1, 2, 2.5, 5, 10)
"""Distances of ticks, times a power of ten."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis with its label, units in it, and the values at its ends."""

    label: str
    low: float
    high: float
    doubling: bool = False
    """Whether equal distances are equal factors."""
    percent: bool = False
    """Whether ticks are shown as shares of 100."""
    ticks: tuple[float, ...] = ()

    def place(self, value: float) -> float:
        """Returns the place of a value: 0 at the low end, 1 at the high one; values beyond stand at the ends."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.doubling:
            low, high, at = math.log2(low), math.log2(high), math.log2(at)
        return (at - low) / (high - low)

    def name(self, tick: float) -> str:
        """Returns the text of a tick."""
        value = 100 * tick if self.percent else tick
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return f"{text} %" if self.percent else text


def axis_over(
    label: str, values: Iterable[float], *, from_zero: bool = True, whole: bool = False, percent: bool = False
) -> Axis:
    """Returns an axis that holds all values that are numbers, with ticks of round numbers; of `whole` ones alone."""
    known = [float(value) for value in values if math.isfinite(value)] or [0.0]
    low, high = min([*known, 0.0] if from_zero else known), max(known)
    if high - low <= 1e-12 * max(1.0, abs(low), abs(high)):
        low, high = (low, low + 1) if from_zero else (low - 0.5, high + 0.5)
    step = _step((high - low) / (8 if whole else 5), whole)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    ticks = tuple(i * step for i in range(first, last + 1))
    return Axis(label, ticks[0], ticks[-1], percent=percent, ticks=ticks)


def doubling_axis(label: str, values: Iterable[float]) -> Axis:
    """Returns an axis of powers of two that holds all values, which are at least 1."""
    most = max(math.ceil(math.log2(max([*values, 2]))), 1)
    apart = max(1, math.ceil(most / 8))
    return Axis(label, 1, 2**most, doubling=True, ticks=tuple(2.0**i for i in range(0, most + 1, apart)))


def _step(least: float, whole: bool) -> float:
    """Returns the least round distance of ticks that is no smaller."""
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * s for s in STEPS if power * s >= least * (1 - 1e-9))
    return max(1.0, float(math.ceil(step))) if whole else step
