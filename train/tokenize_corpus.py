"""Tokenize conversations into sharded files on disk, for data sets that do not fit in memory.

`jaxspec train` takes the folder in place of a JSONL file, and makes the same batches of it. A process then holds some
50 bytes a conversation, half of them shared with the other processes of its machine. To continue a run that was
stopped, give the same command. Many machines can fill one folder, each with its own --shard i/n; the one that finishes
last completes it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from jaxspec.console import cli, progress, results, tables
from jaxspec.data.account import sentences
from jaxspec.data.chat import ChatTokenizer, TemplateChoice
from jaxspec.data.chat_template import DATE, parse_variables
from jaxspec.data.conversations import split_names, unread_files
from jaxspec.data.tokenized_corpus import CorpusSettings, StoredCorpus, is_complete, write_corpus
from jaxspec.data.turns import Thinking, TurnOptions
from jaxspec.interchange import target_folders
from jaxspec.serving import flags

UNTABLED = ("out", "complete", "sources", "left_out")
"""Keys of the result that the table does not show."""


@dataclass(frozen=True)
class Args:
    """Command line of `jaxspec tokenize`."""

    data: Positional[str]
    """Conversations: JSONL (also .gz) or ArrayRecord files, folders or patterns of them, several joined by commas."""
    out: str
    """Folder for the corpus."""
    target: str = "tiny"
    """HuggingFace folder whose tokenizer and chat template are used; `tiny` is the bundled target."""
    template: str | None = None
    """Chat template: vicuna, llama-2-chat, llama-3, chatml, a file of Jinja, or none for a base model. Default: the
    target folder's own."""
    template_args: str | None = None
    """Values of the template's own variables, such as enable_thinking=false; a record's own go before them."""
    thinking: Thinking = "told"
    """told: the target thinks as the template's variables say, and answers that contradict them are left out; record: a
    turn with a thought is shown as with enable_thinking, one without as without it."""
    last_turn_only: tyro.conf.FlagCreatePairsOff[bool] = False
    """Learn the last answer of each conversation alone."""
    max_turns: int | None = None
    """Most answers of a conversation that are learned, the first ones."""
    skip_bad: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave out, and count, conversations that cannot be used, instead of stopping at the first."""
    length: int = 2048
    """Number of tokens of a conversation that are kept; data.length in training may not be less."""
    limit: int | None = None
    """Take at most this many conversations of each file or folder that is named."""
    shard_documents: int = 65536
    """Conversations in a file."""
    shard: str = "0/1"
    """Make only every n-th file, beginning with the i-th: 0/4, 1/4, 2/4 or 3/4."""
    verify: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check the SHA-256 of finished files first, and make damaged ones again."""
    json: str | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        cli.refuse_below_one(self, "length", "limit", "shard_documents", "max_turns")
        _ = self.part, self.chat

    @property
    def chat(self) -> TemplateChoice:
        """The chat template."""
        return TemplateChoice(self.template, parse_variables(self.template_args), DATE)

    @property
    def part(self) -> tuple[int, int]:
        """Number of the shard, and number of shards."""
        return flags.parse_part(self.shard)


def main(argv: Sequence[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec tokenize", description=__doc__ or "")
    folder = Path(args.out)
    tokenizer = ChatTokenizer.load(target_folders.target_folder(args.target), args.chat)
    turns = TurnOptions(args.last_turn_only, args.max_turns, args.thinking)
    settings = CorpusSettings(args.length, args.limit, args.shard_documents, turns, args.skip_bad)
    for named in split_names(args.data):
        for line in sentences(unread_files(named.name)):
            sys.stderr.write(f"jaxspec tokenize: {line}\n")
    work = write_corpus(folder, args.data, tokenizer, settings, part=args.part, verify=args.verify)
    with progress.progress("tokenizing", None, "conversations") as bar:
        for done in work:
            bar.advance(done)
    result = {"out": args.out, "complete": is_complete(folder)}
    if result["complete"] and not bar.completed:
        sys.stderr.write(f"{args.out}: all conversations are already tokenized\n")
    if result["complete"]:
        corpus = StoredCorpus(folder)
        if not corpus.summary.tokens:
            left_out = "; ".join(sentences(corpus.counts)) or "it has no text"
            raise ValueError(f"{args.data}: nothing is left to learn from: {left_out}")
        result |= {**corpus.summary._asdict(), "sources": list(corpus.sources), "left_out": corpus.counts}
        size = sum(path.stat().st_size for path in folder.iterdir())
        result |= {"bytes": size, "bytes_per_token": size / corpus.summary.tokens}
        rows = [[name, value] for name, value in result.items() if name not in UNTABLED]
        tables.print_table(args.out, ["measure", "value"], rows)
        for kind, line in zip(corpus.counts, sentences(corpus.counts), strict=True):
            example = f"; the first is {corpus.examples[kind]}" if kind in corpus.examples else ""
            sys.stdout.write(f"{line}{example}\n")
    else:
        sys.stderr.write(f"{args.out}: this part is finished, and files of other parts are missing\n")
    if args.json:
        results.write_json(args.json, results.result("tokenize", dtype="int32", seed=None, started=started, **result))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
