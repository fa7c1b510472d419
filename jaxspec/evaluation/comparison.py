"""Recipes compared on one set of prompts: tau with bootstrap intervals, paired ratios, acceptance by depth, tables."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 5000
"""Bootstrap samples of the prompts."""
CONFIDENCE = 0.95
EVERY = "all"
"""What the prompts of all sources together are called."""
FEWEST_ROUNDS = 20
"""Rounds below which a share of them is not drawn in a figure: it would be noise."""


class Interval(NamedTuple):
    """An estimate with its percentile bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Counts(NamedTuple):
    """What decoding some prompts took, one row a prompt, in one order for all that is compared."""

    tokens_P: np.ndarray
    """New tokens, the one that prefill gives not counted."""
    calls_P: np.ndarray
    """Target calls, prefill not counted."""
    accepted_PA: np.ndarray
    """Rounds by how many drafted tokens they accepted: 0, 1 .. T."""

    def of(self, chosen_P: np.ndarray) -> Counts:
        """Those of the chosen prompts."""
        return Counts(*(x[chosen_P] for x in self))


def pool(counts: Sequence[Counts]) -> Counts:
    """Several decodings of the same prompts, a prompt's added up."""
    return Counts(*(np.sum(parts, axis=0) for parts in zip(*counts, strict=True)))


@functools.lru_cache(maxsize=8)
def resamples(prompts: int, draws: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """`[draws, prompts]`: how often each prompt stands in each bootstrap sample; the same for equal arguments."""
    drawn = np.random.default_rng((seed, prompts)).multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)
    return drawn.astype(np.float64)  # for the matrix product; whole numbers stay exact


def tau_interval(counts: Counts, confidence: float = CONFIDENCE) -> Interval:
    """tau, tokens per target call over all prompts, and its interval over resampled prompts.

    The bootstrap of a ratio of sums: tokens and calls of a prompt stay together. NaN where no call was made.
    """
    return _interval(_quotient(*_totals(counts)), confidence)


def ratio_interval(counts: Counts, baseline: Counts, confidence: float = CONFIDENCE) -> Interval:
    """tau over the baseline's tau, and its interval over the same resampled prompts in both (paired).

    What makes one prompt easier than another cancels, so it is far tighter than two intervals side by side.
    """
    if len(counts.tokens_P) != len(baseline.tokens_P):
        raise ValueError(f"{len(counts.tokens_P)} prompts cannot be paired with {len(baseline.tokens_P)}")
    ours, theirs = _quotient(*_totals(counts)), _quotient(*_totals(baseline))
    return _interval(_quotient(ours, theirs), confidence)


def _totals(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and calls: of the prompts themselves first, then of every bootstrap sample."""
    weights = resamples(len(counts.tokens_P))
    sums = (x_P.astype(np.float64) for x_P in (counts.tokens_P, counts.calls_P))
    tokens, calls = (np.concatenate([[x_P.sum()], weights @ x_P]) for x_P in sums)
    return tokens, calls


def _quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _interval(values: np.ndarray, confidence: float) -> Interval:
    """From the estimate and, behind it, those of the samples; samples without a call are left out."""
    drawn = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not drawn.size:
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values[0]), float(low), float(high))


class Acceptance(NamedTuple):
    """How far rounds get, by depth 1 .. T."""

    rate_T: np.ndarray
    """Of the rounds that kept a path down to depth t - 1, the share that kept a token at t; NaN where none got there.
    A path the tree did not continue counts as one that ended."""
    rounds_T: np.ndarray
    """Rounds that kept a path down to depth t - 1."""


def acceptance(accepted_A: np.ndarray) -> Acceptance:
    """Conditional acceptance by depth from a histogram of rounds that accepted 0, 1 .. T tokens."""
    reached = np.cumsum(np.asarray(accepted_A, np.float64)[::-1])[::-1]
    return Acceptance(_quotient(reached[1:], reached[:-1]), reached[:-1].astype(np.int64))


class Decoded(NamedTuple):
    """The prompts decoded with one recipe's drafter of one seed."""

    recipe: str
    seed: int
    tree: str
    """As asked for."""
    drafted_tree: str
    """What the drafter could draft of it."""
    temperature: float
    counts: Counts
    drafter_passes: int
    drafter_parameters: int
    train_tokens: int

    @property
    def setting(self) -> tuple[str, float]:
        """What must be equal for two recipes to be compared."""
        return self.tree, self.temperature


def groups(sources: Sequence[str]) -> dict[str, np.ndarray]:
    """Prompts by source, all of them first; a single source is not told apart."""
    names = np.asarray(sources)
    found = {EVERY: np.ones(len(names), bool)}
    kinds = sorted(set(sources))
    return found | ({name: names == name for name in kinds} if len(kinds) > 1 else {})


def seed_rows(runs: Sequence[Decoded], sources: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each recipe, seed, source, temperature and tree."""
    for run in runs:
        for source, chosen in groups(sources).items():
            counts = run.counts.of(chosen)
            tau, kept = tau_interval(counts), acceptance(counts.accepted_PA.sum(axis=0))
            yield {
                "recipe": run.recipe,
                "seed": run.seed,
                "source": source,
                "temperature": run.temperature,
                "tree": run.tree,
                "drafted_tree": run.drafted_tree,
                "prompts": int(chosen.sum()),
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
    """A row for each recipe, source, temperature and tree, seeds pooled, with tau's ratio to the recipe `baseline`.

    The ratio is taken over the seeds that both have, or over all of both where they share none. Intervals are over
    prompts; what seeds add is shown by `tau_by_seed`. Without a baseline run the ratios are None.
    """
    for setting in dict.fromkeys(run.setting for run in runs):
        arms: dict[str, dict[int, Decoded]] = {}
        for run in runs:
            if run.setting == setting:
                arms.setdefault(run.recipe, {})[run.seed] = run
        for recipe, by_seed in arms.items():
            first = next(iter(by_seed.values()))
            for source, chosen in groups(sources).items():
                own = {seed: run.counts.of(chosen) for seed, run in by_seed.items()}
                other = {seed: run.counts.of(chosen) for seed, run in arms.get(baseline, {}).items()}
                whole = pool(list(own.values()))
                tau, kept = tau_interval(whole), acceptance(whole.accepted_PA.sum(axis=0))
                ratio = _paired(own, other)
                yield {
                    "recipe": recipe,
                    "seeds": list(by_seed),
                    "source": source,
                    "temperature": setting[1],
                    "tree": setting[0],
                    "drafted_tree": first.drafted_tree,
                    "prompts": int(chosen.sum()),
                    "tau": tau.value,
                    "tau_low": tau.low,
                    "tau_high": tau.high,
                    "tau_by_seed": [tau_interval(counts).value for counts in own.values()],
                    "baseline": baseline,
                    "ratio": None if ratio is None else ratio.value,
                    "ratio_low": None if ratio is None else ratio.low,
                    "ratio_high": None if ratio is None else ratio.high,
                    "drafter_passes": first.drafter_passes,
                    "drafter_parameters": first.drafter_parameters,
                    "train_tokens": first.train_tokens,
                    "acceptance_by_depth": kept.rate_T,
                    "rounds_by_depth": kept.rounds_T,
                }


def _paired(own: dict[int, Counts], other: dict[int, Counts]) -> Interval | None:
    """The ratio over shared seeds; None without a baseline."""
    if not other:
        return None
    shared = [seed for seed in own if seed in other]
    ours = [own[seed] for seed in shared or own]
    theirs = [other[seed] for seed in shared or other]
    return ratio_interval(pool(ours), pool(theirs))


class Table(NamedTuple):
    """What `tables.print_table` takes."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


def tables(found: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """Of each tree and temperature in `summaries`: tau with its ratio, tau by source, acceptance by depth."""
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
    """How a reader calls it."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"
