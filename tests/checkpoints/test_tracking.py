"""Tracking of runs: metrics that other tools read, and the record of sessions."""

import errno
import json
import os
import resource
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxspec import __version__
from jaxspec.checkpoints.event_file import EventFile, masked_crc
from jaxspec.checkpoints.tracking import (
    METRICS,
    RECORD,
    TENSORBOARD,
    JsonLines,
    flat,
    is_held,
    read_metrics,
    read_record,
    session,
    sole,
    track,
)

FACTS = {"name": "toy", "kind": "train", "steps": 9, "config": {"seed": 3}}


def test_metrics_past_the_resumed_step_and_torn_lines_are_dropped(tmp_path: Path):
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    JsonLines(path, 2).write(3, {"loss": 1.0})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 1.0}\n'


def test_every_sink_gets_the_same_numbers(tmp_path: Path):
    with track(tmp_path) as log:
        log.write(5, loss=1.5, eval={"tau": 2.0, "by_source": {"a": 0.25}, "of": None, "bad": float("nan")})
    line = json.loads((tmp_path / METRICS).read_text())
    assert line == {"step": 5, "loss": 1.5, "eval": {"tau": 2.0, "by_source": {"a": 0.25}, "of": None, "bad": None}}
    assert flat(line) == {"step": 5, "loss": 1.5, "eval/tau": 2.0, "eval/by_source/a": 0.25}
    assert scalars(tmp_path / TENSORBOARD)["eval/by_source/a"] == [(5, 0.25)]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the scalars that TensorBoard reads in a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_the_scalars_and_forgets_those_past_the_resumed_step(tmp_path: Path):
    first = EventFile(tmp_path)
    for step in (1, 2, 300):
        first.write(step, {"loss": 1 / step, "eval/tau": 2.0})
    assert scalars(tmp_path)["eval/tau"] == [(1, 2.0), (2, 2.0), (300, 2.0)]
    EventFile(tmp_path, resumed_from=2).write(3, {"loss": 7.0})
    assert scalars(tmp_path) == {"loss": [(1, 1.0), (2, 0.5), (3, 7.0)], "eval/tau": [(1, 2.0), (2, 2.0)]}
    EventFile(tmp_path).write(1, {"loss": 9.0})  # killed before its first checkpoint, it begins anew
    assert scalars(tmp_path)["loss"] == [(1, 9.0)]


def test_a_torn_record_hides_nothing_but_itself(tmp_path: Path):
    file = EventFile(tmp_path)
    file.write(1, {"loss": 1.0})
    file.write(2, {"loss": 2.0})
    file.path.write_bytes(file.path.read_bytes()[:-3])
    EventFile(tmp_path, resumed_from=1).write(2, {"loss": 3.0})
    assert scalars(tmp_path) == {"loss": [(1, 1.0), (2, 3.0)]}


def test_a_full_disk_does_not_stop_a_run_and_leaves_no_half_of_a_line(tmp_path: Path):
    """A limit on the size of files stands for the disk's."""
    told: list[str] = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with track(tmp_path, tell=told.append) as log:
        log.write(1, loss=1.0)
        room = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) + 5
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            for step in (2, 3, 4):
                log.write(step, loss=2.0, text="x" * room)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        log.write(5, loss=5.0)
    assert told == [f"metrics are not written from step 2 on ({os.strerror(errno.EFBIG)})"]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 5]
    assert scalars(tmp_path / TENSORBOARD) == {"loss": [(1, 1.0), (5, 5.0)]}


def test_the_checksum_is_crc_32c():
    rotated = (struct.unpack("<I", masked_crc(b"123456789"))[0] - 0xA282EAD8) & 0xFFFFFFFF
    assert (rotated << 15 | rotated >> 17) & 0xFFFFFFFF == 0xE3069283  # the check value of RFC 3720's polynomial


def test_weights_and_biases_is_asked_for_by_its_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda *a, **k: calls.append((a, k)), finish=lambda: calls.append("finish"))
    stand_in = SimpleNamespace(init=lambda **k: calls.append(k) or run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)  # type: ignore[arg-type]
    record = {**FACTS, "id": "0a1b"}
    with track(tmp_path, wandb="drafters", record=record) as log:
        log.write(2, loss=1.0, eval={"tau": 3.0})
    begun = {"project": "drafters", "resume": "allow", "dir": str(tmp_path), "name": "toy", "id": "0a1b"}
    assert calls == [
        begun | {"config": {"seed": 3}},
        (({"loss": 1.0, "eval/tau": 3.0},), {"step": 2}),
        "finish",
    ]


def test_weights_and_biases_missing_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tracking\.wandb is 'p', but wandb is not installed: pip install wandb, or"):
        with track(tmp_path, wandb="p", record={}):
            pass


def test_the_record_names_code_versions_machine_and_every_session(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), session(tmp_path, FACTS):
        (first,) = json.loads((tmp_path / RECORD).read_text())["sessions"]
        assert "end" not in first
        raise KeyboardInterrupt
    with session(tmp_path, FACTS, 4) as record:
        pass
    found = read_record(tmp_path)
    assert found and found == record and found.items() >= FACTS.items() and found["id"]
    first, second = found["sessions"]
    assert (first["resumed_from"], first["end"]) == (None, "stopped")
    assert (second["resumed_from"], second["end"]) == (4, "finished")
    assert second["jaxspec"] == __version__ and second["versions"]["jax"] == jax.__version__
    assert second["machine"]["cores"] > 0 and second["started"] <= second["ended"]


def test_a_record_that_is_not_one_is_named(tmp_path: Path):
    assert read_record(tmp_path) is None
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(ValueError, match="not the record of a run"):
        read_record(tmp_path)


def test_a_second_trainer_is_kept_out_while_the_first_is_there(tmp_path: Path):
    with sole(tmp_path):
        assert is_held(tmp_path)
        with (
            pytest.raises(ValueError, match="another process trains there; wait for it"),
            sole(tmp_path),
        ):
            pass
    assert not is_held(tmp_path) and not is_held(tmp_path / "elsewhere")
    with sole(tmp_path):  # and it is free again
        pass
