"""Write a model for other programs: an Orbax checkpoint with a manifest, a HuggingFace folder, or a server's layout.

RUN is the folder of a run, of a drafter (jaxspec's or a published one), or of a target in HuggingFace layout. Folders
for servers need `--target`, the folder of the model that the drafter was made for. Their manifest names the version of
the server whose behaviour is assumed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
from tyro.conf import Positional

from jaxspec import __version__
from jaxspec.checkpoints.folders import refuse_to_overwrite
from jaxspec.console import cli, results, tables
from jaxspec.data.prompts import Prompt
from jaxspec.evaluation.golden import NAME, make_golden, read_asked
from jaxspec.interchange import export, hf
from jaxspec.interchange.target_folders import target_folder
from jaxspec.parallel.agreement import say
from jaxspec.serving import loading
from jaxspec.trees import kept_tree, parse_tree


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of `jaxspec export`."""

    run: Positional[str]
    """Folder of a run, a drafter or a HuggingFace target; `tiny` is the bundled target, `smollm2-head` the bundled
    drafter for SmolLM2."""
    out: Positional[Path]
    """Folder to write."""
    to: Literal["orbax", "hf", "eagle", "sglang", "vllm", "speculators", "sglang-jax", "tpu-inference"] = "orbax"
    """Format: `hf` is a HuggingFace folder of a target or a draft LM, `eagle` is the layout of the papers' code."""
    target: str | None = None
    """Folder of a drafter's target, for its vocabulary, depth and tables; `tiny` is the bundled target. Formats of
    servers and published heads need it; a drafter of jaxspec needs none to become `orbax`."""
    target_name: str | None = None
    """Name by which a server loads the target, such as OWNER/NAME on the hub; `speculators` writes it down. Default:
    --target, where that is a HuggingFace folder."""
    step: str = "best"
    """Checkpoint of a run: best (by its evaluations), last, or the number of a step."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Dtype of the weights. Default: as they are stored."""
    tree: str | None = None
    """Tree that a drafter is used with unless told otherwise, such as chain:3 or a FILE.json of jaxspec lab search; for
    orbax. Default: the one that it was saved with."""
    golden: Path | None = None
    """File of 8 to 16 prompts: golden.json is written beside the model, with what it must do where it is served, for
    jaxspec check-served. The drafter is read back from the export, so the format must be one that jaxspec reads."""
    golden_tree: str | None = None
    """The chain that the server verifies, for --golden, such as chain:5. Default: as many tokens as the drafter drafts
    in a pass, or three."""
    golden_dtype: Literal["fp32", "bf16"] = "bf16"
    """Dtype that the server computes in, for --golden: golden.json is made in fp32 and in this one."""
    overwrite: bool = False
    """Replace a model that was exported to the folder before."""
    json: Path | None = None
    """Write the result here."""

    def __post_init__(self) -> None:
        if self.tree is not None:
            parse_tree(self.tree)
            if self.to != "orbax":
                raise ValueError(f"--tree is for orbax: {self.to} holds no tree; leave it out")


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec export", description=__doc__ or "")
    refuse_to_overwrite(args.out, args.overwrite)
    if args.golden is not None and args.target is None:
        raise ValueError("--golden needs --target, whose answers they are")
    prompts = [] if args.golden is None else read_asked(args.golden, args.golden_tree)
    model = export.find_model(
        args.run, step=args.step, dtype=loading.DTYPES[args.dtype] if args.dtype else None, target=args.target
    )
    unused = args.target is not None and args.golden is None
    if unused and model.kind == "target":
        raise ValueError(f"--target is for drafters, and {args.run} is a target itself: leave it out")
    if unused and args.to == "orbax" and model.layout != "published":
        needed = ", ".join(name for name in export.FORMATS if name != "orbax")
        raise ValueError(f"--target is for {needed}, and for published heads; orbax needs none: leave it out")
    if reason := export.refusal(model, args.to):
        raise ValueError(f"{args.run} cannot be written to {args.to}: {reason}")
    if args.tree is not None:
        model = with_tree(model, args)
    notes = [*model.notes, *export.left_out(model, args.to)]
    for note in notes:
        say(f"note: {args.run}: {note}")
    export.write(args.to, args.out, model, args.target, target_name=args.target_name)
    if prompts:
        write_golden(args, prompts)
    facts = export.facts(model) | {
        "format": args.to,
        "path": args.out,
        "step": model.manifest.get("provenance", {}).get("step"),
    }
    tables.print_table(f"{args.run} in {args.out}", ("", ""), list(facts.items()))
    if args.json:
        results.write_json(args.json, results.result("export", seed=None, started=started, **facts, notes=notes))
    return 0


def with_tree(model: export.Exportable, args: Args) -> export.Exportable:
    """Returns the drafter with the tree of --tree. Raises ValueError for a model that drafts nothing."""
    if model.kind != "drafter":
        raise ValueError(f"--tree is for a drafter, and {args.run} is a {model.kind}: leave it out")
    about = {**model.config.get("about", {}), "tree": kept_tree(parse_tree(args.tree or ""))}
    return model._replace(config={**model.config, "about": about})


def write_golden(args: Args, prompts: Sequence[Prompt]) -> None:
    """Writes the golden prompts of what was exported, as it was exported."""
    assert args.target is not None
    target, dtypes = args.target, {jnp.dtype(dtype).name: dtype for dtype in loading.DTYPES.values()}

    def load(dtype: str) -> loading.Models:
        return loading.load_models(target, drafter=args.out, tree=args.golden_tree, dtype=dtypes[dtype])

    facts = {"target": target, "target_weights": hf.fingerprint(target_folder(target))}
    facts |= {"format_of_drafter": args.to, "version": __version__}
    dtype = jnp.dtype(loading.DTYPES[args.golden_dtype]).name
    golden = make_golden(load, prompts, args.golden_tree, facts, dtype=dtype)
    golden.save(args.out / NAME)
    known = {name: run.acceptance["acceptance_length"] for name, run in golden.runs.items()}
    lengths = [f"{'unknown' if length is None else f'{length:.3f}'} in {name}" for name, length in known.items()]
    say(
        f"{args.out / NAME}: {len(golden.prompts)} golden prompts, acceptance length {' and '.join(lengths)} with "
        f"{golden.facts['tree']}"
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
