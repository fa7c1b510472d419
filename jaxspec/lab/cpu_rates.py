"""Rates of this machine's CPU as decoding meets them: weights read once, multiplied by few rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import Array
from jaxspec.evaluation.machine import TimedProgram, in_turns
from jaxspec.evaluation.stand_ins import fill
from jaxspec.nn.matmul import multiply_left

ROWS = (1, 4, 8, 16, 32, 64)
WIDTH = 2048
MATRICES = 16
"""Square weights that take turns, so that a CPU's caches do not hold them."""


class CpuRates(NamedTuple):
    """Measured rates of a CPU."""

    bytes_per_second: float
    """Of reading weights that no cache holds, by the faster of a sum and a matmul of one row."""
    flops_per_second: dict[int, float]
    """Rows -> FLOPs a second of a matmul whose weights no cache holds."""

    @property
    def peak(self) -> float:
        """The best rate of all rows."""
        return max(self.flops_per_second.values())

    def as_json(self) -> dict[str, Any]:
        """Returns the rates as JSON has them."""
        rates = {str(rows): rate for rows, rate in self.flops_per_second.items()}
        return {"bytes_per_second": self.bytes_per_second, "matmul_flops_per_second": rates}


def rates_of_json(value: dict[str, Any]) -> CpuRates:
    """Returns the rates that `CpuRates.as_json` wrote."""
    rates = {int(rows): rate for rows, rate in value["matmul_flops_per_second"].items()}
    return CpuRates(value["bytes_per_second"], rates)


def median_rates(known: Sequence[dict[str, Any]]) -> CpuRates:
    """Returns the medians of rates in JSON, one or more."""
    found = [rates_of_json(value) for value in known]
    flops = {rows: float(np.median([r.flops_per_second[rows] for r in found])) for rows in found[0].flops_per_second}
    return CpuRates(float(np.median([r.bytes_per_second for r in found])), flops)


class RatePrograms(NamedTuple):
    """Programs whose times give a CPU's rates: 0 sums the weights, `n` multiplies them by `n` rows."""

    programs: dict[int, TimedProgram]
    weights: int
    """Elements of all weights, which each program reads once."""
    itemsize: int

    def rates(self, seconds: dict[int, float]) -> CpuRates:
        """Returns the rates, from each program's seconds."""
        flops = {rows: 2.0 * self.weights * rows / taken for rows, taken in seconds.items() if rows}
        return CpuRates(self.weights * self.itemsize / min(seconds[0], seconds[1]), flops)

    def measure(self, repeats: int = 5) -> CpuRates:
        """Returns the rates of this machine, all of them measured in turns."""
        return self.rates(in_turns(self.programs, repeats=repeats))


def rate_programs(dtype: Any, *, width: int = WIDTH, matrices: int = MATRICES) -> RatePrograms:
    """Returns the programs; together the weights are larger than a CPU's caches."""
    weights = [fill(jax.ShapeDtypeStruct((width, width), dtype), 1.0 / width) for _ in range(matrices)]
    programs = {0: TimedProgram(jax.jit(_read), (weights,))}
    for rows in ROWS:
        x_BLE = fill(jax.ShapeDtypeStruct((1, rows, width), dtype), 1.0)
        programs[rows] = TimedProgram(jax.jit(_multiply_all), (weights, x_BLE))
    return RatePrograms(programs, matrices * width**2, jnp.dtype(dtype).itemsize)


def _read(weights: list[Array]) -> Array:
    return sum((jnp.sum(w.astype(jnp.float32)) for w in weights), jnp.float32(0))


def _multiply_all(weights: list[Array], x_BLE: Array) -> Array:
    for weight in weights:
        x_BLE = multiply_left(weight, x_BLE)
    return x_BLE
