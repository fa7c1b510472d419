"""Invariants of served rows: a sound file has no problem, and each thing that cannot be is one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jaxspec.__main__ import main
from jaxspec.evaluation.served_checks import check_served_file
from jaxspec.evaluation.served_metrics import summarize_served
from jaxspec.evaluation.served_rows import FORMAT, ServedBook, ServedFile, ServedRow, Sitting, read_served
from jaxspec.serving.served_acceptance import Counters, Gauges

SETTINGS = {"format": FORMAT, "max_new_tokens": 8, "concurrency": 2}
OF = ("a", 0.0, 0)
ROW = ServedRow(
    "1", "a", 0, 0.0, 0, "text", (1, 2, 3, 4, 5, 6), 6, 7, "length", 0.1, 0.5, (0.1, 0.2, 0.5), 3, 2, 6, (1, 2)
)
SECOND = dataclasses.replace(ROW, turn=1)
BROKEN = ServedRow("2", "a", 0, 0.0, 0, error="status 400")
SITTING = Sitting(3, 0, 0.6, Counters(6, 12, 4, (4.0, 0.0)), Gauges(2.0, None))


def file_of(*rows: ServedRow, sitting: Sitting = SITTING) -> ServedFile:
    return ServedFile(SETTINGS, list(rows), [(OF, sitting)])


def test_a_sound_file_has_no_problem_and_is_read_as_it_was_written(tmp_path: Path):
    book = ServedBook(tmp_path / "served.jsonl", dict(SETTINGS))
    book.add(OF, [ROW, SECOND, BROKEN], SITTING)
    book.add(OF, [], SITTING)  # nothing was answered: no trace
    assert read_served(book.path) == book.file == file_of(ROW, SECOND, BROKEN)
    assert check_served_file(book.file) == [] and main(["evaluate", "--check", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"finish": "abort"}, "neither stop nor length"),
        ({"count": 9}, "more than its budget of 8"),
        ({"count": 5}, "6 token ids and, by the server's count, 5"),
        ({"rounds": None}, "a part of its rounds"),
        ({"accepted": 7}, "accepts 7 of 6"),
        ({"accepted": -1}, "accepts -1 of 6"),
        ({"rounds": 6, "histogram": ()}, "6 target calls behind prefill for 6 tokens"),
        ({"histogram": (2, 2)}, "a histogram of 4"),
        ({"histogram": (2, 1)}, "1 by its histogram"),
        ({"seconds": float("nan")}, "negative or not finite"),
        ({"ttft_seconds": 0.7}, "times that go back"),
        ({"chunk_seconds": (0.4, 0.2)}, "times that go back"),
        ({"error": "no"}, "has an error and yet text"),
        ({"turn": 0}, "stands 2 times"),
        ({"turn": 2}, "follows a turn that has no answer"),
        ({"task": "b"}, "those before it are others"),
        ({"seconds": 1.0}, "its answers 1.5 s, 2 at a time"),
    ],
)
def test_a_row_that_cannot_be_is_named(changed: dict[str, Any], said: str):
    problems = check_served_file(file_of(ROW, dataclasses.replace(SECOND, **changed), BROKEN))
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": 4}, "says 4 rows"),
        ({"rows": 2}, "the last 1 rows are of a sitting that was stopped"),
        ({"unanswered": -1}, "-1 turns"),
        ({"counters": Counters(6, 3, 4, (4.0,))}, "4 of 3 drafted tokens"),
        ({"counters": Counters(6, 12, 7, (3.0, 4.0))}, "more at a position than before"),
        ({"counters": Counters(6, 12, 7, (7.0,))}, "more at a position than before"),
        ({"counters": Counters(6, 12, 5, (4.0,))}, "5 tokens, and 4 by position"),
    ],
)
def test_a_sitting_that_cannot_be_is_named(changed: dict[str, Any], said: str):
    problems = check_served_file(file_of(ROW, SECOND, BROKEN, sitting=dataclasses.replace(SITTING, **changed)))
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("line", "said"),
    [({"id": "1"}, "served.jsonl:2: is no row"), ({"task": "a", "sitting": {}}, "served.jsonl:2: is no row")],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: dict[str, Any], said: str, capsys: Any):
    path = tmp_path / "served.jsonl"
    path.write_text(json.dumps(SETTINGS) + "\n" + json.dumps(line) + "\n")
    assert main(["evaluate", "--check", str(path)]) == 1 and said in capsys.readouterr().err


def test_both_files_of_a_folder_are_checked(tmp_path: Path, capsys: Any):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    ServedBook(tmp_path / "served.jsonl", dict(SETTINGS)).add(OF, [ROW], dataclasses.replace(SITTING, rows=1))
    assert main(["evaluate", "--check", str(tmp_path / "served.jsonl")]) == 0
    assert main(["evaluate", "--check", str(tmp_path)]) == 1 and "rows.jsonl" in capsys.readouterr().err


def test_calls_that_a_server_leaves_out_are_those_that_its_tokens_need():
    """Two rounds that accept nothing give three tokens with prefill's; the other three are calls without a draft."""
    row = dataclasses.replace(ROW, rounds=2, accepted=0, drafted=4, histogram=())
    assert row.calls == 5 and dataclasses.replace(row, count=0).calls is None


def test_an_answer_that_prefill_gave_alone_counts_and_is_out_of_the_mean():
    single = dataclasses.replace(ROW, id="3", tokens=(1,), count=1, rounds=0, accepted=0, drafted=0, histogram=())
    found = summarize_served(OF, 0, [ROW, single, BROKEN], [dataclasses.replace(SITTING, counters=None)])
    assert found["tau_micro"] == found["tau_macro"] == 5 / 3 and found["tau_raw"] == 1 + 2 / 3
    assert (found["answers"], found["failed"], found["acceptance_from"]) == (2, 1, "answers")
    assert found["survival"] == [2 / 3] and found["gauge_acceptance_length"] == 2.0
    swapped = summarize_served(OF, 0, [BROKEN, single, ROW], [dataclasses.replace(SITTING, counters=None)])
    assert swapped == found
