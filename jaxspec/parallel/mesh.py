"""Where every array lives: rules from logical axes to mesh axes, and the meshes they name."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("slice", "data", "fsdp", "tensor")
"""Outermost first: between slices of a pod or hosts of GPUs the network is slow, along `tensor` it is used most."""


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
"""Logical axis -> mesh axis (or axes)."""


Axes = tuple[str | None, ...]
"""Logical axes of an array's last dimensions; None is one that is never split."""


WEIGHT_AXES: dict[str, Axes] = {}
"""Leaf name -> logical axes of the weight called so. Filled by `jaxspec.nn.weights.declare`, when the module that has
the weight is imported."""


STATE_AXES: dict[str, Axes] = {
    "k_YBKCS": (None, "batch", "kv_heads", None, None),
    "v_YBKSC": (None, "batch", "kv_heads", None, None),
    "root_logits_BV": ("batch", "vocab"),
}
"""The same for the large arrays of a decoding state."""


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
    """A mesh over `slices x data x fsdp x tensor` devices; -1 for `data` takes what the others leave.

    Within a slice, TPUs stand as their network does. Raises ValueError where the device count does not divide.
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
    if devices[0].platform != "tpu":
        grid = np.asarray(devices).reshape(shape)
    elif slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices)
    else:
        within, between = (1, data, fsdp, tensor), (slices, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def leaf_name(path: tuple[Any, ...]) -> str:
    """The last named key of a pytree path (`layers/0/qkv` -> `qkv`)."""
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
    """Into how many parts the mesh in context (`jax.set_mesh`) splits a logical axis; 1 where there is no mesh."""
    over = AXIS_RULES[axis]
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(a, 1) for a in ((over,) if isinstance(over, str) else over or ()))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, held to its logical axes in a program traced under `jax.set_mesh`; else untouched.

    An axis that its mesh axes do not divide evenly, such as a batch of one, is left as XLA likes. In a `shard_map`
    arrays are a device's own, and stay as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x

    def part(size: int, axis: str | None) -> Any:
        if axis is not None and size % splits(axis):
            return P.UNCONSTRAINED
        return AXIS_RULES[axis]

    return jax.lax.with_sharding_constraint(x, P(*map(part, x.shape, axes)))


def constrain_tree(tree: Any) -> Any:
    """`tree`, every leaf held to its name's rule in a program traced under `jax.set_mesh`; else untouched.

    So a program's result lies as the next call of the same program expects it.
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
    """Rows split over `slice`, `data` and `fsdp`, every other axis whole."""
    return NamedSharding(mesh, P(AXIS_RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())
