"""Declarations of weights: what a mesh, an optimizer and a checkpoint need to know of each, said once where it is used.

A module with weights declares them by name when it is imported, beside the function that gives their shapes. The name
is the last key of an array's path in the parameters (`layers/0/qkv` -> `qkv`), so a name means one thing: modules may
share it, and then lay it out, train it and describe it alike. Only initial values are each module's own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.parallel.mesh import Axes, declare_axes

Shape = tuple[int, ...]
Init = Callable[..., Array]
"""`(key, shape, dtype=float32) -> weight`."""


def zeros(key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
    """Zeros, whatever the key."""
    return jnp.zeros(shape, dtype)


def ones(key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
    """Ones, whatever the key."""
    return jnp.ones(shape, dtype)


def _normal(scale: float, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
    return scale * jax.random.normal(key, shape, dtype)


def normal(scale: float = 0.02) -> Init:
    """Returns draws from N(0, scale^2); by default GPT-2's."""
    return functools.partial(_normal, scale)


def _uniform(fan_in: Callable[[Shape], int], key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
    bound = fan_in(shape) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def first_axis(shape: Shape) -> int:
    """Fan-in of a matrix `y = x @ w`."""
    return shape[0]


def last_axis(shape: Shape) -> int:
    """Fan-in of an LM head `[V, D]`."""
    return shape[-1]


def all_but_last(shape: Shape) -> int:
    """Fan-in of the attention's output matrix `[K, G, C, D]`."""
    return math.prod(shape[:-1])


def uniform(fan_in: Callable[[Shape], int] = first_axis) -> Init:
    """Returns draws from U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), as `torch.nn.Linear` begins."""
    return functools.partial(_uniform, fan_in)


GPT2 = normal()


@dataclasses.dataclass(frozen=True)
class Weight:
    """Properties of a weight besides its shape, which depends on a config."""

    init: Init = GPT2
    """Its initial values."""
    axes: Axes = ()
    """Logical axes of its last dimensions, see `mesh.AXIS_RULES`; a stacked weight has more in front, which stay whole.
    Empty: a whole copy on every device."""
    matrix: tuple[int, ...] | None = None
    """Axes that a matmul sums over, counted from the last, if Muon takes the weight as a matrix (or as many as the axes
    in front stack); the axes behind are the outputs. None: Adam takes it."""
    multiplied: bool = False
    """Whether programs read it by `matmul.multiply` alone, so that it may be laid out for CPUs before decoding."""
    decays: bool = True
    """Whether weight decay pulls it towards zero; norms and biases do not decay."""


NORM = Weight(ones, decays=False)
"""A norm's scale."""
BIAS = Weight(zeros, decays=False)
"""A bias, of any shape, whole on every device."""
TABLE = Weight(GPT2, ("vocab", "width"))
"""An embedding or LM head `[V, D]`: Adam's (Jordan et al. 2024 keep Muon from both)."""

_DECLARED: dict[str, Weight] = {}
_CONVENTIONS: dict[str, str] = {}


def declare(weights: Mapping[str, Weight], conventions: Mapping[str, str] | None = None) -> dict[str, Weight]:
    """Registers weights by name and returns them.

    `conventions` says of weights, or of what they stand for together, how they are to be read; a checkpoint's manifest
    holds it. Raises ValueError where another module declared a name or a convention otherwise.
    """
    for name, weight in weights.items():
        before = _DECLARED.setdefault(name, weight)
        if _placing(before) != _placing(weight):
            raise ValueError(
                f"weight {name!r} is declared with axes, matrix, decays, multiplied = {_placing(weight)}, and "
                f"elsewhere with {_placing(before)}: give it another name"
            )
        declare_axes(name, weight.axes)
    for key, sentence in (conventions or {}).items():
        if _CONVENTIONS.setdefault(key, sentence) != sentence:
            raise ValueError(f"convention {key!r} is declared twice with different words: give it another name")
    return dict(weights)


def _placing(weight: Weight) -> tuple[Any, ...]:
    """Returns the properties that all modules which use a name have to agree on."""
    return weight.axes, weight.matrix, weight.decays, weight.multiplied


def declared(name: str) -> Weight:
    """The declaration of the weight called `name`; a default one, whole on every device, where there is none."""
    return _DECLARED.get(name, Weight())


def conventions() -> dict[str, str]:
    """Returns the conventions by which declared weights are read without this library."""
    return dict(_CONVENTIONS)


def with_init(weights: Mapping[str, Weight], inits: Mapping[str, Init]) -> dict[str, Weight]:
    """`weights`, those named in `inits` with other initial values."""
    return {name: dataclasses.replace(w, init=inits.get(name, w.init)) for name, w in weights.items()}


def init_weights(weights: Mapping[str, Weight], shapes: Mapping[str, Shape], key: Array) -> dict[str, Array]:
    """Fresh fp32 weights of `shapes`; the key of each is `key` folded with its number there.

    Raises ValueError for a weight that is not declared.
    """
    return {
        name: init_of(weights, name)(jax.random.fold_in(key, i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def init_of(weights: Mapping[str, Weight], name: str) -> Init:
    """The initial values of a declared weight; ValueError where it is not declared."""
    if name not in weights:
        raise ValueError(f"weight {name!r} is not declared; declared are {', '.join(weights)}")
    return weights[name].init
