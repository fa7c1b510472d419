"""Rank a target's tokens by how often its answers use them, and keep the commonest as a draft vocabulary.

A drafter that scores fewer tokens is faster. The text stays the same, because the target still scores all tokens. Use
answers of the target itself (`jaxspec regenerate`), because its tokens are the ones to be drafted.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence

import tyro
from tyro.conf import Positional

from jaxspec.console import cli, results, tables
from jaxspec.data.account import Account
from jaxspec.data.chat import ChatTokenizer, TemplateChoice
from jaxspec.data.chat_template import DATE, parse_variables
from jaxspec.data.conversations import read_conversations
from jaxspec.data.corpus import Documents, tokenize_conversations
from jaxspec.data.draft_vocab import count_halves, save_maps, together, unseen_coverage
from jaxspec.data.tokenized_corpus import StoredCorpus, is_corpus
from jaxspec.interchange import target_folders
from jaxspec.interchange.hf_config import read_table_config

SIZES = (64, 256, 1024, 4096, 16384, 32768, 65536)
"""Sizes that the table shows beside the requested one."""
USUAL_LENGTH = 2048
"""Tokens of a conversation that are counted by default."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of `jaxspec draft-vocab`."""

    data: Positional[str]
    """Conversations (JSON Lines), or a folder of jaxspec tokenize, whose assistant turns are counted."""
    out: str
    """File (safetensors) for the maps d2t and t2d; `jaxspec generate --draft-vocab` reads it."""
    size: int = 1024
    """Number of tokens to keep."""
    target: str = "tiny"
    """HuggingFace folder of the target; `tiny` is the bundled target."""
    template: str | None = None
    """Chat template: vicuna, llama-2-chat, llama-3, chatml, a file of Jinja, or none for a base model. Default: the
    target folder's own."""
    template_args: str | None = None
    """Values of the template's own variables, such as enable_thinking=false; a record's own go before them."""
    skip_bad: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave out, and count, conversations that cannot be used."""
    length: int | None = None
    """Number of tokens of a conversation that are counted; the rest is cut off. Default: 2048; of a folder of jaxspec
    tokenize, all that it holds."""
    json: str | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        cli.refuse_below_one(self, "size", "length")


def main(argv: Sequence[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec draft-vocab", description=__doc__ or "")
    folder = target_folders.target_folder(args.target)
    vocab = read_table_config(folder).vocab
    tokenizer = ChatTokenizer.load(folder, TemplateChoice(args.template, parse_variables(args.template_args), DATE))
    tokenizer.check_ids(vocab)
    corpus = read_corpus(args, tokenizer)
    halves = count_halves(corpus, vocab)
    counts = together(halves)
    used = int((counts.times_V > 0).sum())
    if not used:
        raise ValueError(f"{args.data}: holds no assistant turn; give conversations with answers")
    tokens = counts.commonest(args.size)
    save_maps(args.out, tokens, vocab)
    rows = [
        {"size": n, "coverage": counts.coverage(counts.commonest(n)), "unseen_coverage": unseen_coverage(halves, n)}
        for n in sorted({args.size, *(s for s in SIZES if s < used)})
        if n <= used
    ]
    tables.print_table(
        f"{int(counts.times_V.sum()):,} tokens of answers use {used:,} of {vocab:,}",
        ["commonest tokens", "share of the answers' tokens", "of answers that did not choose them"],
        [[row["size"], *(_share(row[key]) for key in ("coverage", "unseen_coverage"))] for row in rows],
    )
    if len(tokens) < args.size:
        sys.stderr.write(f"jaxspec draft-vocab: only {used:,} tokens are used, so {len(tokens):,} are kept\n")
    if args.json:
        found = {
            "path": args.out,
            "size": len(tokens),
            "vocab": vocab,
            "coverage": counts.coverage(tokens),
            "unseen_coverage": unseen_coverage(halves, args.size),
            "rows": rows,
            "counted": int(counts.times_V.sum()),
        }
        results.write_json(args.json, results.result("draft-vocab", dtype="int32", seed=None, started=started, **found))
    return 0


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def read_corpus(args: Args, tokenizer: ChatTokenizer) -> Documents:
    """Returns the data as tokens, from disk where `jaxspec tokenize` wrote it; says what was left out."""
    if is_corpus(args.data):
        if args.length is not None or args.skip_bad:
            raise ValueError(
                f"--length and --skip-bad are for conversations, and {args.data} is tokenized: leave them out"
            )
        stored = StoredCorpus(args.data)
        stored.check(tokenizer, stored.turns)  # of whatever turns it is
        return stored
    account = Account(skip_bad=args.skip_bad)
    conversations = read_conversations(args.data, account=account)
    corpus = tokenize_conversations(conversations, tokenizer, length=args.length or USUAL_LENGTH, account=account)
    for line in account.sentences():
        sys.stderr.write(f"jaxspec draft-vocab: {line}\n")
    return corpus


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
