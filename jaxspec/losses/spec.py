"""How a loss or a weighting is named: `name`, or `name:number` where it has one number to set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class LossParameter(NamedTuple):
    """The number behind a name's colon."""

    name: str
    wants: str
    """Which numbers fit, in words."""
    fits: Callable[[float], bool]
    default: float | None = None
    """What a bare name means; None where the number must be written."""
    kind: type[int] | type[float] = float


def read_spec(what: str, spec: str, knobs: Mapping[str, LossParameter | None]) -> tuple[str, tuple[float, ...]]:
    """`"jsd:0.3"` as `("jsd", (0.3,))`; a name without a number to set has `()`.

    ValueError: `knobs` has no such name, or the number is missing, superfluous or unfit.
    """
    name, colon, text = spec.partition(":")
    if name not in knobs:
        raise ValueError(f"{what} {spec!r} is unknown: choose from {', '.join(map(_written, knobs, knobs.values()))}")
    knob = knobs[name]
    if knob is None:
        if colon:
            raise ValueError(f"{what} {spec!r} has a number to spare: write {name}")
        return name, ()
    if not colon and knob.default is not None:
        return name, (knob.default,)
    try:
        number = knob.kind(text)
    except ValueError:
        number = float("nan")
    if not knob.fits(number):
        raise ValueError(f"{what} {spec!r} does not fit: in {_written(name, knob)}, {knob.name} is {knob.wants}")
    return name, (number,)


def _written(name: str, knob: LossParameter | None) -> str:
    """The name with its number, in brackets where that may be left out."""
    if knob is None:
        return name
    return f"{name}:{knob.name}" if knob.default is None else f"{name}[:{knob.name}]"
