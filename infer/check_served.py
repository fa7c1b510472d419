"""Hold a served drafter to the golden prompts of its export: prompt ids, target, drafts, answers, acceptance, speed.

FOLDER is what `jaxspec export --golden` wrote. Stages stop at the first failure, and the likely cause is named. Drafts
are seen at `jaxspec serve` alone. Nobody else may ask the server meanwhile: acceptance is what its counters gain.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from jaxspec.console import cli, results, tables
from jaxspec.evaluation.golden import read_golden
from jaxspec.evaluation.served_check import check_served
from jaxspec.serving.endpoint import Client, Endpoint
from jaxspec.serving.loading import DTYPES
from jaxspec.serving.streaming_client import read_version

SHOWN = {True: "passed", False: "failed", None: "not checked"}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Command line of `jaxspec check-served`."""

    folder: Positional[Path]
    """Folder of an export with golden.json, or that file."""
    endpoint: str | None = None
    """Address of the server, such as http://localhost:8000/v1. Its key is read from JAXSPEC_API_KEY or
    OPENAI_API_KEY."""
    model: str | None = None
    """The model's name. Default: the first that the server lists."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of the server's computations: it decides which of the golden answers are held, and what counts as a tie."""
    timeout: float = 600.0
    """Seconds to wait for an answer."""
    json: Path | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        if self.endpoint is None:
            raise ValueError("--endpoint is missing: name the server, such as http://localhost:8000/v1")


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns 1 where a stage failed."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec check-served", description=__doc__ or "")
    golden = read_golden(args.folder)
    key = os.environ.get("JAXSPEC_API_KEY") or os.environ.get("OPENAI_API_KEY") or None
    dtype = DTYPES[args.dtype]
    golden.run(dtype.dtype.name)
    with closing(Client(Endpoint(args.endpoint or "", args.model, key, 1, timeout=args.timeout))) as client:
        version = read_version(client)
        found = check_served(client, golden, dtype=dtype.dtype.name)
    rows = [[s.stage, SHOWN[s.passed], s.figure, s.expected, s.note] for s in found.stages]
    tables.print_table(f"{args.folder} at {args.endpoint}", ["stage", "", "served", "expected", "note"], rows)
    if found.likely_cause:
        sys.stdout.write(f"likely cause: {found.likely_cause}\n")
    if args.json:
        result = results.result(
            "check-served",
            dtype=dtype,
            seed=None,
            started=started,
            endpoint=args.endpoint,
            server_version=version,
            stages=[s._asdict() for s in found.stages],
            likely_cause=found.likely_cause,
        )
        results.write_json(args.json, result)
    return 0 if found.passed else cli.EXIT_FAILED


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
