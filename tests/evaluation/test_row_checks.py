"""Invariants of rows: what cannot be is named, and so are files that are not whole and summaries of other rows."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_metrics import ARMS, STOP, broken, evaluation_of, make_pair, mine, some_rows

from jaxspec.console.results import jsonable
from jaxspec.evaluation.metrics import summarize, summarize_all
from jaxspec.evaluation.row_checks import check, partial
from jaxspec.evaluation.rows import PLAIN, Row, from_record, to_record
from jaxspec.evaluation.summary_checks import OF_ROWS, check_summary


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (broken(emitted=(3, 3)), "emits 6 tokens and one by prefill, and has 6"),
        (broken(accepted=(2,)), "has 2 target calls and 1 counts of accepted"),
        (broken(drafted=()), "has 2 target calls and 0 counts of drafted"),
        (broken(accepted=(4, 1)), "accepts 4 tokens in a round of a tree that is 3 deep"),
        (broken(drafted=(1, 3), levels=(1, 3)), "round 0 accepts 2 tokens of drafts that are 1 deep"),
        (broken(drafted=(2, 3)), "round 0 drafts 2 tokens 3 deep"),
        (broken(drafted=(3, 4)), "round 1 drafts 4 tokens 3 deep, which a tree of 4 nodes"),
        (broken(levels=(3, 0)), "round 1 drafts 3 tokens 0 deep"),
        (broken(emitted=(2, 3), accepted=(2, 2)), "round 0 emits 2 tokens and accepts 2"),
        (broken(emitted=(3, 2), accepted=(2, 0)), "its last round emits 2 tokens and accepts 0"),
        (broken(emitted=(5,), accepted=(3,), drafted=(3,), levels=(3,), group_calls=1), "which a tree 3 deep cannot"),
        (broken(tokens=(7, STOP, 7, 7, 7, STOP)), "goes on behind a stop id"),
        (broken(tokens=(7,) * 6, identical=False, divergence=(5, 0.0)), "stopped at 7, which is no stop id"),
        (broken(finish="running"), "neither stop nor length"),
        (broken(finish="length"), "ended by its length at 0, which is a stop id"),
        (broken(finish="length", tokens=(7,) * 6), "ended by its length with 6 tokens, and its budget is 64"),
        (make_pair("a", "x", [3] * 40), "has 161 tokens, more than its budget of 64"),
        (broken(task="y"), "is of the task y, and its question of x"),
        (broken(prompt_tokens=11), "has another prompt than plain decoding"),
        (broken(identical=None), "says identical=None, and its rule keeps"),
        (broken(divergence=(3, 5.0)), "says that it parts from plain decoding, and its tokens do not"),
        (broken(tokens=(7, 8, 7, 7, 7, STOP), identical=False, divergence=(1, math.nan)), "which no rounding explains"),
        (broken(wall_seconds=(0.5, 0.3, 0.2)), "s of wall time"),
        (broken(wall_seconds=(9.0,) * 3), "fill 1.055 of 27 s of wall time, less than 95 %"),
        (broken(own_latency=(1.0,) * 3), "has 3 values of own_latency, and the run has 0"),
        (broken(prompt_hash="other"), "has another prompt than plain decoding"),
        (broken(identical=False), "its tokens are those of plain decoding"),
        (broken(tokens=(7, 8, 7, 7, 7, STOP)), "its tokens are not those of plain decoding"),
        (broken(tokens=(7, 8, 7, 7, 7, STOP), identical=False), "does not say where"),
        (broken(tokens=(7, 8, 7, 7, 7, STOP), identical=False, divergence=(2, 0.0)), "does not part from plain"),
        (broken(tokens=(7, 8, 7, 7, 7, STOP), identical=False, divergence=(1, 0.5)), "which no rounding explains"),
        (broken(error="is empty"), "has an error and yet tokens"),
        ([make_pair("a", "x", [2, 1])[0], Row(id="a", task="x", arm="chain:3", error="no")], "has the error 'no', and"),
        (broken(arm="other"), "is of an arm that the first line does not name"),
        (broken(decode_seconds=(float("nan"),) * 3), "not finite"),
        (broken(decode_seconds=()), "has 0 values of decode_seconds, and the run has 3"),
        (broken(group_rows=2), "do not agree about its size"),
        (broken(group_calls=5), "says 5 target calls"),
        (broken(turn=1), "has a row of plain and none of chain:3"),
        ([*broken(), broken()[1]], "stands 2 times"),
    ],
)
def test_rows_that_cannot_be_are_named(rows: list[Row], told: str):
    assert any(told in problem for problem in check(evaluation_of(rows)))


def test_plain_decoding_gives_one_token_a_call():
    plain, other = make_pair("a", "x", [2, 1])
    plain = dataclasses.replace(plain, emitted=(1, 1), accepted=(0, 0), drafted=(0, 0), levels=(0, 0))
    problems = check(evaluation_of([plain, other]))
    assert any("is plain decoding of 6 tokens in 2 target calls" in problem for problem in problems)


def test_sound_rows_pass_and_a_near_tie_is_sound():
    assert check(evaluation_of(some_rows())) == []
    rows = broken(tokens=(7, 8, 7, 7, 7, STOP), identical=False, divergence=(1, 1e-5))
    assert check(evaluation_of(rows)) == []
    found = summarize(mine(rows, "chain:3"), ARMS["chain:3"], mine(rows, PLAIN))
    assert (found["identical_fraction"], found["near_ties"], found["differing"]) == (0.0, 1, 0)


def passes() -> list[Row]:
    """Rows of two temperatures, the second with two seeds."""
    return [
        dataclasses.replace(row, temperature=t, seed=s)
        for t, s in ((0.0, 0), (1.0, 0), (1.0, 1))
        for row in sorted(some_rows(), key=lambda row: row.turn)
    ]


@pytest.mark.parametrize("count", [0, 2, 100])
def test_a_file_that_is_not_whole_is_sound_and_partial(count: int):
    whole = evaluation_of(passes())
    assert check(whole) == [] and partial(whole) is None
    some = whole._replace(rows=whole.rows[:count])
    left = (len(whole.rows) - count) // 2
    assert check(some) == [] and str(partial(some)).startswith(
        f"is partial: has rows of {count // 2} turns and none of {left}"
    )
    without = whole._replace(rows=[row for row in whole.rows if row.temperature == 0])
    wanted = "such as temperature 1, seed 0, question q0, turn 0; its command goes on"
    assert check(without) == [] and wanted in str(partial(without))


def test_rows_that_lack_before_later_ones_and_rows_that_nobody_asked_for_are_named():
    whole = evaluation_of(passes())
    (hole,) = check(whole._replace(rows=whole.rows[2:]))
    assert hole == "temperature 0, seed 0, question q0, turn 0: has no row, and later ones are there"
    fewer = whole._replace(
        settings={**whole.settings, "asked": whole.settings["asked"][1:], "passes": [[0.0, 0], [1, 0]]}
    )
    told = " ".join(check(fewer))
    assert "is of a question that the first line does not name" in told
    assert "is of a temperature and seed that the first line does not name" in told
    turned = [dataclasses.replace(row, turn=1) for row in whole.rows if row.id == "q0"]
    asked = [["q0", turned[0].task, 1]]
    assert any("is of a question that has 1 turns" in told for told in check(evaluation_of(turned, asked=asked)))
    other = [dataclasses.replace(row, prompt_hash="other") if row.temperature else row for row in passes()]
    assert any("do not have one prompt" in told for told in check(evaluation_of(other)))


def test_a_turn_that_failed_has_no_later_one():
    rows = [*make_pair("a", "x", [2, 1]), *(Row(id="b", task="x", arm=arm, error="is empty") for arm in ARMS)]
    assert check(evaluation_of(rows, asked=[["a", "x", 1], ["b", "x", 2]])) == []
    assert partial(evaluation_of(rows, asked=[["a", "x", 1], ["b", "x", 2]])) is None
    assert str(partial(evaluation_of(rows, asked=[["a", "x", 2], ["b", "x", 2]]))).startswith("is partial")


def test_text_that_a_rule_need_not_keep_is_not_compared():
    rows = [dataclasses.replace(row, temperature=1.0) for row in broken(tokens=(7, 8, 7, 7, 7, STOP), identical=None)]
    arms = {PLAIN: ARMS[PLAIN], "chain:3": ARMS["chain:3"] | {"rule": "block"}}
    assert check(evaluation_of(rows, arms=arms)) == []
    same = [dataclasses.replace(row, identical=True) for row in rows]
    assert any("its rule does not keep" in told for told in check(evaluation_of(same, arms=arms)))
    assert any("its rule keeps" in told for told in check(evaluation_of(rows)))


def test_a_summary_is_held_to_its_rows(tmp_path: Path):
    evaluation = evaluation_of(passes())
    assert check_summary(evaluation, tmp_path) == []  # a run writes it at its end
    shared = {name: value for name, value in evaluation.settings.items() if name not in OF_ROWS}
    whole = jsonable(shared | {"failed": 0, "summary": summarize_all(evaluation.rows, ARMS)})

    def told(**changes: Any) -> str:
        (tmp_path / "summary.json").write_text(json.dumps(whole | changes))
        return "; ".join(check_summary(evaluation, tmp_path / "rows.jsonl"))

    first = whole["summary"][0]
    assert (
        told() == "" and told(summary=[first | {"speedup": first["speedup"] * (1 + 1e-9)}, *whole["summary"][1:]]) == ""
    )
    assert "says tau_micro 9 and not 1" in told(summary=[first | {"tau_micro": 9}, *whole["summary"][1:]])
    assert "has no figures" in told(summary=whole["summary"][1:])
    assert "has figures, and no rows" in told(summary=[*whole["summary"], first | {"task": "poems"}])
    assert "stand twice" in told(summary=[first, *whole["summary"]])
    assert "has another max_new_tokens than the rows" in told(max_new_tokens=9)
    assert "says that 1 turns failed" in told(failed=1)
    assert "holds no figures" in told(summary=None)
    (tmp_path / "summary.json").write_text("{")
    assert "is not valid JSON" in check_summary(evaluation, tmp_path)[0]


def test_a_row_with_an_error_is_counted_and_has_no_figures():
    rows = [*make_pair("a", "x", [2, 1]), *(Row(id="b", task="x", arm=arm, error="is empty") for arm in ARMS)]
    assert check(evaluation_of(rows)) == []
    found = summarize(mine(rows, "chain:3"), ARMS["chain:3"], mine(rows, PLAIN))
    assert found["failed"] == 1 and found["answers"] == 1 and found["tau_micro"] == 2.5


WRONG: dict[str, Any] = {
    "tokens": [1, "a"], "accepted": [1.5], "turn": True, "temperature": "0", "prefill_seconds": ["1"],
    "identical": 1, "divergence": [1], "rejected": [1], "arm": 3,
}  # fmt: skip


def test_rows_come_back_from_their_records():
    for row in some_rows():
        assert from_record(to_record(row)) == row
    nowhere = broken(divergence=(1, math.nan), decode_seconds=(math.nan,))[1]
    record = jsonable(to_record(nowhere))
    assert record["divergence"] == [1, None] and record["decode_seconds"] == [None]
    again = from_record(record)
    assert math.isnan(again.decode_seconds[0]) and again.divergence is not None and math.isnan(again.divergence[1])
    for field, value in WRONG.items():
        with pytest.raises(ValueError, match=f"'{field}' is no "):
            from_record({"id": "a", "task": "x", field: value})
    with pytest.raises(ValueError, match="has a field 'speed' that rows do not have"):
        from_record({"id": "a", "task": "x", "speed": 1})
    with pytest.raises(ValueError, match="has no 'task'"):
        from_record({"id": "a"})
