"""Programs timed inside loops on the device, so that no call of the host counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import Array

SAMPLES = 3
"""Loops whose median counts."""


class LoopTime(NamedTuple):
    """The time of one iteration."""

    seconds: float
    compile_seconds: float
    iterations: int
    """Of a timed loop."""


class Loop(NamedTuple):
    """A compiled loop: `(arguments, carry, iterations) -> carry`, its carry donated."""

    run: Callable[[Any, Any, Any], Any]
    compile_seconds: float


def compile_loop(step: Callable[[Any, Any], Any], arguments: Any, carry: Any) -> Loop:
    """Compiles a loop of `step(arguments, carry) -> carry`, whose iterations are its last argument."""

    def loop(arguments: Any, carry: Any, iterations: Array) -> Any:
        return jax.lax.fori_loop(0, iterations, lambda _, c: step(arguments, c), carry)

    started = time.perf_counter()
    run = jax.jit(loop, donate_argnums=1).lower(arguments, carry, np.int32(1)).compile()
    return Loop(run, time.perf_counter() - started)


def time_loop(
    loop: Loop,
    arguments: Any,
    carry: Any,
    *,
    at_least: float,
    most: int,
    rewind: Callable[[Any], Any] = lambda carry: carry,
) -> tuple[LoopTime, Any]:
    """Returns the median time of an iteration and the last carry.

    Loops run for `at_least` seconds or `most` iterations, whichever is less; `rewind` makes the carry of one the start
    of the next.
    """
    carry = jax.block_until_ready(loop.run(arguments, rewind(carry), np.int32(1)))  # not counted
    once, carry = _one(loop, arguments, rewind(carry), 1)
    count = int(min(max(1, at_least / max(once, 1e-9)), most))
    samples = []
    for _ in range(SAMPLES):
        seconds, carry = _one(loop, arguments, rewind(carry), count)
        samples.append(seconds / count)
    return LoopTime(float(np.median(samples)), loop.compile_seconds, count), carry


def _one(loop: Loop, arguments: Any, carry: Any, count: int) -> tuple[float, Any]:
    jax.block_until_ready(carry)
    started = time.perf_counter()
    carry = jax.block_until_ready(loop.run(arguments, carry, np.int32(count)))
    return time.perf_counter() - started, carry


def repeating(compute: Callable[[Any, Array], Any]) -> Callable[[Any, Array], Array]:
    """Returns the step of a loop that computes the same again: `compute(arguments, zero) -> arrays`.

    `zero` is an int32 that the compiler does not know to be 0; what has to be computed again must depend on it.
    """

    def step(arguments: Any, zero: Array) -> Array:
        return zero + zero_of(compute(arguments, zero))

    return step


def zero_of(arrays: Any) -> Array:
    """Returns an int32 that is 0, and depends on every element of all arrays; NaN counts as 0 too."""
    # A sum or a single element could be moved before the matmul that makes it; whether one is huge cannot.
    huge = [jnp.max(jnp.abs(a).astype(jnp.float32)) > 3e38 for a in jax.tree.leaves(arrays) if a.size]
    return sum((h.astype(jnp.int32) for h in huge), jnp.int32(0))
