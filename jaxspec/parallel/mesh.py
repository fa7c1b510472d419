"""Meshes, and the mesh rules by which the logical axes of arrays are spread over them."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("slice", "data", "fsdp", "tensor")
"""Axes of every mesh, outermost first: between slices or hosts the network is slow, along `tensor` it is used most."""

ROW_AXES = ("slice", "data", "fsdp")
"""Mesh axes over which the rows of a batch are spread."""

AXIS_RULES: dict[str | None, Any] = {
    "batch": ROW_AXES,
    "vocab": "tensor",
    "width": "fsdp",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "tensor",
    None: None,
}
"""Mesh rules: logical axis -> mesh axis or axes that split it; None: whole on every device."""


Axes = tuple[str | None, ...]
"""Logical axes of an array's last dimensions; None is one that is never split."""


WEIGHT_AXES: dict[str, Axes] = {}
"""Leaf name -> logical axes of the weight called so. Filled by `jaxspec.nn.weights.declare`, when the module that has
the weight is imported."""


STATE_AXES: dict[str, Axes] = {
    "k_YBKCS": (None, "batch", "kv_heads", None, None),
    "k_YBKSC": (None, "batch", "kv_heads", None, None),
    "v_YBKSC": (None, "batch", "kv_heads", None, None),
    "root_logits_BV": ("batch", "vocab"),
}
"""Leaf name -> logical axes of the large arrays of a decoding state."""


def declare_axes(name: str, axes: Axes) -> None:
    """Says by which logical axes (`AXIS_RULES`) the weight called `name` is split.

    Raises ValueError for an axis without a rule.
    """
    for axis in axes:
        if axis not in AXIS_RULES:
            known = ", ".join(str(a) for a in AXIS_RULES)
            raise ValueError(f"weight {name!r} has a logical axis {axis!r}, and the axis rules know {known}")
    WEIGHT_AXES[name] = axes


def axes_of(name: str, ndim: int) -> Axes:
    """Logical axes of every dimension of the weight called `name`; None for all of one that is not declared."""
    axes = WEIGHT_AXES.get(name, ())
    return (None,) * (ndim - len(axes)) + axes


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, slices: int = 1, devices: list[Any] | None = None
) -> Mesh:
    """Returns a mesh of `slices x data x fsdp x tensor` devices; -1 for `data` takes the devices that the others leave.

    Within a slice, TPUs are ordered as their network is. Raises ValueError where the sizes do not give the number of
    devices.
    """
    devices = list(jax.devices()) if devices is None else devices
    if data == -1:
        data = max(1, len(devices) // (slices * fsdp * tensor))
    shape = (slices, data, fsdp, tensor)
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"a mesh of slices={slices}, data={data}, fsdp={fsdp}, tensor={tensor} needs {math.prod(shape)} devices, "
            f"but there are {len(devices)}: change the mesh sizes so that their product is {len(devices)}"
        )
    # Only TPUs have a network whose shape the order of devices should follow.
    if devices[0].platform != "tpu":
        grid = np.asarray(devices).reshape(shape)
    elif slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices)
    else:
        within, between = (1, data, fsdp, tensor), (slices, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def leaf_name(path: tuple[Any, ...]) -> str:
    """Returns the last named key of a pytree path (`layers/0/qkv` -> `qkv`)."""
    names = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
    return next((n for n in reversed(names) if n), "")


def spec(name: str, ndim: int) -> P:
    """The partition of an array called `name`: its rule, or replicated when it has none."""
    axes = STATE_AXES.get(name) or WEIGHT_AXES.get(name)
    if not axes:
        return P()
    axes = (None,) * (ndim - len(axes)) + axes
    return P(*(AXIS_RULES[a] for a in axes))


def splits(axis: str) -> int:
    """Returns the number of parts into which the mesh in context (`jax.set_mesh`) splits a logical axis."""
    over = AXIS_RULES[axis]
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(a, 1) for a in ((over,) if isinstance(over, str) else over or ()))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns `x`, constrained to its logical axes in a program traced under `jax.set_mesh`; elsewhere as it is.

    An axis that its mesh axes do not divide evenly, such as a batch of one, is left to XLA. In a `shard_map` arrays
    are one device's own and stay as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    uneven = [axis is not None and size % splits(axis) for size, axis in zip(x.shape, axes, strict=False)]
    parts = (P.UNCONSTRAINED if odd else AXIS_RULES[axis] for odd, axis in zip(uneven, axes, strict=False))
    return jax.lax.with_sharding_constraint(x, P(*parts))


def constrain_tree(tree: Any) -> Any:
    """Returns `tree`, every leaf constrained to its name's rule in a program traced under `jax.set_mesh`.

    Elsewhere the tree stays as it is. A program constrains its results so that they lie as its next call expects them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.lax.with_sharding_constraint(x, spec(leaf_name(path), x.ndim)), tree
    )


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The `NamedSharding` of every leaf by its name; optimizer moments follow the parameter they belong to.

    Raises ValueError naming the array and axis where a sharded axis does not divide over its mesh axis.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        shape = tuple(getattr(leaf, "shape", ()))
        name = leaf_name(path)
        part = spec(name, len(shape)) if shape else P()
        for size, axis in zip(shape, part, strict=False):
            over = int(np.prod([mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())]))
            if size % over:
                raise ValueError(
                    f"axis {axis!r} splits `{name}` of shape {shape} into {over} parts, which {size} is not divisible "
                    "by: choose a smaller mesh axis"
                )
        return NamedSharding(mesh, part)

    return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows split over `slice`, `data` and `fsdp`, every other axis whole."""
    return NamedSharding(mesh, P(AXIS_RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with a whole copy on every device."""
    return NamedSharding(mesh, P())
