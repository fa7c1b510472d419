"""Train recipes on the same target, data and tokens, and compare the acceptance of their drafters.

A recipe is a config: every DistillConfig is trained here, from the same conversations with the same budget, whatever
steps and files it names itself; a PretrainConfig's export is taken as it is. All drafters are then measured with the
same trees on the same held-out prompts: the target answers them once, and every drafter drafts along those answers,
which is what decoding would accept (the text does not depend on the drafter). Give the same command to go on after a
stop: nothing that is finished is done again, and recipes, trees and temperatures may be added.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from tyro.conf import Positional

from jaxspec.config import DistillConfig, PretrainConfig, experiments
from jaxspec.console import cli
from jaxspec.console.results import file_facts, jsonable, result, write_json
from jaxspec.console.tables import print_table, table_text
from jaxspec.data.chat import ChatTokenizer, TemplateChoice
from jaxspec.data.prompts import Prompt, encode_prompt, read_prompts
from jaxspec.decoding.requests import Settings
from jaxspec.evaluation import comparison, figures, statistics
from jaxspec.evaluation.acceptance import DECODING_SEED, Setup, measure
from jaxspec.evaluation.comparison import Decoded
from jaxspec.interchange import target_folders
from jaxspec.parallel import processes
from jaxspec.parallel.agreement import say
from jaxspec.parallel.processes import Launch
from jaxspec.serving import loading
from jaxspec.training.comparison_facts import comparison_facts
from jaxspec.training.head_share import vocab_note
from jaxspec.training.loop import termination_notice
from jaxspec.training.recipes import Arm, Corpora, first_of_each, train_arm
from jaxspec.training.terms import NamedRecipe, Terms, config_on, load_recipe, settle, takes_draft_lm, without_vocab
from jaxspec.trees import parse_tree

NOTES = f"""\
tau: tokens per target call, bonus token included; the prefill call and the token it gives are not counted
[low, high]: {statistics.CONFIDENCE:.0%} bootstrap interval over prompts; tau by seed shows what seeds of training add
ratio: of the two recipes' tau, over the seeds that both have; its interval is over the same prompts in both
acceptance by depth: of the rounds that kept a drafted token at every depth above, the share that kept one here too
passes: forward passes of the drafter a round
"""


class PlannedComparison(NamedTuple):
    """All that is to be trained and measured."""

    terms: Terms
    recipes: list[NamedRecipe]
    arms: list[Arm]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Command line of `jaxspec compare`."""

    recipes: Positional[tuple[str, ...]]
    """Names of experiments in configs/, or paths of Python files; ratios are to the first."""
    train: str = "runs/answers.jsonl"
    """Conversations to learn from that the target wrote, as jaxspec regenerate makes them."""
    eval: str = "runs/answers_eval.jsonl"
    """The same, held out: for the learning curves."""
    features: str | None = None
    """Folder, or several joined by commas, that jaxspec features wrote for these conversations: recipes whose needs it
    meets learn from it and do not run the target, which is quicker; those with a mix, or auxiliary hidden states that
    it lacks, train as ever."""
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
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A change of every recipe that is trained here, such as optimizer.peak_lr=1e-3 for a target of another size, or of
    one of them: best:optimizer.peak_lr=4e-3. A pretrained one takes its own alone. Repeat the flag for more."""
    tree: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A tree to measure with: chain:DEPTH, static:eagle1, static:0,1,00, dynamic:NODESxDEPTHxBEAM, or a FILE.json of
    jaxspec lab search. Repeat the flag for more. Default: EAGLE-2's dynamic:60x6x10. A drafter that cannot draft so
    deep gets the tree cut to its depth."""
    temperature: tuple[float, ...] = (0.0, 1.0)
    """Temperatures to measure at; 0 is greedy."""
    max_new_tokens: int = 256
    """Most tokens of an answer."""
    slots: int = 8
    """Prompts answered, and answers drafted along, side by side; it changes the speed only."""
    target: str | None = None
    """HuggingFace folder of the target. Default: the one that the recipes name."""
    draft_vocab: str | None = None
    """File of the tokens that every drafter scores, as jaxspec draft-vocab writes it; not those whose own LM head is
    there already (a draft LM), or whose draft_vocab --set says. Default: that of each recipe."""
    draft_lm: str | None = None
    """Folder of the pretrained draft LM, for a target that the recipes' own does not fit: recipes that train one
    further start from it, and that of its pretraining stands for it. Default: that of each recipe."""
    template: str | None = None
    """Chat template: vicuna, llama-2-chat, llama-3, chatml, or a file of Jinja. Default: the one that the recipes name,
    or else that of the target's folder."""
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
        cli.refuse_below_one(self, "limit", "tokens", "slots", "max_new_tokens")
        for stranger in set(self.headline_names) - set(self.names):
            raise ValueError(f"--headline names {stranger}, which is not compared: {', '.join(self.names)} are")
        _ = self.changes_of(self.names[0])
        for spec in self.tree:
            parse_tree(spec)
        if not self.temperature or len(set(self.temperature)) < len(self.temperature):
            raise ValueError("--temperature needs one or more different temperatures")
        _ = self.settings, self.seeds_of(self.names[0])

    @property
    def names(self) -> list[str]:
        """Names of the recipes in the report."""
        return [Path(recipe).stem for recipe in self.recipes]

    @property
    def headline_names(self) -> list[str]:
        """Recipes that get every seed."""
        return self.names if self.headline is None else [Path(w.strip()).stem for w in self.headline.split(",")]

    def changes_of(self, recipe: str) -> tuple[list[str], list[str]]:
        """Returns the changes of all recipes, and those of this one alone. ValueError for one of a stranger."""
        shared, own = [], []
        for change in self.set:
            name, colon, rest = change.partition(":")
            if not colon or "=" in name:
                shared.append(change)
            elif name not in self.names:
                raise ValueError(f"--set {change}: {name} is not compared: {', '.join(self.names)} are")
            elif name == recipe:
                own.append(rest)
        return shared, own

    @property
    def trees(self) -> list[str]:
        """Specs of the trees, each once."""
        return list(dict.fromkeys(parse_tree(spec).spec for spec in self.tree or (loading.DEFAULT_TREE,)))

    @property
    def settings(self) -> list[Settings]:
        """Settings of the decoding runs, one a temperature."""
        return [Settings(self.max_new_tokens, t, seed=DECODING_SEED) for t in self.temperature]

    def seeds_of(self, recipe: str) -> list[int]:
        """Returns the seeds that a recipe is trained with."""
        seeds = cli.seeds("--seeds", self.seeds)
        return list(seeds if recipe in self.headline_names else seeds[:1])


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns 1 if a recipe failed."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec compare", description=__doc__ or "")
    # Joined first, so that a process that was started beside others learns of them.
    with processes.joined(Launch(), prog="jaxspec compare"):
        processes.refuse_several("jaxspec compare", "start it on one host; jaxspec train runs on several")
    planned = plan(args)
    target, arms = planned.terms.target, planned.arms
    if kept := without_vocab(planned.terms, planned.recipes):
        say(f"--draft-vocab is left out for {', '.join(kept)}: an LM head that is there already scores other tokens")
    tell_vocab(planned)
    template = template_of(arms)
    args = dataclasses.replace(args, template=template.name)
    prompts = choose_prompts(args)
    tokenizer = ChatTokenizer.load(target_folders.target_folder(target), template)
    corpora = Corpora(args.train, args.eval, args.limit, tokenizer)
    read = encode_all(prompts, tokenizer)
    setup = Setup(args.out, begun_with(args, target), read, args.trees, args.settings, args.slots)
    # Hashed before hours of work, in which a file may be moved.
    made = comparison_facts(planned.terms, planned.recipes, arms, args.prompts or args.eval, len(prompts))
    decoded: list[Decoded] = []
    failures: dict[str, str] = {}
    with termination_notice() as noticed:
        stopped = functools.partial(stop_if, noticed)
        for number, arm in enumerate(arms, 1):
            say(f"{number}/{len(arms)} {arm.name}")
            stopped(f"before {arm.name}")
            try:
                decoded += train_and_measure(arm, target, args, corpora, setup, stopped)
            except cli.Preempted:
                raise
            except Exception as failure:  # a recipe that fails must not cost the others
                failures[arm.name] = sentence_of(failure)
                say(f"jaxspec compare: {arm.name}: {failures[arm.name]}")
    decoded.sort(key=lambda run: (args.names.index(run.recipe), run.seed))
    result = write_report(args, planned, made, decoded, [p.source for p in prompts], failures, started)
    if args.json:
        write_json(args.json, result)
    for name, problem in failures.items():
        say(f"jaxspec compare: {name} failed: {problem}")
    return cli.EXIT_FAILED if failures else 0


def tell_vocab(planned: PlannedComparison) -> None:
    """Says once what a draft vocabulary would save, of the first arm for which none was chosen."""
    undecided = {recipe.name for recipe in planned.recipes if "draft_vocab" not in recipe.changed}
    trained = [a.config for a in planned.arms if isinstance(a.config, DistillConfig) and a.recipe in undecided]
    if note := next(filter(None, (vocab_note(config, "--draft-vocab ") for config in trained)), None):
        say(note)


def train_and_measure(
    arm: Arm, target: str, args: Args, corpora: Corpora, setup: Setup, stopped: Callable[[str], None]
) -> list[Decoded]:
    """Trains an arm unless it has been trained, and returns its counts with every tree and temperature."""
    tokens = train_arm(arm, corpora, tokens=int(args.tokens))
    models = loading.load_models(
        target, drafter=arm.drafter, tree="none", template=args.template, dtype=loading.DTYPES[args.dtype]
    )
    return measure(setup, arm.recipe, arm.seed, models, tokens, stopped)


def sentence_of(failure: Exception) -> str:
    """Returns a failure as one sentence; prints the traceback of one that is not a user's mistake."""
    if not isinstance(failure, ValueError | OSError) or os.environ.get("JAXSPEC_TRACEBACK") == "1":
        traceback.print_exception(failure)
    return cli.sentence(failure) or type(failure).__name__


def plan(args: Args) -> PlannedComparison:
    """Returns the target of all, the recipes, and the arms: every recipe with its first seed, then its further seeds.

    Raises ValueError where recipes name different targets, or what is said of all or one of them does not fit.
    """
    given = zip(args.names, args.recipes, strict=True)
    found = [load_recipe(name, file, *args.changes_of(name)) for name, file in given]
    named = {r.name: r.config.target for r in found if isinstance(r.config, DistillConfig)}
    if args.target is None and len(set(named.values())) > 1:
        raise ValueError(f"the recipes name different targets ({named}): choose one for all with --target")
    target = args.target or next(iter(named.values()), "tiny")
    if args.draft_lm is not None and not any(map(takes_draft_lm, found)):
        raise ValueError(f"--draft-lm {args.draft_lm}: no recipe is of a pretrained draft LM: leave it out")
    terms = Terms(target, args.train, args.eval, args.features, args.template, args.draft_vocab, args.draft_lm)
    recipes = [settle(terms, recipe) for recipe in found]
    arms = [
        Arm(recipe.name, seed, config_on(terms, recipe, folder, seed), folder)
        for recipe in recipes
        for seed in seeds_of(recipe, args)
        for folder in [args.out / recipe.name / f"seed-{seed}"]
    ]
    rank = {seed: i for i, seed in enumerate(args.seeds_of(args.headline_names[0]))}
    return PlannedComparison(terms, recipes, sorted(arms, key=lambda arm: rank.get(arm.seed, 0)))


def seeds_of(recipe: NamedRecipe, args: Args) -> list[int]:
    """Returns the seeds of a recipe's arms: a pretrained one has its own."""
    return [recipe.config.seed] if isinstance(recipe.config, PretrainConfig) else args.seeds_of(recipe.name)


def template_of(arms: Sequence[Arm]) -> TemplateChoice:
    """Returns the chat template that all train with. Raises ValueError where they name different ones."""
    chosen = {arm.name: arm.config.data.chat for arm in arms if isinstance(arm.config, DistillConfig)}
    if len(set(chosen.values())) > 1:
        named = {name: choice.name for name, choice in chosen.items()}
        raise ValueError(f"the recipes name different chat templates ({named}): choose one for all with --template")
    return next(iter(chosen.values()), TemplateChoice())


def choose_prompts(args: Args) -> list[Prompt]:
    """Returns the first `--limit` prompts of every source."""
    path = Path(args.prompts or args.eval)
    named = [p if p.source else p._replace(source=path.stem) for p in read_prompts(path)]
    return first_of_each([p.source for p in named], named, args.limit)


def encode_all(prompts: Sequence[Prompt], tokenizer: ChatTokenizer) -> list[np.ndarray]:
    """Returns the prompts as the target reads them. Raises ValueError naming one that it cannot read."""
    read = []
    for prompt in prompts:
        try:
            read.append(encode_prompt(prompt, tokenizer))
        except ValueError as error:
            raise ValueError(f"{prompt.name} {error}; mend it or take it out") from error
    return read


def begun_with(args: Args, target: str) -> dict[str, Any]:
    """Returns the settings that all comparisons in one folder must share.

    Changes of `--set` are not among them: every arm keeps its own, and recipes may be added with theirs.
    """
    files = {"train": args.train, "eval": args.eval, "prompts": args.prompts or args.eval}
    return {
        "target": target,
        "template": args.template,
        "draft_vocab": args.draft_vocab,
        **files,
        **{f"{name}_contents": contents(path) for name, path in files.items()},
        "limit": args.limit,
        "tokens": int(args.tokens),
        "max_new_tokens": args.max_new_tokens,
        "dtype": args.dtype,
    }


def contents(path: str) -> str:
    """Returns the head of a file's SHA-256. Raises ValueError if there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; make it with jaxspec regenerate --prompts CHATS --out {path}")
    return file_facts(path)["sha256"][:16]


def stop_if(noticed: Callable[[int], bool], where: str) -> None:
    """Raises Preempted if SIGTERM has come; all that was done is on disk."""
    if noticed(0):
        raise cli.Preempted(f"stopped {where}; what is finished is kept")


def write_report(
    args: Args,
    planned: PlannedComparison,
    made: dict[str, Any],
    decoded: Sequence[Decoded],
    sources: Sequence[str],
    failures: dict[str, str],
    started: float,
) -> dict[str, Any]:
    """Prints the tables and leaves them, the JSON and the figures in the folder; returns the JSON."""
    summaries = list(comparison.summaries(decoded, sources, args.names[0]))
    trained = {(run.recipe, run.seed): run.train_tokens for run in decoded}
    curves = [arm for arm in planned.arms if trained.get((arm.recipe, arm.seed)) and arm.metrics.is_file()]
    found = result(
        "compare",
        dtype=loading.DTYPES[args.dtype],
        seed=DECODING_SEED,
        started=started,
        rows=list(comparison.seed_rows(decoded, sources)),
        recipes=summaries,
        baseline=args.names[0],
        **made,
        template=args.template,
        set=args.set,
        limit=args.limit,
        train=args.train,
        eval=args.eval,
        prompts=args.prompts or args.eval,
        tokens=int(args.tokens),
        max_new_tokens=args.max_new_tokens,
        confidence=statistics.CONFIDENCE,
        resamples=statistics.RESAMPLES,
        learning_curves=[{"recipe": a.recipe, "seed": a.seed, "metrics": a.metrics} for a in curves],
        figures=draw(args.out, curves, trained, summaries),
        failures=failures,
    )
    write_json(args.out / "compare.json", found)
    tables = list(comparison.tables(summaries))
    text = "\n".join(table_text(*table) for table in tables)
    (args.out / "compare.txt").write_text(f"{text}\n{NOTES}", encoding="utf-8")
    for table in tables:
        print_table(*table)
        sys.stdout.write("\n")
    sys.stdout.write(f"{NOTES}report: {args.out}\n")
    return jsonable(found)


def read_curve(arm: Arm, tokens: int) -> figures.Curve:
    """Returns the learning curve of an arm that was trained on so many tokens."""
    steps = json.loads(arm.trained.read_text(encoding="utf-8"))["steps"]
    late = () if isinstance(arm.config, PretrainConfig) else arm.config.objective.late
    return figures.read_curve(arm.recipe, arm.metrics, tokens / steps, tuple(share * tokens for _, share in late))


def draw(
    folder: Path, curves: Sequence[Arm], trained: dict[tuple[str, int], int], summaries: Sequence[dict[str, Any]]
) -> list[Path]:
    """Draws learning curves and acceptance, where there are any; says so where matplotlib is not installed."""
    lacking = figures.missing()
    if lacking is not None:
        say(f"jaxspec compare: {lacking}")
        return []
    drawn = []
    if curves:
        read = [read_curve(arm, trained[arm.recipe, arm.seed]) for arm in curves]
        drawn.append(folder / "learning_curves.png")
        figures.draw_learning_curves(drawn[-1], read, [row["recipe"] for row in summaries])
    if summaries:
        drawn.append(folder / "acceptance_by_depth.png")
        figures.draw_acceptance(drawn[-1], summaries)
    return drawn


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
