"""Let the target write the answers of a data set: what a drafter is distilled on.

User turns are kept; every assistant turn is the target's, its own earlier answers before it. A run that was stopped
goes on where it was: give the same command. For many machines give each its --shard i/n and its own --out; the files
together hold what one run without shards writes.

The direct-alignment paper's data (arXiv 2403.00858): --temperatures 0,0.3,0.7,1.0 --top-p 0.95. With a drafter's own
HuggingFace folder as --target the answers are the draft's (DistillSpec's on-policy data).
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import tyro

from jaxspec.console import cli, progress, results, tables
from jaxspec.data.account import Account
from jaxspec.data.chat import ChatTokenizer, TemplateChoice
from jaxspec.data.chat_template import DATE, parse_variables
from jaxspec.data.conversations import read_conversations
from jaxspec.data.messages import BadRecord, Conversation
from jaxspec.data.shown import ShownContent
from jaxspec.data.turns import TurnEncoder
from jaxspec.decoding.answers import total_tokens
from jaxspec.interchange.hf import fingerprint
from jaxspec.interchange.target_folders import target_folder
from jaxspec.parallel import processes
from jaxspec.serving import flags, loading
from jaxspec.serving.answer_file import AnswerFile
from jaxspec.serving.dialogue import CALLS, LENGTH, NO_TURN, UNFIT, check_results, steps_of
from jaxspec.serving.endpoint import Client, Endpoint, Failure, rewrite_remotely
from jaxspec.serving.flags import Flags
from jaxspec.serving.loading import Models
from jaxspec.serving.regeneration import (
    RewriteOptions,
    Temperatures,
    TemplateMix,
    begin_dialogue,
    parse_temperatures,
    parse_template_mix,
    rewrite,
    write_user_turns,
)

SETTINGS = (
    "target", "template", "template_args", "template_mix", "from_scratch", "temperature", "temperatures", "top_k",
    "top_p", "seed", "max_new_tokens", "shard", "dtype", "keep_unfinished",
)  # fmt: skip
"""Flags that must stay the same when a run is resumed; prompts are compared one by one."""
TOLD = 5
"""Unfit conversations that are told with their reasons."""
FINISHES = {"unfinished": LENGTH, "unfit": UNFIT, "calls": CALLS}
"""Ways to end that are counted, by the names of their counts."""


@dataclass(frozen=True, kw_only=True)
class Args(Flags):
    out: str
    """JSON Lines of {"id", "source", "messages", "answers", "finish", "tokens", "temperature"}, appended as
    conversations are finished; `answers` holds the tokens of each prompt and answer."""
    prompts: str | None = None
    """JSON Lines of conversations, {"id", "source", "messages"} or ShareGPT's form. Their answers are not read, but the
    recorded results of tools are: they follow the target's own calls, in their order."""
    from_scratch: int = 0
    """Without --prompts: so many single user turns that the target itself writes, at temperature 1."""
    temperatures: str | None = None
    """Instead of --temperature: several, each with its weight (1 if left out), such as 0:1,0.3:1,0.7:1,1.0:1. Every
    conversation draws one, and keeps it through its turns."""
    template_mix: str | None = None
    """Template variables to answer with, each with its weight, such as enable_thinking=true:3,enable_thinking=false:1.
    Every conversation draws one; variables of its own go before it."""
    batch: int = 16
    """Conversations decoded together."""
    endpoint: str | None = None
    """Instead of decoding here: address of a server that speaks OpenAI's chat completions, such as
    http://localhost:8000/v1. Its key is read from JAXSPEC_API_KEY or OPENAI_API_KEY."""
    model: str | None = None
    """With --endpoint: the model's name. Default: the first that the server lists."""
    concurrency: int = 64
    """With --endpoint: requests in flight."""
    tries: int = 8
    """With --endpoint: times that a request is sent before its conversation is given up for this run."""
    timeout: float = 600.0
    """With --endpoint: seconds to wait for an answer."""
    shard: str = "0/1"
    """Take only every n-th conversation, beginning with the i-th: 0/4, 1/4, 2/4 or 3/4."""
    limit: int | None = None
    """Take only the first N conversations of the file, before they are sharded."""
    skip_bad: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave out, and count, conversations that cannot be read, instead of stopping at the first."""
    keep_unfinished: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep conversations whose last answer was cut at --max-new-tokens; they are dropped otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.part, self.mixture
        drawn = [] if self.templates is None else [name for choice in self.templates.choices for name, _ in choice]
        if twice := next((name for name, _ in parse_variables(self.template_args) if name in drawn), None):
            raise ValueError(f"--template-args and --template-mix both set {twice}: give it in one of them")
        if self.endpoint is None and self.model is not None:
            raise ValueError("--model names the model of an --endpoint: give that too, or --target")
        if self.endpoint is not None:
            _ = self.server
            if self.template is not None:
                raise ValueError("--template is for a target that decodes here; a server has its own: leave it out")
            if self.prompts is None:
                raise ValueError("--endpoint needs --prompts: user turns are written by a target that decodes here")
        if self.temperatures is not None and self.temperature:
            raise ValueError("give --temperature, or several with --temperatures, one of the two")
        if (self.prompts is None) == (self.from_scratch == 0):
            raise ValueError("give a file with --prompts, or a number with --from-scratch, one of the two")
        cli.refuse_below_one(self, "batch", "limit")
        if self.prompts is None:
            cli.refuse_below_one(self, "from_scratch")

    @property
    def part(self) -> tuple[int, int]:
        """Shard, and number of shards."""
        return flags.parse_part(self.shard)

    @property
    def chat(self) -> TemplateChoice:
        """The chat template; one day for all, so that a run that goes on writes what one run would."""
        return super().chat._replace(date=DATE)

    @property
    def templates(self) -> TemplateMix | None:
        """The template variables to draw from; None for one choice alone."""
        return None if self.template_mix is None else parse_template_mix(self.template_mix)

    @property
    def server(self) -> Endpoint:
        """The server that answers."""
        key = os.environ.get("JAXSPEC_API_KEY") or os.environ.get("OPENAI_API_KEY") or None
        return Endpoint(self.endpoint or "", self.model, key, self.concurrency, self.tries, self.timeout)

    @property
    def mixture(self) -> Temperatures | None:
        """The temperatures to draw from; None for one alone."""
        return None if self.temperatures is None else parse_temperatures(self.temperatures)


def main(argv: list[str]) -> int:
    """Runs the verb; returns 1 if not one conversation is finished, or some have failed."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec regenerate", description=__doc__ or "")
    if args.part == (0, 1):
        processes.refuse_several("jaxspec regenerate", "give each its --shard i/n and its own --out")
    # Read first: a file that cannot be read must not begin an output.
    account = Account(skip_bad=args.skip_bad)
    conversations = read_prompts(args, account)
    with ExitStack() as opened:
        client = None if args.endpoint is None else opened.enter_context(closing(Client(args.server)))
        output = AnswerFile(Path(args.out), settings_of(args, client))
        for line in account.sentences():
            sys.stderr.write(f"jaxspec regenerate: {line}\n")
        failures, result = fill(output, conversations, client, args)
    seconds = {"wall_seconds": time.monotonic() - started}
    result |= {"left_out": dict(account.counts), "failures": count_failures(failures), **seconds}
    print_counts(result["sources"], result["by_temperature"], args)
    tell_unfit(output)
    if args.json:
        results.write_json(args.json, result)
    return verdict(args, output, result, failures)


def read_prompts(args: Args, account: Account) -> list[Conversation] | None:
    """Returns the conversations of the file that can be asked, or None where there is no file.

    What the target's template has no place for is found here too, before an output is begun.
    """
    found = None
    if args.prompts is not None:
        found = usable(read_conversations(args.prompts, limit=args.limit, account=account), account)
    if args.endpoint is None:
        tokenizer = ChatTokenizer.load(target_folder(args.target), args.chat)
        for choice in [] if args.templates is None else args.templates.choices:
            try:
                tokenizer.template.check(dict(choice))
            except ValueError as error:
                raise ValueError(f"--template-mix: {error}") from error
        found = None if found is None else shown_whole(found, tokenizer, account)
    if found == []:
        raise ValueError(f"{args.prompts}: holds no conversation that can be used; {'; '.join(account.sentences())}")
    return found


def usable(conversations: Sequence[Conversation], account: Account) -> list[Conversation]:
    """Returns the conversations whose id no earlier one has, and whose tools' results follow a user's turn.

    The account refuses or counts the others."""
    first: dict[str, Conversation] = {}
    for conversation in conversations:
        try:
            check_results(conversation.messages)
        except BadRecord as error:
            account.refuse(conversation.name, error)
            continue
        if first.setdefault(conversation.id, conversation) is not conversation:
            place = first[conversation.id].place
            taken = BadRecord("the id of another", f"has the id {conversation.id!r} of {place}: give each its own")
            account.refuse(conversation.place, taken)
    return list(first.values())


def shown_whole(
    conversations: Sequence[Conversation], tokenizer: ChatTokenizer, account: Account
) -> list[Conversation]:
    """Returns the conversations whose first prompt the template shows; the account refuses or counts the others."""
    shown, found = ShownContent(tokenizer), []
    for conversation in conversations:
        try:
            for step in steps_of(conversation.messages)[:1]:
                shown.check(step.others, conversation.tools, conversation.variables)
        except BadRecord as error:
            account.refuse(conversation.name, error)
            continue
        except ValueError:  # unfit, and counted as such when it is asked
            pass
        found.append(conversation)
    return found


def tell_unfit(output: AnswerFile) -> None:
    """Names the conversations that the target cannot read, each with the reason."""
    unfit = [record["id"] for record in output.done.values() if record["finish"] == UNFIT]
    for id in unfit[:TOLD]:
        sys.stderr.write(f"jaxspec regenerate: unfit is {id!r}: {output.reason(id) or 'its reason was not noted'}\n")
    if len(unfit) > TOLD:
        rest = ", ".join(map(repr, unfit[TOLD : TOLD + 20])) + (", ..." if len(unfit) > TOLD + 20 else "")
        sys.stderr.write(f"jaxspec regenerate: unfit are {len(unfit) - TOLD:,} more: {rest}\n")


def fill(
    output: AnswerFile, conversations: list[Conversation] | None, client: Client | None, args: Args
) -> tuple[list[Failure], dict[str, Any]]:
    """Answers the conversations that the file lacks; returns what failed, and the verb's JSON."""
    started = time.monotonic()
    models = None
    if conversations is None:
        models = args.load_target()
        conversations = write_conversations(models, args)
    chosen = list(select(conversations, args))
    todo = output.left(chosen, {c.id for c in conversations} - {c.id for _, c in chosen})
    already = len(output.done)
    tell_left(args.out, already, len(todo))
    if output.changed:
        sys.stderr.write(
            f"{args.out}: {output.changed:,} of them had been left out, have changed since and are asked again\n"
        )
    failures: list[Failure] = []
    speed = (0.0, 0)
    if todo and client is not None:
        speed = run_remotely(client, todo, output, args, failures)
    elif todo:
        speed = run(models or args.load_target(), todo, output, args)
    return failures, make_result(args, output, speed, resumed_from=already, started=started)


def verdict(args: Args, output: AnswerFile, result: dict[str, Any], failures: Sequence[Failure]) -> int:
    """Returns the exit status, and says what is wrong."""
    if failures:
        kinds = ", ".join(f"{count:,} by {kind}" for kind, count in result["failures"].items())
        sys.stderr.write(
            f"jaxspec regenerate: {len(failures):,} conversations have no answer yet ({kinds}; the first: "
            f"{failures[0].id!r}, {failures[0].sentence}): give the same command again\n"
        )
        return cli.EXIT_FAILED
    if output.kept:
        return 0
    reason = "no answer was finished; raise --max-new-tokens or use --keep-unfinished"
    if args.prompts is not None and not result["unfinished"]:
        reason = f"{args.prompts} has no user turn that the target can answer: give it conversations with one"
        if any(output.reason(id) not in ("", NO_TURN) for id in output.done):
            reason = f"{args.prompts} holds no conversation that the target can read: the reasons stand above"
    sys.stderr.write(f"jaxspec regenerate: {reason}\n")
    return cli.EXIT_FAILED


def settings_of(args: Args, client: Client | None) -> dict[str, Any]:
    """Returns the settings that a run keeps when it is resumed."""
    found = {name: getattr(args, name) for name in SETTINGS}
    if client is not None:
        return found | {"endpoint_model": client.model}
    tokenizer = ChatTokenizer.load(target_folder(args.target), args.chat)
    contents = {f"{name}_contents": value for name, value in tokenizer.fingerprint.items()}
    return found | contents | {"target_contents": fingerprint(target_folder(args.target))}


def count_failures(failures: Sequence[Failure]) -> dict[str, int]:
    """Returns the number of failures of each kind."""
    return dict(Counter(failure.kind for failure in failures))


def tell_left(out: str, done: int, left: int) -> None:
    """Says what an earlier run has done."""
    if done and left:
        sys.stderr.write(f"{out}: {done:,} conversations are done, {left:,} are left\n")
    elif done:
        sys.stderr.write(f"{out}: all {done:,} conversations are already done; --out with another name begins anew\n")


def make_result(
    args: Args, output: AnswerFile, speed: tuple[float, int], *, resumed_from: int, started: float
) -> dict[str, Any]:
    """Returns the verb's JSON; `speed` holds the seconds and tokens of this run."""
    seconds, tokens = speed
    rows = output.count("source", finishes=FINISHES)
    return results.result(
        "regenerate",
        dtype=loading.DTYPES[args.dtype],
        seed=args.seed,
        started=started,
        **{name: getattr(args, name) for name in ("prompts", *SETTINGS) if name not in ("dtype", "seed")},
        endpoint=args.endpoint,
        out=args.out,
        conversations=len(output.kept),
        resumed_from=resumed_from,
        unfinished=sum(row["unfinished"] for row in rows),
        unfit=sum(row["unfit"] for row in rows),
        unmatched_calls=sum(row["calls"] for row in rows),
        tokens=tokens,
        tokens_per_second=tokens / seconds if tokens else None,
        sources=rows,
        by_temperature=output.count("temperature", finishes=FINISHES),
    )


def write_conversations(models: Models, args: Args) -> list[Conversation]:
    """Returns conversations of one user turn each, written by the target: the same in every shard."""
    turns = []
    with progress.progress("writing user turns", args.from_scratch, "turns") as bar:
        for turn in write_user_turns(models, args.from_scratch, seed=args.seed, batch=args.batch):
            turns.append(turn)
            bar.advance(1, f"{turn.attempt + 1 - len(turns):,} dropped")
    if not turns:
        raise ValueError("the target wrote no user turn that ended; it may not have been trained on user turns")
    if len(turns) < args.from_scratch:
        sys.stderr.write(f"jaxspec regenerate: the target wrote only {len(turns):,} different user turns\n")
    return [
        Conversation(f"scratch-{turn.attempt}", "scratch", ({"role": "user", "content": turn.text},)) for turn in turns
    ]


def select(conversations: Sequence[Conversation], args: Args) -> Iterator[tuple[int, Conversation]]:
    """Yields this shard's conversations with their indices."""
    part, parts = args.part
    return islice(enumerate(conversations), part, None, parts)


def run(models: Models, todo: list[tuple[int, Conversation]], output: AnswerFile, args: Args) -> tuple[float, int]:
    """Rewrites `todo` into `output`; returns seconds, compilation included, and tokens."""
    ending = TurnEncoder(models.tokenizer).unmarked_end()
    if ending is not None:
        sys.stderr.write(
            f"jaxspec regenerate: the template ends a turn by {ending!r}, which is no stop id of {args.target}: "
            "answers may run on to --max-new-tokens; list its id as eos_token_id in generation_config.json\n"
        )
    made_with = {**models.tokenizer.fingerprint, "target": fingerprint(target_folder(args.target))}
    told = dict(models.tokenizer.template.variables)
    options = RewriteOptions(args.batch, args.mixture, args.templates, made_with, told)
    started, tokens = time.perf_counter(), 0
    with progress.progress("regenerating", len(todo), "conversations") as bar:
        for answers, finished in rewrite(models, todo, args.settings, options):
            output.add(finished, keep_unfinished=args.keep_unfinished)
            tokens += total_tokens(answers)
            speed = tokens / (time.perf_counter() - started)
            bar.advance(len(finished), f"{tables.four_digits(speed)} tokens/s")
    return time.perf_counter() - started, tokens


def run_remotely(
    client: Client,
    todo: list[tuple[int, Conversation]],
    output: AnswerFile,
    args: Args,
    failures: list[Failure],
) -> tuple[float, int]:
    """Lets the server rewrite `todo` into `output`; returns seconds and tokens, and adds what failed."""
    told = dict(parse_variables(args.template_args))
    options = RewriteOptions(1, args.mixture, args.templates, {"model": client.model}, told)
    begun = (begin_dialogue(i, c, args.settings, options) for i, c in todo)
    started, tokens = time.perf_counter(), 0
    with progress.progress("regenerating", len(todo), "conversations") as bar:
        for done in rewrite_remotely(client, begun):
            if isinstance(done, Failure):
                failures.append(done)
            else:
                output.add([done], keep_unfinished=args.keep_unfinished)
                tokens += done.tokens
            speed = tables.four_digits(tokens / (time.perf_counter() - started))
            again = sum(client.retries.values())
            bar.advance(1, f"{speed} tokens/s, {again:,} sent again, {len(failures):,} failed")
    return time.perf_counter() - started, tokens


def print_counts(sources: list[dict[str, Any]], by_temperature: list[dict[str, Any]], args: Args) -> None:
    """Prints the counts, by temperature too where there are several, and their meaning."""
    counted = ("conversations", "turns", "tokens", *FINISHES)
    columns = ["kept", "answers", "tokens", "unfinished", "unfit", "calls"]
    total = {k: sum(row[k] for row in sources) for k in counted}
    tables.print_table(args.out, ["source", *columns], [list(row.values()) for row in [*sources, {"": "all", **total}]])
    if args.temperatures is not None:
        table = [[f"{row['temperature']:g}", *(row[k] for k in counted)] for row in by_temperature]
        tables.print_table("by temperature", ["temperature", *columns], table)
    fate = "kept" if args.keep_unfinished else "dropped"
    sys.stdout.write(
        f"unfinished: an answer reached {args.max_new_tokens} tokens or the target's last position; {fate}.\n"
        "unfit: no user's turn, no room in the target's positions, or the template refuses a turn; cut there, "
        "or dropped if it is the first.\n"
        "calls: the last answer calls a function whose result is not recorded; cut there.\n"
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
