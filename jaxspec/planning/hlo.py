"""Reading of compiled programs, `Compiled.as_text()`: the instructions of one device, and the trips of loops."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "ragged-all-to-all")
ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}
"""Bits of an element of a type, if its name does not end in them."""

# An instruction is `%name = shape opcode(operands), attributes`; a shape ends in `{layout}`, where `S(1)` marks on-chip
# memory. Tuples of shapes stand in parentheses.
_NAME = re.compile(r"^\s+(?:ROOT )?%(\S+) = ")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(r"(?:body|condition|to_apply|true_computation|false_computation|calls)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class ArrayShape(NamedTuple):
    """An array of a compiled program."""

    kind: str
    """Element type, such as `bf16`."""
    dims: tuple[int, ...]
    space: int
    """Memory space: 0 is the device's own (HBM), 1 is on chip."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without the padding of tiles."""
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
    result: tuple[ArrayShape, ...]
    """Its shape, or those of the parts of a tuple, flattened."""
    operands: tuple[str, ...]
    attributes: str
    """The text after the operands, as XLA writes it."""

    @property
    def kind(self) -> str:
        """The opcode without `-start`."""
        return self.opcode.removesuffix("-start")

    def called(self, key: str) -> str | None:
        """Returns the computation that the attribute `key` names; None if it has none."""
        match = re.search(rf"\b{key}=%([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @property
    def all_called(self) -> list[str]:
        """Every computation that it names: bodies, conditions, branches, reductions, fusions."""
        branches = [b.strip().lstrip("%") for group in _BRANCHES.findall(self.attributes) for b in group.split(",")]
        return _CALLED.findall(self.attributes) + branches


@dataclass(frozen=True)
class Program:
    """The computations of a compiled program, by name."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    devices: int = 1
    """Number of devices that run it together."""
    _named: dict[str, dict[str, Instruction]] = field(default_factory=dict)

    def named(self, computation: str) -> dict[str, Instruction]:
        """Returns the instructions of a computation by name."""
        if computation not in self._named:
            self._named[computation] = {i.name: i for i in self.computations[computation]}
        return self._named[computation]

    def trips(self, loop: Instruction) -> int:
        """Returns how often the body of a `while` runs.

        Raises ValueError if its condition compares with no constant, because then the trips are not known.
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
    """Returns the program of a text from `Compiled.as_text()`."""
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
    """Returns the place after the parenthesis that closes the one at `begin`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, begin):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"no closing parenthesis in {text[begin : begin + 80]!r}")


def shapes_of(text: str) -> tuple[ArrayShape, ...]:
    """Returns the shapes written in a piece of a program."""
    found = []
    for kind, dims, layout in _SHAPE.findall(text):
        space = _SPACE.search(layout)
        found.append(ArrayShape(kind, tuple(int(d) for d in dims.split(",") if d), int(space[1]) if space else 0))
    return tuple(found)
