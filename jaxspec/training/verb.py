"""The flags of `jaxspec train` and `jaxspec pretrain`, and their way from a config to a printed result.

It is part of the library because programs do not import each other.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxspec.config import load
from jaxspec.console import cli, results, tables
from jaxspec.console.marks import Inline, Positional
from jaxspec.parallel.processes import Launch, joined


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of a verb that runs an experiment."""

    config: Positional[str]
    """Name of an experiment, see `jaxspec configs`; or path of a Python file."""
    overrides: Positional[tuple[str, ...]] = ()
    """Changes of its fields, such as optimizer.peak_lr=1e-3 data.train=answers.jsonl."""
    json: Path | None = None
    """File for the result."""
    launch: Inline[Launch] = dataclasses.field(default_factory=Launch)


class ResultTable(NamedTuple):
    """A table for `tables.print_table`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class TrainingVerb(NamedTuple):
    """A verb that runs experiments of one kind."""

    name: str
    kind: type
    """Class of the configs that it takes."""
    run: Callable[[Any], dict[str, Any]]
    """From a config to the verb's own JSON keys, in every process."""
    table: Callable[[Any, dict[str, Any]], ResultTable]
    """From the config and the result to the table that is printed."""


def run_verb(verb: TrainingVerb, argv: Sequence[str], *, description: str) -> int:
    """Runs the experiment that `argv` names; prints its result and writes it where `--json` says. Returns 0.

    Raises ValueError if the experiment is of another kind. Of several processes the first prints and writes.
    """
    started = time.monotonic()
    prog = f"jaxspec {verb.name}"
    args = cli.parse(argv, Args, prog=prog, description=description)
    config = load(args.config, args.overrides)
    if not isinstance(config, verb.kind):
        kind = verb.kind.__name__
        raise ValueError(f"{args.config}: holds a {type(config).__name__}, not a {kind}; see `jaxspec configs`")
    with joined(args.launch, prog=prog):
        found = verb.run(config)
        if jax.process_index() == 0:
            common = {"dtype": config.dtype, "seed": config.seed, "started": started}
            result = results.result(verb.name, **common, **found)
            tables.print_table(*verb.table(config, result))
            if args.json:
                results.write_json(args.json, result)
    return 0
