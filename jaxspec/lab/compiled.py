"""Costs of the parts of a round by what a compiler makes of them, for a chip that need not be here.

An operation takes the longer of its HBM traffic at the chip's bandwidth and its arithmetic: on TPUs the cycles that the
compiler estimates at a clock, on CPUs its FLOPs at a measured rate. Of a GPU, which must be here, the compiler gives
the FLOPs and bytes of the whole program alone.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxspec.lab.cpu_rates import CpuRates
from jaxspec.lab.devices import CPU, DevicePeaks
from jaxspec.lab.round_parts import Grid, PartPrograms, Point, sampling_at
from jaxspec.lab.shapes import layer_period, shortened
from jaxspec.parallel.mesh import make_mesh, replicated
from jaxspec.planning import hlo
from jaxspec.planning.chips import Chip, chip_of, device_part, network_bandwidth
from jaxspec.planning.cost import Cost, cost_of
from jaxspec.planning.decode_program import abstract_state, place, tpu_mesh
from jaxspec.serving.loading import Models

ONE_CHIP = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""A slice that libtpu describes, of which one device is compiled for."""
CLOCK_SIZE = 8192
CLOCK_DOUBT = 0.15
"""The calibrated clock supposes that a large square matmul runs at the chip's peak rate."""
SHORT = 2
"""Layers of the smaller program of two between which layers are extrapolated; the other has twice as many."""
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')


class Machine(NamedTuple):
    """The device that programs are compiled for, and its rates a second."""

    name: str
    bandwidth: float
    flops: Callable[[hlo.Instruction], float]
    """Rate of a matmul."""
    clock: float | None = None
    """Cycles a second; None where the compiler estimates none."""
    mesh: Mesh | None = None
    """None: the device that JAX computes on here."""
    topology: str = ""
    peak: float | None = None
    """FLOPs a second at which the compiler's totals of a program are taken, where its instructions say too little."""

    @property
    def method(self) -> str:
        """A sentence on how the figures are made."""
        if self.peak is not None:
            return (
                "FLOPs and bytes of the whole program by the compiler's cost analysis, at the device's peak rates: it "
                "estimates no cycles, and counts the body of a loop once"
            )
        arithmetic = "FLOPs at a rate measured here" if self.clock is None else "the compiler's cycles at a clock"
        return f"each operation at the slower of its memory traffic and its arithmetic: {arithmetic}"


class Priced(NamedTuple):
    """The cost of a program, messages included."""

    cost: Cost
    network: float = 0.0
    """Seconds of messages between chips."""

    def seconds(self, bandwidth: float) -> float:
        """Returns the time of a run.

        Copies that run behind other instructions cost nothing unless HBM is the limit: then all traffic is.
        """
        c = self.cost
        return max(c.computing + c.moving - c.behind, c.bytes / bandwidth) + self.network


def seconds_of_layers(short: Priced, long: Priced, layers: tuple[int, int, int], bandwidth: float) -> float:
    """Returns the seconds of a program of `layers[2]` layers, from those of `layers[0]` and `layers[1]` layers.

    Every part of the cost is linear in the layers.
    """
    first, second, wanted = layers
    share = 0.0 if first == second else (wanted - first) / (second - first)
    names = ("flops", "bytes", "computing", "moving", "behind")
    at: dict[str, Any] = {name: _between(getattr(short.cost, name), getattr(long.cost, name), share) for name in names}
    return Priced(Cost(**at), _between(short.network, long.network, share)).seconds(bandwidth)


def _between(a: float, b: float, share: float) -> float:
    return a + (b - a) * share


def tpu_machine(device: str, clock: float | None = None) -> Machine:
    """Returns a TPU by its chip's name, for one device of it, or by a topology such as `v6e:2x4`, for all its chips.

    The target is then spread over them. Without `clock` that is calibrated. Raises ModuleNotFoundError without libtpu,
    and ValueError for an unknown chip.
    """
    topology = device if ":" in device else ONE_CHIP.get(device, f"{device}:1")
    chip = device_part(chip_of(topology))
    everything = tpu_mesh(topology, data=-1)
    one = make_mesh(devices=list(everything.devices.flat[:1]))
    mesh = tpu_mesh(topology, data=1, tensor=everything.size) if ":" in device else one
    cycles = clock or clock_of(one, chip)
    return Machine(device, chip.hbm_bandwidth, functools.partial(_rate, chip), cycles, mesh, topology)


def _rate(chip: Chip, matmul: hlo.Instruction) -> float:
    return chip.int8_ops if matmul.result[0].kind == "s32" else chip.flops


def clock_of(mesh: Mesh, chip: Chip) -> float:
    """Returns the cycles a second at which a large square matmul runs at the chip's peak rate."""
    square = jax.ShapeDtypeStruct((CLOCK_SIZE, CLOCK_SIZE), jnp.bfloat16, sharding=replicated(mesh))
    program = hlo.parse(_compile(jnp.matmul, (square, square), mesh).as_text() or "")
    cycles = sum(cycles_of(i) for i in program.computations[program.entry])
    return cycles * chip.flops / (2.0 * CLOCK_SIZE**3)


def cycles_of(i: hlo.Instruction) -> int:
    """Returns the cycles that the compiler estimates for an instruction; 0 where it says none."""
    found = _CYCLES.search(i.attributes)
    return int(found[1]) if found else 0


def cpu_machine(rates: CpuRates) -> Machine:
    """Returns this machine's CPU by measured rates: few rows reach only a part of its peak."""
    rows = sorted(rates.flops_per_second)
    at = [rates.flops_per_second[n] for n in rows]
    return Machine(CPU, rates.bytes_per_second, lambda i: float(np.interp(matmul_rows(i), rows, at)))


def gpu_machine(peaks: DevicePeaks) -> Machine:
    """Returns the GPU of this machine, by the totals that the compiler counts and its vendor's peak rates."""
    return Machine(peaks.device, peaks.bandwidth, lambda i: peaks.flops, peak=peaks.flops)


def matmul_rows(matmul: hlo.Instruction) -> int:
    """Returns the smaller side of a matmul's result, of one matmul of a batch."""
    dims = matmul.result[0].dims
    batched = re.search(r"lhs_batch_dims=\{([\d,]*)\}", matmul.attributes)
    own = dims[len([d for d in batched[1].split(",") if d]) if batched else 0 :]
    return min(own, default=1) if len(own) > 1 else 1


def _compile(function: Callable[..., Any], arguments: Sequence[Any], mesh: Mesh | None, **options: Any) -> Any:
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return jax.jit(function, **options).lower(*arguments).compile()


def price_compiled(compiled: Any, machine: Machine) -> Priced:
    """Returns the cost of JAX's compiled program. Raises ValueError where the compiler does not say enough."""
    program = hlo.parse(compiled.as_text() or "")
    if machine.peak is None:
        return price(program, machine)
    # Noise is drawn in loops of little work; matmuls in one would be missed.
    loops = [i for body in program.computations.values() for i in body if i.opcode == "while"]
    for loop in loops:
        if _reached(program, loop) & {"dot", "convolution", "custom-call"}:
            raise ValueError(f"the compiler counts the body of a loop once, and %{loop.name} multiplies matrices")
    return price_totals(compiled.cost_analysis() or {}, machine.peak)


def _reached(program: hlo.Program, loop: hlo.Instruction) -> set[str]:
    """Returns the opcodes of all that a loop runs."""
    waiting, seen, found = loop.all_called, set(), set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            found |= {i.opcode for i in program.computations.get(name, ())}
            waiting += [called for i in program.computations.get(name, ()) for called in i.all_called]
    return found


def price_totals(totals: Mapping[str, float], peak: float) -> Priced:
    """Returns the cost of a program by the totals of the compiler's cost analysis, its FLOPs at the peak rate.

    Raises ValueError where it has none.
    """
    flops, moved = totals.get("flops", 0.0), totals.get("bytes accessed", 0.0)
    if not flops > 0 or not moved > 0:
        raise ValueError("the compiler says neither FLOPs nor bytes of the program: take --source roofline")
    return Priced(Cost(flops=flops, bytes=moved, computing=flops / peak))


def price(program: hlo.Program, machine: Machine) -> Priced:
    """Returns the cost of a compiled program. Raises ValueError where the trips of a loop are not known."""
    clock = machine.clock
    busy = None if clock is None else lambda i: cycles_of(i) / clock
    cost = cost_of(program, flops_per_second=machine.flops, bytes_per_second=machine.bandwidth, busy_seconds=busy)
    return Priced(cost, _network(cost, machine))


def _network(cost: Cost, machine: Machine) -> float:
    """Returns the seconds of all messages, one after another."""
    if machine.mesh is None or not cost.sent:
        return 0.0
    chip, seconds = device_part(chip_of(machine.topology)), 0.0
    shape = [*(int(n) for n in machine.topology.partition(":")[2].split("x")), 1][:3]
    for message, count in cost.sent.items():
        within = [machine.mesh.devices.flat[i] for i in message.group]
        seconds += count * message.bytes / network_bandwidth(chip, within, shape)
    return seconds


class CompiledBench:
    """Prices the parts of a round; programs of few layers are compiled, and layers extrapolated unless `exact`.

    Greedy rows and rows that draw run other programs, so the temperature is the program's own. Raises ValueError where
    the target cannot be spread over the machine's devices.
    """

    def __init__(
        self, models: Models, grid: Grid, machine: Machine, *, temperature: float = 0.0, exact: bool = False
    ) -> None:
        self.models, self.grid, self.machine = models, grid, machine
        devices = 1 if machine.mesh is None else machine.mesh.size
        if models.config.kv_heads % devices:
            raise ValueError(
                f"--device {machine.name} has {devices} devices, over which {models.config.kv_heads} key-value heads "
                "cannot be spread: take a slice whose devices divide them"
            )
        self.sampling = lambda batch: sampling_at(temperature, batch)
        period, layers = layer_period(models.config), models.config.layers
        short = period * -(-SHORT // period)
        self.layers = (layers, layers) if exact or 2 * short >= layers else (short, 2 * short)
        """Layers of the programs that are compiled."""

    def points(self, batch: int, context: int) -> list[Point]:
        """Returns the parts to price at one batch and context; what they leave of the whole round becomes `rest`."""
        engine = self.models.engine
        whole = [] if engine.tree is None else [Point("round", 1, 0, batch, context)]
        return [*self.grid.points(engine, batch, context), *whole]

    def measure(self, point: Point) -> float:
        """Returns the seconds of a part. Raises ValueError where the compiler's program cannot be priced."""
        sizes = self.layers if point.part in ("plain", "verify", "commit", "round") else self.layers[:1]
        priced = [self._price(point, layers) for layers in dict.fromkeys(sizes)]
        layers = (*self.layers, self.models.config.layers) if len(priced) > 1 else (1, 1, 1)
        return seconds_of_layers(priced[0], priced[-1], layers, self.machine.bandwidth)

    def _price(self, point: Point, layers: int) -> Priced:
        models, mesh = shortened(self.models, layers), self.machine.mesh
        capacity = point.context + self.grid.room
        state = abstract_state(models.engine, models.weights, batch=point.batch, capacity=capacity, slots=64)
        program = PartPrograms(models, self.sampling).program(point, state)
        arguments = (models.weights, state, program.given, jax.ShapeDtypeStruct((), jnp.int32))
        placed = arguments if mesh is None else place(mesh, arguments)
        try:
            return price_compiled(_compile(program.step, placed, mesh, donate_argnums=1), self.machine)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(f"does not fit the device: {str(error).splitlines()[0]}") from error
