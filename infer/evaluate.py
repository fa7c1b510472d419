"""Evaluate drafters and trees against plain decoding on a set of questions, all arms in one run on the same tokens.

Reads Spec-Bench's question.jsonl, SPEED-Bench's prepared files, lines with `turns`, `prompt` or `messages`, and plain
text. Every answer becomes a line of rows.jsonl in --out, with the tokens of each target call; all figures are computed
from these rows, and `--check` asserts what must hold of them. A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import tyro

from jaxspec.console import cli, results, tables
from jaxspec.console.progress import progress
from jaxspec.data import jsonl
from jaxspec.data.chat_template import parse_variables
from jaxspec.data.questions import Question, read_questions
from jaxspec.decoding.requests import Settings
from jaxspec.evaluation import metrics, served_metrics, served_rows, side_by_side
from jaxspec.evaluation.acceptance import fingerprint
from jaxspec.evaluation.arms import SERVED, DecodingArm, check_tree, first_tree, make_arms, split_trees
from jaxspec.evaluation.file_checks import check_file
from jaxspec.evaluation.machine import drop_programs_if_crowded, peak_memory
from jaxspec.evaluation.rows import FORMAT, PLAIN, Evaluation, Row, from_record, to_record
from jaxspec.evaluation.served import ServedRun, by_task
from jaxspec.evaluation.served_rows import ServedBook
from jaxspec.evaluation.side_by_side import SideBySide
from jaxspec.evaluation.summary_checks import OF_ROWS, SUMMARY
from jaxspec.interchange import hf, target_folders
from jaxspec.parallel.agreement import say
from jaxspec.report.wording import known
from jaxspec.serving import loading
from jaxspec.serving.endpoint import Client, Endpoint
from jaxspec.serving.flags import DraftFlags
from jaxspec.serving.loading import Models
from jaxspec.serving.streaming_client import read_version
from jaxspec.trees import other_batches

SHOWN = 20
"""Problems of a file of rows that are printed."""


@dataclass(frozen=True, kw_only=True)
class Args(DraftFlags):
    """Command line of `jaxspec evaluate`."""

    drafter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder of a drafter, `lookup`, or `smollm2-head`, which comes with jaxspec; repeat the flag to compare several,
    each with every tree."""
    tree: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A draft tree, an arm each, as `jaxspec bench decode` takes them; `served` is the chain that servers verify of a
    drafter. Default: the tree saved with the drafter, and `served` beside it."""
    prompts: str | None = None
    """File of questions. Needed, unless --check is given."""
    limit: int | None = None
    """Take the first N questions of every task."""
    temperature: tuple[float, ...] = (0.0,)  # type: ignore[assignment]
    """Temperatures, a pass each; 0 is greedy."""
    seeds: str = "0"
    """Seeds of the draws above temperature 0, such as 0,1,2; greedy decoding draws nothing and takes the first."""
    batch: int = 1
    """Answers decoded together."""
    slots: int = 0
    """Decode in this many slots, which answers enter and leave one by one, in the place of batches."""
    repeats: int = 1
    """Times that every batch is decoded by every arm; times are medians over them."""
    rejected: int = 0
    """Keep the rejected drafts of the first N questions of every task, which are decoded once more for them, untimed.
    The page of jaxspec report shows them."""
    out: Path = Path("runs/evaluate")
    """Folder of rows.jsonl and summary.json."""
    endpoint: str | None = None
    """Let a server that speaks OpenAI's API answer (vLLM, SGLang, llama.cpp): its address, such as
    http://localhost:8000/v1. Its acceptance is read from its own metrics and answers. The key is read from
    JAXSPEC_API_KEY or OPENAI_API_KEY."""
    model: str | None = None
    """With --endpoint: the model's name. Default: the first that the server lists."""
    concurrency: int = 1
    """With --endpoint: requests in flight."""
    timeout: float = 600.0
    """With --endpoint: seconds to wait for an answer."""
    check: Path | None = None
    """Assert the invariants of a file of rows, or of the one in a folder, and that the summary beside it has their
    figures; do nothing else. A run that has not ended is said to be partial."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.check is not None:
            return
        if self.prompts is None:
            raise ValueError("--prompts is missing: name a file of questions, such as Spec-Bench's question.jsonl")
        for spec in self.trees:
            check_tree(spec)
        if twice := next((path for path in self.drafter if self.drafter.count(path) > 1), None):
            raise ValueError(f"--drafter {twice} is given twice; give every drafter once")
        if not self.drafter:
            self.needs_drafter(tree=self.tree)
        self._refuse_others()
        if not self.temperature or len(set(self.temperature)) < len(self.temperature):
            raise ValueError("--temperature needs one or more different temperatures")
        cli.refuse_below_one(self, "batch", "repeats", "concurrency", *([] if self.limit is None else ["limit"]))
        if self.rejected < 0:
            raise ValueError(f"--rejected {self.rejected} must be 0 or more")
        if self.rejected and not self.drafter:
            raise ValueError("--rejected needs a --drafter: nothing else is drafted here")
        if self.slots < 0 or (self.slots and self.batch > 1):
            raise ValueError("--slots and --batch are two ways: give --slots of at least 1, or --batch")
        _ = self.passes

    def _refuse_others(self) -> None:
        """Refuses what only a server needs, or what a server decides for itself."""
        usual = {field.name: field.default for field in fields(self)}
        if self.endpoint is None:
            for name in ("model", "concurrency", "timeout"):
                if getattr(self, name) != usual[name]:
                    raise ValueError(f"--{name} is of an --endpoint: give that too, or leave it out")
            return
        if self.drafter:
            raise ValueError("--endpoint has its own drafter: leave out --drafter and --tree")
        for name in ("template", "dtype", "batch", "slots", "repeats", "draft_mode", "rule", "draft_vocab"):
            if getattr(self, name) != usual[name]:
                raise ValueError(f"--{name.replace('_', '-')} is the server's own with --endpoint: leave it out")

    @property
    def trees(self) -> list[str]:
        """The trees named, in order."""
        return split_trees(self.tree)

    @property
    def settings(self) -> Settings:
        """The settings of all answers, at the first temperature."""
        return Settings(self.max_new_tokens, self.temperature[0], self.top_k, self.top_p, self.draft_temperature)

    @property
    def passes(self) -> list[Settings]:
        """The settings of every temperature and seed."""
        seeds = cli.seeds("--seeds", self.seeds)
        return [
            replace(self.settings, temperature=temperature, seed=seed)
            for temperature in self.temperature
            for seed in (seeds if temperature else seeds[:1])
        ]


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns 1 where rows do not hold what they must."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec evaluate", description=__doc__ or "")
    if args.check is not None:
        return tell_problems(args.check)
    assert args.prompts is not None
    questions = check_questions(read_questions(args.prompts, limit=args.limit))
    if args.endpoint is not None:
        return evaluate_served(args, questions, started)
    args.refuse_slow_dtype()
    for note in other_batches(args.trees, args.slots or args.batch):
        say(note)
    arms = make_arms(*load_every(args))
    kept = first_of_tasks(questions, args.rejected)
    setup = SideBySide(arms, args.batch, args.repeats, args.max_new_tokens, args.slots, kept)
    book = RowBook(args.out / "rows.jsonl", begun_with(args, setup, questions))
    with cli.sigterm_interrupts("what was measured is kept, and the same command goes on"):
        for settings in args.passes:
            evaluate(setup, questions, settings, book)
    evaluation = Evaluation(book.settings, book.rows)
    result = summary_of(args, evaluation, started)
    results.write_json(args.out / SUMMARY, result)
    if args.json:
        results.write_json(args.json, result)
    print_result(result, evaluation.rows)
    return tell_problems(args.out)


def evaluate_served(args: Args, questions: Sequence[Question], started: float) -> int:
    """Lets a server answer; writes a row for each answer and the figures by task."""
    key = os.environ.get("JAXSPEC_API_KEY") or os.environ.get("OPENAI_API_KEY") or None
    server = Endpoint(args.endpoint or "", args.model, key, args.concurrency, timeout=args.timeout)
    with closing(Client(server)) as client:
        about = {"format": served_rows.FORMAT, "endpoint": args.endpoint, "model": client.model}
        about |= {"server_version": read_version(client), "concurrency": args.concurrency}
        about |= {"prompts_sha256": hashlib.sha256(Path(args.prompts or "").read_bytes()).hexdigest()}
        asked = {name: getattr(args, name) for name in ("limit", "max_new_tokens", "top_k", "top_p", "template_args")}
        run = ServedRun(questions, args.passes, ServedBook(args.out / "served.jsonl", about | asked))
        with progress("served", len(run), "tasks") as bar:
            shown = ("task", "acceptance_length")
            run.ask(
                client,
                dict(parse_variables(args.template_args)),
                lambda row: bar.advance(1, ": ".join(tables.cell(row[name]) for name in shown)),
            )
    result = results.result(
        "evaluate",
        dtype="unknown",
        seed=args.passes[0].seed,
        started=started,
        **about,
        max_new_tokens=args.max_new_tokens,
        rows=str(run.book.path),
        failed=sum(bool(row.error) for row in run.book.file.rows),
        unanswered=sum(row["unanswered"] for row in run.summary),
        formulas=served_metrics.FORMULAS,
        summary=run.summary,
    )
    results.write_json(args.out / "summary.json", result)
    if args.json:
        results.write_json(args.json, result)
    print_served(result)
    if sentence := run.sentence():
        sys.stderr.write(f"jaxspec evaluate: {sentence}\n")
    return max(cli.EXIT_FAILED if sentence else 0, tell_problems(run.book.path))


def print_served(result: dict[str, Any]) -> None:
    """Prints what a server did, task by task, and how each figure is computed."""
    columns = ["task", "temperature", "answers", "failed", "unanswered", "drafts", "acceptance_length"]
    columns += ["acceptance_rate", "tau_micro", "tokens_per_second", "user_tokens_per_second", "ttft_ms"]
    title = f"{result['model']} at {result['endpoint']}, {result['concurrency']} requests in flight"
    tables.print_table(title, columns, [[row[name] for name in columns] for row in result["summary"]])
    for name, formula in result["formulas"].items():
        sys.stdout.write(f"{name}: {formula}\n")
    if not any(row["acceptance_from"] for row in result["summary"]):
        sys.stdout.write("the server shows no counters of speculative decoding, and its answers no rounds\n")


def load_every(args: Args) -> tuple[list[Models], tuple[str, ...], Sequence[str | None]]:
    """Returns the target with each drafter, or alone, the drafters, and the trees of all (None: each its own)."""
    plain = args.load_target()
    every = [args.add_drafter(plain, drafter, first_tree(args.trees)) for drafter in args.drafter] or [plain]
    return every, args.drafter, args.trees or (None, SERVED)


def check_questions(questions: list[Question]) -> list[Question]:
    """Returns the questions; says what of their lines is not used. Raises ValueError where two have one id.

    A line that cannot be used gives way: it is known by its place where another question has its id.
    """
    seen: dict[str, str] = {}
    for prompt in (question.prompt for question in questions if not question.prompt.problem):
        first = seen.setdefault(prompt.id, prompt.name)
        if first != prompt.name:
            raise ValueError(f"{prompt.name}: has the id of {first}; give each question its own")
    for number, (prompt, *_) in enumerate(questions):
        if prompt.problem and seen.setdefault(prompt.id, prompt.name) != prompt.name:
            questions[number] = questions[number]._replace(prompt=prompt._replace(id=prompt.place))
    own = sum(bool(question.prompt.settings) for question in questions)
    if own:
        say(f"note: {own:,} questions name settings of their own, which are not used: all arms share the run's")
    return questions


def first_of_tasks(questions: Sequence[Question], count: int) -> frozenset[str]:
    """Returns the ids of the first `count` questions of every task."""
    return frozenset(question.prompt.id for mine in by_task(questions).values() for _, question in mine[:count])


class RowBook:
    """The file of rows: a stopped run goes on behind its last whole batch."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, results.jsonable(settings)
        noted = jsonl.journal(path, self.settings, of=path.parent, fields=("id", "task"))
        self.rows = [from_record(record) for record in noted]
        self._drop_torn_batch()
        self.known = {row.key for row in self.rows}

    def add(self, rows: Sequence[Row]) -> None:
        """Notes the rows of a batch; they are on disk when this returns."""
        new = [row for row in rows if row.key not in self.known]
        jsonl.append(self.path, [to_record(row) for row in new])
        self.rows += new
        self.known |= {row.key for row in new}

    def has(self, rows: Sequence[tuple[Any, ...]]) -> bool:
        """Returns whether all these keys are noted."""
        return all(key in self.known for key in rows)

    def _drop_torn_batch(self) -> None:
        """Removes the last batch if a kill left only a part of it."""
        if not self.rows or self.rows[-1].error:
            return
        last = self.rows[-1]
        mine = [r for r in self.rows if (r.group, r.temperature, r.seed) == (last.group, last.temperature, last.seed)]
        if len(mine) == last.group_rows * len(self.settings["arms"]):
            return
        self.rows = self.rows[: -len(mine)]
        jsonl.keep_lines(self.path, 1 + len(self.rows))


def evaluate(setup: SideBySide, questions: Sequence[Question], settings: Settings, book: RowBook) -> None:
    """Measures all arms at one temperature and seed; batches that are noted are not decoded again."""
    warmed: set[Any] = set()
    named = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature:g}, seed {settings.seed}"
    for turn in range(max(question.turns for question in questions)):
        asked = side_by_side.ask(setup.plain, questions, answers_of(setup, book, settings), settings, turn)
        book.add(side_by_side.failures(setup, asked, settings))
        groups = side_by_side.group(setup, asked)
        left = [(n, g) for n, g in enumerate(groups) if not book.has(side_by_side.keys(setup, g, settings))]
        label = f"{named}, turn {turn + 1}" if turn else named
        with progress(label, sum(len(g.asked) for _, g in left), "questions") as bar:
            for number, group in left:
                if drop_programs_if_crowded():
                    warmed.clear()
                rows = []
                for arm, mine in side_by_side.measure(setup, group, settings, warmed, number, bar.tell):
                    rows += mine
                    bar.tell(f"{arm}: {tables.four_digits(speed_of(mine))} tokens/s")
                book.add(rows)
                bar.advance(len(group.asked))


def speed_of(rows: Sequence[Row]) -> float:
    """Returns new tokens a second of a batch."""
    return sum(row.length for row in rows) / sum(row.seconds for row in rows)


def answers_of(setup: SideBySide, book: RowBook, settings: Settings) -> dict[str, list[str]]:
    """Returns plain decoding's answers so far as text, by question id, in the order of turns."""
    mine = [
        r
        for r in book.rows
        if (r.arm, r.temperature, r.seed) == (PLAIN, settings.temperature, settings.seed) and not r.error
    ]
    found: dict[str, list[str]] = {}
    for row in sorted(mine, key=lambda r: r.turn):
        stopped = row.tokens[-1] in setup.plain.stop_ids
        tokens = row.tokens[:-1] if stopped else row.tokens
        found.setdefault(row.id, []).append(setup.plain.tokenizer.decode(list(tokens)))
    return found


def begun_with(args: Args, setup: SideBySide, questions: Sequence[Question]) -> dict[str, Any]:
    """Returns the settings that all rows of a file share."""
    folder, tokenizer = target_folders.target_folder(args.target), setup.plain.tokenizer
    assert args.prompts is not None
    return {
        "format": FORMAT,
        "target": args.target,
        "target_weights": hf.fingerprint(folder),
        **tokenizer.fingerprint,
        "prompts": Path(args.prompts).name,
        "prompts_sha256": hashlib.sha256(Path(args.prompts).read_bytes()).hexdigest(),
        "questions": len(questions),
        "limit": args.limit,
        "dtype": args.dtype,
        "max_new_tokens": args.max_new_tokens,
        "max_positions": setup.plain.config.max_positions,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "draft_temperature": args.draft_temperature,
        "temperatures": list(args.temperature),
        "seeds": args.seeds,
        "passes": [[settings.temperature, settings.seed] for settings in args.passes],
        "batch": args.batch,
        "repeats": args.repeats,
        "slots": args.slots or None,
        "rejected": args.rejected or None,
        "stop_ids": list(setup.plain.stop_ids),
        "machine": results.machine_facts(),
        "arms": {name: facts_of(arm) for name, arm in setup.arms.items()},
        "asked": [[question.prompt.id, question.task, question.turns] for question in questions],
    }


def facts_of(arm: DecodingArm) -> dict[str, Any]:
    """Returns the facts of an arm, its drafter's weights among them."""
    drafted = arm.models.weights.drafter is not None
    return arm.facts() | {"drafter_weights": fingerprint(arm.models) if drafted else None}


def summary_of(args: Args, evaluation: Evaluation, started: float) -> dict[str, Any]:
    """Returns the verb's JSON: the settings of the rows and every figure."""
    shared = {k: v for k, v in evaluation.settings.items() if k not in OF_ROWS}
    return results.result(
        "evaluate",
        dtype=loading.DTYPES[args.dtype],
        seed=args.passes[0].seed,
        started=started,
        **shared,
        rows=str(args.out / "rows.jsonl"),
        failed=sum(bool(row.error) for row in evaluation.rows if row.arm == PLAIN),
        peak_memory_bytes=peak_memory(),
        formulas=metrics.FORMULAS,
        summary=metrics.summarize_all(evaluation.rows, evaluation.arms),
    )


def _ends(row: Mapping[str, Any]) -> str | None:
    """Returns the interval of a speed-up; None where it has none."""
    low, high = row["speedup_low"], row["speedup_high"]
    return f"[{low:.2f}, {high:.2f}]" if known(low) else None


def print_result(result: dict[str, Any], rows: Sequence[Row]) -> None:
    """Prints a table for every temperature, how each figure is computed, and the turns that were left out."""
    columns = {
        "task": "task",
        "arm": "method",
        "answers": "answers",
        "tau": "tau_micro",
        "tau, mean of answers": "tau_macro",
        "tokens/s": "tokens_per_second",
        "x plain": "speedup",
        "95 %": None,
        "efficiency": "efficiency",
        "same": "identical_fraction",
    }
    for temperature in dict.fromkeys(row["temperature"] for row in result["summary"]):
        lines = [
            [_ends(row) if key is None else row[key] for key in columns.values()]
            for row in result["summary"]
            if row["temperature"] == temperature
        ]
        title = "Greedy" if temperature == 0 else f"Temperature {temperature:g}"
        size = f"{result['slots']} slots" if result["slots"] else f"batch {result['batch']}"
        tables.print_table(f"{title}, {size}, {result['dtype']}", list(columns), lines)
    for name in ("tau_micro", "tau_macro", "speedup", "efficiency", "identical_fraction"):
        sys.stdout.write(f"{name}: {metrics.FORMULAS[name]}\n")
    if any(row["answers"] and not known(row["tokens_per_second"]) for row in result["summary"]):
        sys.stdout.write(f"{metrics.SHARED_BATCHES}\n")
    for row in [row for row in rows if row.error and row.arm == PLAIN][:SHOWN]:
        sys.stdout.write(f"left out: {row.id}, turn {row.turn + 1}: its prompt {row.error}\n")
    if result["failed"] > SHOWN:
        sys.stdout.write(f"left out in all: {result['failed']} turns; {result['rows']} says why\n")


def tell_problems(path: Path) -> int:
    """Asserts the invariants of a file of rows, or of those in a folder; returns the exit code."""
    problems, count = check_file(path)
    for problem in problems[:SHOWN]:
        sys.stderr.write(f"jaxspec evaluate: {path}: {problem}\n")
    if len(problems) > SHOWN:
        sys.stderr.write(f"jaxspec evaluate: {path}: {len(problems) - SHOWN:,} problems more\n")
    if not problems:
        sys.stdout.write(f"{path}: all invariants hold of {count:,} rows\n")
    return cli.EXIT_FAILED if problems else 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
