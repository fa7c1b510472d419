"""Distil a frozen target into a drafter: both in one program, resumable, saved for `jaxspec generate`."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from tyro.conf import Positional

from jaxspec import cli, loading, report
from jaxspec.checkpoint import save_drafter
from jaxspec.config import DistillConfig, load
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.draft_vocab import load_maps
from jaxspec.interchange.hf import load_target
from jaxspec.training import distill, read_data


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
    data = read_data(config, tokenizer)
    module, done = distill(config, target.module, target.params, data.train, data.eval)
    scored = None if config.draft_vocab is None else load_maps(config.draft_vocab, target.config.vocab).tolist()
    about = {"target": config.target}
    save_drafter(config.export_folder, config.drafter, module, done.params, about, draft_vocab=scored)
    return {**done.keys(), **data.keys(), "drafter": config.export_folder}


if __name__ == "__main__":
    sys.exit(cli.run(main))
