"""Price the parts of a round of decoding on a device: the target's call by nodes, a draft level by width, the rest.

`measured` times them on this machine; `compiled` reads what XLA makes of them for a chip that need not be here;
`roofline` counts bytes and FLOPs. Weights are needed by none: of a target give its folder, or a known shape.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro

from jaxspec import config
from jaxspec.config import DistillConfig
from jaxspec.console import cli, progress, results, tables
from jaxspec.evaluation.device_decode import memory_limit
from jaxspec.evaluation.stand_ins import cache_bytes
from jaxspec.lab.compiled import CLOCK_DOUBT, CompiledBench, Machine, cpu_machine, gpu_machine, tpu_machine
from jaxspec.lab.costs import PART_NOTES, SOURCE_NOTES, CostRow, CostTable, differences, load_costs
from jaxspec.lab.cpu_rates import CpuRates, median_rates, rate_programs, rates_of_json
from jaxspec.lab.devices import CPU, GPU_NAMES, DevicePeaks, check_device, device_here, peaks_of
from jaxspec.lab.measured import RoundBench
from jaxspec.lab.pricing import RATES, Ledger, Watch, all_points, price_points, rows_of, told
from jaxspec.lab.roofline import Roofline
from jaxspec.lab.round_parts import CHILDREN, Grid, Point
from jaxspec.lab.row_steps import known_steps
from jaxspec.lab.shapes import LAB_SHAPES, abstract_models, filled
from jaxspec.parallel.agreement import say
from jaxspec.planning.decode_program import LIBTPU_ENVIRONMENT
from jaxspec.planning.plan import scored_tokens, target_shape
from jaxspec.serving.loading import DTYPES, Models, check_width, open_drafter
from jaxspec.targets.decoder import LlamaConfig
from jaxspec.training.resolve import drafter_for

PROG = "jaxspec lab cost"
MANY_SLOTS = 1024
"""Slots of a cache, and twice as many, between which the bytes of a token are counted."""


@dataclass(frozen=True, kw_only=True)
class Args:
    target: str | None = None
    """Folder of a target, weights not needed; `tiny` comes with jaxspec. Default: tiny, unless --shape is given."""
    shape: str | None = None
    """Instead of --target, a known shape: tiny, 125m, llama3-1b, llama3-8b, llama3-70b, qwen3-8b, qwen3-30b-a3b ..."""
    drafter: str | None = None
    """Folder of a drafter, or `smollm2-head`, which comes with jaxspec; its shape counts, not its weights."""
    recipe: str | None = None
    """Instead of --drafter, the experiment whose drafter it is, such as hass; `none`: plain decoding alone. Default:
    eagle2."""
    draft_vocab: int | None = None
    """Tokens that the drafter scores. Default: those of the drafter's folder; of a recipe, those of its file."""
    source: Literal["measured", "compiled", "roofline"] = "measured"
    """Where the figures come from: this machine's clock, XLA's programs for a device, or its peak rates."""
    device: str | None = None
    """v5e, v5p, v6e, tpu7x (one device of it), a slice such as v6e:2x4, cpu (this one), or a100, h100, h200: for the
    roofline, or compiled where it is in this machine. Default: this machine's."""
    nodes: str = "1,2,4,8,16,32,64"
    """Nodes of the tree, root included, whose verification is priced. CPUs are also priced at the first of the steps of
    rows between two of these, of which products are padded to 1, 4, 8, 16, 20, 24, 32, 40, 48 and 64."""
    widths: str = "1,2,4,8,16"
    """Nodes of a draft level."""
    paths: str = "2,4,8"
    """Nodes of an accepted path, root included, that the drafter reads; costs reach to twice the longest."""
    batches: str = "1"
    """Rows decoded together."""
    contexts: str = "512"
    """Committed tokens of a row."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Of weights and activations. Default: fp32 on CPUs, else bf16."""
    temperature: float = 0.0
    """At 0 no noise is drawn, above it is."""
    exact_layers: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile all layers of the target, instead of 2 and 4 and the line through them."""
    routed: tyro.conf.FlagCreatePairsOff[bool] = False
    """Roofline of a mixture of experts: read only the experts that uniform routing reaches, not all."""
    overhead_us: float = 0.0
    """Roofline: microseconds added to every part."""
    repeats: int = 7
    """Turns whose median is a measured figure."""
    minutes: float | None = None
    """Most minutes; what does not fit is said, and the same command goes on. Default: no limit."""
    against: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Costs of another source for the same device and sizes, to say how far apart they are. On a CPU, rates that were
    measured beside those are used."""
    out: str = "costs.json"
    """File of the costs. Figures are noted in a ledger beside it as they come; the same command continues."""
    json: str | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        cli.refuse_below_one(self, "repeats", "draft_vocab")
        if self.target is not None and self.shape is not None:
            raise ValueError("--target and --shape are both given: give the one that is priced")
        if self.drafter is not None and self.recipe is not None:
            raise ValueError("--drafter and --recipe are both given: give the one that drafts")
        if self.shape is not None and self.shape not in LAB_SHAPES:
            raise ValueError(f"--shape is {self.shape!r}; there are {', '.join(LAB_SHAPES)}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes is {self.minutes:g}; it must be above 0")
        if self.temperature < 0 or self.overhead_us < 0:
            raise ValueError("--temperature and --overhead-us must not be below 0")
        if self.source != "roofline" and (self.routed or self.overhead_us):
            raise ValueError("--routed and --overhead-us are for --source roofline: leave them out")
        if self.source != "compiled" and self.exact_layers:
            raise ValueError("--exact-layers is for --source compiled: leave it out")
        if self.device is not None:
            self.check_device(self.device)
        _ = self.grid

    def check_device(self, device: str) -> None:
        """Raises ValueError where there are no figures of this source for a device."""
        if self.source != "measured":
            check_device(device)
        if self.source == "compiled" and device in GPU_NAMES and device != device_here():
            raise ValueError(
                f"--source compiled --device {device}: XLA compiles for no GPU that is not here; take --source "
                "roofline, or run this on such a machine"
            )

    @property
    def grid(self) -> Grid:
        """The sizes to price. Raises ValueError for a list that cannot be read."""
        names = ("nodes", "widths", "batches", "contexts", "paths")
        nodes, widths, batches, contexts, paths = (
            tuple(sorted(cli.sizes(f"--{name}", getattr(self, name)))) for name in names
        )
        return Grid(nodes, widths, batches, contexts, paths)


class Job(NamedTuple):
    """All that a table is made of."""

    args: Args
    device: str
    dtype: str
    models: Models
    drafter: str | None
    ledger: Ledger
    watch: Watch
    against: list[tuple[str, CostTable]]

    @property
    def grid(self) -> Grid:
        """The sizes to price, and the steps of rows between them."""
        return self.args.grid._replace(steps=known_steps(self.args.source, self.device, self.dtype))


class SourceFigures(NamedTuple):
    """The points that are left, and facts of the source."""

    left: list[Point]
    facts: dict[str, Any]


def main(argv: list[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog=PROG, description=__doc__ or "")
    against = [(path, load_costs(Path(path))) for path in args.against]
    if args.source != "measured":
        for name, value in LIBTPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if args.device not in (None, CPU) and (args.source == "roofline" or args.device not in GPU_NAMES):
            jax.config.update("jax_platforms", "cpu")
    job = make_job(args, against, started)
    try:
        priced = SOURCES[args.source](job)
    except ModuleNotFoundError as missing:
        raise ValueError(str(missing)) from missing
    found = rows_of(job.ledger.seconds, job.models.engine, args.source, job.device)
    if not found.rows:
        reason = next(iter(job.ledger.failed.values()), "the time did not suffice for one: give more --minutes")
        raise ValueError(f"no part has a figure: {reason}")
    table = CostTable(tuple(found.rows), facts_of(job) | priced.facts | {"rounds": found.rounds})
    table.save(Path(args.out))
    compared = [compare(path, table, other) for path, other in against]
    show(job, table, priced.left, compared)
    if args.json is not None:
        write(args.json, job, table, priced.left, compared, started)
    return 0


def make_job(args: Args, against: list[tuple[str, CostTable]], started: float) -> Job:
    """Returns models, device and ledger. Raises ValueError where they do not go together."""
    device = args.device or device_here()
    args.check_device(device)
    if args.source == "measured" and device != device_here():
        raise ValueError(f"--source measured --device {device}: this machine is {device_here()}; leave out --device")
    for path, other in against:
        if other.facts.get("device") != device:
            raise ValueError(f"--against {path}: holds costs of {other.facts.get('device')}, and these are of {device}")
    dtype = args.dtype or ("fp32" if device == CPU else "bf16")
    shape = LAB_SHAPES[args.shape] if args.shape else target_shape(args.target or "tiny")
    if max(args.grid.contexts) > shape.max_positions:
        raise ValueError(f"--contexts {max(args.grid.contexts)}: the target has {shape.max_positions:,} positions")
    module, scored, name = read_drafter(args, shape)
    models = abstract_models(shape, module, dtype=DTYPES[dtype], scored=scored, for_cpu=device == CPU)
    settings = {
        "command": "lab cost",
        "target": args.shape or args.target or "tiny",
        "drafter": name,
        **{name: getattr(args, name) for name in ("source", "draft_vocab", "temperature", "exact_layers")},
        "device": device,
        "dtype": dtype,
    }
    ledger = Ledger(None if args.source == "roofline" else Path(args.out), settings)
    deadline = float("inf") if args.minutes is None else started + 60 * args.minutes
    return Job(args, device, dtype, models, name, ledger, Watch(deadline), against)


def read_drafter(args: Args, shape: LlamaConfig) -> tuple[Any, int | None, str | None]:
    """Returns the drafter's module, the number of tokens it scores (None: all), and its name; None thrice without."""
    if args.drafter is not None:
        found = open_drafter(args.drafter, target_layers=shape.layers)
        scored = args.draft_vocab or (len(found.draft_vocab) if found.draft_vocab else None)
        check_width(args.drafter, found.module, shape)
        return found.module, scored, args.drafter
    if args.recipe == "none":
        return None, None, None
    name = args.recipe or "eagle2"
    recipe = config.load(name)
    if not isinstance(recipe, DistillConfig):
        raise ValueError(f"--recipe {name} trains no drafter: it is a {type(recipe).__name__}")
    scored = scored_tokens(recipe.draft_vocab, shape.vocab, args.draft_vocab)
    return drafter_for(dataclasses.replace(recipe, init_from=None), shape, scored).module, scored, name


# The sources.


def measure(job: Job) -> SourceFigures:
    """Times all parts on this machine, a batch and context at a time."""
    args, grid = job.args, job.grid
    rates = rate_programs(DTYPES[job.dtype]) if job.device == CPU else None
    bench = RoundBench(filled(job.models), grid, temperature=args.temperature, rates=rates and rates.programs)
    places, left = grid.places(), []
    with progress.progress("measuring", len(places), "batches and contexts") as bar:
        for batch, context in places:
            points = bench.points(batch, context)
            if set(points) <= job.ledger.done:
                bar.advance()
                continue
            if left or not job.watch.fits():
                left += points
                continue
            try:
                found = bench.measure(batch, context, repeats=args.repeats, tell=bar.tell)
            except ValueError as problem:
                job.ledger.note(*({"event": "failed", **p._asdict(), "reason": str(problem)} for p in points))
                bar.advance(1, str(problem), at_once=True)
                continue
            job.ledger.add(found.parts)
            if rates is not None:
                job.ledger.note({"event": RATES, "rates": rates.rates(found.rates).as_json()})
            bar.advance(1, f"batch {batch}, context {context:,}: {told(found.parts)}", at_once=True)
    known = job.ledger.rates
    return SourceFigures(left, {"rates": median_rates(known).as_json()} if known else {})


def compile_parts(job: Job) -> SourceFigures:
    """Prices the compiled programs of all parts."""
    machine, facts = compiled_machine(job)
    args = job.args
    bench = CompiledBench(job.models, job.grid, machine, temperature=args.temperature, exact=args.exact_layers)
    points = all_points(job.grid, bench)
    with progress.progress(f"compiling for {job.device}", len(points), "parts") as bar:
        bar.advance(len(set(points) & job.ledger.done))
        left = price_points(bench, points, job.ledger, job.watch, bar)
    mesh = None if machine.mesh is None else dict(machine.mesh.shape)
    facts |= {"mesh": mesh, "layers_compiled": list(dict.fromkeys(bench.layers)), "method": machine.method}
    return SourceFigures(left, facts)


def compiled_machine(job: Job) -> tuple[Machine, dict[str, Any]]:
    """Returns the machine that programs are compiled for, and its facts: a clock, or rates."""
    if job.device == CPU:
        rates = cpu_rates(job)
        return cpu_machine(rates), {"rates": rates.as_json()}
    if job.device in GPU_NAMES:
        peaks = peaks_of(job.device)
        return gpu_machine(peaks), peaks.rates
    known = next((line["hz"] for line in job.ledger.lines if line["event"] == "clock"), None)
    machine = tpu_machine(job.device, known)
    if known is None:
        job.ledger.note({"event": "clock", "hz": machine.clock})
    return machine, {"clock_hz": machine.clock, "clock_doubt": CLOCK_DOUBT}


def cpu_rates(job: Job) -> CpuRates:
    """Returns this machine's rates: those measured beside the costs that these are held against, else new ones."""
    beside = [table.facts["rates"] for _, table in job.against if table.facts.get("rates")]
    return rates_of_json(beside[0]) if beside else rate_programs(DTYPES[job.dtype]).measure()


def count_work(job: Job) -> SourceFigures:
    """Prices all parts by their bytes and FLOPs."""
    facts: dict[str, Any] = {}
    if job.device == CPU:
        rates = cpu_rates(job)
        peaks, facts = DevicePeaks(CPU, rates.peak, rates.bytes_per_second), {"rates": rates.as_json()}
    else:
        peaks = peaks_of(job.device)
    args = job.args
    bench = Roofline(job.models, job.grid, peaks, overhead=1e-6 * args.overhead_us, routed=args.routed)
    points = all_points(job.grid, bench)
    with progress.progress("counting", len(points), "parts") as bar:
        left = price_points(bench, points, job.ledger, job.watch, bar)
    facts |= {**peaks.rates, "routed": args.routed, "overhead_seconds": 1e-6 * args.overhead_us}
    return SourceFigures(left, facts)


SOURCES: dict[str, Callable[[Job], SourceFigures]] = {
    "measured": measure,
    "compiled": compile_parts,
    "roofline": count_work,
}


# The result.


def facts_of(job: Job) -> dict[str, Any]:
    """Returns the facts of any source."""
    args, engine = job.args, job.models.engine
    largest = {"batch": max(args.grid.batches), "capacity": max(args.grid.contexts) + args.grid.room}
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(job.models.weights))
    caches = [cache_bytes(job.models, batch=1, capacity=slots) for slots in (MANY_SLOTS, 2 * MANY_SLOTS)]
    if args.source == "measured":
        memory = memory_limit()
    else:
        memory = None if job.device == CPU else peaks_of(job.device).memory
    return {
        "target": args.shape or args.target or "tiny",
        "drafter": job.drafter,
        "dtype": np.dtype(DTYPES[job.dtype]).name,
        "source": args.source,
        "device": job.device,
        "mesh": None,
        "temperature": args.temperature,
        "mode": engine.mode,
        "rule": engine.rule.name,
        "children": CHILDREN,
        "one_pass": bool(engine.drafter is not None and engine.drafter.one_pass),
        "reference_tree": getattr(engine.tree, "spec", None),
        "layers": job.models.config.layers,
        "weights_bytes": weights,
        "cache_bytes_per_token": (caches[1] - caches[0]) // MANY_SLOTS,
        "row_steps": job.grid.steps.as_json(),
        "held_bytes": weights + cache_bytes(job.models, **largest),
        "memory_bytes": memory if memory != float("inf") else None,
        "machine": results.machine_facts(),
    }


def compare(path: str, table: CostTable, other: CostTable) -> dict[str, Any]:
    """Returns how far the costs are from those of another file, part by part."""
    parts = [{**found._asdict(), "worst": found.worst._asdict()} for found in differences(table.rows, other.rows)]
    return {"file": path, "source": other.facts.get("source"), "parts": parts}


def show(job: Job, table: CostTable, left: list[Point], compared: list[dict[str, Any]]) -> None:
    """Prints a table of each part, comparisons, what is left out, and the meaning of the figures."""
    args, facts = job.args, table.facts
    title = f"{args.source} for {job.device}, {facts['target']} with {facts['drafter'] or 'no drafter'}, {job.dtype}"
    for part in dict.fromkeys(row.part for row in table.rows):
        show_part(f"{part}, ms: {title}", [row for row in table.rows if row.part == part])
    show_rounds(facts["rounds"])
    for found in compared:
        rows = [
            [p["part"], p["points"], p["ratio"], f"{p['median_error']:.1%}", f"{p['worst_error']:+.1%}", place(p)]
            for p in found["parts"]
        ]
        columns = ["part", "points", "median ratio", "median apart", "worst", "at"]
        tables.print_table(f"{args.source} by {found['source']} ({found['file']})", columns, rows)
    for point, reason in job.ledger.failed.items():
        sys.stdout.write(f"no figure: {' '.join(map(str, point))}: {reason}\n")
    sys.stdout.write(f"{SOURCE_NOTES[args.source]}{facts.get('method', '')}\n{PART_NOTES}\n")
    if "clock_hz" in facts:
        sys.stdout.write(
            f"cycles are taken at {facts['clock_hz'] / 1e9:.2f} GHz, at which a large matmul runs at the chip's peak; "
            f"that clock is good to {CLOCK_DOUBT:.0%}\n"
        )
    if facts["memory_bytes"] and facts["held_bytes"] > facts["memory_bytes"]:
        say(
            f"note: weights and caches take {facts['held_bytes'] / 1e9:.1f} GB, and {job.device} holds "
            f"{facts['memory_bytes'] / 1e9:.1f}: the figures are of a device with more memory"
        )
    if left:
        say(f"note: {len(left)} figures did not fit the time: the same command goes on")


def show_rounds(rounds: list[dict[str, Any]]) -> None:
    """Prints the whole rounds beside the sums of their parts: the target's call, the drafter's reading, all levels."""
    rows = []
    for r in rounds:
        whole, parts = r["round_seconds"], r["parts_seconds"]
        rows.append([r["batch"], r["context"], 1e3 * whole, 1e3 * parts, f"{whole / parts - 1:+.1%}"])
    if rows:
        tables.print_table("Whole rounds, ms", ["batch", "context", "round", "its parts", "more"], rows)


def place(part: dict[str, Any]) -> str:
    """Returns the sizes of the row that is farthest off."""
    return ", ".join(f"{name} {part['worst'][name]}" for name in ("nodes", "width", "batch", "context"))


def show_part(title: str, rows: list[CostRow]) -> None:
    """Prints the rows of one part: a line a size, a column a batch and context."""
    places = list(dict.fromkeys((row.batch, row.context) for row in rows))
    by_width = any(row.width for row in rows)
    size = {row: row.width if by_width else row.nodes for row in rows}
    at = {(size[row], row.batch, row.context): 1e3 * row.seconds for row in rows}
    lines = [[n, *(at.get((n, *place)) for place in places)] for n in sorted(set(size.values()))]
    columns = ["width" if by_width else "nodes", *(f"batch {b}, {c:,} tokens" for b, c in places)]
    tables.print_table(title, columns, lines)


def write(
    path: str, job: Job, table: CostTable, left: list[Point], compared: list[dict[str, Any]], started: float
) -> None:
    """Writes the verb's JSON."""
    facts = {name: value for name, value in table.facts.items() if name not in ("machine", "dtype")}
    failed = [{**point._asdict(), "reason": reason} for point, reason in job.ledger.failed.items()]
    found = results.result(
        "lab cost",
        dtype=table.facts["dtype"],
        seed=None,
        started=started,
        out=job.args.out,
        **facts,
        rows=[row._asdict() for row in table.rows],
        against=compared,
        failed=failed,
        left_out=[point._asdict() for point in left],
    )
    results.write_json(path, found)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
