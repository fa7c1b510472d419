"""Tests of the processes behind `jaxspec bench device`: crashes, deadlines, environments; without any device."""

import sys
import time
from pathlib import Path

import pytest

from jaxspec.evaluation.device_jobs import environment, run_jobs
from jaxspec.evaluation.device_plan import DevicePlan
from jaxspec.evaluation.measurements import FAILED, ROW, Journal, left_out

SETTINGS = {"command": "bench device"}
PLAN = DevicePlan("tiny", "fp32", parts=(1,), batches=(1,), prefixes=(16,), tree="chain:2")
WORKER = """
import os, sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from jaxspec.evaluation.measurements import Journal, work_through
from jaxspec.evaluation.device_plan import DevicePlan
plan = DevicePlan("tiny", "fp32", parts=(1,), batches=(1,), prefixes=(16,), tree="chain:2")
def measure(m):
    if m.kind == {kind!r}:
        {action}
    return {{"seconds": 1.0}}
work_through(plan.measurements(), measure, Journal(Path({folder!r}), {settings!r}, lent=True), 1e12)
"""


def jobs(folder: Path, kind: str, action: str, seconds: float = 60.0) -> tuple[Journal, float]:
    """Runs the plan with a measurement of some kind doing something else; returns the journal and the time it took."""
    journal = Journal(folder, SETTINGS)
    program = WORKER.format(path=sys.path, kind=kind, action=action, folder=str(folder), settings=SETTINGS)
    started = time.time()
    run_jobs(PLAN, journal, lambda job, left: [sys.executable, "-c", program], started + seconds)
    return journal, time.time() - started


def test_a_process_that_dies_is_one_row_with_its_reason_and_another_goes_on(tmp_path: Path):
    journal, _ = jobs(tmp_path, "read", "os.kill(os.getpid(), 9)")
    (line,) = journal.of(FAILED)
    assert line["settings"] == {"what": "read"} and line["reason"].startswith("the process was ended by SIGKILL")
    assert [row["settings"]["what"] for row in journal.of(ROW)] == ["copy", "matmul", "plain"]
    assert not left_out(PLAN.measurements(), journal)


def test_what_runs_at_the_deadline_is_stopped_and_what_comes_behind_is_left_out(tmp_path: Path):
    journal, taken = jobs(tmp_path, "read", "time.sleep(600)", seconds=12.0)
    assert taken < 16
    assert [row["settings"]["what"] for row in journal.of(ROW)] == ["copy"]
    reasons = [skipped["reason"] for skipped in left_out(PLAN.measurements(), journal)]
    assert "at the time limit" in reasons[0] and reasons[1:] == ["the time was over before its turn"] * 2
    (read,) = [m for m in PLAN.measurements() if m.kind == "read"]
    assert journal.estimate(read, compiled=False) >= read.guess


def test_a_process_that_gives_up_is_the_failure_of_the_verb(tmp_path: Path):
    journal = Journal(tmp_path, SETTINGS)
    command = [sys.executable, "-c", "import sys; sys.exit('the folder is of another device')"]
    with pytest.raises(ValueError, match="the folder is of another device"):
        run_jobs(PLAN, journal, lambda job, left: command, time.time() + 60)


def test_a_process_that_crashes_before_it_measures_leaves_its_job_out(tmp_path: Path):
    journal = Journal(tmp_path, SETTINGS)
    command = [sys.executable, "-c", "import sys; sys.stderr.write('Unknown flag'); sys.exit(3)"]
    run_jobs(PLAN, journal, lambda job, left: command, time.time() + 60)
    reasons = {skipped["reason"] for skipped in left_out(PLAN.measurements(), journal)}
    assert reasons == {"the process ended with code 3 before it began: Unknown flag"}


def test_settings_of_xla_are_added_to_the_users_and_pytorch_gets_the_device(tmp_path: Path):
    given = {"XLA_FLAGS": "--a=1", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    found = environment("command_buffers=none", given)
    assert found["XLA_FLAGS"] == "--a=1 --xla_gpu_enable_command_buffer="
    assert found["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert environment("decode", given)["XLA_FLAGS"] == "--a=1"
    assert "JAX_PLATFORMS" not in environment("decode", {})
    assert environment("torch", {})["JAX_PLATFORMS"] == "cpu"
    cache = environment("decode", {"XDG_CACHE_HOME": str(tmp_path)})["JAX_COMPILATION_CACHE_DIR"]
    assert cache == str(tmp_path / "jaxspec" / "programs")
