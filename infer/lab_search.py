"""Find the draft tree of the most tokens per second for a drafter's acceptance and a machine's costs.

Shapes of a dynamic program, a heap and a beam are replayed on one half of the profile's prompts; the best is reported
on the other half. Plain decoding is always among them. For a one-pass drafter the best of the best-first trees stands
beside it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from jaxspec import __version__
from jaxspec.console import cli, results, tables
from jaxspec.data.prompts import Prompt, read_prompts
from jaxspec.evaluation.rows import PLAIN
from jaxspec.lab.acceptance import acceptance_table, product_gap
from jaxspec.lab.cost_model import RoundCost
from jaxspec.lab.drawing import draw
from jaxspec.lab.flags import SearchFlags
from jaxspec.lab.forest import Shape
from jaxspec.lab.optimal import edge_sensitivity
from jaxspec.lab.policy import adaptive_tree
from jaxspec.lab.replay import node_shares
from jaxspec.lab.search import Choice, GrownChoice, Rated, Search, frontier
from jaxspec.lab.trial import TriedTree, encode_requests, load_profiled, try_trees
from jaxspec.trees import policy_fields, write_tree

LONGEST = 60
"""Letters of a tree's text in a printed table."""
MEASURED_TOKENS = 128
"""New tokens of an answer that is decoded to measure."""
EDGES = 8
"""Edges of the tree that are printed with their sensitivity."""


@dataclass(frozen=True, kw_only=True)
class Args(SearchFlags):
    batch: str = "1"
    """Rows decoded together. Of several, such as 1,2,4, the one that --objective rates best is taken."""
    context: int | None = None
    """Committed tokens of a row; default: the middle one of the costs."""
    objective: Literal["tokens_per_second", "latency", "frontier"] = "tokens_per_second"
    """The batch chosen: tokens_per_second of all rows together; latency, the seconds that a row waits for a token;
    frontier prints the batches that nothing beats in both, and chooses as tokens_per_second does. At one batch the
    tree is the same for all three."""
    out: Path | None = None
    """File for the tree, which --tree of every verb takes."""
    adaptive: Path | None = None
    """File for an adaptive tree around it, which decides in every round how deep to draft and how much to verify."""
    lookup: int | None = None
    """Tokens of a looked-up branch (prompt lookup) beside the adaptive tree's drafts; default: none."""
    ragged: tyro.conf.FlagCreatePairsOff[bool] = False
    """The adaptive tree shares the nodes of a call out among the rows of a batch, where they are worth most."""
    measure: Path | None = None
    """File of prompts on which the chosen tree, the runner-up and plain decoding are then decoded in turns, with the
    profile's target and drafter, at its temperature."""
    limit: int = 8
    """Prompts of --measure that are taken."""
    repeats: int = 3
    """Times that each of them decodes these prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cli.refuse_below_one(self, "context", "lookup", "limit", "repeats")
        for name in ("out", "adaptive"):
            if (path := getattr(self, name)) is not None and path.suffix != ".json":
                raise ValueError(f"--{name} {path} must end in .json, so that --tree knows it for a file")
        if self.lookup is not None and self.adaptive is None:
            raise ValueError("--lookup is for an adaptive tree: give --adaptive FILE.json too")
        if self.ragged and self.adaptive is None:
            raise ValueError("--ragged is for an adaptive tree: give --adaptive FILE.json too")
        _ = self.batches

    @property
    def batches(self) -> list[int]:
        """The batches to choose from."""
        return sorted(cli.sizes("--batch", self.batch))


class Searched(NamedTuple):
    """The choices of a search, one a batch."""

    search: Search
    costs: dict[int, RoundCost]
    choices: dict[int, Choice]
    batch: int
    """The batch that the objective takes."""
    frontier: list[Rated]
    best_first: GrownChoice | None
    """The best-first tree at that batch, for a one-pass drafter."""

    @property
    def choice(self) -> Choice:
        """The choice at that batch."""
        return self.choices[self.batch]


def main(argv: list[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec lab search", description=__doc__ or "")
    prompts = [] if args.measure is None else read_prompts(args.measure, limit=args.limit)
    found = run_search(args)
    tried = try_choice(args, found, prompts) if prompts else {}
    result = make_result(args, found, started) | {"measured": {name: t._asdict() for name, t in tried.items()}}
    if "chosen" in tried:
        result["measured_tokens_per_second"] = tried["chosen"].tokens_per_second
    print_search(args, found, result)
    print_tried(found, tried)
    if args.out is not None:
        write_tree(args.out, tree_fields(args, found))
        sys.stdout.write(f"{args.out}: give it as --tree {args.out}\n")
    if args.adaptive is not None:
        write_tree(args.adaptive, adaptive_fields(args, found))
        sys.stdout.write(f"{args.adaptive}: give it as --tree {args.adaptive}\n")
    if args.json is not None:
        results.write_json(args.json, result)
    return 0


def run_search(args: Args) -> Searched:
    """Returns the trees of all batches, those of the costs too, which make the frontier."""
    grid, contexts = args.cost_grid
    context = args.context or contexts[len(contexts) // 2]
    others = [batch for batch in grid if batch not in args.batches and args.refusal(batch, context) is None]
    cells = [(batch, context) for batch in sorted([*args.batches, *others])]
    search = args.search(cells)
    costs = {batch: args.cost_at(batch, context) for batch, _ in cells}
    choices = {batch: search.choose(cost) for batch, cost in costs.items()}
    asked = [choices[batch].chosen for batch in args.batches]
    by_latency = args.objective == "latency"
    best = min(asked, key=lambda r: r.seconds_per_token if by_latency else -r.tokens_per_second.value)
    points = frontier(choice.chosen for choice in choices.values())
    return Searched(search, costs, choices, best.batch, points, search.choose_best_first(costs[best.batch]))


def try_choice(args: Args, found: Searched, prompts: Sequence[Prompt]) -> dict[str, TriedTree]:
    """Returns how the chosen tree, its rivals and plain decoding decode; a tree of one node is plain decoding."""
    facts, choice = args.inputs.profile.facts, found.choice
    if facts.get("kind") == "simulated" or facts.get("simulated_texts"):
        raise ValueError(f"--measure needs a profile that was measured: {args.profile} holds simulated texts")
    models, settings = load_profiled(facts, MEASURED_TOKENS)
    policies = {name: r.tree for name, r in arms_of(found).items() if not r.plain}
    requests = encode_requests(models, prompts, settings)
    tried = try_trees(models, policies, requests, batch=found.batch, repeats=args.repeats)
    return {"chosen": tried[PLAIN], **tried} if choice.chosen.plain else tried


def arms_of(found: Searched) -> dict[str, Rated]:
    """Returns the chosen tree, the runner-up, the best-first tree and plain decoding, those that there are."""
    choice, grown = found.choice, found.best_first
    arms = {"chosen": choice.chosen, "runner-up": choice.runner_up, "best-first": grown and grown.rated}
    return {name: rated for name, rated in (arms | {PLAIN: choice.plain}).items() if rated is not None}


def tree_fields(args: Args, found: Searched) -> dict[str, Any]:
    """Returns the fields of the tree file."""
    chosen, plain = found.choice.chosen, found.choice.plain
    return {
        **chosen.row(),
        "plain_tokens_per_second": plain.tokens_per_second.value,
        "made_from": args.made_from(found.search) | {"objective": args.objective, "jaxspec": __version__},
    }


def adaptive_fields(args: Args, found: Searched) -> dict[str, Any]:
    """Returns the fields of the adaptive tree's file."""
    profile, _ = args.inputs
    chosen, cost = found.choice.chosen, found.costs[found.batch]
    tree = adaptive_tree(profile, cost, found.choice, most_nodes=args.max_nodes, lookup=args.lookup, ragged=args.ragged)
    made_from = args.made_from(found.search) | {"around": chosen.row(), "jaxspec": __version__}
    return {**policy_fields(tree), "batch": found.batch, "context": chosen.context, "made_from": made_from}


def make_result(args: Args, found: Searched, started: float) -> dict[str, Any]:
    """Returns the verb's JSON."""
    profile, costs = args.inputs
    choice, cost = found.choice, found.costs[found.batch]
    chosen = choice.chosen
    shares = node_shares(found.search.reporting, chosen.shape)
    return results.result(
        "lab search",
        dtype=str(costs.facts.get("dtype") or "fp32"),
        seed=args.seed,
        started=started,
        tree=args.out,
        adaptive_tree=args.adaptive,
        **chosen.row(),
        tau_choosing=float(found.search.candidates.tau_S[choice.index]),
        tokens_per_second_choosing=choice.choosing[0],
        measured_tokens_per_second=None,
        plain_tokens_per_second=choice.plain.tokens_per_second.value,
        speedup=chosen.tokens_per_second.value / choice.plain.tokens_per_second.value,
        objective=args.objective,
        frontier=[point.row() for point in found.frontier],
        runner_up=choice.runner_up and choice.runner_up.row(),
        best_first=found.best_first and best_first_row(found.best_first),
        shapes_tried=found.search.candidates.tried,
        shapes_unpriced=found.search.candidates.unpriced,
        shapes_replayed=len(found.search.candidates.forest.shapes),
        node_shares=[{"path": list(path), "share": share} for path, share in shares.items()],
        accept_histogram=found.search.counts(chosen.tree).accepted_PA.sum(0),
        edge_sensitivity=edges_of(found.search, chosen.shape),
        sensitivity=found.search.sensitivity(cost, choice.index),
        product_gap=product_gap(profile) if profile.facts.get("one_pass") else None,
        made_from=args.made_from(found.search),
    )


def best_first_row(grown: GrownChoice) -> dict[str, Any]:
    """Returns the best-first tree and its figures as JSON's types."""
    return {**grown.rated.row(), "tokens_per_second_choosing": grown.choosing}


def edges_of(search: Search, shape: Shape) -> list[dict[str, Any]]:
    """Returns by how much tokens per round grow with each rate of the table, the greatest first."""
    table = acceptance_table(search.reporting, given="kept", by_parent=False)
    slope_DK = edge_sensitivity(table, shape)
    rows = [
        {"depth": d, "rank": r, "rate": float(table.rate_DK[d, r]), "slope": float(slope)}
        for (d, r), slope in ((index, slope_DK[index]) for index in zip(*slope_DK.nonzero(), strict=True))
    ]
    return sorted(rows, key=lambda row: -row["slope"])


def print_search(args: Args, found: Searched, result: dict[str, Any]) -> None:
    """Prints the chosen tree, its figures beside the runner-up's and plain decoding's, and what errors would change."""
    choice = found.choice
    chosen, plain = choice.chosen, choice.plain
    where = f"batch {chosen.batch}, context {chosen.context}"
    if chosen.shape:
        sys.stdout.write(draw(chosen.shape, node_shares(found.search.reporting, chosen.shape)) + "\n")
    else:
        sys.stdout.write(f"no tree pays at {where}: plain decoding is fastest\n")
    before: dict[str, float] = dict(zip(("chosen", "runner-up", PLAIN), choice.choosing, strict=True))
    if found.best_first is not None:
        before["best-first"] = found.best_first.choosing
    rows = [[*figures(name, rated, plain), before[name]] for name, rated in arms_of(found).items()]
    columns = ["", "tree", "nodes", "depth", "tau", "tokens/s", "x plain", "ms a token"]
    tables.print_table(f"Predicted at {where}", [*columns, "tokens/s of the choosing half"], rows)
    for told in (choice.doubt, found.search.left_out, grown_is_faster(found)):
        if told is not None:
            sys.stdout.write(f"{told}\n")
    if args.objective == "frontier" or len(args.batches) > 1:
        rows = [figures(f"batch {p.batch}", p, found.choices[p.batch].plain) for p in found.frontier]
        tables.print_table("Nothing beats these in both tokens/s and ms a token", columns, rows)
    edges = [[e["depth"] + 1, e["rank"], e["rate"], e["slope"]] for e in result["edge_sensitivity"][:EDGES]]
    if edges:
        tables.print_table("Tokens a round by rate", ["level", "rank", "rate", "d tokens / d rate"], edges)
    errors = [
        [
            f"{e['error']} x {e['factor']:g}",
            e["predicted_tokens_per_second"],
            tables.shorten(e["best_spec"], LONGEST),
            e["lost"],
        ]
        for e in result["sensitivity"]
    ]
    columns = ["error", "tokens/s", "best tree then", "lost"]
    tables.print_table("If it were off, on the prompts that chose", columns, errors)
    of = result["made_from"]
    if of["profile"]["simulated_texts"]:
        sys.stdout.write("the profile holds rates alone: each prompt's text is drawn from the rounds counted of it\n")
    models = [f"{of[part]['drafter']} for {of[part]['target']}" for part in ("profile", "costs")]
    if models[0] != models[1]:
        sys.stdout.write(f"acceptance is of {models[0]}, costs are of {models[1]}\n")
    sys.stdout.write(
        f"{result['shapes_tried']:,} shapes, {result['shapes_replayed']:,} replayed on {of['prompts_choosing']} "
        f"prompts; figures are of {of['prompts_reporting']} others, intervals by resampling prompts; costs are "
        f"{of['costs']['source']}\n"
    )


def grown_is_faster(found: Searched) -> str | None:
    """Returns a sentence where the prompts that choose find the best-first tree faster than the chosen one."""
    grown, chosen = found.best_first, found.choice.choosing[0]
    if grown is None or grown.choosing <= chosen:
        return None
    return (
        f"the prompts that choose find the best-first tree faster, {grown.choosing:.4g} tokens/s against {chosen:.4g}: "
        f"take it with --tree {grown.rated.tree.spec}, after a --measure, for costs leave out how its nodes are picked"
    )


def print_tried(found: Searched, tried: dict[str, TriedTree]) -> None:
    """Prints measured figures beside the predicted ones."""
    predicted, rows = arms_of(found), []
    for name, one in tried.items():
        rated = predicted[name]
        guess = rated.tokens_per_second.value
        rows.append([name, rated.tau.value, one.tau, guess, one.tokens_per_second, guess / one.tokens_per_second])
    if rows:
        columns = ["", "tau predicted", "measured", "tokens/s predicted", "measured", "predicted / measured"]
        tables.print_table("Measured, prefill left out", columns, rows)


def figures(name: str, rated: Rated, plain: Rated) -> list[Any]:
    """Returns a row of the printed table."""
    speed = rated.tokens_per_second
    ratio = speed.value / plain.tokens_per_second.value
    return [
        name,
        tables.shorten(rated.tree.spec, LONGEST),
        rated.tree.nodes,
        rated.tree.depth,
        str(rated.tau),
        f"{tables.four_digits(speed.value)} [{tables.four_digits(speed.low)}, {tables.four_digits(speed.high)}]",
        ratio,
        1e3 * rated.seconds_per_token,
    ]


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
