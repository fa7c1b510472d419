"""FLOPs of a program, counted over its jaxpr: loops by their trips, conditionals by their most expensive branch.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, so it cannot be used for models
that scan their layers and losses that map over chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.interpreters import partial_eval


class Flops(NamedTuple):
    """FLOPs of matmuls and convolutions; a multiplication and an addition are two, and other operations none."""

    total: int
    """FLOPs of the program."""
    recomputed: int
    """FLOPs of these that `jax.checkpoint` repeats in the backward pass."""

    @property
    def model(self) -> int:
        """FLOPs without recomputation, which MFU counts."""
        return self.total - self.recomputed


def count_flops(program: Callable[..., Any], *arguments: Any) -> Flops:
    """Returns the most FLOPs that `program(*arguments)` takes. Arguments may be abstract; nothing is compiled.

    Operations that no result depends on are left out, as XLA does. The branch of a conditional with the most FLOPs
    counts, so chunks that a program skips at run time are counted; of what differs by platform, the usual one counts.
    Raises ValueError for FLOPs in a loop whose trips are not known.
    """
    closed = jax.make_jaxpr(program)(*arguments)
    needed, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _of_jaxpr(needed, recomputes=False)


def _of_jaxpr(jaxpr: core.Jaxpr, *, recomputes: bool) -> Flops:
    counts = [_of_equation(equation, recomputes=recomputes) for equation in jaxpr.eqns]
    return Flops(sum(c.total for c in counts), sum(c.recomputed for c in counts))


def _of_equation(equation: Any, *, recomputes: bool) -> Flops:
    name = equation.primitive.name
    recomputes = recomputes or "rematted_computation" in str(equation.source_info.name_stack)
    if name in _COUNTED:
        flops = _COUNTED[name](equation)
        return Flops(flops, flops if recomputes else 0)
    inner = [_of_jaxpr(jaxpr, recomputes=recomputes) for jaxpr in _jaxprs(equation)]
    if not any(count.total for count in inner):
        return Flops(0, 0)
    if name == "while":
        raise ValueError("a loop whose trips are not known has matmuls in it: write it as a scan")
    if name == "pallas_call":
        raise ValueError("a Pallas kernel has matmuls in it, which are not counted: count the program without it")
    if name == "cond":
        platforms = equation.params.get("branches_platforms")
        # Of what is written for several platforms, the program for accelerators counts: a CPU's pads rows.
        return inner[platforms.index(None)] if platforms else max(inner)
    trips = equation.params["length"] if name == "scan" else 1
    return Flops(trips * sum(c.total for c in inner), trips * sum(c.recomputed for c in inner))


def _jaxprs(equation: Any) -> Iterator[core.Jaxpr]:
    """Yields the programs inside an equation: bodies, branches, called functions."""
    if equation.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
        values = [equation.params["call_jaxpr"]]  # the parts of its derivative rules that are used stand elsewhere
    else:
        values = equation.params.values()
    for value in values:
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _dot(equation: Any) -> int:
    """Returns two FLOPs for every element of the result times the axes that are summed over."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
    """Returns two FLOPs for every element of the result times the window over one group's channels; padding counts."""
    kernel = equation.invars[1].aval
    channels_out = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * equation.outvars[0].aval.size * (kernel.size // channels_out)


def _ragged_dot(equation: Any) -> int:
    """FLOPs of groups of rows times a matrix each: those of all rows, each in one group."""
    lhs, numbers = equation.invars[0].aval, equation.params["ragged_dot_dimension_numbers"]
    contracted, _ = numbers.dot_dimension_numbers[0]
    depth = math.prod(lhs.shape[axis] for axis in contracted)
    # Where the rows are what is summed over, as in a weight's gradient, each group has a result of its own.
    summed = any(axis in contracted for axis in numbers.lhs_ragged_dimensions)
    groups = equation.invars[2].aval.shape[-1] if summed else 1
    return 2 * equation.outvars[0].aval.size // groups * depth


_COUNTED: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "ragged_dot_general": _ragged_dot,
}
"""Primitives with FLOPs of their own -> how many an equation has."""
