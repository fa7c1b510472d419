"""Hold predictions of the lab to the clock: decode trees at several batches, in turns with plain decoding.

Target, drafter and temperature are the profile's. Trees are static; for a one-pass drafter, best_first and dynamic
too. By default they are, for each batch, the fastest static ones of a dozen sizes by prediction. Tokens/s are rows
times tau by the seconds of a round, prefill left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from jaxspec.console import cli, results, tables
from jaxspec.data import jsonl
from jaxspec.data.prompts import read_prompts
from jaxspec.decoding.requests import Request
from jaxspec.evaluation.rows import PLAIN
from jaxspec.evaluation.statistics import Interval
from jaxspec.lab.check import CheckedTree, rows_of, summarize, trees_of_sizes
from jaxspec.lab.cost_model import RoundCost
from jaxspec.lab.flags import SearchFlags, digest
from jaxspec.lab.grown import ReplayedTree, replay_tree, replayed_tree
from jaxspec.lab.search import Rated, rate_tree
from jaxspec.lab.trial import TriedTree, encode_requests, load_profiled, try_trees
from jaxspec.serving.loading import Models
from jaxspec.trees import StaticTree, chain

LONGEST = 40
"""Letters of a tree's text in a printed table."""


@dataclass(frozen=True, kw_only=True)
class Args(SearchFlags):
    prompts: Path
    """File of prompts that are decoded, as jaxspec generate reads them."""
    limit: int | None = None
    """Prompts taken; those that do not fill a batch are left out."""
    batches: str = "1,2,4"
    """Rows decoded together."""
    tree: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A static tree or chain, or best_first and dynamic for a one-pass drafter; repeat the flag for more. Default:
    --trees static ones."""
    trees: int = 12
    """Trees of as many sizes for each batch, the fastest of each size by prediction."""
    max_new_tokens: int = 64
    """Most tokens of an answer."""
    repeats: int = 2
    """Times that each tree decodes all prompts; figures are medians."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cli.refuse_below_one(self, "limit", "trees", "max_new_tokens", "repeats")
        if self.max_new_tokens < 2:
            raise ValueError("--max-new-tokens is 1; the first token is prefill's, so give at least 2")
        _ = cli.sizes("--batches", self.batches)
        _ = self.given

    @property
    def given(self) -> list[ReplayedTree]:
        """The trees of --tree."""
        return [tree for tree in dict.fromkeys(map(replayed_tree, self.tree)) if tree.nodes > 1]


def main(argv: list[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec lab check", description=__doc__ or "")
    facts = args.inputs.profile.facts
    if facts.get("kind") == "simulated" or facts.get("simulated_texts"):
        raise ValueError(f"{args.profile}: holds simulated texts; a check needs a profile of a drafter that is here")
    models, settings = load_profiled(facts, args.max_new_tokens)
    requests = encode_requests(models, read_prompts(args.prompts, limit=args.limit), settings)
    checked = []
    for mine in check_all(args, models, requests):
        print_batch(mine)
        checked += mine
    summary = summarize(checked)
    print_summary(checked, summary)
    if args.json is not None:
        dtype = str(args.inputs.costs.facts.get("dtype") or "fp32")
        found = results.result("lab check", dtype=dtype, seed=args.seed, started=started, **make_result(args, checked))
        results.write_json(args.json, found)
    return 0


def check_all(args: Args, models: Models, requests: Sequence[Request]) -> Iterator[list[CheckedTree]]:
    """Yields the trees of one batch after another; what the ledger beside --json holds is not decoded again.

    It does not depend on --cost: costs of another source or day are held to the same measurements of the same trees.
    """
    context = round(float(np.mean([len(r.tokens) for r in requests])) + args.max_new_tokens / 2)
    costs = {batch: args.cost_at(batch, context) for batch in cli.sizes("--batches", args.batches)}
    ledger, known = None, []
    if args.json is not None:
        ledger = args.json.with_name(f"{args.json.stem}.ledger.jsonl")
        known = jsonl.journal(ledger, settings_of(args), of=args.json, fields=("batch", "tried"))
    before = {line["batch"]: line["tried"] for line in known}
    # All is predicted first: a tree that cannot be is refused before anything is decoded.
    rated = {batch: rate_all(args, cost, before.get(batch)) for batch, cost in costs.items()}
    for batch, predicted in rated.items():
        if batch not in before:
            trees = {r.tree.spec: r.tree for r in predicted if not r.plain}
            tried = try_trees(models, trees, requests, batch=batch, repeats=args.repeats)
            before[batch] = {name: one._asdict() for name, one in tried.items()}
            # Programs of a dozen trees a batch are many mappings of memory, of which a process may have so many.
            jax.clear_caches()
            if ledger is not None:
                jsonl.append(ledger, [{"batch": batch, "tried": before[batch]}])
        yield [CheckedTree(r, TriedTree(**before[batch][PLAIN if r.plain else r.tree.spec])) for r in predicted]


def rate_all(args: Args, cost: RoundCost, tried: dict[str, Any] | None) -> list[Rated]:
    """Returns plain decoding and the trees of one batch as predicted: those that were tried, if any, or to be tried."""
    profile = args.inputs.profile
    if tried is not None:
        trees = [replayed_tree(name) for name in tried if name != PLAIN]
    else:
        trees = args.given or [StaticTree(shape) for shape in trees_of_sizes(profile, cost, args.limits, args.trees)]
    return [rate_tree(tree, cost, replay_tree(profile, tree)) for tree in (chain(0), *trees)]


def settings_of(args: Args) -> dict[str, Any]:
    """Returns what measured figures depend on."""
    names = ("limit", "tree", "trees", "max_new_tokens", "repeats", "max_nodes", "max_depth", "max_branch", "multiple")
    files = {name: digest(getattr(args, name)) for name in ("profile", "prompts")}
    return files | {name: list(v) if isinstance(v := getattr(args, name), tuple) else v for name in names}


def make_result(args: Args, checked: list[CheckedTree]) -> dict[str, Any]:
    """Returns the verb's own keys."""
    profile, costs = args.inputs
    return {
        "profile": args.profile,
        "cost": args.cost,
        "prompts": args.prompts,
        "limit": args.limit,
        "target": profile.facts["target"],
        "drafter": profile.facts["drafter"],
        "temperature": profile.facts.get("temperature"),
        "device": costs.facts.get("device"),
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "rows": rows_of(checked),
        **summarize(checked),
    }


def print_batch(checked: list[CheckedTree]) -> None:
    """Prints the trees of one batch."""
    first = checked[0].predicted
    rows = [
        [
            tables.shorten(c.predicted.tree.spec, LONGEST),
            c.predicted.tree.nodes,
            _short(c.predicted.tau),
            c.measured.tau,
            1e3 * c.predicted.round_seconds,
            1e3 * c.measured.round_seconds,
            c.predicted.tokens_per_second.value,
            c.tokens_per_second,
            f"{c.errors['tokens_per_second']:+.1%}",
        ]
        for c in checked
    ]
    columns = ["tree", "nodes", "tau predicted", "measured", "round ms predicted", "measured"]
    columns += ["tokens/s predicted", "measured", "error"]
    tables.print_table(f"Batch {first.batch}, context {first.context}", columns, rows)


def _short(tau: Interval) -> str:
    return f"{tau.value:.2f} [{tau.low:.2f}, {tau.high:.2f}]"


def print_summary(checked: list[CheckedTree], summary: dict[str, Any]) -> None:
    """Prints the errors over all trees, and what the picked trees reach."""
    size, bias, worst = summary["median_error"], summary["bias"], summary["worst_error"]

    def told(name: str) -> str:
        return f"{size[name]:.1%} ({bias[name]:+.1%} with its sign, {worst[name]:+.1%} at worst)"

    sys.stdout.write(
        f"{len(checked)} predictions, errors in the median: tokens/s {told('tokens_per_second')}, tau {told('tau')}, "
        f"a round {told('round_seconds')}, times plain decoding {told('speedup')}\n"
    )
    for batch, share in summary["picked_share"].items():
        sys.stdout.write(f"batch {batch}: the tree predicted best reaches {share:.1%} of the best measured\n")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
