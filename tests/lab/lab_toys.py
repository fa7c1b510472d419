"""Costs that the tests of the tree lab share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxspec.lab.cost_model import RoundCost
from jaxspec.lab.costs import CostRow, CostTable
from jaxspec.lab.profile import BEYOND, MISSED, Profile, RoundCounts
from jaxspec.lab.rates import rates_of
from jaxspec.lab.round_log import by_rank, generous_tree

ROW = (0.7, 0.1, 0.05, 0.03, 0.02, 0.01, 0.01, 0.005)
"""The rank row of the specification's toy search."""


def ridge_cost(ridge: float, batch: int, *, nodes: int = 128, level: float = 0.06, step: int = 8) -> RoundCost:
    """Returns a cost in units of reading the weights, on stairs of `step` rows."""
    size_N = np.arange(nodes + 1)
    verify_N = np.maximum(1.0, -(-size_N // step) * step * batch / ridge)
    level_W = np.concatenate([[0.0], np.full(64, level)])
    return RoundCost(batch, 512, 1.05, verify_N, level_W, np.full(10, level), 0.05)


def cost_table(
    batches: Sequence[int] = (1, 4, 16),
    contexts: Sequence[int] = (512, 2048),
    paths: Sequence[int] = (1,),
    **facts: object,
) -> CostTable:
    """Returns a table of the roofline's kind: verification rises where arithmetic passes the weights."""
    rows = []
    for batch in batches:
        for context in contexts:
            read = 1e-2 * (1 + batch * context / 122_000)
            at = batch, context
            rows += [_row("verify", n, 0, at, max(read, 1e-2 * n * batch / 240)) for n in (1, 2, 4, 8, 16, 32, 64)]
            rows += [_row("draft", 1, w, at, 6e-4 + 1e-6 * w * batch) for w in (1, 2, 4, 8)]
            rows += [_row("extend", n, 0, at, 6e-4) for n in paths] + [_row("plain", 1, 0, at, read + 5e-4)]
        rows.append(_row("rest", 1, 0, (batch, 0), 5e-4))
    made = {"source": "roofline", "device": "toy", "target": "t", "drafter": "d", "dtype": "bf16", **facts}
    return CostTable(tuple(rows), made)


def _row(part: str, nodes: int, width: int, at: tuple[int, int], seconds: float) -> CostRow:
    return CostRow("roofline", "toy", part, nodes, width, *at, seconds)


def times(table: CostTable, factor: float) -> CostTable:
    """Returns the table with all seconds times `factor`."""
    assert math.isfinite(factor)
    return CostTable(tuple(row._replace(seconds=row.seconds * factor) for row in table.rows), table.facts)


def log_toys(rates_PDK: np.ndarray, *, rounds: int, seed: int = 0, extra: int = 64) -> RoundCounts:
    """Returns what a decoding with a generous tree counts of prompts whose children are kept at these rates."""
    _, depth, ranks = rates_PDK.shape
    tree, rng = generous_tree(depth, ranks, extra), np.random.default_rng(seed)
    place = {(): 0} | {path: i for i, path in enumerate(tree.paths, 1)}
    found = []
    for rates_DK in rates_PDK:
        kept_N, tried_N = np.zeros(tree.nodes, int), np.zeros(tree.nodes, int)
        ends_DK = np.cumsum(rates_DK, 1)
        for drawn_D in rng.random((rounds, depth)):
            path: tuple[int, ...] = ()
            for ends_K, drawn in zip(ends_DK, drawn_D, strict=True):
                tried_N[place[path]] += 1
                child = (*path, int(np.searchsorted(ends_K, drawn, side="right")))
                if child not in place:
                    break
                path = child
                kept_N[place[path]] += 1
        found.append((*by_rank(tree, kept_N, tried_N), rounds + kept_N.sum(), rounds))
    return RoundCounts(*(np.array(x) for x in zip(*found, strict=True)))


def rates_alone(counts: RoundCounts, sources: Sequence[str] | None = None, **facts: object) -> Profile:
    """Returns a profile of rates alone, as rounds that were counted make it."""
    prompts, depth, ranks = counts.hits_PDK.shape
    rates = rates_of(counts.hits_PDK, counts.turns_PDK, in_turn=True)
    named = {"rates_DK": rates.rate_DK, "lows_DK": rates.low_DK, "highs_DK": rates.high_DK, "tries_DK": rates.tries_DK}
    table = {name: [[None if np.isnan(x) else float(x) for x in row] for row in rows] for name, rows in named.items()}
    about = {"kind": "rates", "ranks": ranks, "rule": "recursive-rejection", "mode": "swor", **table, **facts}
    nothing = np.zeros((0, depth))
    none = np.zeros(0, np.int32), nothing.astype(np.int16), nothing, np.zeros((0, depth, ranks)), nothing
    return Profile(*none, tuple(sources or [""] * prompts), about, counts)


def one_pass_toy(*, prompts: int = 8, tokens: int = 40, depth: int = 3, ranks: int = 4, seed: int = 0) -> Profile:
    """Returns a one-pass drafter's profile: another distribution at every place and depth, and texts drawn by it."""
    rng, starts = np.random.default_rng(seed), prompts * (tokens - 1)
    p_TDK = -np.sort(-rng.dirichlet(np.full(ranks + 1, 0.6), (starts, depth))[..., :ranks], axis=-1)
    rank_TD = (rng.random((starts, depth, 1)) > np.cumsum(p_TDK, axis=-1)).sum(-1).astype(np.int16)
    rank_TD[rank_TD == ranks] = MISSED
    left_T = np.tile(np.arange(tokens - 1, 0, -1), prompts)
    rank_TD[left_T[:, None] < np.arange(1, depth + 1)] = BEYOND
    facts = {"kind": "ranks", "ranks": ranks, "one_pass": True, "rule": "target-draw", "mode": "topk"}
    prompt_T, nothing = np.repeat(np.arange(prompts, dtype=np.int32), tokens - 1), np.zeros((starts, depth), np.float32)
    return Profile(prompt_T, rank_TD, nothing, np.log(p_TDK).astype(np.float32), nothing, ("",) * prompts, facts)
