"""Figures of an evaluation: a second, slow computation of each, hand-made rows, traps, and what must hold of rows."""

import dataclasses
import itertools
import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from jaxspec.decoding.answers import Answer
from jaxspec.evaluation.metrics import alpha_of, summarize, summarize_all, survival
from jaxspec.evaluation.row_checks import check
from jaxspec.evaluation.rows import PLAIN, Evaluation, Row, rounds_of
from jaxspec.evaluation.statistics import quotient, resampled

STOP, DEPTH, BUDGET = 0, 3, 64
ARMS = {
    PLAIN: {"depth": 0, "nodes": 1, "cost": 0.0, "tree": None, "rule": None},
    "chain:3": {"depth": DEPTH, "nodes": 4, "cost": 0.25, "tree": "chain:3", "rule": "target-draw"},
}


def evaluation_of(rows: list[Row], **changes: Any) -> Evaluation:
    """The rows below the first line of a run that asked what they answer."""
    task_of: dict[str, str] = {}
    for row in rows:
        task_of.setdefault(row.id, row.task)
    asked = [[id, task, 1 + max(r.turn for r in rows if r.id == id)] for id, task in task_of.items()]
    passes = sorted({(row.temperature, row.seed) for row in rows})
    settings = {"arms": ARMS, "asked": asked, "passes": [list(one) for one in passes], "stop_ids": [STOP], "batch": 4}
    settings |= {"max_new_tokens": BUDGET, "max_positions": 1000, "repeats": 3, "slots": None}
    return Evaluation(settings | changes, rows)


def make_pair(
    id: str, task: str, accepted: list[int], cut: int = 0, *, finish: str = "stop", turn: int = 0, drafted=None
):
    """The rows of plain decoding and of a chain of one answer; the last round is cut by `cut` tokens.

    Its rounds draft `drafted` tokens, by default as many as the chain is deep.
    """
    drafted = (DEPTH,) * len(accepted) if drafted is None else tuple(drafted)
    emitted = [a + 1 for a in accepted]
    if emitted:
        emitted[-1] -= cut
    length = 1 + sum(emitted)
    tokens = tuple([7] * (length - 1) + [STOP if finish == "stop" else 7])
    prompt = 10 if finish == "stop" else 1000 - length  # a budget is what is left of the target's positions
    shared: dict[str, Any] = {
        "id": id,
        "task": task,
        "turn": turn,
        "finish": finish,
        "prompt_hash": "p",
        "prompt_tokens": prompt,
        "group": f"{turn}:{id}",
    }
    plain = Row(
        **shared,
        tokens=tokens,
        emitted=(1,) * (length - 1),
        accepted=(0,) * (length - 1),
        drafted=(0,) * (length - 1),
        levels=(0,) * (length - 1),
        group_calls=length - 1,
        prefill_seconds=(0.5, 0.25, 0.125),
        decode_seconds=(seconds := tuple(0.01 * (length - 1) * x for x in (1, 2, 3))),
        wall_seconds=tuple(map(sum, zip((0.5, 0.25, 0.125), seconds, strict=True))),
        identical=True,
    )
    other = dataclasses.replace(
        plain,
        arm="chain:3",
        emitted=tuple(emitted),
        accepted=tuple(accepted),
        drafted=drafted,
        levels=drafted,
        group_calls=len(emitted),
        decode_seconds=(seconds := tuple(0.015 * len(emitted) * x for x in (1, 2, 3))),
        wall_seconds=tuple(map(sum, zip((0.5, 0.25, 0.125), seconds, strict=True))),
    )
    return [plain, other]


def some_rows() -> list[Row]:
    rng = random.Random(0)
    rows = []
    for number in range(40):
        accepted = [rng.randint(0, DEPTH) for _ in range(rng.randint(1, 12))]
        task, finish = rng.choice(["math", "chat"]), rng.choice(["stop", "length"])
        drafted = [rng.randint(a, DEPTH) for a in accepted]  # as an adaptive tree does
        rows += make_pair(f"q{number}", task, accepted, rng.randint(0, accepted[-1]), finish=finish, drafted=drafted)
        if task == "chat":
            rows += make_pair(f"q{number}", task, [1, 2], turn=1)
    return rows


def mine(rows: list[Row], arm: str) -> list[Row]:
    return [row for row in rows if row.arm == arm]


def test_every_figure_is_that_of_a_second_slow_computation():
    rows = some_rows()
    found = summarize(mine(rows, "chain:3"), ARMS["chain:3"], mine(rows, PLAIN))
    emitted = calls = kept = length = drafts = 0
    each, specdec, ours, theirs, rounds = [], [], Fraction(0), Fraction(0), []
    for row in rows:
        repeats = zip(row.prefill_seconds, row.decode_seconds, strict=True)
        seconds = sorted(Fraction(prefill) + Fraction(decode) for prefill, decode in repeats)[1]
        if row.arm == PLAIN:
            theirs += seconds
            continue
        ours += seconds
        emitted, calls, kept = emitted + sum(row.emitted), calls + len(row.emitted), kept + sum(row.accepted)
        length, drafts = length + len(row.tokens), drafts + sum(row.drafted)
        each.append(Fraction(sum(row.emitted), len(row.emitted)))
        specdec.append(Fraction(len(row.tokens), len(row.emitted) + 1))
        rounds += zip(row.accepted, row.drafted, strict=True)
    tau = emitted / calls
    expected = {
        "tau_micro": tau,
        "tau_macro": float(sum(each) / len(each)),
        "tau_raw": 1 + kept / calls,
        "length_sglang": length / calls,
        "length_specdec": float(sum(specdec) / len(specdec)),
        "acceptance_rate": kept / drafts,
        "drafted_tokens": drafts,
        "mbsu": tau / 1.25,
        "speedup": float(theirs / ours),
        "tokens_per_second": float(length / ours),
        "user_tokens_per_second": tau / 0.03,
        "decode_speedup": (0.02 * 1) / (0.03 / tau),
        "efficiency": 0.02 / 0.03,
        "identical_fraction": 1.0,
        "ttft_ms": 250.0,
        "answers": len(each),
        "target_calls": calls,
        "tokens": length,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name
    assert found["histogram"] == [sum(a == k for a, _ in rounds) for k in range(DEPTH + 1)]
    assert found["tried"] == [sum(a >= i - 1 and d >= i for a, d in rounds) for i in (1, 2, 3)]
    got = [sum(a >= i for a, _ in rounds) for i in (1, 2, 3)]
    drafted = [sum(d >= i for _, d in rounds) for i in (1, 2, 3)]
    assert 0 < drafted[2] < drafted[1] < drafted[0] <= calls
    assert found["survival"] == pytest.approx([n / calls for n in got])
    assert found["survival_drafted"] == pytest.approx([n / of for n, of in zip(got, drafted, strict=True)])
    assert found["conditional"] == pytest.approx([n / of for n, of in zip(got, found["tried"], strict=True)])
    powers = sum(n / calls * found["alpha"] ** i for i, n in enumerate(drafted, 1))
    assert 1 + powers == pytest.approx(1 + kept / calls)


def test_rounds_that_draft_all_levels_have_the_figures_of_the_papers():
    rows = [row for row in mine(some_rows(), "chain:3")]
    rows = [dataclasses.replace(row, drafted=(DEPTH,) * row.calls, levels=(DEPTH,) * row.calls) for row in rows]
    found = summarize(rows, ARMS["chain:3"], [])
    before = [1.0, *found["survival"]]
    assert found["conditional"] == pytest.approx([b / a for a, b in itertools.pairwise(before)])
    assert found["survival_drafted"] == found["survival"]
    assert found["acceptance_rate"] == pytest.approx((found["tau_raw"] - 1) / DEPTH)
    assert sum(found["alpha"] ** i for i in range(DEPTH + 1)) == pytest.approx(found["tau_raw"])


def test_rounds_without_drafts_say_nothing_about_acceptance():
    """Prompt lookup that finds nothing in half of its rounds, and all of its drafts are accepted."""
    rows = make_pair("a", "x", [3, 0, 3, 0], drafted=[3, 0, 3, 0])
    found = summarize(mine(rows, "chain:3"), ARMS["chain:3"], mine(rows, PLAIN))
    assert found["acceptance_rate"] == 1 and found["conditional"] == [1.0] * 3 and found["survival"] == [0.5] * 3
    assert found["alpha"] == pytest.approx(1) and check(evaluation_of(rows)) == []
    none = summarize(mine(make_pair("a", "x", [0, 0], drafted=[0, 0]), "chain:3"), ARMS["chain:3"], [])
    assert math.isnan(none["acceptance_rate"]) and math.isnan(none["alpha"]) and none["drafted_tokens"] == 0


def test_the_conversions_between_conventions_hold():
    rows = mine(some_rows(), "chain:3")
    found = summarize(rows, ARMS["chain:3"], [])
    assert found["tau_raw"] == pytest.approx(1 + sum(found["survival"]))
    answers = len(rows)
    assert found["length_sglang"] == pytest.approx(found["tau_micro"] + answers / found["target_calls"])
    assert sum(k * h for k, h in enumerate(found["histogram"])) == sum(sum(r.accepted) for r in rows)
    assert found["tau_micro"] <= found["tau_raw"] <= found["tau_micro"] + DEPTH * answers / found["target_calls"]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("depth", [1, 7])
def test_alpha_is_the_acceptance_that_gives_tau(alpha: float, depth: int):
    tau = sum(alpha**i for i in range(depth + 1))
    whole = [1.0] * depth
    assert alpha_of(tau, whole) == pytest.approx(alpha, abs=1e-6)
    assert math.isnan(alpha_of(depth + 1.5, whole)) and math.isnan(alpha_of(0.5, whole))
    # Half of the rounds draft nothing: they give a token each, and say nothing about acceptance.
    assert alpha_of((1 + tau) / 2, [0.5] * depth) == pytest.approx(alpha, abs=1e-6)
    assert math.isnan(alpha_of(1.0, [0.0] * depth))


def test_hand_made_rows_have_known_figures():
    rows = make_pair("a", "x", [3, 0], 0) + make_pair("b", "x", [1], 0)
    found = summarize(mine(rows, "chain:3"), ARMS["chain:3"], mine(rows, PLAIN))
    assert found["tau_micro"] == pytest.approx(7 / 3)
    assert found["tau_macro"] == pytest.approx((5 / 2 + 2) / 2)
    assert survival(mine(rows, "chain:3"), DEPTH).tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3])


def test_rows_may_be_permuted_and_split():
    rows = some_rows()
    whole = summarize_all(rows, ARMS)
    turned = rows[::-1]
    assert summarize_all(turned, ARMS) == whole
    calls = [s["target_calls"] for s in whole if s["method"] == "chain:3"]
    assert calls[0] == sum(calls[1:])  # tasks add up to all
    assert [s["task"] for s in whole][:2] == ["all", "all"] and {s["task"] for s in whole} == {"all", "math", "chat"}


TRAPS = {
    "a stop id as bonus": make_pair("a", "x", [2, 1]),
    "a stop id inside the accepted path": make_pair("a", "x", [2, 3], 2),
    "a stop id by prefill": make_pair("a", "x", []),
    "a budget of one": make_pair("a", "x", [], finish="length"),
    "a cut at the budget": make_pair("a", "x", [3, 3], 1, finish="length"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps_are_sound_rows_and_are_counted(name: str):
    rows = TRAPS[name]
    assert check(evaluation_of(rows)) == []
    found = summarize(mine(rows, "chain:3"), ARMS["chain:3"], mine(rows, PLAIN))
    if rows[1].calls:
        assert found["tau_micro"] == sum(rows[1].emitted) / rows[1].calls and not found["without_rounds"]
    else:
        # An answer without a round has no tau; it is counted, and left out of the mean.
        assert found["without_rounds"] == 1 and math.isnan(found["tau_micro"]) and math.isnan(found["tau_macro"])
    assert found["answers"] == 1


def broken(**changes: Any) -> list[Row]:
    plain, other = make_pair("a", "x", [2, 1])
    return [plain, dataclasses.replace(other, **changes)]


def test_rounds_of_an_answer_are_its_calls():
    drafted = np.array([[0, 0], [7, 2], [4, 3]])
    answer = Answer(np.arange(7), "stop", 3, np.array([1, 0, 2, 0]), np.array([0, 1, 2, 2, 2, 3, 3]), drafted)
    assert rounds_of(answer) == ((1, 3, 2), (0, 2, 2), (0, 7, 4), (0, 2, 3))
    assert rounds_of(Answer(np.arange(1), "stop", 0, np.zeros(4, int), np.zeros(1, int))) == ((), (), (), ())


def test_strata_keep_their_number_of_units_and_few_units_have_a_skewed_interval():
    rng = np.random.default_rng(0)
    above, below = rng.exponential(size=60), np.ones(60)
    strata = ["a"] * 30 + ["b"] * 30
    above[30:] += 100  # a difference between strata that no resampling within them sees
    apart, together = resampled(quotient(above, below), strata), resampled(quotient(above, below), ["a"] * 60)
    assert apart.high - apart.low < 0.1 * (together.high - together.low)
    few = resampled(quotient(above[:12], below[:12]), ["a"] * 12)
    assert few.low < few.value < few.high and few.high - few.value > few.value - few.low
    assert all(math.isnan(x) for x in resampled(quotient(above[:0], below[:0]), []))
    one = resampled(quotient(np.ones(5), np.ones(5)), ["a"] * 5)
    assert one == (1.0, 1.0, 1.0)


def test_too_few_units_have_no_interval_and_lone_strata_are_drawn_from_together():
    above = np.array([1.0, 2.0, 3.0, 4.0])
    few = resampled(quotient(above[:3], np.ones(3)), ["a"] * 3)
    assert few.value == 2 and math.isnan(few.low) and math.isnan(few.high)
    alone = resampled(quotient(above, np.ones(4)), list("abcd"))
    assert alone == resampled(quotient(above, np.ones(4)), ["a"] * 4) and alone.low < alone.value < alone.high


def batch_rows(batches: int, sizes: int, tasks: str, *, slots: bool = False) -> list[Row]:
    """Rows of answers that share batches, whose times vary by a factor that all answers of a batch have in common."""
    rng, rows = random.Random(1), []
    for batch in range(batches):
        plain_seconds, seconds = 1.0 + rng.random(), 0.5 + rng.random()
        for number in range(sizes):
            pair = make_pair(f"q{batch}-{number}", tasks[number % len(tasks)], [1, 2, number % 3])
            for row, decode in zip(pair, (plain_seconds, seconds), strict=True):
                shared = {"group": f"turn 0, from q{batch}-0", "group_rows": sizes, "group_calls": 9}
                times: dict[str, Any] = {"prefill_seconds": (0.0,), "decode_seconds": (decode,)}
                if slots:
                    times |= {"own_latency": (decode / (1 + number),)}
                rows.append(dataclasses.replace(row, **shared, **times))
    return rows


@pytest.mark.parametrize("slots", [False, True])
def test_a_batch_is_one_measurement_of_time(slots: bool):
    rows = batch_rows(12, 4, "xy", slots=slots)
    found = summarize(mine(rows, "chain:3"), ARMS["chain:3"], mine(rows, PLAIN))
    whole = {row.group: (row.decode_seconds[0], row.arm) for row in mine(rows, PLAIN)}
    drafted = {row.group: row.decode_seconds[0] for row in mine(rows, "chain:3")}
    pairs = np.array([[seconds, drafted[group]] for group, (seconds, _) in sorted(whole.items())])
    assert found["speedup"] == pytest.approx(pairs[:, 0].sum() / pairs[:, 1].sum())
    # The interval is that of twelve measurements, not of 48: as wide as that of the batches' own ratio of sums.
    expected = resampled(quotient(pairs[:, 0], pairs[:, 1]), [""] * 12)
    assert (found["speedup_low"], found["speedup_high"]) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found["speedup_macro"] == pytest.approx(np.mean(pairs[:, 0] / pairs[:, 1]))
    assert math.isnan(found["ttft_ms"]) is slots


def test_tasks_that_share_batches_have_no_speed_of_their_own():
    every = summarize_all(batch_rows(12, 4, "xy"), ARMS)
    by_task = {row["task"]: row for row in every if row["method"] == "chain:3"}
    assert by_task["all"]["speedup"] > 0 and by_task["all"]["tokens_per_second"] > 0
    for task in "xy":
        assert math.isnan(by_task[task]["speedup"]) and math.isnan(by_task[task]["tokens_per_second"])
        assert by_task[task]["decode_speedup"] > 0 and math.isnan(by_task[task]["decode_speedup_low"])
        assert by_task[task]["tau_micro_low"] < by_task[task]["tau_micro_high"] or by_task[task]["tau_micro"] > 1
    apart = summarize_all(batch_rows(12, 4, "x"), ARMS)
    assert all(row["speedup"] > 0 for row in apart)


def test_one_batch_has_a_speed_and_no_interval():
    (row,) = [row for row in summarize_all(batch_rows(1, 4, "x", slots=True), ARMS) if row["method"] == "chain:3"]
    assert row["speedup"] > 0 and math.isnan(row["speedup_low"]) and math.isnan(row["speedup_high"])
