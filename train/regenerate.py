"""Let the target write the answers of a data set: what a drafter is distilled on.

User turns are kept; every assistant turn is the target's, its own earlier answers before it. A run that was stopped
goes on where it was: give the same command. For many machines give each its --shard i/n and its own --out; the files
together hold what one run without shards writes.

The direct-alignment paper's data (arXiv 2403.00858): --temperatures 0,0.3,0.7,1.0 --top-p 0.95. With a drafter's own
HuggingFace folder as --target the answers are the draft's (DistillSpec's on-policy data).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import tyro

from jaxspec.console import cli, progress, results, tables
from jaxspec.data import jsonl
from jaxspec.data.conversations import read_conversations
from jaxspec.data.messages import Conversation
from jaxspec.decoding.answers import total_tokens
from jaxspec.parallel import processes
from jaxspec.serving import flags, loading
from jaxspec.serving.flags import Flags
from jaxspec.serving.loading import Models
from jaxspec.serving.regeneration import (
    LENGTH,
    UNFIT,
    Rewritten,
    Temperatures,
    parse_temperatures,
    rewrite,
    write_user_turns,
)

SETTINGS = (
    "target", "template", "prompts", "from_scratch", "temperature", "temperatures", "top_k", "top_p", "seed",
    "max_new_tokens", "shard", "dtype", "keep_unfinished",
)  # fmt: skip
"""Flags that must stay the same when a run is resumed."""


@dataclass(frozen=True, kw_only=True)
class Args(Flags):
    out: str
    """JSON Lines of {"id", "source", "messages", "finish", "tokens", "temperature"}, appended as conversations are
    finished."""
    prompts: str | None = None
    """JSON Lines of conversations, {"id", "source", "messages"} or ShareGPT's form; their answers are not read."""
    from_scratch: int = 0
    """Without --prompts: so many single user turns that the target itself writes, at temperature 1."""
    temperatures: str | None = None
    """Instead of --temperature: several, each with its weight (1 if left out), such as 0:1,0.3:1,0.7:1,1.0:1. Every
    conversation draws one, and keeps it through its turns."""
    batch: int = 16
    """Conversations decoded together."""
    shard: str = "0/1"
    """Take only every n-th conversation, beginning with the i-th: 0/4, 1/4, 2/4 or 3/4."""
    limit: int | None = None
    """Take only the first N conversations of the file, before they are sharded."""
    keep_unfinished: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep conversations whose last answer was cut at --max-new-tokens; they are dropped otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.part, self.mixture
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
    def mixture(self) -> Temperatures | None:
        """The temperatures to draw from; None for one alone."""
        return None if self.temperatures is None else parse_temperatures(self.temperatures)


class Output:
    """The file of conversations, and beside it `FILE.state`: the run's settings, then the conversations left out.

    Lines are whole or absent: what a kill left half-written is cut off when the file is opened again.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.state_path = path, path.with_name(f"{path.name}.state")
        begun = self.state_path.exists() and self.state_path.stat().st_size
        if not begun and path.exists() and path.stat().st_size:
            raise ValueError(f"{path}: exists, and no run of this verb began it; give another --out")
        noted = ("id", "source", "finish", "tokens", "turns")
        self.dropped = jsonl.journal(self.state_path, settings, of=path, fields=noted)
        jsonl.drop_torn_line(path)
        alone = {"temperature": settings["temperature"]}  # of lines from before they said it
        self.kept = [summarize(alone | record) for record in jsonl.read_lines(path)]
        self.dropped = [alone | record for record in self.dropped]

    @property
    def ids(self) -> set[str]:
        """Conversations that need no more work."""
        return {record["id"] for record in [*self.kept, *self.dropped]}

    def add(self, finished: Iterable[Rewritten], *, keep_unfinished: bool) -> None:
        """Appends finished conversations; they are on disk when this returns."""
        keep, drop = [], []
        for item in finished:
            kept = item.complete or (keep_unfinished and item.turns > 0)
            (keep if kept else drop).append(item.record())
        if keep:
            jsonl.append(self.path, keep)
        if drop:
            jsonl.append(self.state_path, [summarize(record) for record in drop])
        self.kept += map(summarize, keep)
        self.dropped += map(summarize, drop)


def summarize(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a line that the counts read."""
    turns = sum(message["role"] == "assistant" for message in record["messages"])
    return {k: record[k] for k in ("id", "source", "finish", "tokens", "temperature")} | {"turns": turns}


def main(argv: list[str]) -> int:
    """Runs the verb; returns 1 if not one conversation is finished."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec regenerate", description=__doc__ or "")
    if args.part == (0, 1):
        processes.refuse_several("jaxspec regenerate", "give each its --shard i/n and its own --out")
    # Read first: a file that cannot be read must not begin an output.
    conversations = None if args.prompts is None else read_conversations(args.prompts, limit=args.limit)
    output = Output(Path(args.out), {name: getattr(args, name) for name in SETTINGS})
    already = output.ids
    models = None
    if conversations is None:
        models = args.load_target()
        conversations = write_conversations(models, args)
    todo = [(i, c) for i, c in select(conversations, args) if c.id not in already]
    tell_left(args.out, len(already), len(todo))
    speed = run(models or args.load_target(), todo, output, args) if todo else (0.0, 0)
    result = make_result(args, output, speed, resumed_from=len(already), started=started)
    print_counts(result["sources"], result["by_temperature"], args)
    if args.json:
        results.write_json(args.json, result)
    if output.kept:
        return 0
    reason = "no answer was finished; raise --max-new-tokens or use --keep-unfinished"
    if args.prompts is not None and not result["unfinished"]:
        reason = f"{args.prompts} has no user turn that the target can answer: give it conversations with one"
    sys.stderr.write(f"jaxspec regenerate: {reason}\n")
    return cli.EXIT_FAILED


def tell_left(out: str, done: int, left: int) -> None:
    """Says what an earlier run has done."""
    if done and left:
        sys.stderr.write(f"{out}: {done:,} conversations are done, {left:,} are left\n")
    elif done:
        sys.stderr.write(f"{out}: all {done:,} conversations are already done; --out with another name begins anew\n")


def make_result(
    args: Args, output: Output, speed: tuple[float, int], *, resumed_from: int, started: float
) -> dict[str, Any]:
    """Returns the verb's JSON; `speed` holds the seconds and tokens of this run."""
    seconds, tokens = speed
    rows = count(output, "source")
    return results.result(
        "regenerate",
        dtype=loading.DTYPES[args.dtype],
        seed=args.seed,
        started=started,
        **{name: getattr(args, name) for name in SETTINGS if name not in ("dtype", "seed")},
        out=args.out,
        conversations=len(output.kept),
        resumed_from=resumed_from,
        unfinished=sum(row["unfinished"] for row in rows),
        unfit=sum(row["unfit"] for row in rows),
        tokens=tokens,
        tokens_per_second=tokens / seconds if tokens else None,
        sources=rows,
        by_temperature=count(output, "temperature"),
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


def select(conversations: list[Conversation], args: Args) -> Iterator[tuple[int, Conversation]]:
    """Yields this shard's conversations with their indices. Raises ValueError if two of the file have one id."""
    seen: set[str] = set()
    for conversation in conversations:
        if conversation.id in seen:
            raise ValueError(f"{args.prompts}: two conversations have the id {conversation.id!r}; give each its own")
        seen.add(conversation.id)
    part, parts = args.part
    return islice(enumerate(conversations), part, None, parts)


def run(models: Models, todo: list[tuple[int, Conversation]], output: Output, args: Args) -> tuple[float, int]:
    """Rewrites `todo` into `output`; returns seconds, compilation included, and tokens."""
    started, tokens = time.perf_counter(), 0
    with progress.progress("regenerating", len(todo), "conversations") as bar:
        for answers, finished in rewrite(models, todo, args.settings, batch=args.batch, temperatures=args.mixture):
            output.add(finished, keep_unfinished=args.keep_unfinished)
            tokens += total_tokens(answers)
            speed = tokens / (time.perf_counter() - started)
            bar.advance(len(finished), f"{tables.four_digits(speed)} tokens/s")
    return time.perf_counter() - started, tokens


def count(output: Output, key: str) -> list[dict[str, Any]]:
    """Returns a row a value of `key` over the whole file: counts of kept and of unfinished conversations."""
    rows = []
    for value in sorted({r[key] for r in [*output.kept, *output.dropped]}):
        kept = [r for r in output.kept if r[key] == value]
        both = kept + [r for r in output.dropped if r[key] == value]
        rows.append(
            {
                key: value,
                "conversations": len(kept),
                "turns": sum(r["turns"] for r in kept),
                "tokens": sum(r["tokens"] for r in kept),
                "unfinished": sum(r["finish"] == LENGTH for r in both),
                "unfit": sum(r["finish"] == UNFIT for r in both),
            }
        )
    return rows


def print_counts(sources: list[dict[str, Any]], by_temperature: list[dict[str, Any]], args: Args) -> None:
    """Prints the counts, by temperature too where there are several, and their meaning."""
    counted = ("conversations", "turns", "tokens", "unfinished", "unfit")
    columns = ["kept", "answers", "tokens", "unfinished", "unfit"]
    total = {k: sum(row[k] for row in sources) for k in counted}
    tables.print_table(args.out, ["source", *columns], [list(row.values()) for row in [*sources, {"": "all", **total}]])
    if args.temperatures is not None:
        table = [[f"{row['temperature']:g}", *(row[k] for k in counted)] for row in by_temperature]
        tables.print_table("by temperature", ["temperature", *columns], table)
    fate = "kept" if args.keep_unfinished else "dropped"
    sys.stdout.write(
        f"unfinished: an answer reached {args.max_new_tokens} tokens or the target's last position; {fate}.\n"
        "unfit: a turn has no room in the target's positions, or its template refuses it; cut there, "
        "or dropped if it is the first.\n"
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
