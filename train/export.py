"""Write a model as others read it: an Orbax checkpoint with a manifest, a HuggingFace folder, or what a server loads.

RUN is the folder of a run (its checkpoints), a drafter's folder, jaxspec's or published, or a target's in HuggingFace
layout. Servers' folders need `--target`, the folder of the model that the drafter was made for. Their
manifest says which version's behaviour is assumed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from jaxspec.checkpoints.folders import refuse_to_replace
from jaxspec.console import cli, results, tables
from jaxspec.interchange import export
from jaxspec.serving import loading


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of `jaxspec export`."""

    run: Positional[str]
    """Folder of a run, a drafter or a HuggingFace target; `tiny` is the bundled target."""
    out: Positional[Path]
    """Folder to write."""
    to: Literal["orbax", "hf", "eagle", "sglang", "vllm", "speculators", "sglang-jax", "tpu-inference"] = "orbax"
    """Format: `hf` is a HuggingFace folder of a target or a draft LM, `eagle` that of the papers' own code."""
    target: str | None = None
    """Folder of a drafter's target, which says its vocabulary, depth and tables; `tiny` is the bundled one."""
    step: str = "best"
    """Which checkpoint of a run: best by its evaluations, last, or a step's number."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Of the weights. Default: as they are stored."""
    overwrite: bool = False
    """Replace a model that was exported to the folder before."""
    json: Path | None = None
    """Write the result here."""


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec export", description=__doc__ or "")
    refuse_to_replace(args.out)
    if args.out.exists() and any(args.out.iterdir()) and not args.overwrite:
        raise ValueError(f"{args.out}: is there already; give another folder, or --overwrite to replace it")
    model = export.find_model(
        args.run, step=args.step, dtype=loading.DTYPES[args.dtype] if args.dtype else None, target=args.target
    )
    if reason := export.refusal(model, args.to):
        raise ValueError(f"{args.run} cannot be written to {args.to}: {reason}")
    export.write(args.to, args.out, model, args.target)
    facts = export.facts(model) | {
        "format": args.to,
        "path": args.out,
        "step": model.manifest.get("provenance", {}).get("step"),
    }
    tables.print_table(f"{args.run} in {args.out}", ("", ""), list(facts.items()))
    if args.json:
        results.write_json(args.json, results.result("export", seed=None, started=started, **facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
