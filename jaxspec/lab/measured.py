"""Costs of the parts of a round by the clock of this machine: loops on the device, in turns, medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.decoding.rounds import DecodeState, Engine
from jaxspec.evaluation.device_decode import MEMORY_SHARE, DoesNotFit, memory_limit
from jaxspec.evaluation.loops import Loop, compile_loop, zero_of
from jaxspec.evaluation.machine import TimedProgram
from jaxspec.evaluation.stand_ins import CACHE_SCALE, at_prefix, cache_bytes, fill, stand_in_state
from jaxspec.lab.pricing import words_of
from jaxspec.lab.round_parts import Grid, PartPrograms, Point, given_arrays, reference_parts, sampling_at
from jaxspec.serving.loading import Models

MOST_ITERATIONS = 4096
OUTPUT_SLOTS = 64


class TimedLoop(NamedTuple):
    """A part's program in a loop, with its further arguments and the iterations of a timed run."""

    loop: Loop
    arguments: Any
    count: int


class PartTimes(NamedTuple):
    """Median seconds, all measured in turns."""

    parts: dict[Point, float]
    rates: dict[int, float]
    """Seconds of the programs by which the machine's rates are known, `cpu_rates.rate_programs`."""


class RoundBench:
    """Times the parts of a round; holds the caches of one batch and one compiled loop a part at a time.

    A timed loop runs for `at_least` seconds, so that the dispatch of its call, a millisecond or two for a large target,
    does not count. `rates` are further programs, which take turns with the parts.
    """

    def __init__(
        self,
        models: Models,
        grid: Grid,
        *,
        temperature: float = 0.0,
        at_least: float = 0.25,
        rates: dict[int, TimedProgram] | None = None,
    ) -> None:
        self.models, self.grid, self.temperature, self.at_least = models, grid, temperature, at_least
        self.rates = rates or {}
        self.programs = PartPrograms(models)
        self.loops: dict[Any, Loop] = {}
        self.state: DecodeState | None = None
        self.batch = 0

    def points(self, batch: int, context: int) -> list[Point]:
        """Returns the parts of one batch and context, the whole reference round among them."""
        engine: Engine = self.models.engine
        whole = [] if engine.tree is None else [Point("round", 1, 0, batch, context)]
        return [*whole, *self.grid.points(engine, batch, context)]

    def measure(
        self, batch: int, context: int, *, repeats: int, tell: Callable[[str], None] = lambda status: None
    ) -> PartTimes:
        """Returns the median seconds of every part at one batch and context; all take turns.

        Raises DoesNotFit, a ValueError, where memory does not hold the caches.
        """
        self._hold(batch, context)
        timed: dict[Point, TimedLoop] = {}
        for point in self.points(batch, context):
            tell(f"compiling {words_of(point)}")
            timed[point] = self._prepare(point)
        for program in self.rates.values():
            program.run()
        samples: dict[Any, list[float]] = {name: [] for name in (*timed, *self.rates)}
        for turn in range(repeats):
            tell(f"batch {batch}, context {context:,}: turn {turn + 1} of {repeats}")
            for point, program in timed.items():
                samples[point].append(self._run(point, program))
            for name, rate in self.rates.items():
                samples[name].append(rate.run())
        medians = {name: float(np.median(taken)) for name, taken in samples.items()}
        parts = {point: medians[point] for point in timed} | self._rest(samples, batch, context)
        return PartTimes(parts, {name: medians[name] for name in self.rates})

    def _rest(self, samples: dict[Any, list[float]], batch: int, context: int) -> dict[Point, float]:
        """Returns what the parts leave of the reference round, turn by turn; may be below 0. Nothing without one."""
        if self.models.engine.tree is None:
            return {}
        whole = np.asarray(samples[Point("round", 1, 0, batch, context)])
        parts = sum(np.asarray(samples[part]) for part in reference_parts(self.models.engine, batch, context))
        # A turn's parts were disturbed alike.
        return {Point("rest", 1, 0, batch, context): float(np.median(whole - parts))}

    def _hold(self, batch: int, context: int) -> None:
        """Makes the state of a batch, whose caches hold the longest context that fits; one batch is held at a time."""
        room = self.grid.room
        if self.state is None or self.batch != batch:
            self.state, self.loops, self.batch = None, {}, batch
            fits = [c for c in self.grid.contexts if self._needs(batch, c) <= available_bytes()]
            if not fits:
                self._refuse(batch, context)
            state = stand_in_state(self.models, batch=batch, capacity=max(fits) + room, slots=OUTPUT_SLOTS)
            sampling = sampling_at(self.temperature, batch)
            self.state = jax.block_until_ready(state._replace(requests=state.requests._replace(sampling=sampling)))
        assert self.state is not None
        if context + room > self.state.cache.capacity:
            self._refuse(batch, context)

    def _needs(self, batch: int, context: int) -> int:
        return cache_bytes(self.models, batch=batch, capacity=context + self.grid.room)

    def _refuse(self, batch: int, context: int) -> None:
        raise DoesNotFit(
            f"the caches of {batch} rows of {context:,} tokens take {self._needs(batch, context) / 1e9:.1f} GB, and "
            f"{available_bytes() / 1e9:.1f} GB are free: give smaller --batches or --contexts"
        )

    def _prepare(self, point: Point) -> TimedLoop:
        """Returns the part's loop, warm, with iterations for `at_least` seconds."""
        assert self.state is not None
        program = self.programs.program(point, self.state)
        given = given_arrays(program, point, self.models.config.vocab, lambda shapes: fill(shapes, CACHE_SCALE))
        arguments = (self.models.weights, given)
        key = point._replace(context=0)
        if key not in self.loops:
            carry = (at_prefix(self.state, point.context), jnp.int32(0))
            self.loops[key] = compile_loop(looped(program.step), arguments, carry)
        warm = TimedLoop(self.loops[key], arguments, 1)
        self._run(point, warm)
        once = self._run(point, warm)
        return warm._replace(count=int(min(max(1, self.at_least / max(once, 1e-9)), MOST_ITERATIONS)))

    def _run(self, point: Point, timed: TimedLoop) -> float:
        """Returns the seconds of an iteration; the loop takes the state over and hands it back."""
        assert self.state is not None
        carry = (at_prefix(self.state, point.context), jnp.int32(0))
        self.state = None
        jax.block_until_ready(carry)
        started = time.perf_counter()
        carry = jax.block_until_ready(timed.loop.run(timed.arguments, carry, np.int32(timed.count)))
        seconds = (time.perf_counter() - started) / timed.count
        self.state = carry[0]
        return seconds


def looped(step: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """Returns the step of a loop that runs a part of a round again and again."""

    def again(arguments: Any, carry: Any) -> Any:
        (weights, given), (state, zero) = arguments, carry
        # In decoding the caches change from round to round: nothing that is read of them may be moved out of the loop.
        seen, zero = jax.lax.optimization_barrier((state, zero))
        after, outputs = step(weights, seen, given, zero)
        return after, zero + zero_of(outputs)

    return again


def available_bytes() -> float:
    """Returns the bytes that caches may take: of an accelerator what is left of its memory, else of the machine's."""
    limit = memory_limit()
    if limit is not None:
        used = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0)
        return MEMORY_SHARE * limit - used
    meminfo = Path("/proc/meminfo")
    lines: Sequence[str] = meminfo.read_text().splitlines() if meminfo.exists() else ()
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return MEMORY_SHARE * free[0] if free else float("inf")
