"""Show the contents of a folder: family or kind of drafter, shapes, dtype, conventions, and formats to export to.

Of hidden states that another project dumped it says whose they are, and whether `jaxspec import features` takes them;
of tokenized corpora and feature stores, what they hold.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from jaxspec.console import cli, results, tables
from jaxspec.data.feature_store import FeatureStore
from jaxspec.data.shards import ABOUT
from jaxspec.data.tokenized_corpus import StoredCorpus, is_corpus
from jaxspec.interchange import dumps, export
from jaxspec.interchange.dumps import Dump
from jaxspec.parallel.agreement import say


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of `jaxspec inspect`."""

    path: Positional[str]
    """Folder of a run, of a drafter (jaxspec's or a published one), of a target, of a tokenized corpus, of features, or
    of hidden states that another project dumped; `tiny` and `smollm2-head` come with jaxspec."""
    target: str | None = None
    """Folder of a drafter's target; EAGLE-3 heads that do not say which layers they read need it."""
    json: Path | None = None
    """Write the result here."""


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec inspect", description=__doc__ or "")
    if not (Path(args.path) / "config.json").is_file() and (dump := dumps.find_dump(args.path)) is not None:
        show_dump(args, dump, started)
        return 0
    if (Path(args.path) / ABOUT).is_file():
        show_data(args, started)
        return 0
    model = export.find_model(args.path, target=args.target)
    if args.target is not None and model.layout != "published":
        raise ValueError(f"--target is for published heads, and {args.path} holds none: leave it out")
    for note in model.notes:
        say(f"note: {args.path}: {note}")
    facts = export.facts(model) | {"path": args.path}
    shapes, told = export.shapes(model), export.conventions(model)
    tables.print_table(args.path, ("", ""), [*facts.items(), *told.items()])
    tables.print_table("weights", ("weight", "shape"), [(name, str(shape)) for name, shape in shapes.items()])
    if args.json:
        more = {"shapes": shapes, "convention": told, "notes": model.notes}
        results.write_json(args.json, results.result("inspect", seed=None, started=started, **facts, **more))
    return 0


def show_data(args: Args, started: float) -> None:
    """Shows what a tokenized corpus or a feature store holds, and how it was made."""
    if args.target is not None:
        raise ValueError(f"--target is for published heads, and {args.path} holds data: leave it out")
    if is_corpus(args.path):
        corpus = StoredCorpus(args.path)
        held = {**corpus.summary._asdict(), "sources": ", ".join(corpus.sources), **corpus.counts}
        about = corpus.about
    else:
        store = FeatureStore(args.path)
        held, about = {"documents": len(store.stored_keys)}, store.about
    facts = {"path": args.path, **held, **{name: value for name, value in about.items() if name not in held}}
    tables.print_table(args.path, ("", ""), [(name, str(value)) for name, value in facts.items()])
    if args.json:
        told: dict[str, Any] = {"dtype": "int32", "seed": None} | facts | {"kind": "data"}
        results.write_json(args.json, results.result("inspect", started=started, **told))


def show_dump(args: Args, dump: Dump, started: float) -> None:
    """Shows the facts of a dump of hidden states, and writes them where the command line says."""
    if args.target is not None:
        raise ValueError(f"--target is for published heads, and {args.path} holds hidden states: leave it out")
    facts: dict[str, Any] = dumps.describe(dump) | {"path": args.path}
    shapes = facts.pop("shapes", {})
    tables.print_table(args.path, ("", ""), [*facts.items()])
    tables.print_table("first file", ("tensor", "shape"), [(name, str(shape)) for name, shape in shapes.items()])
    if args.json:
        results.write_json(args.json, results.result("inspect", seed=None, started=started, **facts, shapes=shapes))


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
