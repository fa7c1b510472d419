"""Verbs run as processes of their own, to be stopped at a chosen moment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """`jaxspec WORDS` in `folder`, on one CPU device, compiled quickly."""
    one = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = os.environ | one
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "jaxspec", *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=pipe, stdout=pipe, text=True)


def stop_at(run: subprocess.Popen[str], reached: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    """Send the signal as soon as `reached()`; returns the exit code and what was written to stderr."""
    while not reached():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.005)
    run.send_signal(number)
    errors = run.communicate()[1]
    return run.returncode, errors


def finish(run: subprocess.Popen[str]) -> None:
    """Wait for a run that must succeed."""
    errors = run.communicate()[1]
    assert run.returncode == 0, errors
