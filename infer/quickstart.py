"""The main job on the bundled tiny target, start to end: distil an EAGLE-2 head, then decode losslessly with it.

The target writes its own questions and answers, an EAGLE-2 head is distilled from them, the fastest tree on this
machine is picked from a handful, and held-out questions are decoded both ways. No network, no other data.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.checkpoints.models import save_drafter
from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.console import cli, progress, results, tables
from jaxspec.data.conversations import Conversation
from jaxspec.data.draft_vocab import count_tokens
from jaxspec.data.packing import PackedBatches, tokenize_conversations
from jaxspec.decoding.generation import Generation
from jaxspec.decoding.requests import make_requests
from jaxspec.distillation.objective import Objective
from jaxspec.drafters import EagleOptions
from jaxspec.evaluation.equivalence import Divergence, divergences
from jaxspec.parallel.agreement import say
from jaxspec.serving import loading, queue
from jaxspec.serving.loading import Models
from jaxspec.serving.queue import Job, Queue, Settings
from jaxspec.serving.regeneration import SENSIBLE, VARIED, rewrite, write_user_turns
from jaxspec.training.distill import distill
from jaxspec.training.loop import RunResult
from jaxspec.trees import parse_tree

TREES = ("chain:3", "chain:4", "chain:5", "static:0,1,00,000,0000", "dynamic:12x5x3")
"""Candidates: on a CPU each verified node costs, so chains and small trees win."""
DRAFT_VOCAB = 1024
"""Tokens that the head scores: the commonest of the target's answers. The rest are never drafted, and still decoded."""
PASSES = 5
"""Times that arms take turns; other users of the machine disturb single passes."""
TUNING = 20
"""Questions on which trees are measured; drawn like the held-out ones, and like them not trained on."""
FINALISTS = 3
"""Trees that are measured more than once."""


@dataclass(frozen=True)
class Args:
    target: str = "tiny"
    """HuggingFace folder of a Llama-family model; `tiny` is the one that comes with jaxspec."""
    template: str | None = None
    """Chat template: vicuna, llama-2-chat, llama-3, chatml, or a file of Jinja. Default: the target folder's own."""
    folder: Path = Path("runs/quickstart")
    """Where the drafter and the training run are kept; a second call resumes or replaces what is there."""
    conversations: int = 900
    """Conversations that the target writes and the drafter learns from."""
    held_out: int = 20
    """Further questions, kept apart, that both arms answer at the end."""
    steps: int = 400
    """Training steps of 8 rows of 256 tokens."""
    trees: tuple[str, ...] = TREES
    """Trees to measure; the fastest is used."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    seed: int = 0
    """Seed of everything that is drawn."""
    json: str | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        for name in ("conversations", "held_out", "steps", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        for tree in self.trees:
            parse_tree(tree)


class Arm(NamedTuple):
    """One way of decoding the held-out questions."""

    generation: Generation
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the seconds they took, prefill included, compilation not."""
        return sum(map(len, self.generation.tokens)) / self.seconds


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec quickstart", description=__doc__ or "")
    models = loading.load_models(args.target, template=args.template)
    say("1/5 the target writes questions")
    judged = write_questions(models, args.held_out + TUNING, args.seed, SENSIBLE)
    tuning, held_out = judged[:TUNING], judged[TUNING:]
    varied = write_questions(models, args.conversations, args.seed + 1, VARIED)
    asked = [question for question in varied if question not in judged]
    say("2/5 the target answers them")
    conversations = write_answers(models, asked, args)
    say("3/5 an EAGLE-2 head is distilled")
    began = time.monotonic()
    head, scored, done = train_head(models, conversations, args)
    train_seconds = time.monotonic() - began
    say("4/5 trees are measured on this machine")
    drafted = models.with_drafter(head, done.params, parse_tree(args.trees[0]), scored)
    tree, speeds = pick_tree(drafted, tuning, args)
    drafter = args.folder / "drafter"
    about = {"target": args.target, "tree": tree}
    save_drafter(drafter, "eagle", head, done.params, about, draft_vocab=scored, manifest=done.manifest)
    say("5/5 held-out questions are decoded, plainly and speculatively")
    fast = drafted.with_tree(parse_tree(tree))
    passes = [(measure(models, held_out, args), measure(fast, held_out, args)) for _ in range(PASSES)]
    plain, speculative = (sorted(arm, key=lambda a: a.seconds)[PASSES // 2] for arm in zip(*passes, strict=True))
    sampled = measure(fast, held_out, args, temperature=1.0)
    parted = compare(models, held_out, plain, speculative, args)
    keys = {
        "tau": speculative.generation.tau,
        "tau_sampled": sampled.generation.tau,
        "accept_histogram": speculative.generation.accepted.sum(axis=0).tolist(),
        "identical_fraction": 1 - len(parted) / len(held_out),
        "near_ties": [d._asdict() for d in parted],
        "tokens_per_second_plain": plain.tokens_per_second,
        "tokens_per_second_speculative": speculative.tokens_per_second,
        "speedup": speculative.tokens_per_second / plain.tokens_per_second,
        "tree": tree,
        "tree_tokens_per_second": speeds,
        "draft_vocab": len(scored),
        "drafter_checkpoint": str(drafter),
        "train_tokens": done.outcome.tokens,
        "train_seconds": train_seconds,
        "conversations": len(conversations),
        "eval": done.outcome.evaluation,
        "held_out_prompts": len(held_out),
    }
    found = results.result("quickstart", dtype="float32", seed=args.seed, started=started, **keys)
    show(models, held_out, plain, speculative, parted, found)
    if args.json:
        results.write_json(args.json, found)
    return 0


def write_questions(models: Models, count: int, seed: int, settings: Settings) -> list[str]:
    """User turns that the target samples from its bare template header."""
    questions = []
    with progress.progress("questions", count, "questions") as bar:
        for turn in write_user_turns(models, count, seed=seed, settings=settings, batch=32):
            questions.append(turn.text)
            bar.advance()
    if len(questions) < min(count, TUNING + 1):
        raise ValueError(
            f"the target wrote only {len(questions)} whole questions from its template's header; give it prompts with "
            "`jaxspec regenerate` and train with `jaxspec train` instead"
        )
    return questions


def write_answers(models: Models, questions: Sequence[str], args: Args) -> list[Conversation]:
    """The questions with the target's own answers; those cut at the budget stay, unfinished."""
    asked = [
        Conversation(str(i), "self", ({"role": "user", "content": question},)) for i, question in enumerate(questions)
    ]
    settings = Settings(max_new_tokens=args.max_new_tokens)
    answered: list[Conversation] = []
    with progress.progress("answers", len(asked), "answers") as bar:
        for _, finished in rewrite(models, enumerate(asked), settings, seed=args.seed, batch=32):
            answered += [r.conversation for r in finished if r.turns]
            bar.advance(len(finished))
    if len(answered) < 10:
        raise ValueError(f"{args.target}: the target wrote only {len(answered)} answers, too few to learn from")
    return sorted(answered, key=lambda c: int(c.id))


def train_head(models: Models, conversations: Sequence[Conversation], args: Args) -> tuple[Any, list[int], RunResult]:
    """An EAGLE-2 head trained with EAGLE's losses on the target's answers, and the ids of their commonest tokens."""
    config = DistillConfig(
        name="quickstart",
        target=args.target,
        data=DataConfig(train="", eval="", length=256, batch=8, loss_on="assistant"),
        head=EagleOptions(embedding_norm=True),
        optimizer=OptimizerConfig(
            peak_lr=5e-3,
            kind="muon",
            warmup_steps=min(20, args.steps),
            steps=args.steps,
            weight_decay=0.01,
            clip_value=0.5,
            schedule="linear",
        ),
        checkpoint=CheckpointConfig(str(args.folder / "run"), save_every=max(1, args.steps // 4)),
        export_folder=str(args.folder / "drafter"),
        objective=Objective(chunk=32),
        seed=args.seed,
        eval_every=args.steps,
    )
    data = config.data
    judged = max(1, len(conversations) // 20)
    corpora = [
        tokenize_conversations(part, models.tokenizer, length=data.length)
        for part in (conversations[judged:], conversations[:judged])
    ]
    train_data = PackedBatches(corpora[0], data.length, data.batch, seed=args.seed, epochs=None, loss_on="assistant")
    eval_data = PackedBatches(corpora[1], data.length, data.batch, shuffle=False, loss_on="assistant")
    target: Any = models.engine.target
    head, done = distill(config, target, models.weights.target, train_data, eval_data)
    return head, count_tokens(corpora[0], models.config.vocab).commonest(DRAFT_VOCAB).tolist(), done


def pick_tree(drafted: Models, questions: Sequence[str], args: Args) -> tuple[str, dict[str, float]]:
    """The fastest tree by tokens a second on a few questions of their own, and every tree's speed.

    All are measured once and the best few again, in turns, for the median.
    """
    passes: dict[str, list[float]] = {tree: [] for tree in args.trees}
    finalists = min(FINALISTS, len(passes))
    with progress.progress("trees", len(passes) + finalists * (PASSES - 1), "passes") as bar:

        def take_turns(trees: Sequence[str]) -> None:
            for tree in trees:
                arm = drafted.with_tree(parse_tree(tree))
                passes[tree].append(measure(arm, questions, args).tokens_per_second)
                bar.advance(status=f"{tree} {passes[tree][-1]:,.0f} tokens/s")

        take_turns(list(passes))
        best = sorted(passes, key=lambda tree: -passes[tree][0])[:finalists]
        for _ in range(PASSES - 1):
            take_turns(best)
    speeds = {tree: float(np.median(values)) for tree, values in passes.items()}
    return max(best, key=lambda tree: speeds[tree]), speeds


def measure(models: Models, questions: Sequence[str], args: Args, *, temperature: float = 0.0) -> Arm:
    """The questions one at a time, as a single user would wait for them; programs are compiled before the clock."""
    jobs = [Job(i, prompt(models, question), args.seed + i) for i, question in enumerate(questions)]
    settings = Settings(max_new_tokens=args.max_new_tokens, temperature=temperature)
    answers, seconds = {}, 0.0
    for batch in queue.answer(models, Queue(jobs, batch=1), settings, warm=True):
        answers[batch.jobs[0].key] = batch.answers[0]
        seconds += batch.seconds
    rows = [answers[i] for i in range(len(jobs))]
    generation = Generation(
        [r.tokens for r in rows],
        [r.finish for r in rows],
        np.array([r.calls for r in rows]),
        np.stack([r.accepted for r in rows]),
    )
    return Arm(generation, seconds)


def prompt(models: Models, question: str) -> np.ndarray:
    """A question as the target reads it."""
    return models.tokenizer.encode_prompt([{"role": "user", "content": question}])


def compare(models: Models, questions: Sequence[str], plain: Arm, fast: Arm, args: Args) -> list[Divergence]:
    """Where the two arms' texts part, if anywhere."""
    requests = make_requests([prompt(models, q) for q in questions], max_new_tokens=args.max_new_tokens)
    return divergences(models.engine, models.weights, requests, plain.generation, fast.generation)


def show(
    models: Models, questions: Sequence[str], plain: Arm, fast: Arm, parted: list[Divergence], found: dict
) -> None:
    """Both texts of one question, and the table."""
    longest = int(np.argmax([len(t) for t in plain.generation.tokens]))
    for name, text in (
        ("question", questions[longest]),
        ("plain", models.tokenizer.decode(plain.generation.tokens[longest])),
        ("speculative", models.tokenizer.decode(fast.generation.tokens[longest])),
    ):
        sys.stdout.write(f"\n[{name}]\n{text.strip()}\n")
    sys.stdout.write("\n")
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
    for d in parted:
        verdict = "a near tie, decided by rounding" if d.near_tie else "NOT a near tie"
        sys.stdout.write(f"question {d.row} parts after {d.index} tokens at a margin of {d.margin:.1e}: {verdict}\n")
    sys.stdout.write(f'next: jaxspec generate --drafter {found["drafter_checkpoint"]} "{questions[longest][:60]}"\n')


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
