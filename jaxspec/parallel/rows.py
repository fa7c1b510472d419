"""Rows that stay on their device: functions of one device's rows, gathers, scatters and sums over devices.

XLA splits a program over a mesh operation by operation. Where it cannot tell that rows do not depend on each other, it
sends them: for a top-k all logits, for a gather or scatter that has the rows' numbers among its indices the gathered
array, for a write at a place of each row's own the whole cache. The functions here keep such rows where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxspec.parallel.mesh import AXIS_RULES, axes_of, constrain, leaf_name, splits


def shard_map_rows(
    function: Callable[..., Any],
    axes: tuple[tuple[str | None, ...], ...],
    out_axes: tuple[tuple[str | None, ...], ...],
    *arrays: jax.Array,
) -> Any:
    """Returns `function(*arrays)`, a tuple, computed by each device from its own part of the arrays.

    `axes` are the logical axes of each array, `out_axes` those of each result. Where no mesh is in context, and in a
    `shard_map`, `function` is called as it is. An axis that its mesh axes do not divide evenly is whole on every
    device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return function(*arrays)
    sizes = [pair for x, names in zip(arrays, axes, strict=True) for pair in zip(x.shape, names, strict=True)]
    whole = {axis for size, axis in sizes if axis is not None and size % splits(axis)}
    in_specs, out_specs = (
        tuple(P(*(None if axis in whole else AXIS_RULES[axis] for axis in names)) for names in of)
        for of in (axes, out_axes)
    )
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)


def gather_rows(x_BX: jax.Array, at_BY: jax.Array) -> jax.Array:
    """Returns `x[b, at[b, y]]`, `[B, Y, ...]`."""
    # Mapped over the batch: with the rows' numbers among the indices XLA would send indices or rows.
    return jax.vmap(lambda x, at: x[at])(x_BX, at_BY)


def scatter_rows(x_BX: jax.Array, at_BY: jax.Array, new_BY: jax.Array) -> jax.Array:
    """Returns `x` with `new[b, y]` in place of `x[b, at[b, y]]`; mapped over the batch, as `gather_rows`."""
    return jax.vmap(lambda x, at, new: x.at[at].set(new))(x_BX, at_BY, new_BY)


def gather_width(tree: Any) -> Any:
    """Returns weights with their `width` axis whole, so that weights are gathered where they are used.

    In a program traced under `jax.set_mesh` a constraint does it; without one XLA may gather activations instead. In a
    `shard_map` an `all_gather` does it, whose transpose sums gradients and scatters them. Elsewhere weights stay as
    they are. Call it outside a loop that reads the weights, or XLA gathers them in every turn.
    """
    over = AXIS_RULES["width"]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        axes = axes_of(leaf_name(path), x.ndim)
        if "width" not in axes:
            return x
        if over in mesh.manual_axes:
            return jax.lax.all_gather(x, over, axis=axes.index("width"), tiled=True)
        return constrain(x, *(None if axis == "width" else axis for axis in axes))

    return jax.tree_util.tree_map_with_path(one, tree)


def look_up(table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Returns the rows `[B, L, D]` of an embedding at `tokens_BL`."""
    over = AXIS_RULES["width"]
    if over not in jax.sharding.get_abstract_mesh().manual_axes:
        return table_VD[tokens_BL]
    # In a `shard_map` that splits the table's width, tokens are sent and not the table.
    all_tokens = jax.lax.all_gather(tokens_BL, over, axis=0, tiled=True)
    return jax.lax.all_to_all(table_VD[all_tokens], over, split_axis=0, concat_axis=2, tiled=True)


def sum_gradients(tree: Any, axes: tuple[str, ...]) -> Any:
    """Returns gradients summed over the mesh axes `axes` in a `shard_map`, except where `gather_width` has summed."""

    def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        done = AXIS_RULES["width"] if "width" in axes_of(leaf_name(path), x.ndim) else None
        left = tuple(axis for axis in axes if axis != done)
        return jax.lax.psum(x, left) if left else x

    return jax.tree_util.tree_map_with_path(one, tree) if axes else tree
