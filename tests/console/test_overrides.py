"""Tests of fields as text: overrides read by type, and every field written as it is read."""

import dataclasses
from typing import Literal

import pytest

from jaxspec.console.overrides import dotted_fields, override, replace_fields


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    betas: tuple[float, float] = (0.9, 0.99)
    sizes: tuple[int, ...] = ()
    parts: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str = "x"
    count: int = 1
    limit: int | None = None
    fast: bool = False
    mode: Literal["a", "b"] = "a"
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("item", "field", "value"),
    [
        ("name=a=b", "name", "a=b"),
        ("count=7", "count", 7),
        ("count=1e3", "count", 1000),
        ("limit=3", "limit", 3),
        ("limit=none", "limit", None),
        ("fast=true", "fast", True),
        ("mode=b", "mode", "b"),
        ("inner.rate=1e-3", "inner", Inner(rate=1e-3)),
        ("inner.betas=0.8,0.9", "inner", Inner(betas=(0.8, 0.9))),
        ("inner.sizes=(1,2,3)", "inner", Inner(sizes=(1, 2, 3))),
        ("inner.parts=l1:1,top_k:10:.5", "inner", Inner(parts=(("l1", 1.0), ("top_k:10", 0.5)))),
        ("inner.parts=l1:1", "inner", Inner(parts=(("l1", 1.0),))),
    ],
)
def test_an_override_is_read_by_the_fields_type(item: str, field: str, value: object):
    assert override(Outer(), [item]) == dataclasses.replace(Outer(), **{field: value})


def test_the_last_override_of_a_field_wins_and_others_stay():
    assert override(Outer(), ["inner.rate=1", "count=2", "inner.rate=3"]) == Outer(count=2, inner=Inner(rate=3.0))


@pytest.mark.parametrize(
    ("item", "match"),
    [
        ("cout=1", "unknown field 'cout' in Outer; did you mean count"),
        ("inner.rat=1", "unknown field 'inner.rat' in Inner; did you mean rate"),
        ("count=many", "field 'count' cannot be 'many'; it takes a whole number"),
        ("count=1.5", "field 'count' cannot be '1.5'"),
        ("limit=x", "it takes a whole number or none"),
        ("fast=maybe", "it takes true or false"),
        ("mode=c", "it takes a or b"),
        ("inner.betas=1", "field 'inner.betas' cannot be '1'"),
        ("inner.parts=l1", "it takes values separated by commas, each text:number"),
        ("inner=1", "field 'inner' is a group; set one of its fields: rate, betas, sizes, parts"),
        ("count.x=1", "field 'count' has no fields of its own"),
        ("count", "not of the form field=value"),
        ("=1", "not of the form field=value"),
    ],
)
def test_a_wrong_override_is_named(item: str, match: str):
    with pytest.raises(ValueError, match=match):
        override(Outer(), [item])


def test_fields_as_text_are_read_back():
    config = Outer(limit=3, fast=True, mode="b", inner=Inner(rate=1e-9, sizes=(1, 2), parts=(("top_k:10", 0.5),)))
    fields = dotted_fields(config)
    assert list(fields)[-3:] == ["inner.betas", "inner.sizes", "inner.parts"]
    assert (fields["inner.parts"], fields["fast"], dotted_fields(Outer())["limit"]) == ("top_k:10:0.5", "true", "none")
    assert override(Outer(), [f"{path}={text}" for path, text in fields.items()]) == config


def test_a_dict_replaces_fields_of_a_group_and_any_other_value_the_field():
    changed = replace_fields(Outer(), {"count": 2, "inner": {"rate": 0.1, "parts": (("l1", 1.0),)}})
    assert changed == Outer(count=2, inner=Inner(rate=0.1, parts=(("l1", 1.0),)))
    assert replace_fields(changed, {"inner": Inner(rate=2.0)}).inner == Inner(rate=2.0)
    with pytest.raises(ValueError, match=r"unknown field 'inner\.rat' in Inner; did you mean rate"):
        replace_fields(Outer(), {"inner": {"rat": 1.0}})
    with pytest.raises(ValueError, match="field 'count' has no fields of its own"):
        replace_fields(Outer(), {"count": {"x": 1}})
