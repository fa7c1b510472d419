"""The decode program compiled for TPUs that are not here: whether it fits, what it copies, what it sends."""

from __future__ import annotations

import collections
import importlib.util
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxspec.base import KVCache
from jaxspec.decode import DecodeState, Engine, Weights, prefill
from jaxspec.generation import run_rounds
from jaxspec.requests import Requests
from jaxspec.sampling import Sampling
from jaxspec.sharding import make_mesh, replicated, shardings

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


class Plan(NamedTuple):
    """What one chip needs for a compiled decode program, in bytes, and what its loop does besides computing."""

    arguments: int
    """Weights, caches and the rest of the decode state."""
    temporaries: int
    peak: int
    """The most that is held at one time, program included."""
    aliased: int
    """Arguments whose buffers the results take over: the caches, if they are updated in place."""
    cache_bytes: int
    """This chip's part of all caches."""
    cache_copies: tuple[str, ...]
    """Instructions in the loop that write another buffer of a cache's shape. A move of a whole cache between HBM and
    on-chip memory is not one: XLA chooses that for caches that fit, to read them there."""
    host_calls: tuple[str, ...]
    """Instructions that talk to the host."""
    outer_loops: int
    """Loops of the program itself, those inside a round not counted."""
    sent: dict[str, int]
    """Collectives in the loop, as `all-reduce bf16[1,60,4096]` -> how many of them the program text has."""


def tpu_mesh(topology: str, *, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the chips of a TPU slice such as `v6e:2x4`, known to the compiler only.

    Raises ModuleNotFoundError without libtpu, and ValueError for a mesh that does not take all chips.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError('compiling for a TPU that is not here needs libtpu: pip install "jax[tpu]"')
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return make_mesh(data, fsdp, tensor, devices=list(described.devices))


def place(mesh: Mesh, tree: Any) -> Any:
    """`tree` as abstract arrays that live on the mesh by the rules of `jaxspec.sharding`."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings(mesh, tree))


def abstract_state(engine: Engine, weights: Weights, *, batch: int, capacity: int, slots: int) -> DecodeState:
    """The state that prefill would hand to the rounds, as shapes; nothing is allocated."""
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
    """Compile `decode.run_rounds` for the mesh and read what it needs.

    `weights` are abstract (`jax.eval_shape` of an initialisation, cast to what decoding uses); `capacity` is the
    cache's slots a row and `slots` the output's. Raises ValueError, with XLA's numbers, where a chip's memory does not
    hold the program.
    """
    state = abstract_state(engine, weights, batch=batch, capacity=capacity, slots=slots)
    caches = [c for c in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, KVCache)) if isinstance(c, KVCache)]
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
    text = compiled.as_text() or ""
    loop = _loop_instructions(text)
    shapes = {_dims(s) for b in buffers for s in (b.shape, b.sharding.shard_shape(b.shape))}
    return Plan(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        aliased=memory.alias_size_in_bytes,
        cache_bytes=_bytes_a_chip(buffers),
        cache_copies=tuple(line for line in loop if _copies(line, shapes)),
        host_calls=tuple(line for line in loop if _HOST.search(line)),
        outer_loops=sum(" while(" in line for line in text[text.index("\nENTRY") :].splitlines()),
        sent=dict(collections.Counter(filter(None, map(_sent, loop)))),
    )


def _bytes_a_chip(arrays: list[Any]) -> int:
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)


# Reading HLO text. An instruction is `%name = shape opcode(operands), attributes`; a shape ends in `{layout}`, where
# `S(1)` marks on-chip memory.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%\S+ = (?P<result>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_HOST = re.compile(r" (infeed|outfeed|send|recv)(-done)?\(|host_callback|xla_python|callback")
_CALLED = re.compile(r"(?:body|condition|to_apply|true_computation|false_computation)=(%[\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def _loop_instructions(text: str) -> list[str]:
    """The instructions of the program's loops, nested loops and branches included.

    A fusion is one instruction; its line gets `writes=a slice` appended where it updates a buffer in place, else
    `writes=all`.
    """
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.split()[1] if line.startswith("ENTRY") else line.split()[0]
            entry = name if line.startswith("ENTRY") else entry
            lines = computations.setdefault(name, [])
        elif _INSTRUCTION.match(line):
            lines.append(line)
    found, seen = [], {entry}
    waiting = [name for line in computations.get(entry, []) if " while(" in line for name in _CALLED.findall(line)]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in computations.get(name, []):
            if match := re.search(r" fusion\(.*calls=(%[\w.\-]+)", line):
                inside = computations.get(match[1], [])
                in_place = any(" dynamic-update-slice(" in x for x in inside)
                line += f" writes={'a slice' if in_place else 'all'}"
            elif not re.search(r" (all-reduce|reduce|reduce-scatter|sort|scatter|reduce-window)(-start)?\(", line):
                waiting += _CALLED.findall(line)
                waiting += [b.strip() for group in _BRANCHES.findall(line) for b in group.split(",")]
            found.append(line.strip())
    return found


def _shapes(text: str) -> list[tuple[str, str, str]]:
    return _SHAPE.findall(text)


def _dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape up to transposition and axes of size one, so that a relaid copy is recognised."""
    return tuple(sorted(n for n in shape if n > 1))


def _copies(line: str, shapes: set[tuple[int, ...]]) -> bool:
    """Whether an instruction fills a second buffer of one of these shapes."""
    match = _INSTRUCTION.match("  " + line)
    assert match is not None
    results = _shapes(match["result"])
    hit = [r for r in results if _dims(tuple(int(n) for n in r[1].split(",") if n)) in shapes]
    if not hit:
        return False
    if match["opcode"] == "copy-start":
        return len({"S(" in layout for _, _, layout in results[:2]}) == 1
    return match["opcode"] in ("copy", "transpose", *COLLECTIVES) or line.endswith("writes=all")


def _sent(line: str) -> str | None:
    match = _INSTRUCTION.match("  " + line)
    assert match is not None
    opcode = match["opcode"].removesuffix("-start")
    if opcode not in COLLECTIVES:
        return None
    kind, sizes, _ = _shapes(match["result"])[-1 if opcode == "all-gather" else 0]
    return f"{opcode} {kind}[{sizes}]"
