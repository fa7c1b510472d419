"""Distil a frozen target into a drafter: both in one program, resumable, saved for `jaxspec generate`."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tyro.conf import OmitArgPrefixes, Positional

from jaxspec.config import DistillConfig, load
from jaxspec.console import cli, results, tables
from jaxspec.parallel.processes import Launch, joined
from jaxspec.training.distill import run_distillation

PROG = "jaxspec train"


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of `jaxspec train`."""

    config: Positional[str]
    """Name of an experiment in configs/, or path of a Python file."""
    overrides: Positional[tuple[str, ...]] = ()
    """Changes such as optimizer.peak_lr=1e-3 data.train=answers.jsonl."""
    json: Path | None = None
    """Write the result here."""
    launch: OmitArgPrefixes[Launch] = dataclasses.field(default_factory=Launch)


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog=PROG, description=__doc__ or "")
    config = load(args.config, args.overrides)
    if not isinstance(config, DistillConfig):
        raise ValueError(f"{args.config}: holds a {type(config).__name__}, not a DistillConfig; see `jaxspec pretrain`")
    with joined(args.launch, prog=PROG):
        found = run_distillation(config)
        if jax.process_index() == 0:
            show(config, results.result("train", dtype=config.dtype, seed=config.seed, started=started, **found), args)
    return 0


def show(config: DistillConfig, found: dict[str, Any], args: Args) -> None:
    """Print the result and write it where it is asked for."""
    tables.print_table(
        f"{config.name}: held out, after {found['steps']:,} steps (drafter in {config.export_folder})",
        ("measure", "value"),
        [(name, value) for name, value in found["eval"].items()],
    )
    if args.json:
        results.write_json(args.json, found)


if __name__ == "__main__":
    sys.exit(cli.run(main))
