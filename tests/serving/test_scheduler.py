"""The decode thread without a socket: every answer as if alone, rows free within a round, nothing lost, a clean end."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_toys import MOST_NEW, Asking, Caller, alone, askings, toy_models, toy_scheduler

from jaxspec.decoding.requests import Settings
from jaxspec.serving.loading import Models
from jaxspec.serving.outbox import Delta, Outbox
from jaxspec.serving.scheduler import BROKEN, CLOSING, QueueFull, Scheduler, Stopping

ENDLESS = Settings(max_new_tokens=MOST_NEW, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    return toy_models(folder)


@pytest.fixture(scope="module")
def running(models: Models) -> Iterator[Scheduler]:
    scheduler = toy_scheduler(models)
    scheduler.start()
    yield scheduler
    scheduler.close(0)
    assert scheduler.join(10)


@pytest.fixture
def scheduler(running: Scheduler) -> Iterator[Scheduler]:
    """One that runs, and has every row free when a test is done."""
    yield running
    until(lambda: not running.held and not running.waiting)
    for name, rows in (("speculative", 3), ("plain", 2)):
        assert sorted(running.lanes[name].slots.free) == list(range(rows))


def until(holds: Any, seconds: float = 30.0) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def slowed(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.03) -> None:
    """Makes rounds take time, so that a test can act between them."""
    for lane in scheduler.lanes.values():
        step = lane.slots.step
        monkeypatch.setattr(lane.slots, "step", lambda step=step: (time.sleep(seconds), step())[1])


def test_answers_that_share_rows_are_those_of_decoding_alone(scheduler: Scheduler, models: Models):
    asked = askings(12)
    callers = [Caller(models, one) for one in asked]
    for number, caller in enumerate(callers):
        scheduler.submit("plain" if number % 4 == 3 else "speculative", [caller.job])
    for caller, one in zip(callers, asked, strict=True):
        text, ids, finish = alone(models, one)
        assert (caller.wait().text, caller.ids, caller.deltas[-1].finish) == (text, ids, finish)
        assert [delta.round for delta in caller.deltas] == list(range(len(caller.deltas)))


def test_plain_and_drafted_answers_of_one_seed_are_the_same_text(scheduler: Scheduler, models: Models):
    one = Asking("3 and 4 make", Settings(60, 1.0, seed=7))
    pair = [Caller(models, one, watched=True) for _ in range(2)]
    for lane, caller in zip(("plain", "speculative"), pair, strict=True):
        scheduler.submit(lane, [caller.job])
    plain, drafted = (caller.wait() for caller in pair)
    assert plain.ids == drafted.ids and plain.text == drafted.text
    assert all(delta.nodes == 1 and delta.accepted == 0 for delta in plain.deltas[1:])
    assert all(2 <= delta.nodes <= 8 for delta in drafted.deltas[1:])


def test_the_tree_of_a_round_holds_the_tokens_that_it_added(scheduler: Scheduler, models: Models):
    caller = Caller(models, Asking("3 and 4 make", Settings(60, seed=7)), watched=True)
    scheduler.submit("speculative", [caller.job])
    newest = caller.wait().deltas[0].ids[-1]
    for delta in caller.deltas[1:]:
        assert delta.tree is not None and delta.tree.token_N[0] == newest and len(delta.tree.token_N) == delta.nodes
        on_path = delta.tree.token_N[list(delta.tree.path)].tolist()
        assert delta.ids[: delta.accepted] == tuple(on_path[1 : delta.accepted + 1])
        path = delta.tree.path
        assert [delta.tree.parent_N[node] for node in path[1:]] == list(path[:-1])
        newest = delta.ids[-1]


@pytest.mark.parametrize("tree", ["dynamic:8x3x3", "chain:4"])
def test_a_stop_string_cuts_text_and_counts_whatever_the_tree(folder: Path, models: Models, tree: str):
    asked = Asking("5 and 6 make", Settings(60, 0.0))
    text, ids, _ = alone(models, asked)
    scheduler = toy_scheduler(toy_models(folder, tree))
    scheduler.start()
    whole = [at for at in range(1, len(text) - 2) if "\N{REPLACEMENT CHARACTER}" not in text[at : at + 3]]
    for at in (whole[0], whole[len(whole) // 2], whole[-1]):
        stop = text[at : at + 3]
        caller = Caller(models, asked._replace(stops=(stop,)))
        scheduler.submit("speculative", [caller.job])
        assert caller.wait().text == text[: text.find(stop)] and caller.deltas[-1].finish == "stop"
        assert caller.ids == ids[: len(caller.ids)]
        assert stop in models.tokenizer.decode(caller.ids) and stop not in models.tokenizer.decode(caller.ids[:-1])
        until(lambda: not scheduler.held)
    scheduler.close(0)
    assert scheduler.join(10)


def test_a_cancelled_answer_frees_its_row_within_a_round(
    scheduler: Scheduler, models: Models, monkeypatch: pytest.MonkeyPatch
):
    slowed(scheduler, monkeypatch)
    caller = Caller(models, Asking("1 and 1 make", ENDLESS))
    before = scheduler.tally.cancelled
    scheduler.submit("speculative", [caller.job])
    until(lambda: caller.job.rounds >= 2)
    caller.job.cancelled = True
    at = caller.job.rounds
    until(lambda: not scheduler.held)
    assert caller.job.rounds <= at + 1 and scheduler.tally.cancelled == before + 1


def test_a_cancelled_job_that_waits_never_takes_a_row(
    scheduler: Scheduler, models: Models, monkeypatch: pytest.MonkeyPatch
):
    slowed(scheduler, monkeypatch)
    callers = [Caller(models, Asking("1 and 1 make", ENDLESS)) for _ in range(5)]
    scheduler.submit("speculative", [caller.job for caller in callers])
    callers[3].job.cancelled = callers[4].job.cancelled = True
    for caller in callers[:3]:
        caller.wait()
    until(lambda: not scheduler.waiting)
    assert not callers[3].deltas and callers[3].job.rounds == 0


def test_jobs_beyond_the_queue_are_refused_all_or_none(models: Models):
    scheduler = toy_scheduler(models, batch=1, most_waiting=2)
    jobs = [Caller(models, one).job for one in askings(5)]
    with pytest.raises(QueueFull):
        scheduler.submit("speculative", jobs[:4])
    assert not scheduler.waiting
    scheduler.submit("speculative", jobs[:3])
    with pytest.raises(QueueFull):
        scheduler.submit("speculative", jobs[3:4])
    jobs[0].cancelled = True
    scheduler.submit("speculative", jobs[3:4])
    scheduler.submit("plain", jobs[4:])


def test_a_failing_round_ends_its_answers_and_no_others(
    scheduler: Scheduler, models: Models, monkeypatch: pytest.MonkeyPatch
):
    def broken() -> None:
        raise RuntimeError("out of memory")

    one = Asking("2 and 2 make", Settings(40))
    monkeypatch.setattr(scheduler.lanes["speculative"].slots, "step", broken)
    hit, spared = Caller(models, one), Caller(models, one)
    scheduler.submit("speculative", [hit.job])
    scheduler.submit("plain", [spared.job])
    assert hit.wait().failure == BROKEN
    assert spared.wait().ids == alone(models, one)[1]
    again = Caller(models, one)
    scheduler.submit("speculative", [again.job])
    assert again.wait().ids == spared.ids


def test_closing_lets_answers_finish_within_the_grace_and_ends_the_others(
    models: Models, monkeypatch: pytest.MonkeyPatch
):
    scheduler = toy_scheduler(models, batch=2)
    scheduler.start()
    slowed(scheduler, monkeypatch, 0.1)
    short, long = Caller(models, Asking("1 and", Settings(2))), Caller(models, Asking("1 and 1 make", ENDLESS))
    late = Caller(models, Asking("1 and", Settings(2)))
    scheduler.submit("speculative", [short.job, long.job, late.job])
    until(lambda: scheduler.held == 2)
    scheduler.close(0.3)
    with pytest.raises(Stopping):
        scheduler.submit("speculative", [Caller(models, Asking("1 and")).job])
    assert scheduler.join(5)
    assert short.wait().deltas[-1].finish and long.wait().failure == CLOSING and late.wait().failure == CLOSING
    assert not scheduler.held and not scheduler.waiting


@pytest.mark.parametrize("ahead", ["speculative", "plain"])
def test_lanes_that_are_busy_together_get_equal_time(scheduler: Scheduler, models: Models, monkeypatch, ahead: str):
    slowed(scheduler, monkeypatch, 0.01)
    scheduler.lanes[ahead].spent += 100.0  # it was busy while the other had nothing to do
    turns, gaps = [0.0], []

    def watched(lane, turn):
        before = lane.spent
        turn()
        turns.append(lane.spent - before)
        if all(one.busy for one in scheduler.lanes.values()):
            spent = [one.spent for one in scheduler.lanes.values()]
            gaps.append(max(spent) - min(spent))

    for lane in scheduler.lanes.values():
        monkeypatch.setattr(lane, "turn", functools.partial(watched, lane, lane.turn))
    pair = [Caller(models, Asking("1 and 1 make", dataclasses.replace(ENDLESS, stop_ids=()))) for _ in range(2)]
    for lane, caller in zip(("speculative", "plain"), pair, strict=True):
        scheduler.submit(lane, [caller.job])
    until(lambda: all(caller.job.rounds >= 6 for caller in pair))
    for caller in pair:
        caller.wait()
    # The lane that had less goes next, so none is ahead by more than a turn, however long the machine makes that.
    assert gaps and max(gaps) <= max(turns)


def test_a_full_outbox_merges_and_loses_nothing():
    told = threading.Event()
    outbox = Outbox(told.set, room=4)
    deltas = [Delta(str(i), (i,), i, 1, 2, 0.5) for i in range(9)]
    for delta in deltas:
        outbox.put(delta)
    outbox.put(Delta("z", (9,), 9, 0, 1, 0.5, "stop"))
    taken, failure = outbox.take()
    assert len(taken) == 4 and failure is None and taken[-1].finish == "stop" and taken[-1].round == 9
    assert "".join(delta.text for delta in taken) == "012345678z"
    assert [token for delta in taken for token in delta.ids] == list(range(10))
    assert sum(d.accepted for d in taken) == 9 and sum(d.nodes for d in taken) == 19
    assert outbox.take() == ([], None)
