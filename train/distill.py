"""Distill a frozen target into a drafter, as an experiment says.

A run that was stopped goes on from its last checkpoint with the same command. The finished drafter is exported for
`jaxspec generate --drafter`.
"""

import sys
from collections.abc import Sequence
from typing import Any

from jaxspec.config import DistillConfig
from jaxspec.console import cli
from jaxspec.parallel.agreement import say
from jaxspec.training.distill import run_distillation
from jaxspec.training.head_share import vocab_note
from jaxspec.training.verb import ResultTable, TrainingVerb, run_verb


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    verb = TrainingVerb("train", DistillConfig, distil, held_out_table)
    return run_verb(verb, argv, description=__doc__ or "")


def distil(config: DistillConfig) -> dict[str, Any]:
    """Runs the experiment; says first what a draft vocabulary would save, where that is much."""
    if note := vocab_note(config, "draft_vocab="):
        say(note)
    return run_distillation(config)


def held_out_table(config: DistillConfig, result: dict[str, Any]) -> ResultTable:
    """Returns the figures of the last evaluation."""
    title = f"{config.name}: held out, after {result['steps']:,} steps (drafter in {config.export_folder})"
    return ResultTable(title, ("measure", "value"), list(result["eval"].items()))


if __name__ == "__main__":
    sys.exit(cli.run(main))
