"""Times of programs are those of their work alone, and programs do not crowd a process."""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxspec.evaluation import machine
from jaxspec.evaluation.machine import TimedProgram, drop_programs_if_crowded, median_seconds

SLOW = 0.2


class SlowToFree:
    """A result that takes long to free, as a large cache does."""

    def __del__(self) -> None:
        time.sleep(SLOW)


def test_freeing_a_result_is_not_timed():
    assert TimedProgram(SlowToFree, ()).run() < SLOW / 2
    assert median_seconds(SlowToFree, repeats=1) < SLOW / 2


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are counted on Linux")
def test_programs_are_dropped_where_their_mappings_come_near_the_limit(monkeypatch: pytest.MonkeyPatch):
    program: Any = jax.jit(lambda x: x + 1)
    program(jnp.zeros(3))
    for size in range(20):
        jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ y), x))(jnp.ones((4 + size, 4 + size)))
    before = mappings()
    monkeypatch.setattr(machine, "CROWDED", 1.0)
    assert not drop_programs_if_crowded() and program._cache_size() == 1
    monkeypatch.setattr(machine, "CROWDED", 0.0)
    assert drop_programs_if_crowded() and program._cache_size() == 0
    assert mappings() < before - 50  # each program had several
    assert program(jnp.zeros(3)).sum() == 3
