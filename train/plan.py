"""Plan a training run on a TPU slice before paying for it: memory, time and what binds, from the compiled programs.

The config's training step, and the decoding of its drafter, are compiled for the slice by libtpu; no TPU, no weights
and no data are needed (of a target that is not here, give a folder with its config.json, or call it by a known shape:
target=llama3-8b). Times are rooflines, from the chip's peak rates: what a step takes at the least.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh
from tyro.conf import Positional

from jaxspec.config import DistillConfig, load
from jaxspec.console import cli, progress, results, tables
from jaxspec.evaluation import figures
from jaxspec.parallel.agreement import say
from jaxspec.planning.chips import chip_of
from jaxspec.planning.decode_program import LIBTPU_ENVIRONMENT, tpu_mesh
from jaxspec.planning.plan import (
    PARTS,
    Costs,
    DecodePlan,
    StepPlan,
    plan_decoding,
    plan_step,
    scored_tokens,
    target_shape,
)
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.training.resolve import DistillStep, build_step, check_length, drafter_for

PROG = "jaxspec plan"
NOTES = """\
activations: all that is not held between steps, gathered weights, gradients and the program included
compute, memory: time of the instructions that matmuls and HBM hold up, one after another; network: of all messages
roofline: the longer of work and network, each hiding behind the other; no padding; nothing is faster than this
MFU: FLOPs that the mathematics asks for, recomputation left out, by the chip's peak, at the roofline
GB, TFLOP: powers of ten, except capacity, which is as the maker counts it"""


Planned = tuple[DistillConfig, StepPlan]
"""A config that was tried, and its plan."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Command line of `jaxspec plan`."""

    config: Positional[str]
    """Name of an experiment in configs/, or path of a Python file."""
    overrides: Positional[tuple[str, ...]] = ()
    """Changes such as data.batch=512 mesh.fsdp=16."""
    topology: str
    """Chip (v4, v5e, v5p, v6e, tpu7x) and shape of a slice, such as v6e:8x8 or v5p:4x4x8; mesh.slices says how many."""
    draft_vocab: int | None = None
    """Tokens that the drafter scores; needed where the config names a draft_vocab file that is not here."""
    steps: int | None = None
    """Steps of the run; default: optimizer.steps of the config."""
    sweep: tyro.conf.FlagCreatePairsOff[bool] = False
    """Try other meshes, then other batches on the best, and rank what fits. Each takes a compilation."""
    decode: str | None = None
    """Topology to decode on too, such as v6e:2x4, the target spread over all its chips; none: training alone."""
    decode_batch: int = 8
    """Prompts decoded together."""
    decode_capacity: int = 4096
    """Cache slots of each."""
    decode_tree: str = "dynamic:60x6x10"
    """Draft tree, as --tree of jaxspec generate names it."""
    plot: Path | None = None
    """Draw memory and time into this PNG."""
    json: Path | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        cli.refuse_below_one(self, "draft_vocab", "steps", "decode_batch", "decode_capacity")
        chip_of(self.topology)
        if self.decode is not None:
            chip_of(self.decode)


def main(argv: list[str]) -> int:
    """Runs the verb; returns 1 if nothing fits."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog=PROG, description=__doc__ or "")
    config = load(args.config, args.overrides)
    if not isinstance(config, DistillConfig):
        raise ValueError(f"{args.config}: holds a {type(config).__name__}, not a DistillConfig")
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    try:
        plans = list(all_plans(config, args))
    except ModuleNotFoundError as missing:
        raise ValueError(str(missing)) from missing
    ranked = sorted(plans, key=lambda planned: -(planned[1].tokens_per_second or 0))
    best, plan = ranked[0]
    decoding = None if args.decode is None else decoding_of(best, args)
    found = describe(best, plan, args)
    if len(ranked) > 1:
        found["sweep"] = [describe(tried, planned, args) for tried, planned in ranked]
    if decoding is not None:
        found["decode"] = describe_decoding(decoding)
    written = results.result("plan", config=config.name, dtype=config.dtype, seed=None, started=started, **found)
    show(ranked, decoding, found, args)
    if args.plot is not None:
        draw(args.plot, f"{config.name} on {args.topology}, {name_of(best, plan)}", plan)
    if args.json is not None:
        results.write_json(args.json, written)
    return 0 if plan.fits and (decoding is None or decoding.fits) else cli.EXIT_FAILED


class Planner:
    """Plans each mesh and batch of a config once."""

    def __init__(self, args: Args, bar: progress.Progress) -> None:
        self.args, self.bar = args, bar
        self.found: dict[Any, StepPlan | None] = {}
        """By mesh and batch; None where they do not fit together."""

    def plan(self, config: DistillConfig) -> Iterator[Planned]:
        """Yields the config and its plan, unless it has been planned before or cannot be."""
        place = (config.mesh, config.data.batch)
        if place in self.found:
            return
        try:
            planned = plan_config(config, self.args.topology, self.args.draft_vocab)
        except ValueError as problem:
            if not self.found:  # the config itself
                raise
            self.found[place] = None
            say(f"left out: {problem}")
            self.bar.advance(1, "")
            return
        self.found[place] = planned
        self.bar.advance(1, name_of(config, planned))
        yield config, planned


def all_plans(config: DistillConfig, args: Args) -> Iterator[Planned]:
    """Yields the config's plan; in a sweep, those of other meshes, and of other batches on the best of these."""
    with progress.progress("compiling", None, "programs") as bar:
        planner = Planner(args, bar)
        first = next(planner.plan(config))
        yield first
        if not args.sweep:
            return
        planner.found[on_mesh(config, first[1].mesh).mesh, config.data.batch] = None  # -1 has its number now
        meshes = [planned for tried in other_meshes(config, first[1]) for planned in planner.plan(tried)]
        yield from meshes
        best = max([first, *meshes], key=lambda planned: planned[1].tokens_per_second or 0)[0]
        for n in (1, 2, 8, 16):
            if batch := best.data.batch * n // 4:
                data = dataclasses.replace(best.data, batch=batch)
                yield from planner.plan(dataclasses.replace(best, data=data))


def plan_config(config: DistillConfig, topology: str, scored: int | None = None) -> StepPlan:
    """Returns the plan of a config's step on a slice (on each of `mesh.slices`); see `plan_step`."""
    shape = target_shape(config.target)
    axes = {name: getattr(config.mesh, name) for name in ("data", "fsdp", "tensor")}
    mesh = tpu_mesh(topology, slices=config.mesh.slices, **axes)
    scored = scored_tokens(config.draft_vocab, shape.vocab, scored)
    return plan_step(build_abstract(config, shape, mesh, scored), topology, scored)


def build_abstract(config: DistillConfig, shape: LlamaConfig, mesh: Mesh, scored: int | None) -> DistillStep:
    """Returns a config's step for a target of which only the shape is known."""
    check_length(config, shape)
    dtype = jnp.dtype(config.dtype)
    target = Decoder(shape, stacked=config.scan_layers, dtype=dtype, param_dtype=dtype)
    return build_step(config, mesh, target, drafter_for(config, shape, scored).module)


def on_mesh(config: DistillConfig, sizes: Mapping[str, int]) -> DistillConfig:
    """Returns the config with these sizes of mesh axes; the number of slices stays."""
    axes = {name: sizes[name] for name in ("data", "fsdp", "tensor")}
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **axes))


def other_meshes(config: DistillConfig, first: StepPlan) -> Iterator[DistillConfig]:
    """Yields the config's slices cut into data, fsdp and tensor by powers of two."""
    devices = first.mesh["data"] * first.mesh["fsdp"] * first.mesh["tensor"]
    for tensor in (1, 2, 4, 8):
        fsdp = devices // tensor
        while fsdp * tensor >= 4 and devices % (fsdp * tensor) == 0:
            yield on_mesh(config, {"data": devices // tensor // fsdp, "fsdp": fsdp, "tensor": tensor})
            fsdp //= 4


def decoding_of(config: DistillConfig, args: Args) -> DecodePlan:
    """Returns the plan of decoding with the config's drafter on the slice that `--decode` names."""
    assert args.decode is not None
    shape = target_shape(config.target)
    scored = scored_tokens(config.draft_vocab, shape.vocab, args.draft_vocab)
    drafter = drafter_for(config, shape, scored).module
    asked: dict[str, Any] = {"tree": args.decode_tree, "batch": args.decode_batch, "capacity": args.decode_capacity}
    return plan_decoding(shape, drafter, args.decode, **asked, scored=scored)


def steps_of(config: DistillConfig, args: Args) -> int | None:
    """Returns the steps of the whole run, where they are known without its data."""
    return args.steps or config.optimizer.steps


def describe(config: DistillConfig, plan: StepPlan, args: Args) -> dict[str, Any]:
    """Returns the verb's own JSON keys."""
    costs, steps = plan.costs, steps_of(config, args)
    return {
        "topology": args.topology,
        "chips": plan.chips,
        "mesh": plan.mesh,
        "batch": config.data.batch,
        "length": config.data.length,
        "fits": plan.fits,
        "hbm_bytes_per_chip": plan.memory._asdict(),
        "flops_per_chip": costs and costs.flops * plan.devices_per_chip,
        "model_flops_per_chip": costs and costs.model_flops * plan.devices_per_chip,
        "hbm_traffic_bytes_per_chip": costs and costs.bytes * plan.devices_per_chip,
        "collective_bytes": costs and costs.collective_bytes,
        "collective_seconds": costs and costs.sending,
        "collective_share": costs and costs.network / (costs.network + costs.computing + costs.moving),
        "largest_message": costs and costs.largest_message,
        "compute_seconds": costs and costs.computing,
        "memory_seconds": costs and costs.moving,
        "roofline_seconds_per_step": costs and costs.roofline,
        "bound_by": costs and costs.bound_by,
        "advice": plan.advice,
        "mfu": plan.mfu,
        "tokens_per_second": plan.tokens_per_second,
        "steps": steps,
        "hours": None if costs is None or steps is None else steps * costs.roofline / 3600,
        "chip_hours": None if steps is None else plan.chip_hours(steps),
    }


def describe_decoding(plan: DecodePlan) -> dict[str, Any]:
    """The keys of `decode`."""
    return {
        "fits": plan.fits,
        "chips": plan.chips,
        "hbm_bytes_per_chip": plan.memory._asdict(),
        "why": plan.why or None,
    }


def show(ranked: Sequence[Planned], decoding: DecodePlan | None, found: dict[str, Any], args: Args) -> None:
    """Prints memory, times and advice of the best, and a table of all that were tried."""
    config, plan = ranked[0]
    show_memory(f"{config.name} on {args.topology}, {name_of(config, plan)}", plan, decoding)
    if plan.costs is None:
        total, capacity = plan.memory.total / 1e9, plan.memory.capacity / 1e9
        sys.stdout.write(
            f"does not fit: the step needs {total:.2f} GB of a chip's {capacity:.2f} ({plan.why}); {plan.advice}\n"
        )
    else:
        show_costs(plan, plan.costs, found)
    if decoding is not None and not decoding.fits:
        sys.stdout.write(f"decoding does not fit: {decoding.why}\n")
    if len(ranked) > 1:
        rows = []
        for tried, p in ranked:
            mfu = p.mfu and f"{p.mfu:.1%}"
            bound = p.costs and p.costs.bound_by
            rows.append([name_of(tried, p), p.fits, p.memory.total / 1e9, bound, mfu, p.tokens_per_second])
        tables.print_table("Tried", ["mesh, batch", "fits", "GB a chip", "bound by", "MFU", "tokens/s"], rows)
    sys.stdout.write(NOTES + "\n")


def show_memory(title: str, plan: StepPlan, decoding: DecodePlan | None) -> None:
    """Prints the memory of a chip, by its use."""
    rows = [["training", *(size / 1e9 for size in plan.memory)]]
    if decoding is not None:
        rows.append(["decoding", *(size / 1e9 for size in decoding.memory)])
    tables.print_table(f"{title}: GB of a chip", ["program", *PARTS, "total", "capacity"], rows)


def show_costs(plan: StepPlan, costs: Costs, found: dict[str, Any]) -> None:
    """Prints the work and the times of a step, and what to change."""
    rows = [
        ["TFLOP a chip", found["flops_per_chip"] / 1e12],
        ["HBM traffic a chip, GB", found["hbm_traffic_bytes_per_chip"] / 1e9],
        *([f"sent along {axes}, GB", size / 1e9] for axes, size in costs.collective_bytes.items()),
        ["compute, ms", 1e3 * costs.computing],
        ["memory, ms", 1e3 * costs.moving],
        *([f"network, {axes}", 1e3 * seconds] for axes, seconds in costs.sending.items()),
        ["roofline, ms", 1e3 * costs.roofline],
        ["bound by", costs.bound_by],
        ["MFU", f"{plan.mfu:.1%}"],
        ["tokens/s", f"{plan.tokens_per_second:,.0f}"],
    ]
    if found["hours"] is not None:
        rows.append([f"hours of {found['steps']:,} steps", found["hours"]])
        rows.append(["chip-hours", found["chip_hours"]])
    tables.print_table("A step", ["measure", "value"], rows)
    sys.stdout.write(f"bound by {costs.bound_by}: {plan.advice}\n")


def name_of(config: DistillConfig, plan: StepPlan) -> str:
    """Mesh and batch in words."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    return f"{mesh or 'one chip'}, batch {config.data.batch:,} of {config.data.length:,}"


def draw(path: Path, title: str, plan: StepPlan) -> None:
    """Memory and time as a picture, if matplotlib is there."""
    problem = figures.missing()
    if problem:
        sys.stderr.write(problem + "\n")
        return
    seconds = {}
    if plan.costs is not None:
        network = {f"network, {axes}": taken for axes, taken in plan.costs.sending.items()}
        seconds = {"compute": plan.costs.computing, "memory": plan.costs.moving, **network}
    memory = {name: size for name, size in plan.memory._asdict().items() if name != "total"}
    path.parent.mkdir(parents=True, exist_ok=True)
    figures.draw_plan(path, title, memory, seconds)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
