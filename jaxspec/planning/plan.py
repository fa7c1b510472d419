"""Plans for TPUs that are not here: memory, arithmetic, messages and time, read from the compiled programs."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxspec.data.draft_vocab import load_maps
from jaxspec.decoding.rounds import DraftVocab, Engine, Weights
from jaxspec.distillation.compilers import lower_step
from jaxspec.distillation.step import init_state, train_step
from jaxspec.distillation.task import Batch, Frozen, Task, TrainState, read_tables
from jaxspec.interchange.exported import is_exported
from jaxspec.interchange.hf_config import read_config
from jaxspec.interchange.target_folders import target_folder
from jaxspec.nn.quantization import quantize_layers
from jaxspec.parallel.mesh import ROW_AXES, batch_sharding
from jaxspec.planning import decode_program, hlo
from jaxspec.planning.chips import Chip, chip_of, device_part, network_bandwidth
from jaxspec.planning.cost import cost_of
from jaxspec.planning.flops import count_flops
from jaxspec.targets.decoder import SHAPES, Decoder, LlamaConfig
from jaxspec.training.resolve import DistillStep
from jaxspec.trees import cut_tree, parse_tree

PARTS = ("target", "drafter", "optimizer", "activations", "caches")


class Memory(NamedTuple):
    """Bytes of one chip's HBM."""

    target: int
    drafter: int
    """The fp32 masters."""
    optimizer: int
    activations: int
    """All that is not held between steps: activations, gradients, gathered weights, the batch, the program itself."""
    caches: int
    total: int
    """Most bytes held at one time; where they do not fit, XLA's own number."""
    capacity: int


class Costs(NamedTuple):
    """One step of the compiled program on one device."""

    flops: float
    model_flops: float
    """Without recomputation."""
    bytes: float
    computing: float
    """Seconds of instructions bound by arithmetic."""
    moving: float
    """Seconds of those bound by HBM."""
    sending: dict[str, float]
    """Seconds of messages, by the mesh axes that they travel along, joined by `+`."""
    collective_bytes: dict[str, float]
    """Bytes that a device sends, likewise."""
    largest_message: str
    """The largest array in any message."""

    @property
    def network(self) -> float:
        """Seconds of all messages, one after another."""
        return sum(self.sending.values())

    @property
    def roofline(self) -> float:
        """Seconds of a step whose messages all hide behind its work, or its work behind them."""
        return max(self.computing + self.moving, self.network)

    @property
    def bound_by(self) -> str:
        """`compute`, `memory`, or `network` with the axes that take longest."""
        if self.network > self.computing + self.moving:
            return f"network ({max(self.sending, key=self.sending.__getitem__)})"
        return "compute" if self.computing >= self.moving else "memory"


class StepPlan(NamedTuple):
    """A training step on a slice."""

    mesh: dict[str, int]
    chips: int
    memory: Memory
    costs: Costs | None
    """None where the step does not fit."""
    tokens: int
    """Of a step, padding included."""
    peak_flops: float
    """Of one device."""
    devices_per_chip: int
    """As JAX counts them."""
    why: str = ""
    """XLA's message where it does not fit."""

    @property
    def fits(self) -> bool:
        """Returns whether XLA could place the step in HBM."""
        return self.costs is not None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs a second at the roofline, by the peak."""
        return self.costs and self.costs.model_flops / self.costs.roofline / self.peak_flops

    @property
    def tokens_per_second(self) -> float | None:
        """Of all chips, at the roofline."""
        return self.costs and self.tokens / self.costs.roofline

    def chip_hours(self, steps: int) -> float | None:
        """Of so many steps, at the roofline."""
        return self.costs and steps * self.costs.roofline * self.chips / 3600

    @property
    def advice(self) -> str:
        """Advice on what to change, by what binds."""
        if self.costs is None:
            return (
                "spread weights over more chips (mesh.fsdp, mesh.tensor), take fewer rows a step (data.batch) or "
                "shorter ones (data.length), or smaller pieces of logits (objective.chunk)"
            )
        if self.costs.bound_by.startswith("network"):
            return (
                "take more rows a step (data.batch), or spread weights over fewer chips (mesh.fsdp) and rows over more"
            )
        if self.costs.bound_by == "memory":
            return "take more rows a step (data.batch), or larger pieces of logits (objective.chunk)"
        return "nothing on this slice: the matmuls set the time"


class DecodePlan(NamedTuple):
    """Speculative decoding on a slice."""

    chips: int
    memory: Memory
    why: str = ""
    """The reason where it does not fit."""

    @property
    def fits(self) -> bool:
        """Returns whether XLA could place the program in HBM."""
        return not self.why


def target_shape(name: str) -> LlamaConfig:
    """Returns the shape of a target that may not be here: that of its folder, or the known one of the folder's name."""
    folder = target_folder(name)
    if (folder / "config.json").is_file() or is_exported(folder):
        return read_config(folder)
    if Path(name).name in SHAPES:
        return SHAPES[Path(name).name]
    raise ValueError(
        f"target {name!r}: there is no such folder, and no shape is called so; give a folder with its config.json "
        f"(weights are not needed), or one of {', '.join(SHAPES)}"
    )


def scored_tokens(path: str | None, vocab: int, given: int | None = None) -> int | None:
    """Returns how many tokens a drafter scores: `given`, or those of its draft vocabulary's file; None for all.

    ValueError where the file is not here, and no number is given.
    """
    if given is not None or path is None:
        return given
    if not Path(path).exists():
        raise ValueError(
            f"the drafter scores the tokens of {path}, which is not here: make it (jaxspec draft-vocab), "
            "or say how many they are (--draft-vocab 32000)"
        )
    return len(load_maps(path, vocab))


def plan_step(step: DistillStep, topology: str, scored: int | None = None) -> StepPlan:
    """Returns the plan of a training step whose mesh is over a TPU slice such as `v5p:4x4x8`, or over several.

    The step is compiled and its program is read; the target's weights are not needed, and nothing is allocated.
    `scored` is the number of tokens that the drafter scores, where it scores not all. ValueError where mesh, batch and
    shapes do not fit together.
    """
    chip, mesh = chip_of(topology), step.mesh
    arguments = abstract_arguments(step, scored)
    frozen, state, batch = arguments
    parts = [_bytes_held(part) for part in (frozen.params, state.params, state.optimizer)]
    common = {"mesh": dict(mesh.shape), "chips": mesh.size // chip.cores, "tokens": math.prod(batch.tokens_BL.shape)}
    common |= {"peak_flops": device_part(chip).flops, "devices_per_chip": chip.cores}
    lowered = lower_step(step.compiler, mesh, step.task, step.optimizer, *arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = _memory(chip, parts, max(_named_bytes(str(error)), sum(parts)))
        return StepPlan(**common, memory=memory, costs=None, why=str(error).splitlines()[0])
    memory = _memory(chip, parts, peak_bytes(compiled))
    program = hlo.parse(compiled.as_text() or "")
    # FLOPs within an attention kernel cannot be counted: they are counted of the plain attention.
    target, drafter = (module.clone(kernel="xla") for module in _modules(step.task))
    countable = Task(target, drafter, step.task.objective)
    model = count_flops(functools.partial(train_step, countable, step.optimizer), *arguments).model / mesh.size
    return StepPlan(**common, memory=memory, costs=read_costs(program, mesh, topology, model))


def _modules(task: Task) -> tuple[Any, Any]:
    return task.target, task.drafter


def plan_decoding(
    shape: LlamaConfig,
    drafter: Any,
    topology: str,
    *,
    tree: str,
    batch: int,
    capacity: int,
    scored: int | None = None,
) -> DecodePlan:
    """Returns the plan of `batch` prompts' rounds of decoding, in bf16, the target spread over a slice.

    The tree is cut where the drafter drafts less deep. ValueError where mesh and shapes do not fit together.
    """
    chip, size = chip_of(topology), decode_program.tpu_mesh(topology, data=-1).size
    tensor = math.gcd(size, shape.kv_heads)
    mesh = decode_program.tpu_mesh(topology, data=size // tensor, tensor=tensor)
    bf16 = jnp.bfloat16
    drafter = drafter.clone(dtype=bf16)
    target = Decoder(shape, stacked=False, dtype=bf16, param_dtype=bf16, taps=drafter.taps)
    policy = parse_tree(tree)
    policy = policy if drafter.deepest is None else cut_tree(policy, drafter.deepest)
    weights = jax.eval_shape(functools.partial(_init_weights, target, drafter, scored))
    trees = weights.target, (weights.drafter, weights.vocab)
    held = [_bytes_held(decode_program.place(mesh, arrays)) for arrays in trees]
    chips = size // chip.cores
    try:
        found = decode_program.plan_rounds(
            Engine(target, drafter, policy), weights, mesh, batch=batch, capacity=capacity
        )
    except ValueError as problem:
        if "does not fit a chip" not in str(problem):
            raise
        needed = max(sum(held), _named_bytes(str(problem)))
        return DecodePlan(chips, _decode_memory(chip, held, 0, needed), str(problem))
    return DecodePlan(chips, _decode_memory(chip, held, found.cache_bytes, found.peak))


def _init_weights(target: Decoder, drafter: Any, scored: int | None) -> Weights:
    """Fresh weights of both models, the drafter's in bf16."""
    key = jax.random.key(0)
    params = target.init_params(key)
    shared = target.shared_tables(params)
    token_U = None if scored is None else jnp.arange(scored)
    vocab = None if token_U is None else DraftVocab(token_U, shared.head_VD[token_U])
    drafting = jax.tree.map(lambda a: a.astype(jnp.bfloat16), drafter.init_params(key, shared))
    return Weights(params, drafting, vocab)


def _decode_memory(chip: Chip, held: list[int], caches: int, total: int) -> Memory:
    """Of a chip, from a device's: `held` by target and drafter, by the caches, in all."""
    target, drafter, caches, total = (chip.cores * size for size in (*held, caches, total))
    rest = max(0, total - caches - target - drafter)
    return Memory(target, drafter, 0, rest, caches, total, chip.hbm_bytes)


def abstract_arguments(step: DistillStep, scored: int | None) -> tuple[Frozen, TrainState, Batch]:
    """Returns the arguments of a step as shapes that lie on its mesh."""
    mesh, (target, drafter) = step.mesh, _modules(step.task)
    key = jax.random.key(0)
    params = jax.eval_shape(target.init_params, key)
    if step.int8_target:
        params = jax.eval_shape(quantize_layers, params)
    ids: Any = scored and jax.ShapeDtypeStruct((scored,), jnp.int32)
    frozen = Frozen(params, ids)
    state = jax.eval_shape(lambda f: init_state(drafter, step.optimizer, key, read_tables(target, f)), frozen)
    if step.rows[0] % (spread := math.prod(mesh.shape[axis] for axis in ROW_AXES)):
        raise ValueError(
            f"data.batch is {step.rows[0]}, and the mesh spreads rows over {spread} devices: let it be a multiple"
        )
    integers: Any = jax.ShapeDtypeStruct(step.rows, jnp.int32, sharding=batch_sharding(mesh))
    flags: Any = jax.ShapeDtypeStruct(step.rows, jnp.bool_, sharding=batch_sharding(mesh))
    frozen, state = decode_program.place(mesh, (frozen, state))
    return frozen, state, Batch(integers, integers, integers, flags)


def read_costs(program: hlo.Program, mesh: Mesh, topology: str, model_flops: float) -> Costs:
    """Returns the costs of a compiled program on each device of a mesh over slices of this topology."""
    chip = device_part(chip_of(topology))
    cost = cost_of(program, flops_per_second=functools.partial(_rate, chip), bytes_per_second=chip.hbm_bandwidth)
    shape = [int(n) for n in topology.partition(":")[2].split("x")]
    seconds: dict[str, float] = {}
    sent: dict[str, float] = {}
    for message, count in cost.sent.items():
        axes = "+".join(mesh_axes(mesh, message.group)) or "chip"
        within = [mesh.devices.flat[i] for i in message.group]
        taken = message.bytes / network_bandwidth(chip, within, [*shape, 1][:3])
        seconds[axes] = seconds.get(axes, 0.0) + count * taken
        sent[axes] = sent.get(axes, 0.0) + count * message.bytes
    largest = max((m.largest for m in cost.sent), key=lambda s: s.bytes, default="")
    return Costs(cost.flops, model_flops, cost.bytes, cost.computing, cost.moving, seconds, sent, str(largest))


def mesh_axes(mesh: Mesh, group: tuple[int, ...]) -> list[str]:
    """Returns the mesh axes along which some of its devices differ."""
    places = np.unravel_index(np.asarray(group), mesh.devices.shape)
    return [name for name, at in zip(mesh.axis_names, places, strict=True) if len(set(at.tolist())) > 1]


def _rate(chip: Chip, matmul: hlo.Instruction) -> float:
    """Peak rate of a matmul; XLA's default precision makes bf16 of fp32, and integers have their own rate."""
    return chip.int8_ops if matmul.result[0].kind == "s32" else chip.flops


def peak_bytes(compiled: Any) -> int:
    """Returns the most bytes that a device holds at one time."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return max(
        getattr(memory, "peak_memory_in_bytes", 0),
        held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
    )


def _bytes_held(tree: Any) -> int:
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _memory(chip: Chip, parts: list[int], total: int) -> Memory:
    """Of a chip, from a device's."""
    n = chip.cores
    target, drafter, optimizer = (n * part for part in parts)
    return Memory(target, drafter, optimizer, n * (total - sum(parts)), 0, n * total, chip.hbm_bytes)


def _named_bytes(message: str) -> int:
    """`Used 20.1G of 15.75G hbm` in bytes; 0 where XLA says no number."""
    used = re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    return int(float(used[1]) * 2 ** (10 * " KMGT".index(used[2] or " "))) if used else 0
