"""Show the contents of a folder: family or kind of drafter, shapes, dtype, conventions, and formats to export to."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from jaxspec.console import cli, results, tables
from jaxspec.interchange import export
from jaxspec.parallel.agreement import say


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of `jaxspec inspect`."""

    path: Positional[str]
    """Folder of a run, of a drafter (jaxspec's or a published one), or of a target; `tiny` is the bundled target."""
    target: str | None = None
    """Folder of a drafter's target; EAGLE-3 heads that do not say which layers they read need it."""
    json: Path | None = None
    """Write the result here."""


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec inspect", description=__doc__ or "")
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


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
