"""The decode program compiled for TPUs that are not here: whether it fits, what it copies, what it sends."""

from __future__ import annotations

import collections
import importlib.util
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxspec.base import Cache
from jaxspec.decoding.generation import run_rounds
from jaxspec.decoding.requests import Requests
from jaxspec.decoding.rounds import DecodeState, Engine, Weights, prefill
from jaxspec.parallel.mesh import make_mesh, replicated, shardings
from jaxspec.planning import hlo
from jaxspec.sampling import Sampling

LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
}
"""Variables of a process that compiles: so that libtpu neither looks for a TPU nor talks of missing one."""


class Plan(NamedTuple):
    """One chip's needs for a compiled decode program, in bytes, and all that its loop does besides computing."""

    arguments: int
    """Weights, caches and the rest of the decode state."""
    temporaries: int
    peak: int
    """Most bytes held at one time, program included."""
    aliased: int
    """Arguments whose buffers the results take over: the caches, if they are updated in place."""
    cache_bytes: int
    """This chip's part of all caches."""
    cache_copies: tuple[str, ...]
    """Instructions in the loop that write another buffer of a cache's shape, with it. A move of a whole cache between
    HBM and on-chip memory is not one: XLA chooses that for caches that fit, to read them there."""
    host_calls: tuple[str, ...]
    """Instructions that talk to the host."""
    outer_loops: int
    """Loops of the program itself, those inside a round not counted."""
    sent: dict[str, int]
    """Collectives in the loop, as `all-reduce bf16[1,60,4096]` -> how many of them the program text has."""


def tpu_mesh(topology: str, *, data: int = 1, fsdp: int = 1, tensor: int = 1, slices: int = 1) -> Mesh:
    """Returns a mesh over the chips of a TPU slice such as `v6e:2x4`, or of several, known to the compiler only.

    Raises ModuleNotFoundError without libtpu, and ValueError for a mesh that does not take all chips.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError('compiling for a TPU that is not here needs libtpu: pip install "jax[tpu]"')
    several = {"num_slices": slices} if slices > 1 else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **several)
    return make_mesh(data, fsdp, tensor, slices=slices, devices=list(described.devices))


def place(mesh: Mesh, tree: Any) -> Any:
    """Returns `tree` as abstract arrays that live on the mesh by the rules of `jaxspec.parallel.mesh`."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings(mesh, tree))


def abstract_state(engine: Engine, weights: Weights, *, batch: int, capacity: int, slots: int) -> DecodeState:
    """Returns the state that prefill hands to the rounds, as shapes; nothing is allocated."""
    requests = jax.eval_shape(
        lambda: Requests(
            jnp.zeros((batch, min(64, capacity)), jnp.int32),
            jnp.zeros(batch, jnp.int32),
            Sampling(*(jnp.zeros(batch, t) for t in (jnp.float32, jnp.int32, jnp.float32, jnp.uint32))),
            jnp.zeros((batch, 1), jnp.int32),
            jnp.zeros(batch, jnp.int32),
            jnp.zeros(batch, jnp.float32),
        )
    )
    return jax.eval_shape(lambda w, r: prefill(engine, w, r, capacity, slots), weights, requests)


def plan_rounds(engine: Engine, weights: Weights, mesh: Mesh, *, batch: int, capacity: int, slots: int = 512) -> Plan:
    """Compiles `generation.run_rounds` for the mesh and returns its needs.

    `weights` are abstract (`jax.eval_shape` of an initialisation, cast to what decoding uses); `capacity` is the
    cache's slots a row and `slots` the output's. Raises ValueError, with XLA's numbers, where a chip's memory does not
    hold the program.
    """
    state = abstract_state(engine, weights, batch=batch, capacity=capacity, slots=slots)
    caches = [c for c in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Cache)) if isinstance(c, Cache)]
    buffers = jax.tree.leaves(place(mesh, caches))
    limit = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    with jax.set_mesh(mesh):
        lowered = run_rounds.lower(engine, place(mesh, weights), place(mesh, state), limit)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        held = _bytes_a_chip(jax.tree.leaves(place(mesh, (weights, state)))) / 2**30
        raise ValueError(
            f"decoding batch={batch} with capacity={capacity} on a mesh of {dict(mesh.shape)} does not fit a chip: "
            f"weights and state alone take {held:.2f} GiB of it; use more chips, a smaller batch or a smaller capacity "
            f"({str(error).splitlines()[0]})"
        ) from error
    memory = compiled.memory_analysis()
    assert memory is not None
    program = hlo.parse(compiled.as_text() or "")
    loop = list(_in_loops(program))
    shapes = {_dims(s) for b in buffers for s in (b.shape, b.sharding.shard_shape(b.shape))}
    return Plan(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        aliased=memory.alias_size_in_bytes,
        cache_bytes=_bytes_a_chip(buffers),
        cache_copies=tuple(_named(i) for i in loop if _copies(program, i, shapes)),
        host_calls=tuple(_named(i) for i in loop if i.kind in _HOST_CALLS or _CALLBACK.search(i.attributes)),
        outer_loops=sum(i.opcode == "while" for i in program.computations[program.entry]),
        sent=dict(collections.Counter(_named(i) for i in loop if i.kind in hlo.COLLECTIVES)),
    )


def _bytes_a_chip(arrays: list[Any]) -> int:
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)


_HOST_CALLS = ("infeed", "outfeed", "send", "send-done", "recv", "recv-done")
_CALLBACK = re.compile(r"host_callback|xla_python|callback")
_INSIDE = ("fusion", "reduce", "reduce-scatter", "all-reduce", "sort", "scatter", "reduce-window")
"""Instructions whose computations are their own affair."""


def _in_loops(program: hlo.Program) -> Iterator[hlo.Instruction]:
    """The instructions of the program's loops, nested loops and branches included; a fusion is one."""
    waiting = [i for i in program.computations[program.entry] if i.opcode == "while"]
    seen = set()
    while waiting:
        for name in waiting.pop().all_called:
            if name not in seen:
                seen.add(name)
                for i in program.computations.get(name, ()):
                    yield i
                    if i.kind not in _INSIDE:
                        waiting.append(i)


def _dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape up to transposition and axes of size one, so that a relaid copy is recognised."""
    return tuple(sorted(n for n in shape if n > 1))


def _copies(program: hlo.Program, i: hlo.Instruction, shapes: set[tuple[int, ...]]) -> bool:
    """Returns whether an instruction fills a second buffer of one of these shapes."""
    if not any(_dims(s.dims) in shapes for s in i.result):
        return False
    if i.opcode == "copy-start":
        return i.result[0].space == i.result[1].space
    if i.opcode == "fusion":
        inside = program.computations[i.called("calls") or ""]
        return not any(inner.opcode == "dynamic-update-slice" for inner in inside)
    return i.opcode in ("copy", "transpose", *hlo.COLLECTIVES)


def _named(i: hlo.Instruction) -> str:
    """`all-reduce bf16[1,60,4096]`: the opcode, and what it makes."""
    return f"{i.kind} {i.result[-1 if i.kind == 'all-gather' else 0] if i.result else ''}"
