"""Verbs run as processes of their own, to be stopped at a chosen moment."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ONE_OF_SEVERAL = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
"""Variables of processes that compute together: each compiles its own programs."""


def start(folder: Path, *words: str, devices: int = 1, **variables: str) -> subprocess.Popen[str]:
    """`jaxspec WORDS` in `folder`, on so many CPU devices, compiled quickly."""
    own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = os.environ | own | variables
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "jaxspec", *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=pipe, stdout=pipe, text=True)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_several(folders: Iterable[Path], *words: str, devices: int) -> list[subprocess.Popen[str]]:
    """`jaxspec WORDS` as one process in every folder, joined by flags."""
    folders = list(folders)
    place = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(len(folders)), "--process")
    return [
        start(folder, *words, *place, str(i), devices=devices, **ONE_OF_SEVERAL) for i, folder in enumerate(folders)
    ]


def ends(runs: Iterable[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and stderr of each, which come to their end by themselves: one that does not is killed, and fails."""
    runs, found = list(runs), []
    try:
        for run in runs:
            errors = run.communicate(timeout=600)[1]
            found.append((run.returncode, errors))
    finally:
        for run in runs:
            run.kill()
    return found


def wait_for(reached: Callable[[], bool], runs: Iterable[subprocess.Popen[str]]) -> None:
    """Returns as soon as `reached()`; all runs must live until then."""
    runs = list(runs)
    while not reached():
        assert all(run.poll() is None for run in runs), ends(runs)
        time.sleep(0.005)


def stop_at(run: subprocess.Popen[str], reached: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    """Send the signal as soon as `reached()`; returns the exit code and what was written to stderr."""
    wait_for(reached, [run])
    run.send_signal(number)
    errors = run.communicate()[1]
    return run.returncode, errors


def finish(run: subprocess.Popen[str]) -> None:
    """Wait for a run that must succeed."""
    errors = run.communicate()[1]
    assert run.returncode == 0, errors
