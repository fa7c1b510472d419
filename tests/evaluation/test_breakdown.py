"""Figures of an evaluation in parts: each held to a slow count by hand."""

import dataclasses
import math
import random

import numpy as np
import pytest

from jaxspec.evaluation.breakdown import (
    chunk_milliseconds,
    chunk_sizes,
    prompt_times,
    tau_along,
    tau_by_prompt_length,
)
from jaxspec.evaluation.metrics import summarize
from jaxspec.evaluation.rows import PLAIN, Row


def row(id: str, emitted: list[int], *, prompt: int = 10, task: str = "x", **fields) -> Row:
    """A row whose rounds emitted these tokens."""
    accepted = tuple(e - 1 for e in emitted)
    times = {"prefill_seconds": (0.1, 0.1), "decode_seconds": (1.0, 2.0), "group_calls": len(emitted)}
    tokens = tuple(range(1 + sum(emitted)))
    return Row(
        id=id,
        task=task,
        arm="a",
        prompt_tokens=prompt,
        tokens=tokens,
        emitted=tuple(emitted),
        accepted=accepted,
        **{**times, **fields},
    )


def test_a_round_counts_at_the_place_of_its_first_token():
    # Rounds begin at tokens 1, 4, 5 and 8: bins of 5 hold two of them each.
    found = tau_along([row("q", [3, 1, 3, 2])], width=5)
    assert [(b.first, b.last, b.tau.value, b.rounds) for b in found] == [(0, 4, 2.0, 2), (5, 9, 2.5, 2)]


def test_bins_along_the_answer_are_those_of_a_slow_count():
    rng = random.Random(3)
    rows = [row(f"q{i}", [rng.randint(1, 4) for _ in range(rng.randint(1, 90))]) for i in range(12)]
    slow: dict[int, list[int]] = {}
    for one in rows:
        at = 1
        for e in one.emitted:
            slow.setdefault(at // 64, []).append(e)
            at += e
    found = tau_along(rows)
    assert {b.first // 64: b.rounds for b in found} == {n: len(mine) for n, mine in slow.items()}
    for b in found:
        assert b.tau.value == pytest.approx(np.mean(slow[b.first // 64]))
        assert b.answers < 4 or b.tau.low <= b.tau.value <= b.tau.high
    assert repr(tau_along(rows[::-1])) == repr(found) and tau_along([]) == []  # NaN is no number's equal


@pytest.mark.parametrize(
    ("length", "ends"), [(1, (1, 64)), (64, (1, 64)), (65, (65, 128)), (128, (65, 128)), (129, (129, 256))]
)
def test_prompts_fall_in_bins_that_double(length: int, ends: tuple[int, int]):
    (found,) = tau_by_prompt_length([row("q", [2, 1], prompt=length), row("r", [], prompt=length)])
    assert (found.first, found.last) == ends and found.tau.value == 1.5 and found.answers == 1


def test_bins_by_the_prompt_hold_all_rounds():
    rows = [row(f"q{n}", [1 + n % 3] * 3, prompt=n) for n in range(1, 300, 7)]
    found = tau_by_prompt_length(rows)
    assert sum(b.rounds for b in found) == 3 * len(rows) and sum(b.answers for b in found) == len(rows)


def test_chunks_are_counted_by_their_size_and_their_time_is_that_of_rounds():
    rows = [row("q", [3, 1, 3]), row("r", [1], group_calls=2), row("s", [])]
    assert chunk_sizes(rows).tolist() == [0, 2, 0, 2]
    assert chunk_milliseconds(rows) == pytest.approx(1e3 * (1.5 + 0.75) / 4)
    assert chunk_sizes([]).tolist() == [] and math.isnan(chunk_milliseconds([]))


def pair(id: str, seconds: tuple[float, ...], **fields) -> tuple[Row, Row]:
    ours = row(id, [3, 1], decode_seconds=seconds, prefill_seconds=(0.1,) * len(seconds), **fields)
    plain = dataclasses.replace(ours, arm=PLAIN, emitted=(1,) * 4, accepted=(0,) * 4, group_calls=4)
    return ours, dataclasses.replace(plain, decode_seconds=(2.0, 4.0, 3.0)[: len(seconds)])


def test_a_prompt_has_the_spread_of_its_repeats():
    ours, plain = pair("q", (1.0, 1.0, 6.0))
    (found,) = prompt_times([ours], [plain])
    assert (found.plain_ms, found.ms, found.speedup) == pytest.approx((750, 250, 3.0))
    assert (found.low, found.high, found.repeats, found.tau) == pytest.approx((0.5, 4.0, 3, 2.0))
    (once,) = prompt_times(*([r] for r in pair("q", (1.0,))))
    assert math.isnan(once.low) and math.isnan(once.high) and once.repeats == 1


def test_turns_and_seeds_of_a_conversation_are_one_prompt_and_the_sum_is_the_decode_speedup():
    pairs = [pair("q", (1.0, 2.0)), pair("q", (2.0, 2.5), turn=1), pair("q", (3.0, 1.5), seed=1)]
    ours, plain = [list(side) for side in zip(*pairs, strict=True)]
    (found,) = prompt_times(ours, plain)
    whole = summarize(ours, {"depth": 3, "cost": 0.1}, plain)
    assert found.speedup == pytest.approx(whole["decode_speedup"])
    assert found.low == pytest.approx(min(6 / 6, 12 / 6)) and found.high == pytest.approx(2.0)


def test_prompts_that_failed_or_have_no_round_have_no_time():
    ours, plain = pair("q", (1.0, 2.0))
    failed = Row(id="r", task="x", arm="a", error="is empty")
    short = row("s", [])
    assert [t.unit for t in prompt_times([ours, failed, short], [plain, failed, short])] == ["x/q"]
    assert prompt_times([failed], [failed]) == []


def test_in_slots_a_prompts_ends_are_of_its_own_latencies():
    group = {"decode_seconds": (9.0, 9.0), "group_calls": 9, "group_rows": 4}
    plain = [row("q", [1, 1, 1, 1], own_latency=(4.0, 6.0), **group)]
    ours = [row("q", [2, 2], own_latency=(2.0, 2.0), **group)]
    (found,) = prompt_times(ours, plain)
    assert (found.low, found.speedup, found.high) == pytest.approx((2.0, 2.5, 3.0)) and found.repeats == 2
