"""Tests of measurements within a time limit: noted as they come, continued, left out with a reason, failing alone."""

import json
from pathlib import Path

import pytest

from jaxspec.evaluation.measurements import BEGIN, FAILED, SESSION, Journal, Measurement, left_out, work_through

SETTINGS = {"command": "bench device", "shape": "tiny"}


class Clock:
    """A clock that stands still but for the seconds that measurements take."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def measurement(number: int, kind: str = "verify", guess: float = 1.0) -> Measurement:
    return Measurement(2, kind, {"number": number}, "decode", (number,), guess)


def taking(clock: Clock, seconds: float, calls: list[int], compiling: float = 0.0):
    """A measure that takes some seconds by the clock."""

    def measure(m: Measurement) -> dict:
        clock.now += seconds
        calls.append(m.settings["number"])
        return {"seconds": 0.5, "compile_seconds": compiling}

    return measure


def test_figures_are_on_disk_before_the_next_measurement_begins(tmp_path: Path):
    seen = []

    def measure(m: Measurement) -> dict:
        lines = (tmp_path / "measured.jsonl").read_text().splitlines()
        seen.append([json.loads(line).get("event") for line in lines[1:]])
        return {"seconds": 1.0}

    work_through([measurement(1), measurement(2)], measure, Journal(tmp_path, SETTINGS), 1e12)
    assert seen == [["begin"], ["begin", "row", "begin"]]


def test_another_session_measures_what_is_missing_and_nothing_twice(tmp_path: Path):
    clock, calls = Clock(), []
    every = [measurement(n) for n in range(4)]
    work_through(every[:2], taking(clock, 1, calls), Journal(tmp_path, SETTINGS), 1e12, clock=clock)
    with (tmp_path / "measured.jsonl").open("a") as file:
        file.write('{"event": "row", "key"')  # the line that a killed process was writing
    work_through(every, taking(clock, 1, calls), Journal(tmp_path, SETTINGS), 1e12, clock=clock)
    assert calls == [0, 1, 2, 3]
    assert len(Journal(tmp_path, SETTINGS).finished) == 4


def test_what_does_not_fit_is_left_out_with_its_estimate_and_what_fits_goes_on(tmp_path: Path):
    clock, calls = Clock(), []
    every = [measurement(0), measurement(1, "train", guess=500), measurement(2)]
    journal = Journal(tmp_path, SETTINGS)
    work_through(every, taking(clock, 10, calls), journal, clock.now + 60, clock=clock)
    assert calls == [0, 2]
    (skipped,) = left_out(every, journal)
    assert skipped["part"] == 2 and skipped["settings"] == {"what": "train", "number": 1}
    assert skipped["reason"] == "takes about 500 s, and 50 s are left"


def test_estimates_follow_the_last_of_the_kind_and_leave_out_compiling_what_is_compiled(tmp_path: Path):
    clock, journal = Clock(), Journal(tmp_path, SETTINGS)
    work_through([measurement(0)], taking(clock, 100, [], compiling=80), journal, 1e12, clock=clock)
    assert journal.estimate(measurement(1), compiled=False) == pytest.approx(130)
    assert journal.estimate(measurement(1), compiled=True) == pytest.approx(26)
    assert journal.estimate(measurement(1, "train", guess=7), compiled=False) == 7


def test_nothing_begins_that_would_end_behind_the_deadline(tmp_path: Path):
    clock, calls = Clock(), []
    every = [measurement(n) for n in range(100)]
    deadline = clock.now + 60
    work_through(every, taking(clock, 7, calls), Journal(tmp_path, SETTINGS), deadline, clock=clock)
    assert 5 < len(calls) < 9 and clock.now <= deadline


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            RuntimeError("RESOURCE_EXHAUSTED: trying\nto allocate 9 bytes"),
            "out of memory: RESOURCE",
        ),
        (NotImplementedError("no kernel\n for this device"), "no kernel for this device"),
        (ModuleNotFoundError("No module named 'torch'"), "No module named 'torch'"),
        (KeyError(), "KeyError"),
    ],
)
def test_a_measurement_that_fails_is_one_row_with_its_reason_and_the_next_goes_on(tmp_path: Path, failure, reason: str):
    def measure(m: Measurement) -> dict:
        if m.settings["number"] == 0:
            raise failure
        return {"seconds": 1.0}

    journal = Journal(tmp_path, SETTINGS)
    work_through([measurement(0), measurement(1)], measure, journal, 1e12)
    (line,) = journal.of(FAILED)
    assert line["reason"].startswith(reason) and "\n" not in line["reason"]
    assert len(journal.finished) == 2 and not left_out([measurement(0), measurement(1)], journal)


def test_a_folder_is_for_one_shape_and_one_device(tmp_path: Path):
    journal = Journal(tmp_path, SETTINGS)
    journal.use_device({"name": "NVIDIA H200", "memory_bytes": 1})
    journal.use_device({"name": "NVIDIA H200", "memory_bytes": 1})
    assert len(journal.of("device")) == 1
    with pytest.raises(ValueError, match="was measured on NVIDIA H200, and this is cpu: give another --out"):
        journal.use_device({"name": "cpu", "memory_bytes": None})
    with pytest.raises(ValueError, match="shape was tiny, is 125m"):
        Journal(tmp_path, {**SETTINGS, "shape": "125m"})


def test_reasons_are_those_of_the_last_session(tmp_path: Path):
    clock, journal = Clock(), Journal(tmp_path, SETTINGS)
    journal.note(SESSION, minutes=1)
    work_through([measurement(0, guess=50)], taking(clock, 1, []), journal, clock.now + 10, clock=clock)
    assert "50 s" in left_out([measurement(0)], journal)[0]["reason"]
    journal.note(SESSION, minutes=1)
    assert left_out([measurement(0)], journal)[0]["reason"] == "the time was over before its turn"


def test_the_open_measurement_is_the_one_begun_last(tmp_path: Path):
    journal = Journal(tmp_path, SETTINGS)
    assert journal.open is None
    journal.note(BEGIN, key="a", at=3.0)
    assert journal.open is not None and journal.open["key"] == "a" and journal.open["at"] == 3.0
    journal.note(FAILED, key="a", reason="")
    assert journal.open is None
