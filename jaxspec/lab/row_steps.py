"""The steps of rows by which a call's cost rises: its products are padded, so all sizes of a step cost about the same.

The rows of a call are the nodes of a row of the batch times the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.lab.devices import CPU, is_tpu
from jaxspec.nn.matmul import FULL_ROWS, LEFT_ROWS


class RowSteps(NamedTuple):
    """The last rows of each step: `ends`, then the multiples of `every`."""

    ends: tuple[int, ...] = ()
    every: int = 1

    def padded(self, rows_N: np.ndarray) -> np.ndarray:
        """Returns the last rows of the steps that these rows are in."""
        rows_N = np.asarray(rows_N)
        if not self.ends:
            return -(-rows_N // self.every) * self.every
        ends = np.asarray(self.ends)
        known_N = ends[np.minimum(np.searchsorted(ends, rows_N), len(ends) - 1)]
        return np.where(rows_N <= ends[-1], known_N, -(-rows_N // self.every) * self.every)

    def with_jumps(self, sizes: Sequence[int], batch: int) -> list[int]:
        """Returns the sizes, ascending, and between two neighbours the last size of the first step that neither is in.

        Products of 20 rows take a third longer than of 16, and of 32 hardly longer than of 20: the line from 16 to 32
        rows misses that. Steps of `every` rows rise evenly, and nothing is added between them.
        """
        found = set(sizes)
        for low, high in zip(sorted(found), sorted(found)[1:], strict=False):
            between = np.arange(low, high + 1)
            step_N = self.padded(between * batch)
            first = between[(step_N > step_N[0]) & (step_N < step_N[-1]) & np.isin(step_N, self.ends)]
            if len(first):
                found.add(int(first[step_N[first - low] == step_N[first[0] - low]][-1]))
        return sorted(found)

    def as_json(self) -> dict[str, Any]:
        """Returns the fact `row_steps` of a file of costs."""
        return {"ends": list(self.ends), "every": self.every}


def known_steps(source: str, device: str, dtype: str | None) -> RowSteps:
    """Returns the steps of a device by a source of costs.

    CPUs pad rows as `nn.matmul` does, measured or compiled. The compiler's cycles for TPUs rise by 8 rows, but one row
    alone is a program of its own. Rooflines count the rows there are; of measured accelerators no steps are known.
    """
    if source == "roofline":
        return RowSteps()
    if device == CPU:
        return RowSteps((FULL_ROWS,) if dtype in ("bf16", "bfloat16") else LEFT_ROWS)
    return RowSteps((1,), FULL_ROWS) if source == "compiled" and is_tpu(device) else RowSteps()


def steps_of(facts: Mapping[str, Any], source: str, device: str) -> RowSteps:
    """Returns the steps that a file's facts name; of a file without them, those known of its device."""
    named = facts.get("row_steps")
    if named is None:
        return known_steps(source, device, facts.get("dtype"))
    return RowSteps(tuple(named["ends"]), int(named["every"]))
