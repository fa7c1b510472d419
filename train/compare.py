"""Train recipes on the same target, data and tokens, and compare what their drafters are worth.

A recipe is a config: every DistillConfig is trained here, from the same conversations with the same budget, whatever
steps and files it names itself; a PretrainConfig's export is taken as it is. All drafters are then measured with the
same trees on the same held-out prompts, where the same draws give the same texts. Give the same command to go on after
a stop: nothing that is finished is done again, and recipes, trees and temperatures may be added.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from tyro.conf import Positional

from jaxspec import cli, comparison, cost, figures, flags, loading, report, serving
from jaxspec.comparison import Counts, Decoded
from jaxspec.config import DistillConfig, PretrainConfig, differences, experiments, load, to_dict
from jaxspec.data import jsonl
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import read_conversations
from jaxspec.data.packing import Documents, tokenize_conversations
from jaxspec.data.prompts import Prompt, encode_prompt, read_prompts
from jaxspec.generation import tau
from jaxspec.loading import Models
from jaxspec.serving import Job, Settings
from jaxspec.training import RESUMABLE, Data, pack_data, read_corpus, run_distillation, say, termination_notice
from jaxspec.trees import cut_tree, parse_tree

DECODING_SEED = 0
"""Of the draws at temperatures above 0: every drafter meets the same ones."""
EVALUATIONS = 10
"""Points of a learning curve's held-out part."""
LOSSES = 50
"""Points that a learning curve's loss has at least, if there are so many steps."""
NOTES = f"""\
tau: tokens per target call, bonus token included; the prefill call and the token it gives are not counted
[low, high]: {comparison.CONFIDENCE:.0%} bootstrap interval over prompts; tau by seed shows what seeds of training add
ratio: of the two recipes' tau, over the seeds that both have; its interval is over the same prompts in both
acceptance by depth: of the rounds that kept a drafted token at every depth above, the share that kept one here too
passes: forward passes of the drafter a round
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Command line of `jaxspec compare`."""

    recipes: Positional[tuple[str, ...]]
    """Names of experiments in configs/, or paths of Python files; ratios are to the first."""
    train: str = "runs/answers.jsonl"
    """Conversations to learn from that the target wrote, as jaxspec regenerate makes them."""
    eval: str = "runs/answers_eval.jsonl"
    """The same, held out: for the learning curves."""
    prompts: str | None = None
    """File of prompts to measure tau on. Default: those of --eval."""
    limit: int = 100
    """Take the first N prompts, and held-out conversations, of every source."""
    tokens: float = 2e6
    """Tokens that every drafter is trained on, rounded up to whole steps."""
    seeds: str = "0"
    """Seeds of training, such as 0,1,2."""
    headline: str | None = None
    """Recipes that get all the seeds, such as eagle2,hass; the others then get the first only. Default: all."""
    tree: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A tree to measure with: chain:DEPTH, static:eagle1, static:0,1,00 or dynamic:NODESxDEPTHxBEAM. Repeat the flag
    for more. Default: EAGLE-2's dynamic:60x6x10. A drafter that cannot draft so deep gets the tree cut to its depth."""
    temperature: tuple[float, ...] = (0.0, 1.0)
    """Temperatures to measure at; 0 is greedy."""
    max_new_tokens: int = 256
    """Most tokens of an answer."""
    slots: int = 8
    """Prompts decoded side by side; it changes the speed only."""
    target: str | None = None
    """HuggingFace folder of the target. Default: the one that the recipes name."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of decoding; training has each recipe's own."""
    out: Path = Path("runs/compare")
    """Folder of the report, and of all that the comparison makes."""
    json: Path | None = None
    """Write the result here too; it is in compare.json of --out in any case."""

    def __post_init__(self) -> None:
        known = experiments()
        for recipe in self.recipes:
            if not recipe.endswith(".py") and recipe not in known:
                raise ValueError(f"there is no recipe {recipe!r} in configs/; there are {', '.join(known)}")
        if not self.recipes or len(set(self.names)) < len(self.recipes):
            raise ValueError("name recipes to compare, each once")
        flags.refuse_below_one(self, "limit", "tokens", "slots", "max_new_tokens")
        for stranger in set(self.headline_names) - set(self.names):
            raise ValueError(f"--headline names {stranger}, which is not compared: {', '.join(self.names)} are")
        for spec in self.tree:
            parse_tree(spec)
        if not self.temperature or len(set(self.temperature)) < len(self.temperature):
            raise ValueError("--temperature needs one or more different temperatures")
        _ = self.settings, self.seeds_of(self.names[0])

    @property
    def names(self) -> list[str]:
        """What the recipes are called in the report."""
        return [Path(recipe).stem for recipe in self.recipes]

    @property
    def headline_names(self) -> list[str]:
        """Recipes that get every seed."""
        return self.names if self.headline is None else [Path(w.strip()).stem for w in self.headline.split(",")]

    @property
    def trees(self) -> list[str]:
        """Specs of the trees, each once."""
        return list(dict.fromkeys(parse_tree(spec).spec for spec in self.tree or (loading.DEFAULT_TREE,)))

    @property
    def settings(self) -> list[Settings]:
        """How the prompts are answered."""
        return [Settings(self.max_new_tokens, temperature) for temperature in self.temperature]

    def seeds_of(self, recipe: str) -> list[int]:
        """The seeds that a recipe is trained with."""
        words = [word.strip() for word in self.seeds.split(",")]
        if not all(w.isdecimal() for w in words) or len(set(words)) < len(words):
            raise ValueError(f"--seeds is {self.seeds!r}; it must be different whole numbers such as 0,1,2")
        return [int(word) for word in (words if recipe in self.headline_names else words[:1])]


class Arm(NamedTuple):
    """One recipe with one seed."""

    recipe: str
    seed: int
    config: DistillConfig | PretrainConfig
    """With the comparison's files and folders; a distillation's steps are still to be found."""
    folder: Path

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"{self.recipe}, seed {self.seed}"

    @property
    def drafter(self) -> Path:
        """Where the finished drafter is."""
        return Path(self.config.export_folder)

    @property
    def metrics(self) -> Path:
        """The metric log of its training."""
        return Path(self.config.checkpoint.folder) / "metrics.jsonl"


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns 1 if a recipe failed."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec compare", description=__doc__ or "")
    target, arms = plan(args)
    prompts = choose_prompts(args)
    tokenizer = ChatTokenizer.load(loading.target_folder(target))
    notes = Notes(args.out, begun_with(args, target))
    corpora = Corpora(args, tokenizer)
    measured = functools.partial(measure, args, target, make_jobs(prompts, args, tokenizer), notes)
    decoded: list[Decoded] = []
    failures: dict[str, str] = {}
    with termination_notice() as noticed:
        stopped = functools.partial(stop_if, noticed)
        for number, arm in enumerate(arms, 1):
            say(f"{number}/{len(arms)} {arm.name}")
            try:
                stopped(f"before {arm.name}")
                decoded += measured(arm, train_arm(arm, args, corpora), stopped)
            except cli.Preempted:
                raise
            except Exception as failure:  # whatever is wrong with a recipe is no reason to lose the others
                if not isinstance(failure, ValueError | OSError) or os.environ.get("JAXSPEC_TRACEBACK") == "1":
                    traceback.print_exc()
                failures[arm.name] = cli.sentence(failure) or type(failure).__name__
                say(f"jaxspec compare: {arm.name}: {failures[arm.name]}")
    decoded.sort(key=lambda run: (args.names.index(run.recipe), run.seed))
    result = write_report(args, arms, decoded, [p.source for p in prompts], failures, started)
    if args.json:
        report.write_json(args.json, result)
    for name, problem in failures.items():
        say(f"jaxspec compare: {name} failed: {problem}")
    return cli.EXIT_FAILED if failures else 0


def plan(args: Args) -> tuple[str, list[Arm]]:
    """The target of all, and the arms: every recipe with its first seed, then what further seeds there are.

    ValueError where recipes name different targets.
    """
    configs = {name: load(given) for name, given in zip(args.names, args.recipes, strict=True)}
    for name, config in configs.items():
        if not isinstance(config, DistillConfig | PretrainConfig):
            raise ValueError(f"{name}: holds a {type(config).__name__}, not a DistillConfig or PretrainConfig")
    named = {name: config.target for name, config in configs.items() if isinstance(config, DistillConfig)}
    if args.target is None and len(set(named.values())) > 1:
        raise ValueError(f"the recipes name different targets ({named}): choose one for all with --target")
    target = args.target or next(iter(named.values()), "tiny")
    arms = [
        Arm(name, seed, own_config(config, target, args, folder, seed), folder)
        for name, config in configs.items()
        for seed in ([config.seed] if isinstance(config, PretrainConfig) else args.seeds_of(name))
        for folder in [args.out / name / f"seed-{seed}"]
    ]
    rank = {seed: i for i, seed in enumerate(args.seeds_of(args.headline_names[0]))}
    return target, sorted(arms, key=lambda arm: rank.get(arm.seed, 0))


def own_config(
    config: DistillConfig | PretrainConfig, target: str, args: Args, folder: Path, seed: int
) -> DistillConfig | PretrainConfig:
    """The config as it is run here: the comparison's target, files, seed and folders; the rest is the recipe."""
    if isinstance(config, PretrainConfig):
        return config
    return dataclasses.replace(
        config,
        target=target,
        data=dataclasses.replace(config.data, train=args.train, eval=args.eval, limit=None, eval_limit=None),
        optimizer=dataclasses.replace(config.optimizer, steps=1, epochs=None),
        checkpoint=dataclasses.replace(config.checkpoint, folder=str(folder / "run")),
        export_folder=str(folder / "drafter"),
        seed=seed,
    )


def choose_prompts(args: Args) -> list[Prompt]:
    """The first `--limit` prompts of every source; ValueError for one that cannot be answered."""
    path = Path(args.prompts or args.eval)
    named = [p if p.source else p._replace(source=path.stem) for p in read_prompts(path)]
    return first_of_each([p.source for p in named], named, args.limit)


def first_of_each(sources: Sequence[str], items: Sequence[Any], limit: int) -> list[Any]:
    """The first `limit` items of every source, in their order."""
    seen: dict[str, int] = {}
    chosen = []
    for source, item in zip(sources, items, strict=True):
        seen[source] = seen.get(source, 0) + 1
        if seen[source] <= limit:
            chosen.append(item)
    return chosen


def make_jobs(prompts: Sequence[Prompt], args: Args, tokenizer: ChatTokenizer) -> list[np.ndarray]:
    """The prompts as the target reads them; ValueError naming one that it cannot."""
    read = []
    for prompt in prompts:
        try:
            read.append(encode_prompt(prompt, tokenizer))
        except ValueError as error:
            raise ValueError(
                f"{args.prompts or args.eval}: prompt {prompt.id!r} {error}; mend it or take it out"
            ) from error
    return read


def begun_with(args: Args, target: str) -> dict[str, Any]:
    """What all that is compared in one folder must share."""
    files = {"train": args.train, "eval": args.eval, "prompts": args.prompts or args.eval}
    return {
        "target": target,
        **files,
        **{f"{name}_contents": contents(path) for name, path in files.items()},
        "limit": args.limit,
        "tokens": int(args.tokens),
        "max_new_tokens": args.max_new_tokens,
        "dtype": args.dtype,
    }


def contents(path: str) -> str:
    """A file's SHA-256, in short; ValueError if it is not there."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; make it with jaxspec regenerate --prompts CHATS --out {path}")
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class Corpora:
    """The conversations, tokenized when a recipe is to be trained on them; recipes of one row length share them."""

    def __init__(self, args: Args, tokenizer: ChatTokenizer) -> None:
        self.args, self.tokenizer = args, tokenizer
        self.read: dict[int, tuple[Documents, Documents]] = {}
        self.mixed: dict[tuple[str, int], Documents] = {}

    def of(self, length: int) -> tuple[Documents, Documents]:
        """To learn from and to be judged by, cut to rows of `length` tokens."""
        if length not in self.read:
            held_out = read_conversations(self.args.eval)
            judged = first_of_each([c.source for c in held_out], held_out, self.args.limit)
            self.read[length] = (
                read_corpus("train", self.args.train, tokenizer=self.tokenizer, length=length),
                tokenize_conversations(judged, self.tokenizer, length=length),
            )
        return self.read[length]

    def pack(self, config: DistillConfig) -> Data:
        """The rows that a recipe learns from, with its own mix if it has one, and those it is judged by."""
        length, mix = config.data.length, config.data.mix
        if mix is not None and (mix, length) not in self.mixed:
            self.mixed[mix, length] = read_corpus("mix", mix, tokenizer=self.tokenizer, length=length)
        return pack_data(config, *self.of(length), None if mix is None else self.mixed[mix, length])


def train_arm(arm: Arm, args: Args, corpora: Corpora) -> int:
    """Trains the arm unless it has been trained; returns the tokens that it was trained on, 0 for a PretrainConfig.

    Raises ValueError if it was begun with other settings.
    """
    config = arm.config
    if isinstance(config, PretrainConfig):
        if not arm.drafter.is_dir():
            raise ValueError(f"{arm.drafter}: no such folder; run jaxspec pretrain {arm.recipe} first")
        return 0
    finished = arm.folder / "trained.json"
    keep_settings(arm)
    if finished.is_file():
        return int(json.loads(finished.read_text(encoding="utf-8"))["train_tokens"])
    steps, tokens = comparison.steps_for(corpora.pack(config).train.token_counts(), int(args.tokens))
    config = dataclasses.replace(
        config,
        name=arm.name,
        optimizer=dataclasses.replace(config.optimizer, steps=steps),
        eval_every=max(1, steps // EVALUATIONS),
        log_every=min(config.log_every, max(1, steps // LOSSES)),
    )
    epochs = tokens / corpora.of(config.data.length)[0].summary.tokens
    say(f"{steps:,} steps of {tokens / steps:,.0f} tokens, {epochs:.2f} epochs")
    done = run_distillation(config, corpora.pack(config))
    report.write_json(finished, {**done, "train_tokens": tokens})
    return tokens


def keep_settings(arm: Arm) -> None:
    """Notes what the arm is trained with; ValueError if it was begun with something else.

    Files and steps are left out: they belong to the whole comparison, which keeps its own.
    """
    settings = {name: value for name, value in to_dict(arm.config).items() if name in RESUMABLE}
    settings["data"] = {k: v for k, v in settings["data"].items() if k not in ("train", "eval")}
    settings["optimizer"] = {k: v for k, v in settings["optimizer"].items() if k != "steps"}
    path, steps = arm.folder / "settings.json", Path(arm.config.checkpoint.folder).glob("[0-9]*")
    if not (path.is_file() and ((arm.folder / "trained.json").is_file() or any(steps))):  # nothing to lose yet
        report.write_json(path, settings)
    changed = differences(json.loads(path.read_text(encoding="utf-8")), report.jsonable(settings))
    if changed:
        raise ValueError(
            f"was trained with other settings ({'; '.join(changed)}): give another --out, or move {arm.folder} away "
            "to train it anew"
        )


class Notes:
    """What decoding each prompt took, in `decoded.jsonl` of the folder, beneath what the folder was begun with."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / "decoded.jsonl"
        self.known: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
        for record in jsonl.journal(self.path, settings, of=folder):
            self.known.setdefault(tuple(record["of"]), {})[record["prompt"]] = record

    def add(self, of: tuple[Any, ...], prompt: int, answer: serving.Answer) -> None:
        """Note one prompt's answer; on disk when this returns."""
        record = {
            "of": list(of),
            "prompt": prompt,
            "tokens": len(answer.tokens) - 1,
            "calls": int(answer.calls),
            "accepted": answer.accepted.tolist(),
        }
        jsonl.append(self.path, [record])
        self.known.setdefault(of, {})[prompt] = record

    def counts(self, of: tuple[Any, ...]) -> Counts:
        """All prompts of a finished decoding, in order."""
        records = [self.known[of][prompt] for prompt in sorted(self.known[of])]
        return Counts(*(np.array([r[name] for r in records]) for name in ("tokens", "calls", "accepted")))


def measure(
    args: Args,
    target: str,
    prompts: Sequence[np.ndarray],
    notes: Notes,
    arm: Arm,
    train_tokens: int,
    stopped: Callable[[str], None],
) -> list[Decoded]:
    """The arm's drafter with every tree at every temperature; what is noted is not decoded again."""
    models = loading.load_models(target, drafter=arm.drafter, tree="none", dtype=loading.DTYPES[args.dtype])
    drafter, print_of_weights = models.engine.drafter, fingerprint(models)
    assert drafter is not None
    deepest, runs = drafter.deepest, []
    for spec in args.trees:
        asked = parse_tree(spec)
        tree = asked if deepest is None else cut_tree(asked, deepest)
        if tree != asked:
            say(f"{arm.name}: drafts {deepest} deep at most, so {spec} becomes {tree.spec}")
        for settings in args.settings:
            of = (arm.recipe, arm.seed, print_of_weights, tree.spec, settings.temperature)
            decode(models.with_tree(tree), prompts, settings, args.slots, notes, of, stopped)
            run = Decoded(
                arm.recipe,
                arm.seed,
                spec,
                tree.spec,
                settings.temperature,
                notes.counts(of),
                cost.drafter_passes(drafter, tree.depth),
                sum(int(a.size) for a in jax.tree.leaves(models.weights.drafter)),
                train_tokens,
            )
            say(f"{arm.name}, {spec}, {named(settings)}: tau {comparison.tau_interval(run.counts)}")
            runs.append(run)
    return runs


def decode(
    models: Models,
    prompts: Sequence[np.ndarray],
    settings: Settings,
    slots: int,
    notes: Notes,
    of: tuple[Any, ...],
    stopped: Callable[[str], None],
) -> None:
    """Answers the prompts that are not noted yet, and notes them."""
    left = [
        Job(i, tokens, serving.row_seed(DECODING_SEED, i))
        for i, tokens in enumerate(prompts)
        if i not in notes.known.get(of, {})
    ]
    if not left:
        return
    recipe, seed, _, tree, _ = of
    tokens = calls = 0
    with report.progress(f"{recipe}, seed {seed}, {tree}, {named(settings)}", len(left), "prompts") as bar:
        for served in serving.serve(models, left, settings, slots=slots):
            notes.add(of, served.job.key, served.answer)
            tokens, calls = tokens + len(served.answer.tokens) - 1, calls + served.answer.calls
            bar.advance(1, f"tau {tau(tokens, calls):.2f}")
            stopped(f"while {recipe}, seed {seed} was measured")


def named(settings: Settings) -> str:
    """The temperature as a reader calls it."""
    return comparison.named_temperature(settings.temperature)


def fingerprint(models: Models) -> str:
    """Of the drafter's weights, so that what others drafted is not taken for theirs."""
    digest = hashlib.sha256()
    scored = None if models.weights.vocab is None else models.weights.vocab.token_U
    for path, leaf in jax.tree_util.tree_leaves_with_path((models.weights.drafter, scored)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()[:16]


def stop_if(noticed: Callable[[int], bool], where: str) -> None:
    """Raises Preempted if SIGTERM has come; all that was done is on disk."""
    if noticed(0):
        raise cli.Preempted(f"stopped {where}; what is finished is kept")


def write_report(
    args: Args,
    arms: Sequence[Arm],
    decoded: Sequence[Decoded],
    sources: Sequence[str],
    failures: dict[str, str],
    started: float,
) -> dict[str, Any]:
    """Prints the tables and leaves them, the JSON and the figures in the folder; returns the JSON."""
    summaries = list(comparison.summaries(decoded, sources, args.names[0]))
    trained = {(run.recipe, run.seed): run.train_tokens for run in decoded}
    curves = [arm for arm in arms if trained.get((arm.recipe, arm.seed)) and arm.metrics.is_file()]
    result = report.result(
        "compare",
        dtype=loading.DTYPES[args.dtype],
        seed=DECODING_SEED,
        started=started,
        rows=list(comparison.seed_rows(decoded, sources)),
        recipes=summaries,
        baseline=args.names[0],
        train=args.train,
        eval=args.eval,
        prompts=args.prompts or args.eval,
        tokens=int(args.tokens),
        max_new_tokens=args.max_new_tokens,
        confidence=comparison.CONFIDENCE,
        resamples=comparison.RESAMPLES,
        learning_curves=[{"recipe": a.recipe, "seed": a.seed, "metrics": a.metrics} for a in curves],
        figures=draw(args.out, curves, trained, summaries),
        failures=failures,
    )
    report.write_json(args.out / "compare.json", result)
    tables = list(comparison.tables(summaries))
    text = "\n".join(report.table_text(*table) for table in tables)
    (args.out / "compare.txt").write_text(f"{text}\n{NOTES}", encoding="utf-8")
    for table in tables:
        report.print_table(*table)
        sys.stdout.write("\n")
    sys.stdout.write(f"{NOTES}report: {args.out}\n")
    return report.jsonable(result)


def draw(
    folder: Path, curves: Sequence[Arm], trained: dict[tuple[str, int], int], summaries: Sequence[dict[str, Any]]
) -> list[Path]:
    """Draws the figures that there is something for; says so where matplotlib is not installed."""
    lacking = figures.missing()
    if lacking is not None:
        say(f"jaxspec compare: {lacking}")
        return []
    drawn = []
    if curves:
        read = []
        for arm in curves:
            steps = json.loads((arm.folder / "trained.json").read_text(encoding="utf-8"))["steps"]
            read.append(figures.read_curve(arm.recipe, arm.metrics, trained[arm.recipe, arm.seed] / steps))
        drawn.append(folder / "learning_curves.png")
        figures.draw_learning_curves(drawn[-1], read)
    if summaries:
        drawn.append(folder / "acceptance_by_depth.png")
        figures.draw_acceptance(drawn[-1], summaries)
    return drawn


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
