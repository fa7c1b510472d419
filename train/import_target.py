"""Import a target in HuggingFace layout, or a GGUF file, as sharded Orbax with checksums, a manifest and its tokenizer.

Only a few pieces are in memory at a time, for any size of the model. Files are checked against the index, their headers
and, if the hub or a file beside them gives it, their SHA-256. A repository is downloaded with huggingface_hub. After an
interruption the same command continues where it stopped. All verbs take OUT as a target.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from jaxspec.checkpoints.folders import refuse_to_overwrite
from jaxspec.console import cli, results, tables
from jaxspec.interchange import export, import_target


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of `jaxspec import target`."""

    source: Positional[str]
    """HuggingFace folder, GGUF file, or name of a repository (OWNER/NAME); `tiny` and `smollm2` are targets too."""
    out: Positional[Path]
    """Folder to write."""
    revision: str | None = None
    """Branch, tag or commit of a repository. Default: its main branch."""
    overwrite: bool = False
    """Replace a model that was written to the folder before."""
    json: Path | None = None
    """Write the result here."""


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec import target", description=__doc__ or "")
    refuse_to_overwrite(args.out, args.overwrite)
    done = import_target.import_target(
        import_target.find_source(args.source, args.revision), args.out, name=args.source
    )
    facts = export.facts(done.model) | {
        "format": "orbax",
        "path": args.out,
        "bytes": done.bytes,
        "kept_bytes": done.kept_bytes,
        "checked_files": done.checked_files,
    }
    tables.print_table(f"{args.source} in {args.out}", ("", ""), list(facts.items()))
    if args.json:
        results.write_json(args.json, results.result("import target", seed=None, started=started, **facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
