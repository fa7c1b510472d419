"""Make instructions from plain text: user turns that ask to continue, summarize or rewrite a passage.

The target answers them with `jaxspec regenerate --prompts OUT`, so that a drafter also learns prose.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from jaxspec.console import cli, results
from jaxspec.data import jsonl
from jaxspec.data.account import Account, sentences
from jaxspec.data.conversations import parse_records, read_records, unread_files
from jaxspec.data.instructions import write_instructions


@dataclass(frozen=True)
class Args:
    """Command line of `jaxspec instructions`."""

    texts: Positional[str]
    """Plain text: a file, or a pattern of files; form feeds divide the texts of a file."""
    out: str
    """JSON Lines of {"id", "source", "messages"}; `source` is the kind of instruction."""
    count: int = 1000
    """Number of instructions."""
    seed: int = 0
    """Seed of the draws."""
    json: str | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        cli.refuse_below_one(self, "count")


def main(argv: list[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec instructions", description=__doc__ or "")
    out = Path(args.out)
    if out.exists():
        raise ValueError(f"{out}: exists; give another --out, or remove it")
    for line in sentences(unread_files(args.texts)):
        sys.stderr.write(f"jaxspec instructions: {line}\n")
    texts = [c.text for c in parse_records(read_records(args.texts), Account(flag="")) if c.text]
    if not texts:
        raise ValueError(f"{args.texts}: holds no plain text; give .txt files, or JSON Lines of texts")
    made = list(write_instructions(texts, args.count, seed=args.seed))
    out.parent.mkdir(parents=True, exist_ok=True)
    jsonl.append(out, [{"id": c.id, "source": c.source, "messages": list(c.messages)} for c in made])
    sys.stdout.write(f"{len(made):,} instructions from {len(texts):,} texts: {out}\n")
    if args.json:
        found = {"path": str(out), "count": len(made), "texts": len(texts)}
        results.write_json(
            args.json, results.result("instructions", dtype=None, seed=args.seed, started=started, **found)
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
