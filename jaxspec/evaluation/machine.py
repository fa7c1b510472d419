"""Rates and memory of this machine, and medians of programs timed in turns."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

STEADY = 0.1
"""Largest share by which the copy bandwidth may move during a run whose times are compared."""
CROWDED = 0.5
"""Share of the mappings of memory that a process may have, beyond which its compiled programs are dropped."""
ENOUGH_REPEATS = 5
"""Repeats that a median of times should be of."""


def median_seconds(call: Callable[[], Any], *, repeats: int = 5) -> float:
    """Returns the median time of `call`, results awaited, after one call that is not timed."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
        del result  # behind the clock: an operating system takes milliseconds to take back a large result
    return float(np.median(times))


def peak_memory() -> int:
    """Returns the most bytes that the accelerator held, or on a CPU this process."""
    facts = jax.devices()[0].memory_stats() or {}
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return int(facts.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit))


def drop_programs_if_crowded() -> bool:
    """Drops all compiled programs where they crowd the process; returns whether it did.

    Every program of XLA:CPU is many mappings of memory. Linux gives a process some 65,000, and LLVM ends it at the last
    one. Programs that are needed again come from the cache on disk.
    """
    held, most = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if not (held.exists() and most.exists()):
        return False
    if held.read_bytes().count(b"\n") <= CROWDED * int(most.read_text()):
        return False
    jax.clear_caches()
    return True


Name = TypeVar("Name", bound=Hashable)


class TimedProgram(NamedTuple):
    """A program to time, with its arguments."""

    program: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: int | None = None
    """The argument that the program donates: it gets a copy of it."""

    def run(self) -> float:
        """Runs it once; returns the seconds."""
        given = [jax.tree.map(jnp.copy, a) if i == self.donated else a for i, a in enumerate(self.arguments)]
        jax.block_until_ready(given)
        started = time.perf_counter()
        result = jax.block_until_ready(self.program(*given))
        seconds = time.perf_counter() - started
        del result  # behind the clock: a cache that was donated is freed here, 13 ms for one of 200 MB on a CPU
        return seconds


def in_turns(
    parts: dict[Name, TimedProgram], *, repeats: int, advance: Callable[[], None] | None = None
) -> dict[Name, float]:
    """Returns the median seconds of each part; parts take turns, so that a machine that drifts slows all of them alike.

    A first turn is not counted; `advance` is called after every turn, that one included.
    """
    samples: dict[Name, list[float]] = {name: [] for name in parts}
    for _ in range(repeats + 1):
        for name, part in parts.items():
            samples[name].append(part.run())
        if advance is not None:
            advance()
    return {name: float(np.median(taken[1:])) for name, taken in samples.items()}


def copy_bandwidth(megabytes: int = 256, seconds: float = 3.0) -> float:
    """Returns bytes a second, read and written counted both, of copies far larger than any cache: a median.

    Copies go on for `seconds`, so that what disturbs a few of them does not pass for another machine.
    """
    held = [jnp.ones(megabytes * 2**18, jnp.float32)]
    # In place, because a copy into new memory is as slow as a CPU finds its pages.
    in_place = jax.jit(lambda x: x + 1, donate_argnums=0)

    def rewrite() -> Any:
        held[0] = in_place(held[0])
        return held[0]

    first = median_seconds(rewrite, repeats=3)
    return 2 * held[0].nbytes / median_seconds(rewrite, repeats=max(15, round(seconds / first)))


class Drift(NamedTuple):
    """Copy bandwidths before and after a run, in bytes a second, and whether times of that run may be compared."""

    bytes_per_second: Sequence[float]
    moved: float | None
    """Share by which the largest exceeds the smallest; None where there are not two."""

    @property
    def steady(self) -> bool | None:
        """They moved by no more than `STEADY`; None where that is not known."""
        return None if self.moved is None else self.moved <= STEADY

    @property
    def refused(self) -> bool:
        """Ratios of the run's times are refused."""
        return self.steady is False

    @property
    def facts(self) -> dict[str, Any]:
        """Returns what a result keeps."""
        return {"bytes_per_second": list(self.bytes_per_second), "moved": self.moved, "steady": self.steady}

    def sentence(self) -> str:
        """Returns how far the bandwidth moved, and what follows from that; nothing where that is not known."""
        if self.moved is None:
            return ""
        low, high = (f"{end(self.bytes_per_second) / 1e9:.1f}" for end in (min, max))
        told = f"copy bandwidth before and after: {low} to {high} GB/s, {self.moved:.0%} apart"
        if not self.refused:
            return f"{told}\n"
        return f"{told}: over {STEADY:.0%}, so ratios are refused; run it again while nothing else uses this machine\n"


def drift_of(bandwidths: Sequence[float]) -> Drift:
    """Returns how far the copy bandwidths of a run lie apart."""
    moved = max(bandwidths) / min(bandwidths) - 1 if len(bandwidths) > 1 else None
    return Drift(tuple(bandwidths), moved)


def spread(name: str, figures: Sequence[float]) -> dict[str, Any]:
    """Returns the median of a figure's repeats, as `name`, and the least and greatest; None where there are none."""
    ends = {"": np.median, "_min": np.min, "_max": np.max}
    return {f"{name}{end}": float(of(figures)) if len(figures) else None for end, of in ends.items()}


def square_matmul(dtype: Any = jnp.float32, size: int | None = None) -> tuple[TimedProgram, float]:
    """Returns a square matmul in `dtype`, by default of 1,536 rows on a CPU and of 8,192 elsewhere, and its FLOPs."""
    size = size or (1536 if jax.devices()[0].platform == "cpu" else 8192)
    return TimedProgram(jax.jit(lambda x: x @ x), (jnp.ones((size, size), dtype),)), 2.0 * size**3


def matmul_rate(dtype: Any = jnp.float32, size: int | None = None) -> float:
    """Returns the FLOPs a second of `square_matmul`."""
    part, flops = square_matmul(dtype, size)
    return flops / median_seconds(lambda: part.program(*part.arguments))
