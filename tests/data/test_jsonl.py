"""Files of records that are made once, whatever stops their making."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxspec.console.cli import sentence
from jaxspec.data import jsonl


def count_to(most: int, stop_at: int | None = None):
    def make(known: list[jsonl.Record]) -> Iterator[jsonl.Record]:
        for n in range(len(known), most):
            if n == stop_at:
                raise KeyboardInterrupt
            yield {"n": n}

    return make


def test_lines_have_null_where_numbers_are_not_finite(tmp_path: Path):
    path = tmp_path / "kept.jsonl"
    found = jsonl.resume(path, {}, lambda known: [{"rate": math.nan, "rates": [1.5, -math.inf], "text": "NaN é"}])
    assert found == [{"rate": None, "rates": [1.5, None], "text": "NaN é"}]
    assert path.read_text(encoding="utf-8") == '{"rate": null, "rates": [1.5, null], "text": "NaN é"}\n'


def test_records_are_made_further_after_a_stop_and_never_twice(tmp_path: Path):
    path, settings = tmp_path / "deep" / "kept.jsonl", {"seed": 1}
    with pytest.raises(KeyboardInterrupt):
        jsonl.resume(path, settings, count_to(5, stop_at=3))
    with path.open("a") as file:
        file.write('{"n": 3')  # a torn line
    whole = jsonl.resume(path, settings, count_to(5))
    assert whole == [{"n": n} for n in range(5)]
    assert jsonl.resume(path, settings, count_to(9)) == whole  # it is whole: nothing is asked for


def test_a_file_begun_with_other_settings_is_begun_anew(tmp_path: Path):
    path = tmp_path / "kept.jsonl"
    jsonl.resume(path, {"seed": 1}, count_to(5))
    assert jsonl.resume(path, {"seed": 2}, count_to(2)) == [{"n": 0}, {"n": 1}]
    assert jsonl.read_lines(path) == [{"n": 0}, {"n": 1}]
    assert jsonl.read_lines(tmp_path / "kept.jsonl.state") == [{"seed": 2}, {"done": True}]


def test_a_journal_begins_anew_where_nothing_was_noted_and_else_names_what_differs(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    first = {"seed": 1, "arms": {"plain": {"tree": None}, "a": {"tree": "x" * 200, "nodes": 4}}}
    other = {"seed": 1, "arms": {"plain": {"tree": None}, "a": {"tree": "y" * 200, "nodes": 4}, "b": {}}}
    assert jsonl.journal(path, first, of=tmp_path, fields=("id",)) == []
    assert jsonl.journal(path, other, of=tmp_path, fields=("id",)) == []
    assert jsonl.read_lines(path) == [other]
    jsonl.append(path, [{"id": 1}])
    assert jsonl.journal(path, other, of=tmp_path, fields=("id",)) == [{"id": 1}]
    with pytest.raises(ValueError) as refused:
        jsonl.journal(path, first, of=tmp_path, fields=("id",))
    told = str(refused.value)
    assert "was begun with other settings (arms.a.tree was yyyy" in told and "arms.b was {}, is None" in told
    assert "plain" not in told
    assert jsonl.read_lines(path) == [other, {"id": 1}]


def test_a_file_of_something_else_is_not_begun_anew(tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match="was begun with other settings \\(seed was None, is 1"):
        jsonl.journal(path, {"seed": 1}, of=tmp_path, fields=("id",))
    assert path.read_text() == '{"mine": 1}\n'


def test_a_full_disk_is_named_with_its_file_and_what_helps():
    with pytest.raises(OSError) as full:
        jsonl.append(Path("/dev/full"), [{"n": 1}])
    assert sentence(full.value) == (
        "/dev/full: No space left on device; free some space, and give the same command again"
    )
