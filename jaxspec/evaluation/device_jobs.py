"""The processes of `jaxspec bench device`: started in turn, replaced where they crash, ended at the deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from jaxspec.evaluation.device_plan import XLA_FLAGS, DevicePlan
from jaxspec.evaluation.measurements import FAILED, LEFT, STOPPED, Journal, Measurement, shown

PEER_JOBS = ("torch", "peers")
"""Jobs that run PyTorch, and leave the device's memory to it."""
MEMORY_FRACTION = "0.92"
"""Share of the device's memory that JAX takes at its start; its own default is 0.75."""


def environment(job: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a job's process; what the user has set stands, XLA's flags are added to it."""
    # Programs, and the kernels that were chosen for them, are found again by the next process and the next session.
    cache = Path(inherited.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    set_here = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY_FRACTION,
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jaxspec" / "programs"),
    }
    found = {**set_here, **inherited}
    if job in XLA_FLAGS:
        found["XLA_FLAGS"] = f"{inherited.get('XLA_FLAGS', '')} {XLA_FLAGS[job]}".strip()
    if job in PEER_JOBS:
        found["JAX_PLATFORMS"] = "cpu"
    return found


def run_jobs(
    plan: DevicePlan,
    journal: Journal,
    command: Callable[[str, float], list[str]],
    deadline: float,
    *,
    clock: Callable[[], float] = time.time,
) -> None:
    """Runs the plan's jobs until all is measured or it is `deadline`, a time of `clock`.

    `command(job, seconds left)` is the command line of a job. A measurement whose process crashes is noted as failed,
    and a new process goes on behind it. Raises ValueError, with its last line, where a process gives up by itself.
    """
    measurements = plan.measurements()
    for job in plan.jobs():
        mine = [m for m in measurements if m.job == job]
        while [m for m in mine if m.key not in journal.finished] and clock() < deadline:
            code, said = _run(command(job, deadline - clock()), job, journal.folder, deadline - clock())
            journal.read_again()
            if not _goes_on(mine, journal, code, said, clock()):
                break


def _goes_on(mine: list[Measurement], journal: Journal, code: int | None, said: str, now: float) -> bool:
    """Notes how a process ended (None: at the deadline), and returns whether another one is to go on."""
    begun = journal.open
    if begun is not None and code is None:
        reason = f"was stopped after {now - begun['at']:.0f} s, at the time limit"
        journal.note(STOPPED, key=begun["key"], after_seconds=now - begun["at"], reason=reason)
        return False
    if begun is not None:
        m = next(m for m in mine if m.key == begun["key"])
        journal.note(FAILED, key=m.key, part=m.part, settings=shown(m), reason=f"{ending(code)} {said}".strip())
        return True
    if code == 1:
        raise ValueError(said or "a process failed without a word")
    if code:
        for m in mine:
            journal.note(LEFT, key=m.key, reason=f"{ending(code)} before it began: {said}".strip())
    return False


def ending(code: int | None) -> str:
    """Returns how a process ended, by its return code."""
    if code is not None and code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with code {code}"


def _run(command: list[str], job: str, folder: Path, seconds: float) -> tuple[int | None, str]:
    """Returns the exit code of a process, None where it was ended after `seconds`, and its last words."""
    log = folder / "processes.log"
    with log.open("ab") as errors:
        begin = errors.tell()
        process = subprocess.Popen(command, stderr=errors, env=environment(job, os.environ))
        try:
            code = process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            process.wait()
    words = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    return code, words[-1][:300] if words else ""
