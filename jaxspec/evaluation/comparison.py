"""Recipes compared on one set of prompts: rows a seed and a recipe, tables, and the training budget they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.evaluation.statistics import Counts, Interval, acceptance, pool, ratio_interval, tau_interval

EVERY = "all"
"""The name of the prompts of all sources together."""
FEWEST_ROUNDS = 20
"""Rounds below which a share of them is not drawn in a figure: it would be noise."""


class Decoded(NamedTuple):
    """The prompts decoded with one recipe's drafter of one seed."""

    recipe: str
    seed: int
    tree: str
    """As named on the command line."""
    drafted_tree: str
    """The part of it that the drafter can draft."""
    temperature: float
    counts: Counts
    drafter_passes: int
    drafter_parameters: int
    train_tokens: int

    @property
    def setting(self) -> tuple[str, float]:
        """Tree and temperature, which must be equal for two recipes to be compared."""
        return self.tree, self.temperature


def groups(sources: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the mask of each source's prompts, that of all first; a single source is not told apart."""
    names = np.asarray(sources)
    found = {EVERY: np.ones(len(names), bool)}
    kinds = sorted(set(sources))
    return found | ({name: names == name for name in kinds} if len(kinds) > 1 else {})


def seed_rows(runs: Sequence[Decoded], sources: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields a row for each recipe, seed, source, temperature and tree."""
    for run in runs:
        for source, chosen in groups(sources).items():
            yield {"recipe": run.recipe, "seed": run.seed, "source": source} | _measured(run, run.counts.of(chosen))


def _measured(run: Decoded, counts: Counts) -> dict[str, Any]:
    """Returns the fields that rows of a seed and of a recipe share: how it was decoded, tau, cost, acceptance."""
    tau, kept = tau_interval(counts), acceptance(counts.accepted_PA.sum(axis=0))
    return {
        "temperature": run.temperature,
        "tree": run.tree,
        "drafted_tree": run.drafted_tree,
        "prompts": len(counts.tokens_P),
        "tau": tau.value,
        "tau_low": tau.low,
        "tau_high": tau.high,
        "drafter_passes": run.drafter_passes,
        "drafter_parameters": run.drafter_parameters,
        "train_tokens": run.train_tokens,
        "acceptance_by_depth": kept.rate_T,
        "rounds_by_depth": kept.rounds_T,
    }


def summaries(runs: Sequence[Decoded], sources: Sequence[str], baseline: str) -> Iterator[dict[str, Any]]:
    """Yields a row for each recipe, source, temperature and tree, with tau's ratio to the recipe `baseline`.

    Seeds are pooled; `tau_by_seed` tells them apart. The ratio is taken over the seeds that both recipes have, or over
    all of both where they share none; without a baseline run it is None. Intervals are over prompts.
    """
    for setting in dict.fromkeys(run.setting for run in runs):
        by_recipe: dict[str, dict[int, Decoded]] = {}
        for run in runs:
            if run.setting == setting:
                by_recipe.setdefault(run.recipe, {})[run.seed] = run
        for recipe, by_seed in by_recipe.items():
            for source, chosen in groups(sources).items():
                own = {seed: run.counts.of(chosen) for seed, run in by_seed.items()}
                other = {seed: run.counts.of(chosen) for seed, run in by_recipe.get(baseline, {}).items()}
                ratio = _paired(own, other)
                yield {
                    "recipe": recipe,
                    "seeds": list(by_seed),
                    "source": source,
                    **_measured(next(iter(by_seed.values())), pool(list(own.values()))),
                    "tau_by_seed": [tau_interval(counts).value for counts in own.values()],
                    "baseline": baseline,
                    "ratio": None if ratio is None else ratio.value,
                    "ratio_low": None if ratio is None else ratio.low,
                    "ratio_high": None if ratio is None else ratio.high,
                }


def _paired(own: dict[int, Counts], other: dict[int, Counts]) -> Interval | None:
    """Returns the ratio over shared seeds, or over all seeds of both where they share none; None without a baseline."""
    if not other:
        return None
    shared = [seed for seed in own if seed in other]
    ours = [own[seed] for seed in shared or own]
    theirs = [other[seed] for seed in shared or other]
    return ratio_interval(pool(ours), pool(theirs))


class Table(NamedTuple):
    """The arguments of `tables.print_table`."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


def tables(found: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """Yields for each tree and temperature in `summaries`: tau with its ratio, tau by source, acceptance by depth."""
    for setting in dict.fromkeys((row["tree"], row["temperature"]) for row in found):
        rows = [row for row in found if (row["tree"], row["temperature"]) == setting]
        title = f"{setting[0]}, {named_temperature(setting[1])}"
        sources = list(dict.fromkeys(row["source"] for row in rows))
        by_recipe = {r: {x["source"]: x for x in rows if x["recipe"] == r} for r in dict.fromkeys(map(_recipe, rows))}
        whole = [row for row in rows if row["source"] == EVERY]
        yield _tau_table(title, whole)
        if len(sources) > 1:
            sizes = [f"{source} ({by_recipe[_recipe(rows[0])][source]['prompts']} prompts)" for source in sources]
            cells = [[recipe, *(_tau(of[s]) for s in sources)] for recipe, of in by_recipe.items()]
            yield Table(f"tau by source: {title}", ["recipe", *sizes], cells)
        depth = max(len(row["acceptance_by_depth"]) for row in whole)
        yield Table(
            f"acceptance by depth: {title}",
            ["recipe", "rounds", *map(str, range(1, depth + 1))],
            [
                [_recipe(row), int(max(row["rounds_by_depth"], default=0)), *_shares(row["acceptance_by_depth"], depth)]
                for row in whole
            ],
        )


def _tau_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    cut = any(row["drafted_tree"] != row["tree"] for row in rows)
    columns = [
        "recipe",
        "tau",
        f"ratio to {rows[0]['baseline']}",
        "tau by seed",
        "passes",
        "parameters",
        "train tokens",
    ]
    return Table(
        f"tau: {title}, {rows[0]['prompts']} prompts",
        columns + ["tree cut to"] * cut,
        [
            [
                _recipe(row),
                _tau(row),
                "-" if row["ratio"] is None else str(Interval(row["ratio"], row["ratio_low"], row["ratio_high"])),
                ", ".join(f"{s}: {t:.3f}" for s, t in zip(row["seeds"], row["tau_by_seed"], strict=True)),
                row["drafter_passes"],
                row["drafter_parameters"],
                row["train_tokens"],
                *([row["drafted_tree"] if row["drafted_tree"] != row["tree"] else ""] if cut else []),
            ]
            for row in rows
        ],
    )


def _recipe(row: dict[str, Any]) -> str:
    return row["recipe"]


def _tau(row: dict[str, Any]) -> str:
    return str(Interval(row["tau"], row["tau_low"], row["tau_high"]))


def _shares(rates: np.ndarray, depth: int) -> list[str]:
    cells = ["-" if np.isnan(rate) else f"{rate:.3f}" for rate in rates]
    return cells + [""] * (depth - len(cells))


def named_temperature(temperature: float) -> str:
    """Returns the temperature as tables and figures name it."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"
