"""Specs of losses and weightings: `name`, or `name:number` where there is one number to set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class LossParameter(NamedTuple):
    """The number that a loss or weighting takes, behind the colon of its spec."""

    name: str
    wants: str
    """Description of the numbers that fit."""
    fits: Callable[[float], bool]
    default: float | None = None
    """Number of a bare name; None where the number must be written."""
    kind: type[int] | type[float] = float


def read_spec(what: str, spec: str, parameters: Mapping[str, LossParameter | None]) -> tuple[str, tuple[float, ...]]:
    """Reads `"jsd:0.3"` as `("jsd", (0.3,))`; a name without a number to set gives `()`.

    Raises ValueError where `parameters` has no such name, or the number is missing, superfluous or does not fit.
    """
    name, colon, text = spec.partition(":")
    if name not in parameters:
        raise ValueError(
            f"{what} {spec!r} is unknown: choose from {', '.join(map(_written, parameters, parameters.values()))}"
        )
    parameter = parameters[name]
    if parameter is None:
        if colon:
            raise ValueError(f"{what} {spec!r} has a number to spare: write {name}")
        return name, ()
    if not colon and parameter.default is not None:
        return name, (parameter.default,)
    try:
        number = parameter.kind(text)
    except ValueError:
        number = float("nan")
    if not parameter.fits(number):
        raise ValueError(
            f"{what} {spec!r} does not fit: in {_written(name, parameter)}, {parameter.name} is {parameter.wants}"
        )
    return name, (number,)


def _written(name: str, parameter: LossParameter | None) -> str:
    """Returns the name with its number, in brackets where the number may be left out."""
    if parameter is None:
        return name
    return f"{name}:{parameter.name}" if parameter.default is None else f"{name}[:{parameter.name}]"
