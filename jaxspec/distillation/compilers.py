"""One training step under three compilers: `jit` by shardings, `shard_map` by explicit collectives, `pmap`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxspec.base import Array, Params, Target
from jaxspec.distillation.objective import Objective
from jaxspec.distillation.step import Batch, Sums, TrainState, gradients, update
from jaxspec.parallel.mesh import ROW_AXES, shardings

Compiler = Literal["jit", "shard_map", "pmap"]
Step = Callable[[Params, TrainState, Batch, Any], tuple[TrainState, Array]]
"""`(frozen, state, batch, draft vocabulary) -> (state, mean loss)`; the state it is given is consumed."""
Result = TypeVar("Result")


def compile_step(
    compiler: Compiler,
    mesh: Mesh,
    target: Target,
    drafter: Any,
    optimizer: optax.GradientTransformation,
    objective: Objective,
) -> Step:
    """`step.train_step` for a mesh. All compilers compute the same; they differ in who decides what is sent when.

    * `jit`: XLA's partitioner, from the arrays' shardings and the constraints within; any mesh.
    * `shard_map`: every device has its rows; weights are gathered layer by layer, and the gradient of the whole step is
      summed and scattered once. Meshes without a `tensor` axis.
    * `pmap`: rows alone are spread, and every device holds all weights. Meshes of `data` alone.

    ValueError where the mesh does not suit.
    """
    step, compute = _step_of(target, drafter, optimizer, objective)
    if compiler != "pmap":
        jitted = _jitted(compiler, mesh, step, compute)
        return under(mesh, jitted) if compiler == "jit" else jitted
    if mesh.size > mesh.shape["data"]:
        raise ValueError("compiler='pmap' spreads rows alone: set mesh.fsdp, mesh.tensor and mesh.slices to 1")
    axis = "data"
    mapped = jax.pmap(
        functools.partial(step, functools.partial(compute, axes=(axis,))),
        axis_name=axis,
        in_axes=(None, None, 0, None),
        out_axes=None,
        devices=list(mesh.devices.flat),
    )  # type: ignore[call-overload]

    def run(frozen: Params, state: TrainState, batch: Batch, vocab_U: Any) -> tuple[TrainState, Array]:
        parts = jax.tree.map(lambda x: np.asarray(x).reshape(mesh.size, -1, *x.shape[1:]), batch)
        return mapped(frozen, state, parts, vocab_U)

    return run


def lower_step(
    compiler: Compiler,
    mesh: Mesh,
    target: Target,
    drafter: Any,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *arguments: Any,
) -> jax.stages.Lowered:
    """The program of `compile_step` for abstract arguments, ready to be compiled for devices that are not here.

    ValueError for `pmap`, which compiles for devices that are.
    """
    step, compute = _step_of(target, drafter, optimizer, objective)
    jitted: Any = _jitted(compiler, mesh, step, compute)
    if compiler == "shard_map":
        return jitted.lower(*arguments)
    with jax.set_mesh(mesh):
        return jitted.lower(*arguments)


def _step_of(
    target: Target, drafter: Any, optimizer: optax.GradientTransformation, objective: Objective
) -> tuple[Callable[..., tuple[TrainState, Array]], Callable[..., tuple[Params, Sums]]]:
    """The step, given how gradients are made, and how they are made on one device."""

    def step(
        gradients_of: Callable[..., tuple[Params, Sums]], frozen: Params, state: TrainState, batch: Batch, vocab_U: Any
    ) -> tuple[TrainState, Array]:
        key = jax.random.fold_in(state.key, state.step)
        gradient, sums = gradients_of(frozen, state.params, batch, key, vocab_U)
        loss = sums.mean_loss(objective)
        return update(optimizer, state, gradient, loss), loss

    return step, functools.partial(gradients, target, drafter, objective)


def _jitted(
    compiler: Compiler, mesh: Mesh, step: Callable[..., Any], compute: Callable[..., tuple[Params, Sums]]
) -> Step:
    """The step as one program for a mesh."""
    if compiler == "jit":
        return jax.jit(functools.partial(step, compute), donate_argnums=1)
    if compiler != "shard_map":
        raise ValueError(f"compiler is {compiler!r}; a program for a mesh comes from jit or shard_map")
    if mesh.shape["tensor"] > 1:
        raise ValueError(
            f"compiler='shard_map' spreads rows and weights, and the mesh has tensor={mesh.shape['tensor']}: set "
            "mesh.tensor=1, or compiler=jit"
        )
    spread = functools.partial(_spread, mesh, functools.partial(compute, axes=ROW_AXES))
    return jax.jit(functools.partial(step, spread), donate_argnums=1)


def under(mesh: Mesh, compiled: Callable[..., Result]) -> Callable[..., Result]:
    """`compiled` with the mesh in context, which the constraints in the models refer to; one device needs none."""
    if mesh.size == 1:
        return compiled

    def run(*arguments: Any) -> Result:
        with jax.set_mesh(mesh):
            return compiled(*arguments)

    return run


def _spread(
    mesh: Mesh,
    compute: Callable[..., tuple[Params, Sums]],
    frozen: Params,
    params: Params,
    batch: Batch,
    key: Array,
    vocab_U: Any,
) -> tuple[Params, Sums]:
    """`compute` on each device's rows and parts of the weights."""
    specs = functools.partial(jax.tree.map, lambda x: x.spec)
    weights = specs(shardings(mesh, params))
    # Without types of variance: what is differentiated holds no sum over devices, see `judge_batch`.
    return jax.shard_map(
        compute,
        mesh=mesh,
        in_specs=(specs(shardings(mesh, frozen)), weights, P(ROW_AXES), P(), P()),
        out_specs=(weights, P()),
        check_vma=False,
    )(frozen, params, batch, key, vocab_U)
