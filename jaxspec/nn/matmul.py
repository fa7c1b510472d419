"""Products with weight matrices: as they are trained, or laid out for CPUs, which decode a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Params
from jaxspec.nn.quantization import rescale
from jaxspec.nn.weights import declared

LEFT_ROWS = (1, 4, 8, 16, 20, 24, 32, 40, 48, 64)
"""Rows right of a matrix of outputs by inputs that XLA:CPU's kernels are quick for; others are padded to the next of
these. 12 rows take a fifth longer than 16, 28 two fifths longer than 32. Of more rows the matrix stands right."""
FULL_ROWS = 8
"""Rows that fewer are padded to. One row alone compiles for TPUs to multiplications and sums of vectors, which by the
compiler's cycles take two to five times as long as eight rows in the matrix unit. Fewer than eight rows of bf16 miss a
CPU's kernels for it: one row takes five times as long as eight."""


def outputs_first(name: str) -> str:
    """Returns the name of the matrix `name` laid out with its outputs before its inputs."""
    return f"{name}_outputs_first"


def multiply(weights: Mapping[str, Array], name: str, x_BLE: Array) -> Array:
    """Returns `x` times the declared matrix `name`, `[B, L, *outputs]`, scaled where the matrix is quantized.

    The axes that the declaration contracts are taken as one, `E`. `weights` holds the matrix as it is declared, or with
    its outputs first, as `lay_out` makes it of weights that are declared as `multiplied`.
    """
    inputs = len(declared(name).matrix or ())
    if name not in weights:
        laid = weights[outputs_first(name)]
        outputs = laid.shape[: laid.ndim - inputs]
        product = multiply_left(laid.reshape(math.prod(outputs), -1), x_BLE).reshape(*x_BLE.shape[:2], *outputs)
    else:
        matrix = weights[name].astype(x_BLE.dtype)
        # One contracted axis: to contract three, XLA:CPU would copy the weight on every call.
        matrix = matrix.reshape(-1, *matrix.shape[inputs:])
        product = fill_rows(lambda x: jax.lax.dot_general(x, matrix, (((2,), (0,)), ((), ()))), x_BLE)
    return rescale(weights, name, product)


def multiply_left(matrix_FE: Array, x_BLE: Array, out: Any = None) -> Array:
    """Returns `x @ matrix.T`, `[B, L, F]`, in dtype `out` (None: that of `x`).

    Few rows stand right of the matrix, as columns: where a matrix stands right of few rows, XLA:CPU lays it out anew on
    every call, which costs as much as the product.
    """
    batch, length, width = x_BLE.shape
    rows, matrix_FE = batch * length, matrix_FE.astype(x_BLE.dtype)
    if rows > LEFT_ROWS[-1]:
        return jnp.einsum("BLE,FE->BLF", x_BLE, matrix_FE, preferred_element_type=out)
    padding = next(size for size in LEFT_ROWS if size >= rows) - rows
    x_RE = jnp.pad(x_BLE.reshape(rows, width), ((0, padding), (0, 0)))
    product_FR = jnp.einsum("FE,RE->FR", matrix_FE, x_RE, preferred_element_type=out)
    # The barrier keeps XLA from making one product of both transposes, with the matrix on the right again.
    product_FR = jax.lax.optimization_barrier(product_FR)
    return product_FR.T[:rows].reshape(batch, length, -1)


def fill_rows(product: Callable[[Array], Array], x_BLE: Array) -> Array:
    """Returns `product(x)`, `[B, L, ...]`; few rows are padded to `FULL_ROWS` where the platform is faster so."""
    batch, length, width = x_BLE.shape
    rows = batch * length

    def padded(x_BLE: Array) -> Array:
        x_RE = jnp.pad(x_BLE.reshape(rows, width), ((0, FULL_ROWS - rows), (0, 0)))
        # Behind the barrier, or XLA would leave out the rows that are cut off again.
        made = product(jax.lax.optimization_barrier(x_RE)[None])
        return made[0, :rows].reshape(batch, length, *made.shape[2:])

    platforms = {"tpu": rows == 1, "cpu": rows < FULL_ROWS and x_BLE.dtype == jnp.bfloat16}
    filled = {name: padded for name, slow in platforms.items() if slow}
    return jax.lax.platform_dependent(x_BLE, default=product, **filled) if filled else product(x_BLE)


def lay_out(params: Params) -> Params:
    """Returns a model's weights with the matrices that `multiply` reads laid out with their outputs first.

    For CPUs, once, before decoding. Stacked matrices (of layers, experts or heads) stay as they are, and so does bf16,
    for which CPUs have kernels of the usual order alone.
    """
    if isinstance(params, Mapping):
        return dict(_lay_out_one(name, value) for name, value in params.items())
    return [lay_out(each) for each in params]


def _lay_out_one(name: str, value: Any) -> tuple[str, Any]:
    """Returns an entry of the weights under the name and in the layout for decoding on a CPU."""
    if isinstance(value, Mapping | list | tuple):
        return name, lay_out(value)
    weight = declared(name)
    matrix = weight.matrix or (0,)
    # Only where the inputs are the first axes; axes before them stack matrices.
    if not weight.multiplied or -min(matrix) != value.ndim or value.dtype == jnp.bfloat16:
        return name, value
    return outputs_first(name), jnp.moveaxis(value, range(len(matrix)), range(-len(matrix), 0))
