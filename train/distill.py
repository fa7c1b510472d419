"""Distil a frozen target into a drafter: both in one program, resumable, saved for `jaxspec generate`."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tyro.conf import Positional

from jaxspec import cli, loading, report
from jaxspec.checkpoint import save_drafter
from jaxspec.config import DistillConfig, load
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import read_conversations
from jaxspec.data.draft_vocab import load_maps
from jaxspec.data.packing import Corpus, PackedBatches, tokenize_conversations
from jaxspec.interchange.hf import load_target
from jaxspec.training import distill, say


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of `jaxspec train`."""

    config: Positional[str]
    """Name of an experiment in configs/, or path of a Python file."""
    overrides: Positional[tuple[str, ...]] = ()
    """Changes such as optimizer.peak_lr=1e-3 data.train=answers.jsonl."""
    json: Path | None = None
    """Write the result here."""


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec train", description=__doc__ or "")
    config = load(args.config, args.overrides)
    if not isinstance(config, DistillConfig):
        raise ValueError(f"{args.config}: holds a {type(config).__name__}, not a DistillConfig; see `jaxspec pretrain`")
    found = run(config)
    written = report.result("train", dtype=config.dtype, seed=config.seed, started=started, **found)
    report.print_table(
        f"{config.name}: held out, after {found['steps']:,} steps (drafter in {config.export_folder})",
        ("measure", "value"),
        [(name, value) for name, value in found["eval"].items()],
    )
    if args.json:
        report.write_json(args.json, written)
    return 0


def run(config: DistillConfig) -> dict[str, Any]:
    """Train and export; returns the verb's own JSON keys."""
    folder = loading.target_folder(config.target)
    target = load_target(folder, dtype=jnp.dtype(config.dtype), stacked=False)
    tokenizer = ChatTokenizer.load(folder)
    train_data = packed(config, read_corpus(config, tokenizer, "train"), epochs=config.optimizer.epochs, shuffle=True)
    eval_data = packed(config, read_corpus(config, tokenizer, "eval"), epochs=1, shuffle=False)
    module, done = distill(config, target.module, target.params, train_data, eval_data)
    scored = None if config.draft_vocab is None else load_maps(config.draft_vocab, target.config.vocab).tolist()
    about = {"target": config.target}
    save_drafter(config.export_folder, config.drafter, module, done.params, about, draft_vocab=scored)
    return {**done.keys(), "drafter": config.export_folder}


def read_corpus(config: DistillConfig, tokenizer: ChatTokenizer, part: str) -> Corpus:
    """The tokenized conversations of `data.train` or `data.eval`."""
    path, limit = (
        (config.data.train, config.data.limit) if part == "train" else (config.data.eval, config.data.eval_limit)
    )
    corpus = tokenize_conversations(read_conversations(path, limit=limit), tokenizer, length=config.data.length)
    say(f"{part}: {corpus.summary}")
    return corpus


def packed(config: DistillConfig, corpus: Corpus, *, epochs: int | None, shuffle: bool) -> PackedBatches:
    """This process's share of the corpus in packed rows."""
    return PackedBatches(
        corpus,
        config.data.length,
        config.data.batch,
        seed=config.seed,
        epochs=epochs,
        loss_on=config.data.loss_on,
        shuffle=shuffle,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
