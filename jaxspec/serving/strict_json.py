"""JSON of strangers: one object, shallow, without duplicate keys, NaN or lone surrogates."""

from __future__ import annotations

import collections
import json
import re
from typing import Any

from jaxspec.serving.api_errors import ApiError

DEEPEST = 32
"""Levels of objects and lists."""
# A string without an end reaches to the end of the body: searched for again behind each quote, it would take hours.
_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_object(body: bytes) -> dict[str, Any]:
    """Returns the object that a body holds. Raises ApiError with status 400 for anything else."""
    _check_depth(body)
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (at byte {error.start})") from error
    except ApiError:
        raise
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _check_depth(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") <= DEEPEST:
        return
    depth = 0
    for found in _MARKS.finditer(body):
        mark = found[0]
        if len(mark) == 1:
            depth += 1 if mark in b"[{" else -1
            if depth > DEEPEST:
                raise ApiError(400, f"the body is nested deeper than {DEEPEST} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object; readers differ on which of two equal keys counts, so there may be none."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ApiError(400, f"the body has the key {shown(twice)} twice in one object")
    return found


def _refuse_constant(name: str) -> Any:
    raise ApiError(400, f"the body is not JSON: it has the number {name}")


def check_text(text: str, param: str) -> str:
    """Returns a text. Raises ApiError where it holds half of a surrogate pair, which no UTF-8 text does."""
    if found := _SURROGATE.search(text):
        raise ApiError(400, f"{param} has a lone surrogate at character {found.start()}", param=param)
    return text


def shown(value: object) -> str:
    """Returns a value as a message shows it, shortened."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
