"""`train_step` under three compilers: `jit` by shardings, `shard_map` by explicit collectives, `pmap`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxspec.base import Array, Params
from jaxspec.distillation.metrics import Sums
from jaxspec.distillation.step import loss_gradient, train_step
from jaxspec.distillation.task import Batch, Frozen, Task, TrainState
from jaxspec.parallel.mesh import ROW_AXES, shardings

Compiler = Literal["jit", "shard_map", "pmap"]
Step = Callable[[Frozen, TrainState, Batch], tuple[TrainState, Array]]
"""`(frozen, state, batch) -> (state, mean loss)`; the state it is given is consumed."""
Result = TypeVar("Result")


def compile_step(compiler: Compiler, mesh: Mesh, task: Task, optimizer: optax.GradientTransformation) -> Step:
    """Returns `step.train_step` of a task for a mesh. All compilers compute the same; they differ in who decides what
    is sent when.

    * `jit`: XLA's partitioner, from the arrays' shardings and the constraints within; any mesh.
    * `shard_map`: every device has its rows; weights are gathered layer by layer, and the gradient of the whole step is
      summed and scattered once. Meshes without a `tensor` axis.
    * `pmap`: rows alone are spread, and every device holds all weights. Meshes of `data` alone.

    ValueError where the mesh does not suit.
    """
    if compiler == "pmap":
        return _pmap_step(mesh, task, optimizer)
    jitted = _jit_step(compiler, mesh, task, optimizer)
    return under(mesh, jitted) if compiler == "jit" else jitted


def lower_step(
    compiler: Compiler, mesh: Mesh, task: Task, optimizer: optax.GradientTransformation, *arguments: Any
) -> jax.stages.Lowered:
    """Returns the program of `compile_step` for abstract `(frozen, state, batch)`, for devices that are not here.

    ValueError for `pmap`, which compiles for devices that are.
    """
    jitted: Any = _jit_step(compiler, mesh, task, optimizer)
    if compiler == "shard_map":
        return jitted.lower(*arguments)
    with jax.set_mesh(mesh):
        return jitted.lower(*arguments)


def _jit_step(compiler: Compiler, mesh: Mesh, task: Task, optimizer: optax.GradientTransformation) -> Step:
    """The step as one program for a mesh."""
    step = functools.partial(train_step, task, optimizer)
    if compiler == "jit":
        return jax.jit(step, donate_argnums=1)
    if compiler != "shard_map":
        raise ValueError(f"compiler is {compiler!r}; a program for a mesh comes from jit or shard_map")
    if mesh.shape["tensor"] > 1:
        raise ValueError(
            f"compiler='shard_map' spreads rows and weights, and the mesh has tensor={mesh.shape['tensor']}: set "
            "mesh.tensor=1, or compiler=jit"
        )
    # The update stays outside: clipping needs the norm of the whole gradient, which `jit` sums over devices.
    return jax.jit(functools.partial(step, gradient_of=functools.partial(_shard_map_gradient, mesh)), donate_argnums=1)


def _shard_map_gradient(
    mesh: Mesh, task: Task, frozen: Frozen, params: Params, batch: Batch, key: Array
) -> tuple[Params, Sums]:
    """`loss_gradient` on each device's rows and parts of the weights."""
    frozen_specs, specs = (jax.tree.map(lambda x: x.spec, shardings(mesh, tree)) for tree in (frozen, params))
    # Without types of variance: what is differentiated holds no sum over devices, see `score_batch`.
    return jax.shard_map(
        functools.partial(loss_gradient, task, axes=ROW_AXES),
        mesh=mesh,
        in_specs=(frozen_specs, specs, P(ROW_AXES), P()),
        out_specs=(specs, P()),
        check_vma=False,
    )(frozen, params, batch, key)


def _pmap_step(mesh: Mesh, task: Task, optimizer: optax.GradientTransformation) -> Step:
    """The step with each device's rows on a leading axis of their own."""
    if mesh.size > mesh.shape["data"]:
        raise ValueError("compiler='pmap' spreads rows alone: set mesh.fsdp, mesh.tensor and mesh.slices to 1")
    axis = "data"
    mapped = jax.pmap(
        functools.partial(train_step, task, optimizer, gradient_of=functools.partial(loss_gradient, axes=(axis,))),
        axis_name=axis,
        in_axes=(None, None, 0),
        out_axes=None,
        devices=list(mesh.devices.flat),
    )  # type: ignore[call-overload]

    def run(frozen: Frozen, state: TrainState, batch: Batch) -> tuple[TrainState, Array]:
        parts = jax.tree.map(lambda x: np.asarray(x).reshape(mesh.size, -1, *x.shape[1:]), batch)
        return mapped(frozen, state, parts)

    return run


def under(mesh: Mesh, compiled: Callable[..., Result]) -> Callable[..., Result]:
    """Returns `compiled` with the mesh in context, for the constraints in the models; one device needs none."""
    if mesh.size == 1:
        return compiled

    def run(*arguments: Any) -> Result:
        with jax.set_mesh(mesh):
            return compiled(*arguments)

    return run
