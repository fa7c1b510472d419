"""Enumeration of rejection rules in fp64: every tree that a policy can draw, and every fall of the coins.

The trees come from the library's own policies. Noise that selects each family of children is made here, one array for
every sequence of draws, and weighed with the draft distributions that the tree itself reports.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from toys import Tables, grow, path_tables

from jaxspec.base import Array, DraftMode, Tree
from jaxspec.sampling import Sampling, distribution_of
from jaxspec.trees import DynamicTree, StaticTree, chain, parse_paths
from jaxspec.trees.children import drawn
from jaxspec.verify.rejection import RejectionResult, recursive_rejection, traversal_verification


class TreeCase(NamedTuple):
    """A tree policy, and the size of the vocabulary that it is enumerated with."""

    policy: Any
    vocab: int
    children: int
    """Number of children drawn for every expanded node."""


SHAPES = {
    "chain": TreeCase(chain(3), 3, 1),
    "flat": TreeCase(StaticTree(parse_paths("0 1 2")), 5, 3),
    "2x2": TreeCase(StaticTree(parse_paths("0 1 00 01 10 11")), 3, 2),
    "lopsided": TreeCase(StaticTree(parse_paths("0 1 00 10 11 100")), 2, 2),
    "dynamic": TreeCase(DynamicTree(4, 2, 2), 3, 2),
    "deep dynamic": TreeCase(DynamicTree(5, 3, 2), 3, 2),
}
RULES: dict[str, Callable[..., RejectionResult]] = {
    "recursive-rejection": lambda mode, tree, p, coin, depth: recursive_rejection(mode, tree, p, coin),
    "traversal": traversal_verification,
}
T_AND_WARPS = [*itertools.product((0.3, 1.0, 1.5), ((0, 1.0), (0, 0.9), (5, 1.0))), (0.0, (0, 1.0))]
LOUD = 1e6
"""Noise so large that log-probabilities do not count beside it."""


def sequences(mode: DraftMode, vocab: int, count: int) -> np.ndarray:
    """Returns every outcome of a family's draws, `[outcomes, count]`."""
    ways = itertools.permutations if mode == "swor" else lambda v, c: itertools.product(v, repeat=c)
    return np.array(list(ways(range(vocab), count)))


def loud_noise(mode: DraftMode, drawn_EK: np.ndarray, vocab: int) -> np.ndarray:
    """Returns Gumbel noise with which these tokens are drawn, in their order."""
    one_hot = np.eye(vocab)[drawn_EK]
    if mode == "sample":
        return LOUD * one_hot
    falling = np.arange(drawn_EK.shape[-1], 0, -1)[:, None]
    return LOUD * (one_hot * falling).sum(-2)


def chance_of(mode: DraftMode, distribution: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Returns the probability `[trees]` of each sequence; draws after the support is used up are not random."""
    chance, rest = np.ones(len(distribution)), distribution.copy()
    for i in range(tokens.shape[1]):
        token = tokens[:, i : i + 1]
        here, total = np.take_along_axis(rest, token, 1)[:, 0], rest.sum(1)
        some = total > 0
        # When the support is used up, the lowest of the tokens not drawn yet stands for the draw.
        fresh = np.ones(distribution.shape, bool)
        np.put_along_axis(fresh, tokens[:, :i], False, 1)
        stand_in = token[:, 0] == fresh.argmax(1)
        chance *= np.where(some, here / np.where(some, total, 1), stand_in)
        if mode == "swor":
            np.put_along_axis(rest, token, 0, 1)
    return chance


@functools.partial(jax.jit, static_argnums=(0, 1))
def grow_with(mode: DraftMode, policy: Any, tables: Any, noise_QEKV: Array) -> Tree:
    """Returns one tree a row; `noise[q, e]` is for the family of slot `e - 1`."""
    noise = functools.partial(noise_of_slots, mode, noise_QEKV)
    return grow(policy, tables, choose=drawn(mode, jnp.ones(noise_QEKV.shape[0], noise_QEKV.dtype), noise))


def noise_of_slots(mode: DraftMode, noise_QEKV: Array, slot: int, shape: tuple[int, ...]) -> Array:
    """Returns the noise of the families from a slot on."""
    found = noise_QEKV[:, slot + 1 : slot + 1 + shape[0]]
    return found if mode == "sample" else found[:, :, 0]


class Drafts(NamedTuple):
    """Every tree of a policy, and its probability."""

    tree: Tree
    weight_Q: np.ndarray


def drafts(mode: DraftMode, shape: TreeCase, draft: Tables) -> Drafts:
    """Returns the trees with a probability above 0; `draft` has one batch row."""
    policy, vocab, count = shape
    expanded = policy.slots + 1
    ways = np.zeros((1, count), int) if mode == "topk" else sequences(mode, vocab, count)
    pick = np.array(list(itertools.product(range(len(ways)), repeat=1 if mode == "topk" else expanded)))
    pick = np.broadcast_to(pick, (len(pick), expanded))
    tokens = ways[pick]
    noise = np.stack([loud_noise(mode, tokens[:, e], vocab) for e in range(expanded)], 1)
    noise = noise if mode == "sample" else noise[:, :, None]
    tables = [np.broadcast_to(x, (len(pick), *x.shape[1:])) for x in draft]
    tree: Tree = jax.device_get(grow_with(mode, policy, tables, noise))
    if mode == "topk":
        return Drafts(tree, np.ones(1))
    assert tree.distributions is not None
    distribution_QEV = np.asarray(tree.distributions.distribution_BEV)
    weight = np.prod([chance_of(mode, distribution_QEV[:, e], tokens[:, e]) for e in range(expanded)], axis=0)
    # Families that the tree does not hold are summed out.
    keep = weight > 0
    return Drafts(jax.tree.map(lambda x: x[keep], tree), weight[keep])


def codes(tree: Tree, vocab: int) -> np.ndarray:
    """Returns the number of each node's path among the paths of its length."""
    code = np.zeros(tree.token_BN.shape, int)
    for n in range(1, code.shape[1]):
        above = np.maximum(tree.parent_BN[:, n], 0)[:, None]
        code[:, n] = np.take_along_axis(code, above, 1)[:, 0] * vocab + tree.token_BN[:, n]
    return code


distribution_of_each = jax.jit(lambda tables, sampling: [distribution_of(x, sampling) for x in tables])


def warped(tables: Tables, t: float, top_k: int, top_p: float) -> list[np.ndarray]:
    """Returns the distribution after every path, `[V ** d, V]` for each length `d`."""
    sampling = Sampling(*(jnp.asarray([v], d) for v, d in zip((t, top_k, top_p, 0), "fifi", strict=True)))
    return [np.asarray(x)[0] for x in distribution_of_each(tables, sampling)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def accept(rule: str, mode: DraftMode, depth: int, tree: Tree, p_QNV: Array, coin_QN: Array) -> RejectionResult:
    return RULES[rule](mode, tree, p_QNV, coin_QN, depth)


class Outcome(NamedTuple):
    """The result of a rule on all drafts."""

    distance: float
    """Total variation between the target's distribution of `T + 1` tokens and that of the round's tokens followed by
    plain sampling."""
    length: float
    """Mean accept length."""


Warp = tuple[float, tuple[int, float]]
"""Temperature, and (top-k, top-p)."""
PLAIN: Warp = (1.0, (0, 1.0))
Pair = tuple[Tables, Tables]
"""Target and draft."""


def same(x: Any) -> Any:
    return x


class Changes(NamedTuple):
    """Changes that make a rule wrong."""

    seen_distributions: Callable[..., Any] = same
    """Of the target's distributions that the rule sees."""
    seen_tree: Callable[..., Any] = same
    """Of the tree that the rule sees."""
    coins: Callable[[int], np.ndarray] | None = None
    """Makes the coins `[falls, tests]`, all equally likely; None for every fall of fair ones."""
    rest: Callable[..., Any] | None = None
    """Makes the distribution of the bonus token from the target's at the last node."""


UNCHANGED = Changes()


def measure(
    rule: str, mode: DraftMode, shape: TreeCase, tables: Pair, warps: list[Warp], changes: Changes = UNCHANGED
) -> list[Outcome]:
    """Returns one outcome for each warp."""
    target, draft = tables
    found = drafts(mode, shape, draft)
    tests = shape.policy.nodes - 1
    falls = changes.coins(tests) if changes.coins else np.array(list(itertools.product((0.0, 1.0), repeat=tests)))
    coin = np.tile(np.pad(falls, ((0, 0), (1, 0))), (len(found.weight_Q), 1))
    return [outcome(rule, mode, shape, found, warped(target, t, *cuts), coin, changes) for t, cuts in warps]


def outcome(
    rule: str,
    mode: DraftMode,
    shape: TreeCase,
    found: Drafts,
    distributions: list[np.ndarray],
    coin: np.ndarray,
    changes: Changes,
) -> Outcome:
    """Returns the outcome for a target of these distributions; `coin` has every fall for every draft."""
    tree, depth = found.tree, shape.policy.depth
    each = functools.partial(np.repeat, repeats=len(coin) // len(found.weight_Q), axis=0)
    code, weight = codes(tree, shape.vocab), each(found.weight_Q)
    shown, p = changes.seen_distributions(distributions), np.zeros((*code.shape, shape.vocab))
    for d in range(depth + 1):
        p[tree.depth_BN == d] = shown[d][code[tree.depth_BN == d]]
    many = jax.tree.map(each, changes.seen_tree(tree))
    result = jax.device_get(accept(rule, mode, depth, many, each(p), coin))
    if changes.coins is None:
        chance = np.where(result.tested_BN, np.where(coin == 0, result.chance_BN, 1 - result.chance_BN), 0.5)
        weight = weight * chance[:, 1:].prod(axis=1)
    else:
        weight = weight / (len(coin) // len(found.weight_Q))
    at = np.arange(len(weight)), result.last_B
    bonus = result.rest_BV if changes.rest is None else changes.rest(each(p)[at])
    joint = joint_distribution(each(code)[at], each(tree.depth_BN)[at], weight, bonus, distributions)
    want = functools.reduce(lambda w, x: (w[:, None] * x).ravel(), distributions[: depth + 1], np.ones(1))
    return Outcome(0.5 * float(np.abs(joint - want).sum()), float(weight @ each(tree.depth_BN)[at]))


def joint_distribution(
    code: np.ndarray, depth: np.ndarray, weight: np.ndarray, rest: np.ndarray, distributions: list[np.ndarray]
) -> np.ndarray:
    """Returns the distribution of `T + 1` tokens: accepted paths, the bonus token, and then plain sampling."""
    vocab, length = rest.shape[1], len(distributions)
    joint = np.zeros(vocab**length)
    for d in range(length):
        here, mass = depth == d, np.zeros((vocab**d, vocab))
        np.add.at(mass, code[here], weight[here, None] * rest[here])
        text = mass.ravel()
        for later in range(d + 1, length):
            text = (text[:, None] * distributions[later]).ravel()
        joint += text
    return joint


def with_zeros(tables: Tables, seed: int) -> Tables:
    """Returns the tables with some tokens impossible, never the likeliest."""
    rng = np.random.default_rng(seed)
    return [np.where((rng.random(x.shape) < 0.4) & (x < x.max(-1, keepdims=True)), -np.inf, x) for x in tables]


def pair(case: str, seed: int, shape: TreeCase) -> Pair:
    """Returns the tables of a target and a draft."""
    target, draft = (path_tables(s, shape.vocab, shape.policy.depth) for s in (seed, seed + 900))
    if case == "zeros":
        target, draft = with_zeros(target, seed), with_zeros(draft, seed + 1)
    fp64 = [[x.astype(np.float64) for x in tables] for tables in (target, draft)]
    return fp64[0], fp64[0] if case == "same" else fp64[1]
