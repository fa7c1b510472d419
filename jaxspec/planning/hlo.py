"""Reading a compiled program: its instructions, how often each runs, and what it computes, moves and sends.

XLA's own `cost_analysis` counts a loop's body once and all branches of a conditional; here loops count by their trips
and conditionals by their dearest branch. What is read is one device's program, `Compiled.as_text()`.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "ragged-all-to-all")
ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}
"""Bits of an element where the type's name does not end in them."""

# An instruction is `%name = shape opcode(operands), attributes`; a shape ends in `{layout}`, where `S(1)` marks on-chip
# memory. Tuples of shapes stand in parentheses.
_NAME = re.compile(r"^\s+(?:ROOT )?%(\S+) = ")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(r"(?:body|condition|to_apply|true_computation|false_computation|calls)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Shape(NamedTuple):
    """An array of a compiled program."""

    kind: str
    """Element type, such as `bf16`."""
    dims: tuple[int, ...]
    space: int
    """Memory: 0 is the device's own (HBM), 1 on chip."""

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of tiles."""
        bits = ITEM_BITS.get(self.kind)
        if bits is None:
            digits = re.match(r"\D*(\d+)", self.kind)
            bits = int(digits[1]) if digits else 0
        return -(-self.size * bits // 8)

    def __str__(self) -> str:
        return f"{self.kind}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    opcode: str
    result: tuple[Shape, ...]
    """One, or the parts of a tuple, flattened."""
    operands: tuple[str, ...]
    attributes: str
    """All behind the operands, as XLA writes it."""

    @property
    def kind(self) -> str:
        """The opcode, `-start` left out."""
        return self.opcode.removesuffix("-start")

    def called(self, key: str) -> str | None:
        """The computation that the attribute `key` names."""
        match = re.search(rf"\b{key}=%([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @property
    def all_called(self) -> list[str]:
        """Every computation it names: bodies, conditions, branches, reductions, fusions."""
        branches = [b.strip().lstrip("%") for group in _BRANCHES.findall(self.attributes) for b in group.split(",")]
        return _CALLED.findall(self.attributes) + branches


@dataclass(frozen=True)
class Program:
    """The computations of a compiled program, by name."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    devices: int = 1
    """That run it together."""
    _named: dict[str, dict[str, Instruction]] = field(default_factory=dict)

    def named(self, computation: str) -> dict[str, Instruction]:
        """The instructions of a computation by name."""
        if computation not in self._named:
            self._named[computation] = {i.name: i for i in self.computations[computation]}
        return self._named[computation]

    def trips(self, loop: Instruction) -> int:
        """How often the body of a `while` runs.

        ValueError where its condition compares with no constant: the trips are not known when it is compiled.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        waiting, bounds = [loop.called("condition")], []
        while waiting:
            name = waiting.pop()
            for i in self.computations.get(name or "", ()):
                whole = i.opcode == "constant" and i.result[0].kind in ("s32", "s64", "u32", "u64")
                bound = re.match(r"constant\((\d+)\)", i.attributes) if whole else None
                if bound:
                    bounds.append(int(bound[1]))
                waiting += i.all_called
        if not bounds:
            raise ValueError(f"loop %{loop.name}: its trips are not known before it runs")
        return max(bounds)


def parse(text: str) -> Program:
    """The program that `Compiled.as_text()` describes."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            words = line.split()
            name = words[1 if words[0] == "ENTRY" else 0].lstrip("%")
            entry = name if words[0] == "ENTRY" else entry
            lines = computations.setdefault(name, [])
        elif match := _NAME.match(line):
            lines.append(_instruction(match[1], line[match.end() :]))
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    devices = int(partitions[1]) if partitions else 1
    return Program({name: tuple(lines) for name, lines in computations.items()}, entry, devices)


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    assert opcode is not None, rest[:80]
    close = _closing(rest, opcode.end() - 1)
    operands, attributes = rest[opcode.end() : close - 1], rest[close:].lstrip(", ")
    if opcode[1] in ("constant", "parameter"):
        attributes = f"{opcode[1]}({operands}) {attributes}"
    return Instruction(name, opcode[1], shapes_of(rest[:end]), tuple(re.findall(r"%([\w.\-]+)", operands)), attributes)


def _closing(text: str, begin: int) -> int:
    """The place behind the parenthesis that closes the one at `begin`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, begin):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"no closing parenthesis in {text[begin : begin + 80]!r}")


def shapes_of(text: str) -> tuple[Shape, ...]:
    """The shapes written in a piece of a program."""
    found = []
    for kind, dims, layout in _SHAPE.findall(text):
        space = _SPACE.search(layout)
        found.append(Shape(kind, tuple(int(d) for d in dims.split(",") if d), int(space[1]) if space else 0))
    return tuple(found)


# What it costs.


class Message(NamedTuple):
    """What one device sends in a collective."""

    kind: str
    group: tuple[int, ...]
    """Devices that take part with device 0's group, as places in the mesh, in order."""
    bytes: int
    """Over its links, at the least: of `n` that take part it sends `(n - 1) / n` of the whole, twice that to reduce
    and spread."""
    largest: Shape
    """The largest array in it."""


@dataclass(frozen=True)
class Cost:
    """What instructions take together."""

    flops: float = 0.0
    """Of matmuls and convolutions, two a multiplication and addition."""
    bytes: float = 0.0
    """Read from and written to HBM."""
    computing: float = 0.0
    """Seconds of instructions that arithmetic holds up."""
    moving: float = 0.0
    """Seconds of those that memory holds up."""
    sent: Counter[Message] = field(default_factory=Counter)
    """Collectives, and how often each is done."""

    @property
    def seconds(self) -> float:
        """Each instruction at the slower of arithmetic and memory, one after another; collectives apart."""
        return self.computing + self.moving

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.computing + other.computing,
            self.moving + other.moving,
            self.sent + other.sent,
        )

    def __mul__(self, count: int) -> Cost:
        sent = Counter({message: n * count for message, n in self.sent.items()})
        return Cost(self.flops * count, self.bytes * count, self.computing * count, self.moving * count, sent)


_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota", "add-dependency", "domain", "get-dimension-size",
}  # fmt: skip
_ALIASES = ("ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding", "AllocateBuffer", "MoveToHost", "MoveToDevice")
"""Custom calls that move nothing."""


def cost_of(program: Program, *, flops_per_second: Callable[[Instruction], float], bytes_per_second: float) -> Cost:
    """What one run of the program takes. `flops_per_second` of a matmul or convolution may depend on its types.

    ValueError where a loop's trips are not known.
    """

    @functools.cache
    def of_computation(name: str) -> Cost:
        return functools.reduce(Cost.__add__, (of(name, i) for i in program.computations[name]), Cost())

    def of(computation: str, i: Instruction) -> Cost:
        if i.opcode in _FREE or i.opcode.endswith("-done"):
            return Cost()
        if i.opcode == "while":
            body, condition = i.called("body"), i.called("condition")
            assert body and condition
            return (of_computation(body) + of_computation(condition)) * program.trips(i)
        if i.opcode == "conditional":
            return max((of_computation(name) for name in i.all_called), key=lambda c: (c.seconds, c.bytes))
        if i.opcode in ("call", "async-start"):
            return of_computation(i.called("to_apply") or i.called("calls") or "")
        arithmetic = matmuls(program, i)
        flops, busy = 0.0, 0.0
        for matmul, count in arithmetic:
            flops += count
            busy += count / flops_per_second(matmul)
        moved = float(traffic(program, computation, i))
        sent = Counter(m for _, inner in _with_inside(program, i) if (m := message_of(inner, program.devices)))
        waiting = moved / bytes_per_second
        held_up = (busy, 0.0) if busy >= waiting else (0.0, waiting)
        return Cost(flops, moved, *held_up, sent)

    return of_computation(program.entry)


def message_of(i: Instruction, devices: int) -> Message | None:
    """What a collective among `devices` sends; None for other instructions, and where nobody else takes part."""
    if i.kind not in COLLECTIVES:
        return None
    group = _group(i.attributes, devices)
    results = i.result
    if i.opcode.endswith("-start") and i.kind != "all-reduce":  # operands stand in front
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


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The devices of the group that device 0 is in. ValueError where XLA writes groups in none of the ways known."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(pairs[1]), int(pairs[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        chosen = re.findall(r"'([^']+)'", mesh[2])
        places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return tuple(places[tuple(slice(None) if name in chosen else 0 for name in sizes)].ravel().tolist())
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        dims = [int(d) for d in iota[3].split(",")]
        order = [int(d) for d in iota[4].split(",")] if iota[4] else list(range(len(dims)))
        places = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(int(iota[1]), int(iota[2]))
        return tuple(sorted(next(row for row in places.tolist() if 0 in row)))
    listed = re.search(r"replica_groups=\{([\d,{}]*)\}", attributes)
    if listed is None:
        raise ValueError(f"the groups of a collective are written in a way that is not known: {attributes[:120]}")
    groups = [[int(d) for d in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])]
    return tuple(next((g for g in groups if 0 in g), range(devices)))  # none listed: all together


def _with_inside(program: Program, i: Instruction) -> Iterator[tuple[str | None, Instruction]]:
    """An instruction, and of a fusion all that is in it; each with its computation where that is not the caller's."""
    yield None, i
    if i.opcode == "fusion":
        name = i.called("calls") or ""
        for inner in program.computations.get(name, ()):
            for place, found in _with_inside(program, inner):
                yield place or name, found


def matmuls(program: Program, i: Instruction) -> list[tuple[Instruction, float]]:
    """Every matmul and convolution of an instruction, those inside a fusion too, with its FLOPs."""
    found = []
    for place, inner in _with_inside(program, i):
        if inner.opcode in ("dot", "convolution"):
            named = program.named(place) if place else None
            found.append((inner, _flops(program, inner, named)))
        elif inner.name.startswith("splash_mha"):
            found.append((inner, _splash_flops(inner, program)))
    return found


def _splash_flops(i: Instruction, program: Program) -> float:
    """Of a splash attention kernel with a causal mask, which is opaque: half the scores of each of its matmuls.

    Forward two, for scores and values; backward they are made again and lead to keys and values, and in a fused kernel
    to queries too. Of keys behind as many as there are queries, each query's own, the mask's blocks on their diagonal.
    """
    named = next(n for name in program.computations if i.name in (n := program.named(name)))
    shapes = [named[o].result[0] for o in i.operands if o in named]
    queries, keys = [s.dims for s in shapes if "f" in s.kind][:2]
    fused = any(len(s.dims) > len(queries) for s in i.result)  # queries' gradients of each block of keys
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
    """Places along one axis of a convolution where output, kernel and a real element of the input meet."""

    def number(name: str, default: int) -> int:
        return int(window[name][axis]) if name in window else default

    low = int(window["pad"][axis].split("_")[0]) if "pad" in window else 0
    spread = number("lhs_dilate", 1)
    at = np.arange(out)[:, None] * number("stride", 1) - low + np.arange(kernel) * number("rhs_dilate", 1)
    return int(np.sum((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)))


def traffic(program: Program, computation: str, i: Instruction) -> int:
    """Bytes that an instruction reads from and writes to HBM; of what it only cuts out of or into, that piece alone."""
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


def _fusion_traffic(program: Program, i: Instruction, reads_of: list[Instruction | None]) -> int:
    name = i.called("calls") or ""
    inside = program.named(name)
    users: dict[str, list[Instruction]] = {}
    for inner in inside.values():
        for operand in inner.operands:
            users.setdefault(operand, []).append(inner)
    written = sum(_written(inside, s, root) for s, root in _roots(program, name, i) if s.space == 0)
    read = 0
    for number, source in enumerate(reads_of):
        parameter = next((p for p in inside.values() if p.attributes.startswith(f"parameter({number})")), None)
        if source is None or parameter is None or parameter.result[0].space != 0 or source.opcode == "constant":
            continue
        read += _read(program, inside, users, parameter)
    return written + read


def _roots(program: Program, computation: str, i: Instruction) -> Iterator[tuple[Shape, Instruction]]:
    """Each result of a fusion with the instruction inside that makes it."""
    root = program.computations[computation][-1]
    named = program.named(computation)
    parts = [named[o] for o in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) == len(i.result):
        yield from zip(i.result, parts, strict=True)
    else:
        yield from ((s, root) for s in i.result)


def _written(inside: dict[str, Instruction], shape: Shape, root: Instruction) -> int:
    """Bytes of a result: of one that is updated in place, the piece that is new."""
    while root.opcode in ("bitcast", "copy", "convert") and root.operands and root.operands[0] in inside:
        root = inside[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return inside[root.operands[1]].result[0].bytes
    return shape.bytes


def _read(program: Program, inside: dict[str, Instruction], users: dict[str, list[Instruction]], x: Instruction) -> int:
    """Bytes of a fusion's input that are read: of one that is only cut from, the pieces."""
    pieces = 0
    for user in users.get(x.name, []):
        if user.opcode == "bitcast":
            piece = _read(program, inside, users, user)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == x.name:
            piece = user.result[0].bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == x.name:
            piece = 0
        elif user.opcode == "fusion":
            name = user.called("calls") or ""
            inner, number = program.named(name), user.operands.index(x.name)
            parameter = next((p for p in inner.values() if p.attributes.startswith(f"parameter({number})")), None)
            inner_users: dict[str, list[Instruction]] = {}
            for instruction in inner.values():
                for operand in instruction.operands:
                    inner_users.setdefault(operand, []).append(instruction)
            piece = x.result[0].bytes if parameter is None else _read(program, inner, inner_users, parameter)
        else:
            return x.result[0].bytes
        pieces += piece
    return min(pieces, x.result[0].bytes)
