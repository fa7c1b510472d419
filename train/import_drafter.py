"""Import a drafter that the authors of a paper or the project of a server published.

FOLDER holds its config.json and weights (safetensors, or PyTorch's .bin, which is read without running code in it). The
tensors tell what kind of drafter it is. Whole LMs need no import: give their folder as drafter.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from jaxspec.checkpoints.folders import refuse_to_overwrite
from jaxspec.console import cli, results, tables
from jaxspec.interchange import export
from jaxspec.parallel.agreement import say
from jaxspec.serving import loading


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of `jaxspec import drafter`."""

    folder: Positional[Path]
    """Folder of the published drafter."""
    out: Positional[Path]
    """Folder to write."""
    target: str | None = None
    """Folder of its target. EAGLE-3 heads that do not say which layers they read need it, and heads with an LM head
    that may be a copy of the target's; copies of its tables are compared with them."""
    layer_ids: Literal["input", "output"] | None = None
    """Whether an EAGLE-3 head's config.json names the target's layers by their inputs or by their outputs. Default: the
    convention of its layout."""
    tokens: int | None = None
    """How many tokens a P-EAGLE head drafts in a pass. Default: as many as its config.json says."""
    overwrite: bool = False
    """Replace a model that was written to the folder before."""
    json: Path | None = None
    """Write the result here."""

    def __post_init__(self) -> None:
        cli.refuse_below_one(self, "tokens")


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec import drafter", description=__doc__ or "")
    refuse_to_overwrite(args.out, args.overwrite)
    model = export.published_drafter(
        args.folder, str(args.folder), target=args.target, layer_ids=args.layer_ids, tokens=args.tokens
    )
    for note in model.notes:
        say(f"note: {args.folder}: {note}")
    export.write("orbax", args.out, model)
    facts = export.facts(model) | {"format": "orbax", "path": args.out}
    tables.print_table(f"{args.folder} in {args.out}", ("", ""), list(facts.items()))
    loading.open_drafter(args.out)  # checks that the written drafter can be used
    if args.json:
        told = {**facts, "notes": model.notes}
        results.write_json(args.json, results.result("import", seed=None, started=started, **told))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
