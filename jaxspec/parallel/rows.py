"""Rows that stay on their device: functions of a device's own rows, gathers and sums over devices."""

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
    """`function` of each device's own part of `arrays`, whose logical axes are `axes`, and a tuple of parts in return.

    For what XLA, left alone, would send: it takes operations whose rows do not meet for such as may. In a program
    traced under no mesh, and in a `shard_map`, `function` is called as it is. An axis that its mesh axes do not divide
    evenly is whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return function(*arrays)
    sizes = [pair for x, own in zip(arrays, axes, strict=True) for pair in zip(x.shape, own, strict=True)]
    whole = {axis for size, axis in sizes if axis is not None and size % splits(axis)}

    def specs(of: tuple[tuple[str | None, ...], ...]) -> tuple[P, ...]:
        return tuple(P(*(None if axis in whole else AXIS_RULES[axis] for axis in own)) for own in of)

    return jax.shard_map(function, in_specs=specs(axes), out_specs=specs(out_axes), check_vma=False)(*arrays)


def gather_rows(x_BX: jax.Array, at_BY: jax.Array) -> jax.Array:
    """`x[b, at[b, y]]`, each row by itself: with the rows' numbers as indices, XLA sends indices or rows."""
    return jax.vmap(lambda x, at: x[at])(x_BX, at_BY)


def scatter_rows(x_BX: jax.Array, at_BY: jax.Array, new_BY: jax.Array) -> jax.Array:
    """`x` with `new[b, y]` in place of `x[b, at[b, y]]`, each row by itself; see `gather_rows`."""
    return jax.vmap(lambda x, at, new: x.at[at].set(new))(x_BX, at_BY, new_BY)


def gather_width(tree: Any) -> Any:
    """Weights with their `width` axis whole: so XLA gathers weights where they are used, and not activations.

    In a program traced under `jax.set_mesh` by a constraint, in a `shard_map` by an explicit `all_gather`, whose
    transpose sums gradients and scatters them; elsewhere nothing is to be done. To be called outside a loop that reads
    the weights: left alone, XLA gathers them again in every turn.
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
    """Rows `[B, L, D]` of an embedding. In a `shard_map` that splits its width, tokens travel and not the table."""
    over = AXIS_RULES["width"]
    if over not in jax.sharding.get_abstract_mesh().manual_axes:
        return table_VD[tokens_BL]
    everyones = jax.lax.all_gather(tokens_BL, over, axis=0, tiled=True)
    return jax.lax.all_to_all(table_VD[everyones], over, split_axis=0, concat_axis=2, tiled=True)


def sum_gradients(tree: Any, axes: tuple[str, ...]) -> Any:
    """Gradients summed over the devices of `axes` in a `shard_map`: over all but those that `gather_width` summed."""

    def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        done = AXIS_RULES["width"] if "width" in axes_of(leaf_name(path), x.ndim) else None
        left = tuple(axis for axis in axes if axis != done)
        return jax.lax.psum(x, left) if left else x

    return jax.tree_util.tree_map_with_path(one, tree) if axes else tree
