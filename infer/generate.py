"""Answer prompts with a target, with or without a drafter.

One prompt is streamed; several run side by side in slots, each of which takes the next prompt when it is done, and are
printed in the order given. A prompt that cannot be answered is named in one sentence before any is answered, and
skipped; the exit code is then 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from jaxspec.console import cli, progress, results, tables
from jaxspec.data import jsonl
from jaxspec.data.chat import NO_TEMPLATE, IncrementalDecoder
from jaxspec.data.prompts import Prompt, encode_prompt, read_prompts, refuse_same_ids, text_prompt
from jaxspec.decoding.answers import Answer, total_tau, total_tokens
from jaxspec.decoding.generation import stream
from jaxspec.decoding.requests import Request, Settings, make_requests
from jaxspec.parallel.agreement import say
from jaxspec.serving import loading, queue
from jaxspec.serving.flags import DraftFlags
from jaxspec.serving.loading import Models
from jaxspec.trees import other_batches, parse_tree, resolve_tree

RUN_FLAGS = ("prompt", "prompts", "slots", "out", "json")
"""Flags that do not change an answer, or not by themselves."""
TAU = "tau: tokens per target call, bonus token included; the prefill call and the token it gives are not counted"


@dataclass(frozen=True, kw_only=True)
class Args(DraftFlags):
    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """Text to answer; several prompts are answered in batches."""
    prompts: str | None = None
    """File of prompts instead: JSON Lines of {"id", "prompt"} or {"id", "messages"}, or text with one prompt a line. A
    line of JSON may set temperature, top_k, top_p, seed, max_new_tokens, draft_temperature and stop_ids for itself."""
    drafter: str = "none"
    """Folder of a drafter; `smollm2-head` comes with jaxspec, for the target smollm2; `lookup` looks the newest tokens
    up in the text; `none` decodes plainly, a token a call."""
    tree: str | None = None
    """Tree drafted each round: none, chain:DEPTH, static:eagle1, static:0,1,00, dynamic:NODESxDEPTHxBEAM,
    lookup:LENGTH, lookup:LENGTH+dynamic:NODESxDEPTHxBEAM, a FILE.json of jaxspec lab search or, for Medusa and
    ParallelSpec, best_first:NODESxDEPTHxWIDTH. Default: the tree saved with the drafter, else EAGLE-2's
    dynamic:60x6x10."""
    slots: int = 8
    """Prompts decoded side by side."""
    out: str | None = None
    """File (JSON Lines) for the answers, one line a prompt, instead of printing them. What is done is kept in
    FILE.partial as it comes: a run that was stopped goes on with the same command."""
    raw: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue the prompt's text as it stands, without the chat template."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.prompt) == (self.prompts is not None):
            raise ValueError("give prompts as words in quotes or a file with --prompts, one of the two")
        if self.raw and self.template is not None:
            raise ValueError("--raw leaves the chat template out: leave out --template, or --raw")
        if self.tree is not None:
            parse_tree(self.tree)
        if self.drafter == "none":
            self.needs_drafter(tree=self.tree)
        cli.refuse_below_one(self, "slots")
        if self.out is not None and Path(self.out).exists():
            raise ValueError(f"--out {self.out} exists: give another name, or move it away")


class AnsweredPrompts(NamedTuple):
    """Answers by prompt index, and the time and tokens of this run alone."""

    answers: dict[int, Answer]
    seconds: float
    tokens: int
    """New tokens of this run; those of a run it resumes are not counted."""


def main(argv: list[str]) -> int:
    """Runs the verb; returns 1 if a prompt could not be answered."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec generate", description=__doc__ or "")
    given = [text_prompt(str(number), text) for number, text in enumerate(args.prompt, 1)]
    prompts = given or refuse_same_ids(read_prompts(args.prompts or ""))
    failures = find_failures(prompts, args.settings)
    tell_failures(prompts, failures)
    tell_unread(prompts)
    if len(failures) == len(prompts):
        return cli.EXIT_FAILED
    log = None if args.out is None else Log(Path(args.out), args, prompts)
    models = args.load_target(NO_TEMPLATE if args.raw else None)
    if args.drafter != "none":
        for note in other_batches([args.tree], min(args.slots, len(prompts))):
            say(note)
        models = args.add_drafter(models, args.drafter, args.tree)
    requests, unfit = request_all(prompts, models, args, failures)
    tell_failures(prompts, unfit)
    failures |= unfit
    if len(prompts) == 1 and requests and log is None:
        done = answer_one(models, requests[0])
    else:
        done = answer_many(models, requests, args, log)
    rows = [make_row(p, models, done.answers.get(i), failures.get(i)) for i, p in enumerate(prompts)]
    if log is not None:
        log.finish(rows)
    elif len(prompts) > 1:
        print_answers(prompts, models, done.answers)
    if done.answers:
        print_summary(models, done)
    if args.json:
        results.write_json(args.json, make_result(args, rows, models, done, started))
    return cli.EXIT_FAILED if failures else 0


class Log:
    """The answers so far, in `FILE.partial`; at the end they are written to `FILE` in the order of the prompts."""

    def __init__(self, path: Path, args: Args, prompts: Sequence[Prompt]) -> None:
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        settings = {k: v for k, v in dataclasses.asdict(args).items() if k not in RUN_FLAGS}
        if args.tree is not None:
            settings["tree"] = resolve_tree(args.tree)  # a tree file may change before the run goes on
        told = [[p.tools, {**p.variables}] if p.tools or p.variables else [] for p in prompts]
        asked = [[p.id, p.messages, {**p.settings}, *more] for p, more in zip(prompts, told, strict=True)]
        text = json.dumps(asked)
        settings["prompts"] = hashlib.sha256(text.encode()).hexdigest()[:16]
        noted = jsonl.journal(self.partial, settings, of=path, fields=("index", "tokens", "rest"))
        self.answers = {line["index"]: read_answer(line["tokens"], *line["rest"]) for line in noted}

    def note(self, index: int, answer: Answer) -> None:
        """Keeps one answer; it is on disk when this returns."""
        self.answers[index] = answer
        rest = [answer.finish, answer.calls, answer.accepted.tolist()]
        jsonl.append(self.partial, [{"index": index, "tokens": answer.tokens.tolist(), "rest": rest}])

    def finish(self, rows: list[dict[str, Any]]) -> None:
        """Writes the whole file, and drops the partial one."""
        draft = self.path.with_name(f"{self.path.name}.draft")
        draft.unlink(missing_ok=True)
        jsonl.append(draft, [{**row, "token_ids": [int(t) for t in row["token_ids"]]} for row in rows])
        draft.replace(self.path)
        self.partial.unlink()


def read_answer(tokens: list[int], finish: str, calls: int, accepted: list[int]) -> Answer:
    """Returns an answer as the log's line holds it."""
    return Answer(np.array(tokens, np.int32), finish, calls, np.array(accepted))


def find_failures(prompts: Sequence[Prompt], settings: Settings) -> dict[int, str]:
    """Returns by index a sentence on each prompt that no target can answer."""
    found = {index: prompt.problem for index, prompt in enumerate(prompts) if prompt.problem}
    for index, prompt in enumerate(prompts):
        try:
            settings_of(prompt, settings)
        except ValueError as error:
            found.setdefault(index, cli.sentence(error))
    return found


def tell_unread(prompts: Sequence[Prompt]) -> None:
    """Says on stderr which fields of the prompts' lines are not used."""
    counts = Counter(name for prompt in prompts for name in prompt.unread)
    for name, count in counts.items():
        sys.stderr.write(f"jaxspec generate: {count:,} prompts have a field {name}, which is not read\n")


def tell_failures(prompts: Sequence[Prompt], failures: dict[int, str]) -> None:
    """Names the prompts that cannot be answered on stderr."""
    for index, problem in sorted(failures.items()):
        sys.stderr.write(f"jaxspec generate: {prompts[index].name} {problem}\n")


def request_all(
    prompts: Sequence[Prompt], models: Models, args: Args, failures: dict[int, str]
) -> tuple[list[Request], dict[int, str]]:
    """Returns the requests of the prompts without a failure, and by index a sentence on each that is none here."""
    requests, unfit = [], {}
    for index, prompt in enumerate(prompts):
        if index in failures:
            continue
        try:
            tokens = encode_prompt(prompt, models.tokenizer, raw=args.raw)
            requests.append(models.request(tokens, settings_of(prompt, args.settings.for_row(index)), index))
        except ValueError as error:
            unfit[index] = cli.sentence(error)
    return requests, unfit


def settings_of(prompt: Prompt, settings: Settings) -> Settings:
    """Returns the settings with those that the prompt's line sets for itself."""
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in prompt.settings.items()}
    return dataclasses.replace(settings, **own)


def answer_one(models: Models, request: Request) -> AnsweredPrompts:
    """Streams the answer to stdout; the programs are compiled before the clock starts."""
    requests = make_requests([request])
    queue.warm_up(models, requests, request.settings.max_new_tokens)
    decoder = IncrementalDecoder(models.tokenizer)
    rounds = max(1, 8 // models.engine.path)  # about a word or two at a time
    started, answer, shown = time.perf_counter(), None, 0
    for (answer,) in stream(models.engine, models.weights, requests, rounds=rounds):
        sys.stdout.write(decoder.push(answer.tokens[shown:]))
        sys.stdout.flush()
        shown = len(answer.tokens)
    seconds = time.perf_counter() - started
    sys.stdout.write(decoder.flush() + "\n\n")
    assert answer is not None
    return AnsweredPrompts({request.key: answer}, seconds, len(answer.tokens))


def answer_many(models: Models, requests: list[Request], args: Args, log: Log | None) -> AnsweredPrompts:
    """Answers the requests in slots, with a progress bar; those already in the log are left out."""
    answers = {} if log is None else log.answers
    left = [request for request in requests if request.key not in answers]
    if answers:
        sys.stderr.write(f"{args.out}: {len(answers):,} prompts are done, {len(left):,} are left\n")
    seconds, tokens = 0.0, 0
    if left:
        with progress.progress("answering", len(left), "prompts") as bar:
            for request, answer, seconds, _ in queue.serve(models, left, slots=args.slots):
                answers[request.key] = answer
                if log is not None:
                    log.note(request.key, answer)
                tokens += len(answer.tokens)
                bar.advance(1, f"{tables.four_digits(tokens / seconds)} tokens/s")
    return AnsweredPrompts(answers, seconds, tokens)


def print_answers(prompts: Sequence[Prompt], models: Models, answers: dict[int, Answer]) -> None:
    """Prints the answers in the order of the prompts, each under its id."""
    for index in sorted(answers):
        prompt, text = prompts[index], models.tokenizer.decode(answers[index].tokens)
        sys.stdout.write(f"[{prompt.id}] {json.dumps(prompt.messages[-1]['content'], ensure_ascii=False)}\n{text}\n\n")


def tokens_per_second(done: AnsweredPrompts) -> float | None:
    """Returns this run's new tokens by its time from prompts to last token, prefill included, compilation not."""
    return done.tokens / done.seconds if done.tokens else None


def print_summary(models: Models, done: AnsweredPrompts) -> None:
    """Prints speed, tau and the accept lengths."""
    answers = list(done.answers.values())
    rows = [
        ["new tokens", total_tokens(answers)],
        ["tokens/s", tokens_per_second(done)],
        ["tau", total_tau(answers)],
    ]
    tables.print_table("Decoding", ["measure", "value"], rows)
    sys.stdout.write(f"tokens/s: from prompt to last token, prefill included, compilation not\n{TAU}\n")
    if not models.engine.rule.lossless:
        sys.stdout.write(f"rule {models.engine.rule.name} is LOSSY: this is not the target's own text\n")
    if models.engine.drafter is not None:
        rounds = np.sum([a.accepted for a in answers], axis=0)
        shares = rounds / max(1, rounds.sum())
        table = [[n, int(r), f"{share:.1%}"] for n, (r, share) in enumerate(zip(rounds, shares, strict=True))]
        tables.print_table("Accept lengths", ["drafted tokens accepted", "rounds", "share"], table)


def make_result(
    args: Args, rows: list[dict[str, Any]], models: Models, done: AnsweredPrompts, started: float
) -> dict[str, Any]:
    """Returns the verb's JSON; a prompt that failed has its sentence in `error` and no text."""
    answers = list(done.answers.values())
    tree = models.engine.tree
    return results.result(
        "generate",
        dtype=loading.DTYPES[args.dtype],
        seed=args.seed,
        started=started,
        target=args.target,
        drafter=None if args.drafter == "none" else args.drafter,
        tree=None if tree is None else getattr(tree, "spec", str(tree)),
        draft_mode=models.engine.mode,
        rule=models.engine.rule.name,
        lossless=models.engine.rule.lossless,
        temperature=args.temperature,
        rows=rows,
        failed=sum(row["error"] is not None for row in rows),
        tokens_per_second=tokens_per_second(done),
        tau=total_tau(answers) if answers else None,
        accept_histogram=np.sum([a.accepted for a in answers], axis=0) if answers else [],
    )


def make_row(prompt: Prompt, models: Models, answer: Answer | None, error: str | None) -> dict[str, Any]:
    """Returns a prompt's entry of `rows`; `tokens` counts `token_ids`, the stop id included."""
    if answer is None:
        row = {"text": "", "tokens": 0, "token_ids": [], "finish_reason": "error", "tau": None, "target_calls": 0}
        return {"id": prompt.id, **row, "error": error}
    return {
        "id": prompt.id,
        "text": models.tokenizer.decode(answer.tokens),
        "tokens": len(answer.tokens),
        "token_ids": answer.tokens,
        "finish_reason": answer.finish,
        "tau": answer.tau,
        "target_calls": answer.calls,
        "error": None,
    }


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
