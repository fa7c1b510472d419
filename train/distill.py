"""Distil a frozen target into a drafter: both in one program, resumable, saved for `jaxspec generate`."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from jaxspec import cli, report
from jaxspec.config import DistillConfig, load
from jaxspec.training import run_distillation


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
    found = run_distillation(config)
    written = report.result("train", dtype=config.dtype, seed=config.seed, started=started, **found)
    report.print_table(
        f"{config.name}: held out, after {found['steps']:,} steps (drafter in {config.export_folder})",
        ("measure", "value"),
        [(name, value) for name, value in found["eval"].items()],
    )
    if args.json:
        report.write_json(args.json, written)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
