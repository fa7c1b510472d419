"""Fields of nested frozen dataclasses as text, such as `optimizer.peak_lr=1e-3`: read by their types, and written."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")
Read = Callable[[Any, str, Any, Any], Any]
"""From a change, and the path, type and present value of the field it is for, to the field's new value."""


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Returns `config` with each `a.b=value` applied in order, the value read by its field's type.

    Raises ValueError naming the override, field or value that is wrong.
    """
    tree: dict[str, Any] = {}
    for item in overrides:
        path, equals, value = item.partition("=")
        if not equals or not path:
            raise ValueError(f"override {item!r} is not of the form field=value")
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {item!r} follows one that sets {parent!r} as a whole")
        node[leaf] = value
    return _replace(config, tree, _read)


def replace_fields(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns `config` with some fields replaced: a dict replaces fields of a group, anything else is the new value.

    Raises ValueError naming a field that does not exist.
    """
    return _replace(config, changes, lambda change, *_: change)


def dotted_fields(config: Any, prefix: str = "") -> dict[str, str]:
    """Returns the fields of `config` and of its groups: dotted path -> the text that `override` reads as the value."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        found |= dotted_fields(value, f"{path}.") if dataclasses.is_dataclass(value) else {path: _text(value)}
    return found


def suggest(name: str, names: Sequence[str]) -> str:
    """Returns the end of a sentence about an unknown name: the names that look like it, or all of them."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(names)}"


def _replace(config: Any, changes: Mapping[str, Any], read: Read, prefix: str = "") -> Any:
    """Returns `config` with `changes`: a dict for fields of a group, anything else through `read`."""
    hints = typing.get_type_hints(type(config))
    names = [field.name for field in dataclasses.fields(config) if field.init]
    values = {}
    for name, change in changes.items():
        path = f"{prefix}{name}"
        if name not in names:
            raise ValueError(f"unknown field {path!r} in {type(config).__name__}{suggest(name, names)}")
        current = getattr(config, name)
        if not isinstance(change, dict):
            values[name] = read(change, path, hints[name], current)
        elif dataclasses.is_dataclass(current):
            values[name] = _replace(current, change, read, f"{path}.")
        else:
            raise ValueError(f"field {path!r} has no fields of its own, so {path}.{next(iter(change))} does not exist")
    try:
        return dataclasses.replace(config, **values)
    except ValueError as error:
        raise ValueError(f"{prefix.rstrip('.') or 'config'}: {error}") from error


def _read(text: str, path: str, kind: Any, current: Any) -> Any:
    """Returns `text` as a value of the annotated type `kind`."""
    if dataclasses.is_dataclass(current) and text.lower() != "none":
        inner = ", ".join(field.name for field in dataclasses.fields(current))
        raise ValueError(f"field {path!r} is a group; set one of its fields: {inner}")
    try:
        return _parse(text, kind)
    except ValueError:
        raise ValueError(f"field {path!r} cannot be {text!r}; it takes {_describe(kind)}") from None


def _parse(text: str, kind: Any) -> Any:
    """Returns `text` as a value of type `kind`; a ValueError says no more than that it is none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if types.NoneType in arguments and text.lower() == "none":
            return None
        return _first(text, [a for a in arguments if a is not types.NoneType])
    if origin is Literal:
        return _choose(text, {str(a): a for a in arguments})
    if origin is tuple:
        items = [item.strip() for item in text.strip("()[]").split(",") if item.strip()]
        if len(items) == 1 and arguments[-1] is not Ellipsis:  # a pair within a list: top_k:10:1.0
            items = text.rsplit(":", len(arguments) - 1)
        kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(items):
            raise ValueError
        return tuple(_parse(item, k) for item, k in zip(items, kinds, strict=True))
    if kind is bool:
        return _choose(text.lower(), {"true": True, "false": False, "1": True, "0": False})
    if kind is int:
        number = float(text) if any(c in text for c in ".eE") else int(text)  # 1e6 is a whole number
        if not math.isfinite(number) or number != int(number):
            raise ValueError
        return int(number)
    if kind in (float, str):
        return kind(text)
    raise ValueError


def _choose(text: str, values: dict[str, Any]) -> Any:
    if text not in values:
        raise ValueError
    return values[text]


def _first(text: str, kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        try:
            return _parse(text, kind)
        except ValueError:
            continue
    raise ValueError


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is types.NoneType else _describe(a) for a in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        if arguments[-1] is not Ellipsis:
            return ":".join(_describe(a).removeprefix("a ") for a in arguments)
        return f"values separated by commas, each {_describe(arguments[0])}"
    named = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return named.get(kind, f"a {getattr(kind, '__name__', kind)}, which the config file must set")


def _text(value: Any) -> str:
    """Returns the text that `_parse` reads as `value`."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(":".join(map(_text, item)) if isinstance(item, tuple) else _text(item) for item in value)
    return str(value)
