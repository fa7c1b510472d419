"""Time and count distillation steps of several recipes side by side, and one step part by part.

All arms train heads for one random target on one random batch in one process, taking turns; figures are medians over
the repeats. With --count-only nothing is run, compiled or allocated: FLOPs are counted for abstract arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import jax
import tyro

from jaxspec import config
from jaxspec.base import Params
from jaxspec.config import DistillConfig
from jaxspec.console import cli, progress, results, tables
from jaxspec.drafters import DRAFTERS, DraftLMOptions
from jaxspec.evaluation import machine
from jaxspec.evaluation.machine import TimedProgram
from jaxspec.evaluation.step_parts import PARTS, StepArguments, parts_of, random_arguments, step_of
from jaxspec.parallel.mesh import make_mesh
from jaxspec.planning.flops import Flops, count_flops
from jaxspec.serving import loading
from jaxspec.serving.flags import Shape
from jaxspec.targets.decoder import SHAPES, Decoder, LlamaConfig
from jaxspec.training.resolve import DistillStep, build_step, drafter_for, takes_vocab

DTYPES: dict[str, Literal["float32", "bfloat16"]] = {"fp32": "float32", "bf16": "bfloat16"}
SHORT = {"eagle": "eagle2", "parallelspec": "parallelspec_eagle", "draft_lm": "draft_lm_kld"}
"""Other names of experiments."""
MATMUL = "matmul"
NOTES = """\
FLOPs: of matmuls and convolutions, exact over loops, conditionals at their dearest branch (all chunks scored)
again: FLOPs that jax.checkpoint spends a second time on the way back; included in FLOPs
target: its forward pass; drafter: its draft steps, forward and back; head and loss: logits of target and draft, losses,
and the way back to the draft's outputs; optimizer: its update of the weights, of which only Muon's has matmuls; these
are programs of their own on the same shapes
rest: what is left of the step; below 0 where fusion saves more than it costs"""
TIMED_NOTES = """\
steps/s: one update on the whole batch, compilation not counted; median of {repeats}
MFU: model FLOPs a second, those done again left out, by what a large matmul reaches in between: {rate:.0f} GFLOP/s"""


@dataclass(frozen=True, kw_only=True)
class Args:
    recipe: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A recipe to time, an arm each; repeat the flag. The name of an experiment (or eagle, parallelspec, draft_lm),
    with `:N` for N draft steps (heads of Medusa, tokens of ParallelSpec), then overrides as `jaxspec train` takes them:
    "parallelspec:4 head.keep=0.7". Ratios are to the first. Weights are random, whatever an experiment goes on from.
    Default: eagle and hass:3."""
    shape: Shape = "tiny"
    """Of the target."""
    batch: int = 1
    """Rows of a step."""
    length: int = 512
    """Tokens of a row, one document, all of them trained."""
    draft_vocab: int = 0
    """Tokens that the drafters score; 0 for all, as a draft LM does in any case."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the target and of activations; the drafters' masters are fp32."""
    repeats: int = 5
    """Steps of each arm that are timed."""
    count_only: bool = False
    """Count FLOPs for abstract arrays and stop."""
    seed: int = 0
    """Seed of weights and tokens."""
    json: str | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        cli.refuse_below_one(self, "batch", "length", "repeats")
        if not 0 <= self.draft_vocab <= self.target.vocab:
            raise ValueError(f"--draft-vocab is {self.draft_vocab}; {self.shape} has {self.target.vocab} tokens")
        if len(set(self.recipe)) < len(self.recipe):
            raise ValueError("--recipe names an arm twice: leave one out")
        for name in self.recipes:
            make_arm(name, self)

    @property
    def recipes(self) -> tuple[str, ...]:
        """The arms, in order."""
        return self.recipe or ("eagle", "hass:3")

    @property
    def target(self) -> LlamaConfig:
        """The target's shape."""
        return SHAPES[self.shape]


def main(argv: list[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec bench train", description=__doc__ or "")
    arms = {name: make_arm(name, args) for name in args.recipes}
    rows = count_rows(arms, args)
    rate = None if args.count_only else time_rows(rows, arms, args)
    result = results.result(
        "bench train",
        dtype=DTYPES[args.dtype],
        seed=args.seed,
        started=started,
        target=args.shape,
        batch=args.batch,
        length=args.length,
        draft_vocab=args.draft_vocab or None,
        repeats=None if args.count_only else args.repeats,
        rows=rows,
        machine_matmul_flops_per_second=rate,
    )
    print_result(result, args)
    if args.json:
        results.write_json(args.json, result)
    return 0


def make_arm(spec: str, args: Args) -> DistillStep:
    """Returns the training step that `spec` names.

    ValueError: there is no such experiment, or its fields do not fit the target.
    """
    found = read_recipe(spec, args)
    scored = args.draft_vocab if args.draft_vocab and takes_vocab(found, args.target, args.draft_vocab) else None
    drafter = drafter_for(found, args.target, scored).module
    if drafter.deepest is not None and found.objective.steps > drafter.deepest:
        raise ValueError(
            f"{spec}: drafts {drafter.deepest} tokens ahead, and objective.steps is {found.objective.steps}"
        )
    dtype = loading.DTYPES[args.dtype]
    target = Decoder(args.target, dtype=dtype, param_dtype=dtype)
    return build_step(found, make_mesh(devices=jax.devices()[:1]), target, drafter, steps=1000)


def read_recipe(spec: str, args: Args) -> DistillConfig:
    """The experiment's settings, as far as they say what a step computes."""
    words = spec.split()
    match = re.fullmatch(r"(.+?)(?::(\d+))?", words[0] if words else "")
    if match is None:
        raise ValueError("--recipe is empty: name an experiment")
    name, steps = match.groups()
    overrides = [] if steps is None else [f"objective.steps={steps}"]
    found = config.load(SHORT.get(name, name))
    if not isinstance(found, DistillConfig):
        raise ValueError(f"--recipe {name} trains no drafter: it is a {type(found).__name__}")
    if steps is not None and "tokens" in {f.name for f in dataclasses.fields(DRAFTERS[found.drafter].options)}:
        overrides.append(f"head.tokens={steps}")
    found = config.override(found, [*overrides, *words[1:]])
    head = found.head
    if found.drafter == "draft_lm" and not (head and head.given):
        head = small_llama(args.target)
    return dataclasses.replace(found, head=head, init_from=None, draft_vocab=None, dtype=DTYPES[args.dtype])


def small_llama(c: LlamaConfig) -> DraftLMOptions:
    """A draft LM a quarter as wide as the target and an eighth as deep."""
    kv_heads = max(1, c.kv_heads // 4)
    return DraftLMOptions(
        width=c.width // 4,
        layers=max(1, c.layers // 8),
        heads=kv_heads * c.group if c.heads % 4 == 0 and c.kv_heads % 4 == 0 else kv_heads,
        kv_heads=kv_heads,
        head_dim=c.head_dim,
        mlp=c.mlp // 4,
        tied=True,
    )


def make_arguments(arm: DistillStep, params: Params, args: Args) -> StepArguments:
    """Returns fresh weights and a random batch for an arm; under `jax.eval_shape`, their shapes."""
    scored = args.draft_vocab if arm.task.drafter.vocab in (None, args.draft_vocab) else 0
    return random_arguments(arm, params, rows=(args.batch, args.length), scored=scored, seed=args.seed)


def count_rows(arms: dict[str, DistillStep], args: Args) -> list[dict[str, Any]]:
    """Every arm's row as far as it can be told without running anything."""
    rows: list[dict[str, Any]] = []
    with progress.progress("counting", len(arms), "arms") as bar:
        for name, arm in arms.items():
            params = jax.eval_shape(arm.task.target.init_params, jax.random.key(0))  # type: ignore[attr-defined]
            arguments = jax.eval_shape(functools.partial(make_arguments, arm, args=args), params)
            whole = count_flops(step_of(arm), *arguments)
            parts = parts_of(arm, arguments, jax.eval_shape)
            counted = {part: count_flops(p.program, *p.arguments) for part, p in parts.items()}
            first = whole.total if not rows else rows[0]["flops_per_step"]
            rows.append(make_row(name, arm, arguments, whole, counted) | {"flops_ratio": whole.total / first})
            bar.advance()
    return rows


def make_row(
    name: str, arm: DistillStep, arguments: StepArguments, whole: Flops, parts: dict[str, Flops]
) -> dict[str, Any]:
    """Returns the counts, and the keys of the times to come."""
    timed = ("steps_per_second", "tokens_per_second", "flops_per_second", "mfu", "time_ratio")
    return {
        "recipe": name,
        "draft_steps": arm.task.objective.steps,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(arguments.state.params)),
        "flops_per_step": whole.total,
        "recomputed_flops_per_step": whole.recomputed,
        "flops_per_token": whole.total / arguments.batch.tokens_BL.size,
        **{f"{part}_flops": parts[part].total for part in PARTS},
        **dict.fromkeys(timed),
        **dict.fromkeys(("step_ms", *(f"{part}_ms" for part in PARTS), "rest_ms")),
    }


def time_rows(rows: list[dict[str, Any]], arms: dict[str, DistillStep], args: Args) -> float:
    """Fills in the arms' times, and returns the FLOPs a second of a large matmul.

    The arms' steps, their parts and the matmul take turns.
    """
    matmul, matmul_flops = machine.square_matmul(loading.DTYPES[args.dtype])
    params = jax.jit(next(iter(arms.values())).task.target.init_params)(jax.random.key(args.seed))  # type: ignore[attr-defined]
    programs = {MATMUL: matmul}
    for name, arm in arms.items():
        made = jax.jit(functools.partial(make_arguments, arm, args=args))(params)
        arguments = made._replace(frozen=made.frozen._replace(params=params))  # one copy for all arms
        programs[name] = TimedProgram(jax.jit(step_of(arm), donate_argnums=1), tuple(arguments), donated=1)
        parts = parts_of(arm, arguments, lambda program, *given: jax.jit(program)(*given))
        programs |= {f"{name}\n{part}": p._replace(program=jax.jit(p.program)) for part, p in parts.items()}
    with progress.progress("timing", args.repeats + 1, "turns") as bar:
        seconds = machine.in_turns(programs, repeats=args.repeats, advance=bar.advance)
    rate = matmul_flops / seconds[MATMUL]
    for row in rows:
        taken = seconds[row["recipe"]]
        mine = {part: seconds[f"{row['recipe']}\n{part}"] for part in PARTS}
        model = row["flops_per_step"] - row["recomputed_flops_per_step"]
        row |= {
            "steps_per_second": 1 / taken,
            "tokens_per_second": args.batch * args.length / taken,
            "flops_per_second": row["flops_per_step"] / taken,
            "mfu": model / taken / rate,
            "time_ratio": taken / seconds[rows[0]["recipe"]],
            "step_ms": 1e3 * taken,
            **{f"{part}_ms": 1e3 * mine[part] for part in PARTS},
            "rest_ms": 1e3 * (taken - sum(mine.values())),
        }
    return rate


def print_result(result: dict[str, Any], args: Args) -> None:
    """Prints the arms, their counts and times, and what every figure means."""
    rows = result["rows"]
    title = f"A distillation step, {args.shape}, batch {args.batch} of {args.length} tokens, {args.dtype}"
    counts = {"GFLOP": "flops_per_step", "again": "recomputed_flops_per_step"}
    counts |= {part.replace("_", " "): f"{part}_flops" for part in PARTS}
    table = [
        [row["recipe"], row["draft_steps"], *(row[key] / 1e9 for key in counts.values()), row["flops_ratio"]]
        for row in rows
    ]
    tables.print_table(title, ["recipe", "draft steps", *counts, "x first"], table)
    if args.count_only:
        sys.stdout.write(NOTES + "\n")
        return
    columns = {
        "steps/s": "steps_per_second",
        "tokens/s": "tokens_per_second",
        "MFU": "mfu",
        "step": "step_ms",
        **{part.replace("_", " "): f"{part}_ms" for part in PARTS},
        "rest": "rest_ms",
        "x first": "time_ratio",
    }
    table = [[row["recipe"], *(row[key] for key in columns.values())] for row in rows]
    tables.print_table("Its time, ms", ["recipe", *columns], table)
    rate = result["machine_matmul_flops_per_second"] / 1e9
    sys.stdout.write(TIMED_NOTES.format(repeats=args.repeats, rate=rate) + "\n" + NOTES + "\n")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
