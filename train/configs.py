"""List the experiments of `configs/`, or show one with every field resolved.

A field is shown as `field = value`. Any verb that takes an experiment also takes `field=value` and changes it.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from jaxspec.config import PretrainConfig, docstring, experiments, load, to_dict
from jaxspec.console import cli, results, tables
from jaxspec.console.overrides import dotted_fields


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of `jaxspec configs`."""

    config: Positional[str | None] = None
    """Name of the experiment to show, or path of a Python file. Default: list all."""
    overrides: Positional[tuple[str, ...]] = ()
    """Changes of its fields, such as optimizer.peak_lr=1e-3."""
    json: Path | None = None
    """File for the result."""


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec configs", description=__doc__ or "")
    if args.config is None:
        keys = {"configs": [summarize(name) for name in experiments()]}
        rows = [list(row.values()) for row in keys["configs"]]
        tables.print_table(f"{len(rows)} experiments", ("config", "verb", "what it is"), rows)
        dtype, seed = "various", None
    else:
        config, about = load(args.config, args.overrides), docstring(args.config)
        show(config, about)
        keys = {"config": to_dict(config), "docstring": about}
        dtype, seed = config.dtype, config.seed
    if args.json:
        results.write_json(args.json, results.result("configs", dtype=dtype, seed=seed, started=started, **keys))
    return 0


def summarize(name: str) -> dict[str, str]:
    """Returns a row of the list: name, the verb that runs it, and the first line of its docstring."""
    verb = "pretrain" if isinstance(load(name), PretrainConfig) else "train"
    return {"name": name, "verb": verb, "summary": docstring(name).partition("\n")[0]}


def show(config: object, about: str) -> None:
    """Prints what the experiment is, as comments, and each of its fields."""
    comments = [f"# {line}".rstrip() for line in about.splitlines()]
    fields = [f"{path} = {value}".rstrip() for path, value in dotted_fields(config).items()]
    sys.stdout.write("\n".join([*comments, *fields]) + "\n")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
