"""Rules for sampled children have exactly the target's law: every draft tree and every coin, enumerated in fp64."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from toys import Tables, path_tables, tree_of

from jaxspec.base import ROOT
from jaxspec.sampling import Sampling, warp_logits
from jaxspec.verify.rejection import DraftMode, Verdict, bottom_up, top_down

MODES: tuple[DraftMode, ...] = ("topk", "sample", "swor")
SHAPES = {"chain": (1, 1, 1), "flat": (3,), "2x2": (2, 2), "2x1": (2, 1)}
"""Children of every node, by depth."""
WARPS: dict[str, dict[str, float]] = {"plain": {}, "top-p": {"top_p": 0.9}, "top-k": {"top_k": 5}}
Laws = list[np.ndarray]
"""`laws[d]`: fp64 `[V ** d, V]`, the next token's law behind every path of `d` tokens."""


def laws_of(tables: Tables, temperature: float = 1.0, **warp: float) -> Laws:
    """The laws that the library's own `warp_logits` makes of fp64 tables."""
    with jax.enable_x64(True):
        settings = (temperature, warp.get("top_k", 0), warp.get("top_p", 1.0), 0)
        sampling = Sampling(*(jax.numpy.asarray([v]) for v in settings))
        warped = [np.asarray(warp_logits(jax.numpy.asarray(x, np.float64), sampling))[0] for x in tables]
    e = [np.exp(x - x.max(-1, keepdims=True)) for x in warped]
    return [x / x.sum(-1, keepdims=True) for x in e]


def with_zeros(tables: Tables, seed: int) -> Tables:
    """Some tokens impossible, never the likeliest."""
    rng = np.random.default_rng(seed)
    return [np.where((rng.random(x.shape) < 0.4) & (x < x.max(-1, keepdims=True)), -np.inf, x) for x in tables]


class Nodes(NamedTuple):
    """A tree shape; node 0 is the root, levels in order, siblings in the order of their draws."""

    parent: list[int]
    depth: list[int]


def nodes_of(children: tuple[int, ...]) -> Nodes:
    parent, depth, level = [ROOT], [0], [0]
    for d, count in enumerate(children, start=1):
        added = [(n, d) for n in level for _ in range(count)]
        level = list(range(len(parent), len(parent) + len(added)))
        parent += [n for n, _ in added]
        depth += [d] * len(added)
    return Nodes(parent, depth)


class Drafts(NamedTuple):
    """Every tree of one shape that the draft can make."""

    token_EN: np.ndarray
    valid_EN: np.ndarray
    """False where the draft had nothing left to draw, and below."""
    code_EN: np.ndarray
    """Of each node's path."""
    weight_E: np.ndarray


def drafts(shape: Nodes, laws: Laws, mode: DraftMode) -> Drafts:
    """All outcomes of drawing each node's children; those without probability are left out."""
    vocab = laws[0].shape[-1]
    token, code, weight, valid = np.zeros((1, 1), int), np.zeros((1, 1), int), np.ones(1), np.ones((1, 1), bool)
    for n in range(1, len(shape.parent)):
        above = shape.parent[n]
        law = laws[shape.depth[above]][code[:, above]].copy()
        older = [m for m in range(1, n) if shape.parent[m] == above]
        if mode == "topk":
            chosen = np.argsort(-law, axis=-1, kind="stable")[:, len(older)]
            law = np.eye(vocab)[chosen]
        elif mode == "swor":
            for m in older:
                np.put_along_axis(law, token[:, m : m + 1], 0, axis=1)
            law /= np.maximum(law.sum(-1, keepdims=True), 1e-300)
        some = valid[:, above] & (law.sum(-1) > 0)
        law = np.where(some[:, None], law, np.eye(vocab)[0])
        rows, drawn = np.nonzero(law > 0)
        weight = weight[rows] * law[rows, drawn]
        valid = np.concatenate([valid[rows], some[rows, None]], axis=1)
        token = np.concatenate([token[rows], drawn[:, None]], axis=1)
        code = np.concatenate([code[rows], code[rows, above][:, None] * vocab + drawn[:, None]], axis=1)
    return Drafts(token, valid, code, weight)


RULES = {
    "top down": lambda mode, depth: functools.partial(top_down, mode),
    "bottom up": lambda mode, depth: functools.partial(bottom_up, mode, depth=depth),
}


@functools.cache
def compiled(rule: str, mode: DraftMode, depth: int) -> Any:
    return jax.jit(RULES[rule](mode, depth))


def outcomes(rule: str, mode: DraftMode, shape: Nodes, found: Drafts, p: Laws, q: Laws) -> tuple[Verdict, np.ndarray]:
    """The verdicts over every tree and every way the coins fall, and each one's probability."""
    nodes, trees = len(shape.parent), len(found.weight_E)
    coins = np.array(list(itertools.product((0.0, 1.0), repeat=nodes - 1)))
    coin = np.tile(np.pad(coins, ((0, 0), (1, 0))), (trees, 1))
    each = functools.partial(np.repeat, repeats=len(coins), axis=0)
    ancestors = np.eye(nodes, dtype=bool)
    for n in range(1, nodes):
        ancestors[n] |= ancestors[shape.parent[n]]
    rows = trees * len(coins)
    parent, depth = (np.broadcast_to(np.asarray(x, np.int32), (rows, nodes)) for x in shape)
    token, valid = each(found.token_EN).astype(np.int32), each(found.valid_EN)
    ancestors_ENN = np.broadcast_to(ancestors, (rows, nodes, nodes))
    tree = tree_of(token, parent, depth, np.ones((rows, nodes)), valid, ancestors_ENN)
    laws = [
        each(np.stack([table[shape.depth[n]][found.code_EN[:, n]] for n in range(nodes)], axis=1)) for table in (p, q)
    ]
    size = 4 ** int(np.ceil(np.log2(max(rows, 1024)) / 2))  # few sizes, few programs
    args = jax.tree.map(
        lambda x: np.concatenate([x, np.broadcast_to(x[:1], (size - rows, *x.shape[1:]))]), (tree, *laws, coin)
    )
    with jax.enable_x64(True):
        verdict = jax.tree.map(lambda x: x[:rows], jax.device_get(compiled(rule, mode, max(shape.depth))(*args)))
    chance = np.where(verdict.tested_BN, np.where(coin == 0, verdict.chance_BN, 1 - verdict.chance_BN), 0.5)
    return verdict, each(found.weight_E) * chance[:, 1:].prod(axis=1)


def law_and_length(rule: str, mode: DraftMode, children: tuple[int, ...], p: Laws, q: Laws) -> tuple[float, float]:
    """Total variation between the target's law of `T + 1` tokens and the rule's, and the mean accept length."""
    shape, vocab = nodes_of(children), p[0].shape[-1]
    found = drafts(shape, q, mode)
    verdict, weight = outcomes(rule, mode, shape, found, p, q)
    length = len(children) + 1
    code = np.repeat(found.code_EN, 2 ** (len(shape.parent) - 1), axis=0)[np.arange(len(weight)), verdict.last_B]
    depth = np.asarray(shape.depth)[verdict.last_B]
    joint = np.zeros(vocab**length)
    want = np.ones(1)
    for d in range(length):
        # Paths that end at depth d, their bonus token, and plain sampling behind it.
        here = depth == d
        mass = np.zeros((vocab**d, vocab))
        np.add.at(mass, code[here], weight[here, None] * verdict.rest_BV[here])
        rest = mass.ravel()
        for later in range(d + 1, length):
            rest = (rest[:, None] * p[later]).ravel()
        joint += rest
        want = (want[:, None] * p[d]).ravel()
    return 0.5 * float(np.abs(joint - want).sum()), float((weight * depth).sum())


def pair(case: str, seed: int, vocab: int, depth: int, t: float, warp: str) -> tuple[Laws, Laws]:
    """Target and draft laws."""
    target, draft = path_tables(seed, vocab, depth), path_tables(seed + 900, vocab, depth)
    if case == "zeros":
        target, draft = with_zeros(target, seed), with_zeros(draft, seed + 1)
    p = laws_of(target, t, **WARPS[warp])
    return p, (p if case == "same" else laws_of(draft, 0.8))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["random", "zeros", "same"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_exactly_the_targets_law(rule: str, mode: DraftMode, case: str):
    for seed, (name, children) in enumerate(SHAPES.items()):
        vocab = 3 if name == "2x2" else 5 if name == "flat" else 4
        for t, warp in zip((1.0, 0.3, 1.5), WARPS, strict=True):
            p, q = pair(case, seed, vocab, len(children), t, warp)
            tv, _ = law_and_length(rule, mode, children, p, q)
            assert tv < 1e-12, (name, t, warp)
