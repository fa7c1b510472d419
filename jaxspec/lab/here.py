"""Trees to try with a drafter on this machine: its acceptance on texts at hand, costs by the clock, and the search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxspec.base import TreePolicy
from jaxspec.console import progress
from jaxspec.decoding.requests import Request
from jaxspec.lab.candidates import Limits
from jaxspec.lab.cost_model import RoundCost, round_cost
from jaxspec.lab.costs import CostTable
from jaxspec.lab.devices import device_here
from jaxspec.lab.making import joined
from jaxspec.lab.measured import RoundBench
from jaxspec.lab.policy import adaptive_tree
from jaxspec.lab.pricing import rows_of
from jaxspec.lab.profile import Profile
from jaxspec.lab.ranks import Text, batches, rank_texts, ranked_profile, read_target
from jaxspec.lab.reading import summarize
from jaxspec.lab.round_parts import Grid, with_reference
from jaxspec.lab.row_steps import known_steps
from jaxspec.lab.search import Choice, Search
from jaxspec.serving.loading import Models
from jaxspec.serving.queue import answer_one_by_one

DEPTH, RANKS, LOOKUP = 8, 8, 15
"""Depth and ranks of the profile, and tokens of the looked-up branch."""
NODES, WIDTHS = (1, 2, 4, 8, 16), (1, 2, 4)
"""Sizes that are timed: on a CPU each verified node costs."""
REPEATS = 5


class TreesHere(NamedTuple):
    """Trees worth measuring, and the search behind them."""

    trees: dict[str, TreePolicy]
    """By name: the best fixed one, its runner-up, the adaptive trees around it without and with looked-up tokens."""
    choice: Choice
    cost: RoundCost

    @property
    def told(self) -> str:
        """A sentence about what is predicted."""
        chosen, plain = self.choice.chosen, self.choice.plain
        if chosen.tree.nodes == 1:
            speed = plain.tokens_per_second.value
            return f"tree lab: no tree is predicted to pay; plain decoding writes {speed:,.0f} tokens/s"
        return (
            f"tree lab: {chosen.tree.spec} is predicted to write {chosen.tokens_per_second.value:,.0f} tokens/s at a "
            f"tau of {chosen.tau.value:.2f}, plain decoding {plain.tokens_per_second.value:,.0f}"
        )


def trees_here(
    models: Models, texts: Sequence[Text], *, seed: int = 0, tell: Callable[[str], None] = lambda status: None
) -> TreesHere:
    """Returns the trees to try for the drafter of `models`, one row at a time, in texts such as these.

    `texts` are the target's own greedy answers, two at least. Raises ValueError for fewer.
    """
    texts = [text for text in texts if text.starts > 0]
    tell("acceptance")
    profile = summarize(text_profile(models, texts))
    tell("costs")
    context = max(1, int(np.median([text.length for text in texts])))
    cost = round_cost(costs_here(models, context, tell), 1, context)
    tell("search")
    search = Search(profile, [cost], Limits(max(NODES), profile.rank_TD.shape[1]), seed=seed)
    choice = search.choose(cost)
    fixed = [rated.tree for rated in (choice.chosen, choice.runner_up) if rated is not None]
    adaptive = [adaptive_tree(profile, cost, choice, most_nodes=max(NODES), lookup=lookup) for lookup in (None, LOOKUP)]
    return TreesHere({tree.spec: tree for tree in (*fixed, *adaptive)}, choice, cost)


def text_profile(models: Models, texts: Sequence[Text]) -> Profile:
    """Returns the profile of the drafter of `models` over greedy texts."""
    drafter = models.engine.drafter
    assert drafter is not None
    depth = min(DEPTH, drafter.deepest or DEPTH)
    found = {}
    for group in batches(texts):
        some = [texts[i] for i in group]
        parts = rank_texts(models, some, read_target(models, some), depth=depth, ranks=RANKS)
        found |= dict(zip(group, parts, strict=True))
    facts = {"kind": "ranks", "ranks": RANKS, "depth": depth, "temperature": 0.0, "one_pass": drafter.one_pass}
    return ranked_profile(texts, joined(found, len(texts)), ("",) * len(texts), facts)


def costs_here(models: Models, context: int, tell: Callable[[str], None]) -> CostTable:
    """Returns what a round of one row costs on this machine behind so many committed tokens."""
    timed = with_reference(models)
    device, dtype = device_here(), str(models.engine.target.empty_cache(1, 1).v_YBKSC.dtype)
    steps = known_steps("measured", device, dtype)
    bench = RoundBench(timed, Grid(NODES, WIDTHS, (1,), (context,), steps=steps))
    parts = bench.measure(1, context, repeats=REPEATS, tell=tell).parts
    rows = rows_of(parts, timed.engine, "measured", device).rows
    one_pass = timed.engine.drafter is not None and timed.engine.drafter.one_pass
    facts = {"source": "measured", "device": device, "dtype": dtype, "row_steps": steps.as_json()}
    return CostTable(tuple(rows), {**facts, "one_pass": one_pass})


FINALISTS = 3
"""Trees that are measured more than once."""


def fastest_tree(
    drafted: Models, trees: Mapping[str, TreePolicy], requests: Sequence[Request], *, passes: int
) -> tuple[str, dict[str, float]]:
    """Returns the tree that answers the requests fastest, one at a time, and every tree's tokens a second.

    All are measured once and the best few again, in turns, `passes` times in all; speeds are medians.
    """
    found: dict[str, list[float]] = {name: [] for name in trees}
    finalists = min(FINALISTS, len(found))
    best = list(found)
    with progress.progress("trees", len(found) + finalists * (passes - 1), "passes") as bar:
        for turn in range(passes):
            for tree in best:
                timed = answer_one_by_one(drafted.with_tree(trees[tree]), requests)
                found[tree].append(timed.tokens_per_second)
                bar.advance(status=f"{tree} {timed.tokens_per_second:,.0f} tokens/s")
            if turn == 0:
                best = sorted(found, key=lambda tree: -found[tree][0])[:finalists]
    speeds = {tree: float(np.median(values)) for tree, values in found.items()}
    return max(best, key=lambda tree: speeds[tree]), speeds
