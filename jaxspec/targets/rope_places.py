"""The places of rotary fields in a `config.json`, and which of them wins, as in transformers 5 (modeling_rope_utils).

The object `rope_scaling` comes before `rope_parameters`; base and rotated part stand in it, or else beside it, and the
original length beside it, or else in it. transformers drops in silence what loses. Here a place that says something
else than what is used is an error, for one of the two is not what the model was trained with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

LOCAL = "sliding_attention"
"""Kind of layers that `rope_scaling`, where it is not for each kind, does not speak of."""
ORIGINAL = "original_max_position_embeddings"
STRETCHED = ("llama3", "yarn", "longrope")
"""Kinds of scaling that go by the original length."""


class RotaryObject(NamedTuple):
    """An object with rotary fields."""

    name: str
    values: Mapping[str, Any]
    wins: bool
    """Whether transformers reads it."""


class RopeFields(NamedTuple):
    """Rotary fields as transformers would read them."""

    field: str
    """Name of the object that they stand in."""
    values: Mapping[str, Any]
    """That object, with `rope_type` in the newer spelling."""
    theta: Any
    part: Any
    """Share of a head's channels that is rotated; None where nothing says so."""
    original: Any
    """The length before it is stretched; None where nothing says so."""


class Sources(NamedTuple):
    """A `config.json` and the defaults of its family."""

    path: Path
    raw: Mapping[str, Any]
    defaults: Mapping[str, Any]


def find_rope(sources: Sources, layers: str | None = None, *, theta: str = "rope_theta") -> RopeFields:
    """Returns the rotary fields, of the kind of layers `layers` where each kind has its own.

    `theta` names the field that the base has beside the object. Raises ValueError, one sentence, where two places
    contradict each other, and for objects of another form.
    """
    path, raw, defaults = sources
    places = _places(path, raw, layers)
    winners = [place for place in places if place.wins]
    values = {name: value for place in reversed(winners) for name, value in place.values.items()}
    values["rope_type"] = kind = _agreed(
        path, "rope_type", [*_kinds(path, winners), ("the default", "default")], places
    )
    values.pop("type", None)
    for name in values.keys() - {"rope_type", "rope_theta", "partial_rotary_factor"}:
        _agreed(path, name, [(place.name, place.values[name]) for place in winners if name in place.values], places)
    stated = [(place.name, place.values["rope_theta"]) for place in winners if place.values.get("rope_theta")]
    stated += [("the top level", raw[theta])] if raw.get(theta) is not None else []
    default = None if theta in raw else defaults.get(theta)  # null stands for no number, not for the default one
    base = _agreed(path, "rope_theta", [*stated, ("the default", default)], places, beside=theta)
    return RopeFields(
        winners[0].name if winners else "rope_parameters",
        values,
        base,
        _part(sources, places, winners),
        _original(sources, places, winners, nested=layers is not None) if kind in STRETCHED else None,
    )


def _places(path: Path, raw: Mapping[str, Any], layers: str | None) -> list[RotaryObject]:
    """Returns the objects that are set, the winning ones first."""
    found: list[RotaryObject] = []
    for field in ("rope_scaling", "rope_parameters"):
        rope = raw.get(field) or {}
        nested = isinstance(rope, dict) and any(isinstance(value, dict) for value in rope.values())
        if not isinstance(rope, dict) or (nested and layers is None):
            raise ValueError(f"{path}: {field}={rope!r} is not supported; only one set of values for all layers is")
        if nested and isinstance(rope.get(layers), dict):
            found.append(RotaryObject(f"{field}.{layers}", rope[layers], True))
        elif rope and not nested and layers is None:
            found.append(RotaryObject(field, rope, not found))
        elif rope and not nested and layers != LOCAL:
            # Where each kind of layers has its own, transformers reads nothing of a rope_parameters for all of them.
            found.append(RotaryObject(field, rope, field == "rope_scaling"))
    return sorted(found, key=lambda place: not place.wins)


def _kinds(path: Path, places: Iterable[RotaryObject]) -> list[tuple[str, str]]:
    """Returns the kind of scaling that each object names."""
    found = []
    for place in places:
        named = {name: place.values[name] for name in ("rope_type", "type") if name in place.values}
        if wrong := next((name for name, kind in named.items() if not isinstance(kind, str | None)), None):
            raise ValueError(f"{path}: {wrong}={named[wrong]!r} in {place.name} must be a name, such as 'llama3'")
        kinds = {_kind(kind, place.values) for kind in named.values()}
        if len(kinds) > 1:
            both = " and ".join(f"{name}={place.values[name]!r}" for name in ("rope_type", "type"))
            raise ValueError(f"{path}: {both} in {place.name} contradict each other: remove one")
        found += [(place.name, kind) for kind in kinds]
    return found


def _kind(kind: Any, values: Mapping[str, Any]) -> Any:
    # Early Phi-3 files call longrope "su" or "yarn".
    return "longrope" if kind == "su" or (kind == "yarn" and "short_factor" in values) else kind


def _part(sources: Sources, places: list[RotaryObject], winners: list[RotaryObject]) -> Any:
    name = "partial_rotary_factor"
    stated = [(place.name, place.values[name]) for place in winners if place.values.get(name) is not None]
    stated += [("the top level", sources.raw[name])] if sources.raw.get(name) is not None else []
    return _agreed(sources.path, name, [*stated, ("the default", sources.defaults.get(name))], places)


def _original(sources: Sources, places: list[RotaryObject], winners: list[RotaryObject], *, nested: bool) -> Any:
    """Returns the original length: that of the top level is read first unless each kind of layers has its own."""
    inside = [(place.name, place.values[ORIGINAL]) for place in winners if place.values.get(ORIGINAL) is not None]
    top = [("the top level", sources.raw[ORIGINAL])] if sources.raw.get(ORIGINAL) is not None else []
    default = [("the default", sources.defaults[ORIGINAL])] if ORIGINAL in sources.defaults else []
    stated = [*inside, *top] if nested else [*top, *(default if not top else []), *inside]
    return _agreed(sources.path, ORIGINAL, [*stated, ("nothing", None)], places)


def _agreed(
    path: Path, name: str, stated: list[tuple[str, Any]], places: list[RotaryObject], *, beside: str = ""
) -> Any:
    """Returns the first value that is stated; raises ValueError if another place states another one."""
    (place, value), *others = stated
    others = [other for other in others if other[0] not in ("the default", "nothing")]
    losers = [other for other in places if not other.wins]
    if name == "rope_type":
        others += _kinds(path, losers)
    else:
        others += [(other.name, other.values[name]) for other in losers if other.values.get(name) is not None]
    for other, different in others:
        if different != value:
            named = beside if beside and other == "the top level" else name
            raise ValueError(
                f"{path}: {name}={value!r} of {place} and {named}={different!r} of {other} contradict each other "
                "(transformers reads the former): make them agree, or remove one"
            )
    return value
