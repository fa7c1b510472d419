"""Cost of compiled programs: what their instructions compute, move and send.

XLA's own `cost_analysis` counts a loop's body once and all branches of a conditional. Here loops count by their trips
and conditionals by their most expensive branch.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxspec.planning.hlo import COLLECTIVES, ArrayShape, Instruction, Program


class Message(NamedTuple):
    """The message that one device sends in a collective."""

    kind: str
    group: tuple[int, ...]
    """Devices of device 0's group, as places in the mesh, in order."""
    bytes: int
    """Least number of bytes over its links: `(n - 1) / n` of the whole array for `n` devices, and twice that for an
    all-reduce."""
    largest: ArrayShape
    """The largest array in it."""


@dataclass(frozen=True)
class Cost:
    """The cost of some instructions together."""

    flops: float = 0.0
    """FLOPs of matmuls and convolutions; a multiplication and an addition are two."""
    bytes: float = 0.0
    """Bytes read from and written to HBM."""
    computing: float = 0.0
    """Seconds of instructions that are bound by arithmetic."""
    moving: float = 0.0
    """Seconds of instructions that are bound by memory."""
    sent: Counter[Message] = field(default_factory=Counter)
    """Collectives, and how often each runs."""
    behind: float = 0.0
    """Of `moving`, the seconds of copies that run while other instructions do."""

    @property
    def seconds(self) -> float:
        """Seconds of all instructions in turn, each at the slower of arithmetic and memory, without collectives."""
        return self.computing + self.moving

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.computing + other.computing,
            self.moving + other.moving,
            self.sent + other.sent,
            self.behind + other.behind,
        )

    def __mul__(self, count: int) -> Cost:
        sent = Counter({message: n * count for message, n in self.sent.items()})
        rest = self.computing * count, self.moving * count, sent, self.behind * count
        return Cost(self.flops * count, self.bytes * count, *rest)


_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota", "add-dependency", "domain", "get-dimension-size",
}  # fmt: skip
_ALIASES = ("ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding", "AllocateBuffer", "MoveToHost", "MoveToDevice")
"""Custom calls that move no data."""


def cost_of(
    program: Program,
    *,
    flops_per_second: Callable[[Instruction], float],
    bytes_per_second: float,
    busy_seconds: Callable[[Instruction], float] | None = None,
) -> Cost:
    """Returns the cost of one run of the program.

    `flops_per_second` is the rate of a matmul or convolution, which may depend on its types. `busy_seconds` is the
    least time of an instruction besides its traffic, where more is known of it than its FLOPs. Raises ValueError if the
    trips of a loop are not known.
    """
    return _Costing(program, flops_per_second, bytes_per_second, busy_seconds).of_computation(program.entry)


@dataclass(frozen=True, eq=False)
class _Costing:
    """A program with the rates of its device."""

    program: Program
    flops_per_second: Callable[[Instruction], float]
    bytes_per_second: float
    busy_seconds: Callable[[Instruction], float] | None
    _known: dict[str, Cost] = field(default_factory=dict)

    def of_computation(self, name: str) -> Cost:
        """Returns the cost of a computation."""
        if name not in self._known:
            costs = (self._of_instruction(name, i) for i in self.program.computations[name])
            self._known[name] = functools.reduce(Cost.__add__, costs, Cost())
        return self._known[name]

    def _of_instruction(self, computation: str, i: Instruction) -> Cost:
        if i.opcode in _FREE or i.opcode.endswith("-done"):
            return Cost()
        if i.opcode == "while":
            body, condition = i.called("body"), i.called("condition")
            assert body and condition
            return (self.of_computation(body) + self.of_computation(condition)) * self.program.trips(i)
        if i.opcode == "conditional":
            return max((self.of_computation(name) for name in i.all_called), key=lambda c: (c.seconds, c.bytes))
        if i.opcode in ("call", "async-start"):
            return self.of_computation(i.called("to_apply") or i.called("calls") or "")
        return self._of_simple(computation, i)

    def _of_simple(self, computation: str, i: Instruction) -> Cost:
        """Returns the cost of an instruction that is no control flow."""
        flops, busy = 0.0, 0.0
        for matmul, count in matmuls(self.program, i):
            flops += count
            busy += count / self.flops_per_second(matmul)
        if self.busy_seconds is not None:
            busy = max(busy, self.busy_seconds(i))
        moved = float(traffic(self.program, computation, i))
        inside = _with_inside(self.program, i)
        sent = Counter(m for _, inner in inside if (m := message_of(inner, self.program.devices)))
        waiting = moved / self.bytes_per_second
        bound = (busy, 0.0) if busy >= waiting else (0.0, waiting)
        return Cost(flops, moved, *bound, sent, bound[1] if i.opcode.endswith("-start") else 0.0)


def message_of(i: Instruction, devices: int) -> Message | None:
    """Returns the message of a collective among `devices`; None for other instructions, and for a group of one."""
    if i.kind not in COLLECTIVES:
        return None
    group = _group(i.attributes, devices)
    results = i.result
    if i.opcode.endswith("-start") and i.kind != "all-reduce":  # operands come first
        results = tuple(s for s in results if s.kind != "u32" or s.dims)
        results = results[len(results) // 2 :]
    held, others = sum(s.bytes for s in results), len(group) - 1
    share = others / max(1, len(group))
    sent = {
        "all-reduce": 2 * held * share,
        "reduce-scatter": held * others,
        "collective-permute": held,
    }.get(i.kind, held * share)
    largest = max(results, key=lambda s: s.bytes)
    return Message(i.kind, group, round(sent), largest) if others else None


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
"""Device ids in order, shaped, and perhaps transposed."""


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Returns the device ids that `_IOTA` writes."""
    dims = [int(d) for d in shape.split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids if order is None else ids.transpose([int(d) for d in order.split(",")])


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """Returns the devices of device 0's group. Raises ValueError if the groups are written in an unknown way."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(pairs[1]), int(pairs[2])
    if mesh := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        chosen = re.findall(r"'([^']+)'", mesh[4])
        ids = _iota(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(sizes.values()))
        places = ids.reshape(tuple(sizes.values()))
        zero = zip(sizes, np.argwhere(places == 0)[0], strict=True)
        row = places[tuple(slice(None) if name in chosen else at for name, at in zero)]
        return tuple(sorted(row.ravel().tolist()))
    if iota := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", attributes):
        places = _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
        return tuple(sorted(next(row for row in places.tolist() if 0 in row)))
    listed = re.search(r"replica_groups=\{([\d,{}]*)\}", attributes)
    if listed is None:
        raise ValueError(f"the groups of a collective are written in a way that is not known: {attributes[:120]}")
    groups = [[int(d) for d in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])]
    return tuple(next((g for g in groups if 0 in g), range(devices)))  # no group is listed: all devices are one


def _with_inside(program: Program, i: Instruction) -> Iterator[tuple[str | None, Instruction]]:
    """Yields an instruction and all inside a fusion, each with its computation if that is not the caller's."""
    yield None, i
    if i.opcode == "fusion":
        name = i.called("calls") or ""
        for inner in program.computations.get(name, ()):
            for place, found in _with_inside(program, inner):
                yield place or name, found


def matmuls(program: Program, i: Instruction) -> list[tuple[Instruction, float]]:
    """Returns every matmul and convolution of an instruction, those inside a fusion too, with its FLOPs."""
    found = []
    for place, inner in _with_inside(program, i):
        if inner.opcode in ("dot", "convolution"):
            named = program.named(place) if place else None
            found.append((inner, _flops(program, inner, named)))
        elif inner.name.startswith("splash_mha"):
            found.append((inner, _splash_flops(inner, program)))
    return found


def _splash_flops(i: Instruction, program: Program) -> float:
    """Returns the FLOPs of a splash attention kernel, which is opaque, with a causal mask.

    Each of its matmuls computes half the scores. Forward there are two, for scores and values. Backward repeats them
    and adds the gradients of keys and values, and in a fused kernel those of queries. Keys beyond the number of queries
    are per-query keys, of which the kernel computes the mask's blocks on the diagonal.
    """
    named = next(n for name in program.computations if i.name in (n := program.named(name)))
    shapes = [named[o].result[0] for o in i.operands if o in named]
    queries, keys = [s.dims for s in shapes if "f" in s.kind][:2]
    fused = any(len(s.dims) > len(queries) for s in i.result)  # the gradients of queries by blocks of keys
    matmuls = 2 if "_fwd" in i.name else 3 if "_dq" in i.name else 5 if fused else 4
    length, block = queries[-2], shapes[-1].dims[-1]
    own = keys[-2] - length
    return 2 * matmuls * math.prod(queries) * (length / 2 + own // length * block)


def _flops(program: Program, i: Instruction, named: dict[str, Instruction] | None) -> float:
    if named is None:
        named = next(n for name in program.computations if i.name in (n := program.named(name)))
    left, right = (named[operand].result[0].dims for operand in i.operands[:2])
    out = i.result[0].size
    if i.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        over = [int(d) for d in contracted[1].split(",") if d] if contracted else []
        return 2.0 * out * math.prod(left[d] for d in over)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels is not None, i.name
    lhs, rhs, result = labels.groups()
    window = _window(i.attributes)
    pairs = out * right[rhs.index("i")]
    for d in (c for c in result if c.isdigit()):
        size = i.result[0].dims[result.index(d)]
        pairs = pairs // size * _meetings(left[lhs.index(d)], right[rhs.index(d)], size, window, int(d))
    return 2.0 * pairs


def _window(attributes: str) -> dict[str, list[str]]:
    match = re.search(r"window=\{([^}]*)\}", attributes)
    words = (word.split("=") for word in match[1].split()) if match else ()
    return {name: values.split("x") for name, values in words}


def _meetings(size: int, kernel: int, out: int, window: dict[str, list[str]], axis: int) -> int:
    """Returns the number of places along one axis of a convolution where output, kernel and input meet.

    Padding and the gaps of a dilated input do not count.
    """
    low = int(window["pad"][axis].split("_")[0]) if "pad" in window else 0
    spread, stride, step = (int(window[n][axis]) if n in window else 1 for n in ("lhs_dilate", "stride", "rhs_dilate"))
    at = np.arange(out)[:, None] * stride - low + np.arange(kernel) * step
    return int(np.sum((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)))


def traffic(program: Program, computation: str, i: Instruction) -> int:
    """Returns the bytes that an instruction reads from and writes to HBM; a slice counts, not the array it is of."""
    named = program.named(computation)
    if i.opcode == "custom-call" and any(f'"{name}"' in i.attributes for name in _ALIASES):
        return 0
    results = [s for s in i.result if s.space == 0]
    reads = [named[o].result[0] for o in i.operands if o in named and named[o].opcode not in ("tuple", "constant")]
    if i.opcode == "copy-start":
        return sum(s.bytes for s in i.result[:2] if s.space == 0)
    if i.opcode in ("slice-start", "dynamic-slice-start"):
        whole, piece = i.result[0], i.result[1]
        return piece.bytes * ((whole.space == 0) + (piece.space == 0))
    if i.opcode in ("slice", "dynamic-slice", "gather"):
        return (2 if reads[0].space == 0 else 1) * sum(s.bytes for s in results)
    if i.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * reads[-1 if i.opcode == "scatter" else 1].bytes if results else 0
    if i.opcode == "fusion":
        return _fusion_traffic(program, i, reads_of=[named.get(o) for o in i.operands])
    if i.opcode.endswith("-start"):
        results = results[-1:]
    return sum(s.bytes for s in results) + sum(s.bytes for s in reads if s.space == 0)


def _fusion_traffic(program: Program, i: Instruction, reads_of: Sequence[Instruction | None]) -> int:
    name = i.called("calls") or ""
    inside = program.named(name)
    written = sum(_written(inside, s, root) for s, root in _roots(program, name, i) if s.space == 0)
    read = 0
    for number, source in enumerate(reads_of):
        parameter = _parameter(inside, number)
        if source is None or parameter is None or parameter.result[0].space != 0 or source.opcode == "constant":
            continue
        read += _read(program, inside, parameter)
    return written + read


def _parameter(inside: Mapping[str, Instruction], number: int) -> Instruction | None:
    """Returns a parameter of a computation by its number."""
    return next((p for p in inside.values() if p.attributes.startswith(f"parameter({number})")), None)


def _roots(program: Program, computation: str, i: Instruction) -> Iterator[tuple[ArrayShape, Instruction]]:
    """Yields each result of a fusion with the instruction inside that makes it."""
    root = program.computations[computation][-1]
    named = program.named(computation)
    parts = [named[o] for o in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) == len(i.result):
        yield from zip(i.result, parts, strict=True)
    else:
        yield from ((s, root) for s in i.result)


def _written(inside: dict[str, Instruction], shape: ArrayShape, root: Instruction) -> int:
    """Returns the bytes of a result that are written: of an array that is updated in place, the new piece."""
    while root.opcode in ("bitcast", "copy", "convert") and root.operands and root.operands[0] in inside:
        root = inside[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return inside[root.operands[1]].result[0].bytes
    return shape.bytes


def _read(program: Program, inside: Mapping[str, Instruction], x: Instruction) -> int:
    """Returns the bytes of a fusion's input that are read: of an array that is only sliced, the slices."""
    pieces = 0
    for user in (i for i in inside.values() for operand in i.operands if operand == x.name):
        if user.opcode == "bitcast":
            piece = _read(program, inside, user)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == x.name:
            piece = user.result[0].bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == x.name:
            piece = 0
        elif user.opcode == "fusion":
            inner = program.named(user.called("calls") or "")
            parameter = _parameter(inner, user.operands.index(x.name))
            if parameter is not None and _is_view(inner, program.computations[user.called("calls") or ""][-1]):
                piece = _read(program, inside, user)  # the array itself, by another shape
            else:
                piece = x.result[0].bytes if parameter is None else _read(program, inner, parameter)
        else:
            return x.result[0].bytes
        pieces += piece
    return min(pieces, x.result[0].bytes)


def _is_view(inside: Mapping[str, Instruction], root: Instruction) -> bool:
    """Returns whether a computation only gives its parameter another shape."""
    while root.opcode == "bitcast" and root.operands and root.operands[0] in inside:
        root = inside[root.operands[0]]
    return root.opcode == "parameter"
