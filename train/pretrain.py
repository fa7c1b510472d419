"""Train a small language model from scratch, as an experiment says: its tokenizer, then the model.

A run that was stopped goes on from its last checkpoint with the same command. The finished model is exported as a
HuggingFace folder.
"""

import sys
from collections.abc import Sequence
from typing import Any

from jaxspec.config import PretrainConfig
from jaxspec.console import cli
from jaxspec.training.pretrain import run_pretraining
from jaxspec.training.verb import ResultTable, TrainingVerb, run_verb


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    verb = TrainingVerb("pretrain", PretrainConfig, run_pretraining, held_out_table)
    return run_verb(verb, argv, description=__doc__ or "")


def held_out_table(config: PretrainConfig, result: dict[str, Any]) -> ResultTable:
    """Returns the held-out loss by source."""
    rows = [*result["eval"]["by_source"].items(), ("all", result["eval"]["loss"])]
    return ResultTable(
        f"{config.name}: held-out loss after {result['steps']:,} steps", ("source", "nats a token"), rows
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
