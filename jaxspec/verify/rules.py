"""Every acceptance rule under one interface: a tree and the target's logits in, the path that is kept out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import DRAFT_MODES, Array, DraftMode, Tree, TreePolicy
from jaxspec.sampling import Sampling, argmax, distribution_of, draw, round_noise
from jaxspec.verify.path import Accepted, deepest, follow, path_to, reached
from jaxspec.verify.rejection import RejectionResult, bottom_up, top_down

COINS, BONUS = 1, 2
"""Uses of a round's noise; drafting has others."""
TYPICAL_FLOOR, TYPICAL_SHARE = 0.09, 0.3
"""Medusa's `epsilon` and `delta`, as its code sets them (`posterior_threshold`, `posterior_alpha`)."""


class Case(NamedTuple):
    """What a rule decides on."""

    mode: DraftMode
    tree: Tree
    depth: int
    """The tree's `T`."""
    logits_BNV: Array
    """The target's, at every node."""
    length_B: Array
    """Tokens before the root. No two rounds of a row share it, so their noise is independent."""
    sampling: Sampling


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which drafted tokens are kept, and how the token behind them is drawn."""

    name: str
    modes: tuple[DraftMode, ...]
    """How children may have been chosen."""
    accept: Callable[[Case], Accepted]
    lossless: bool = True
    """Whether the text has exactly the target's distribution."""
    chains_only: bool = False

    def check_mode(self, mode: DraftMode) -> None:
        """Raises ValueError where the rule would not be right for children chosen this way."""
        if mode not in self.modes:
            fitting = [rule.name for rule in RULES.values() if mode in rule.modes and rule.lossless]
            raise ValueError(
                f"rule {self.name} is for children drafted by {' or '.join(self.modes)}, not {mode}: take the draft "
                f"mode {self.modes[0]}, or for {mode} one of the rules {', '.join(fitting)}"
            )

    def check(self, mode: DraftMode, tree: TreePolicy) -> None:
        """Raises ValueError where the rule would not be right for trees of this policy, drafted this way."""
        self.check_mode(mode)
        if self.chains_only and tree.nodes != tree.depth + 1:
            raise ValueError(f"rule {self.name} is for chains: take the tree chain:{tree.depth}, or another rule")


def target_draw(case: Case) -> Accepted:
    """The target draws at every node with its position's noise; the path that carries its draws is kept."""
    tree, depth = case.tree, case.depth
    return follow(tree, draw(case.logits_BNV, tree.depth_BN, case.length_B + 1, depth + 1, case.sampling), depth)


def judged(judge: Callable[[Case, Array, Array], RejectionResult]) -> Callable[[Case], Accepted]:
    """A rejection rule `(case, target's distribution, coins) -> verdict` with the coins and the bonus token it
    needs."""

    def accept(case: Case) -> Accepted:
        nodes, vocab = case.logits_BNV.shape[1:]
        noise = functools.partial(round_noise, case.sampling.seed_B, case.length_B)
        coin_BN = noise(COINS, functools.partial(jax.random.uniform, shape=(nodes,)))
        verdict = judge(case, distribution_of(case.logits_BNV, case.sampling), coin_BN)
        gumbel_BV = noise(BONUS, functools.partial(jax.random.gumbel, shape=(vocab,)))
        return path_to(case.tree, verdict.last_B, argmax(jnp.log(verdict.rest_BV) + gumbel_BV), case.depth)

    return accept


from_the_root = judged(lambda case, p_BNV, coin_BN: top_down(case.mode, case.tree, p_BNV, coin_BN))
from_the_leaves = judged(lambda case, p_BNV, coin_BN: bottom_up(case.mode, case.tree, p_BNV, coin_BN, case.depth))


def typical(case: Case) -> Accepted:
    """Medusa's typical acceptance (section 3.3.1), NOT lossless: tokens that are likely enough are kept.

    A token is kept where `p(x) > min(epsilon, delta exp(-H(p)))` under the target's warped distribution; of the kept
    paths the longest is taken, among equals the one the target finds likeliest, and the bonus token is drawn from the
    target's distribution behind it. Greedy rows keep the target's own argmax, which is exact.
    """
    tree, p_BNV = case.tree, distribution_of(case.logits_BNV, case.sampling)
    entropy_BN = -jnp.sum(p_BNV * jnp.log(jnp.where(p_BNV > 0, p_BNV, 1)), axis=-1)
    enough_BN = jnp.minimum(TYPICAL_FLOOR, TYPICAL_SHARE * jnp.exp(-entropy_BN))
    parent_BN = jnp.maximum(tree.parent_BN, 0)
    own_BN = jax.vmap(lambda p, parent, token: p[parent, token])(p_BNV, parent_BN, tree.token_BN)
    kept_BN = reached(tree, own_BN > jnp.take_along_axis(enough_BN, parent_BN, axis=1))
    logp_BN = jnp.log(jnp.where(own_BN > 0, own_BN, 1)).at[:, 0].set(0)
    path_logp_BN = jnp.sum(jnp.where(tree.ancestors_BNN, logp_BN[:, None], 0), axis=-1)
    longest_B1 = jnp.take_along_axis(tree.depth_BN, deepest(tree, kept_BN)[:, None], axis=1)
    last_B = argmax(jnp.where(kept_BN & (tree.depth_BN == longest_B1), path_logp_BN, -jnp.inf))
    drawn_BN = draw(case.logits_BNV, tree.depth_BN, case.length_B + 1, case.depth + 1, case.sampling)
    return path_to(tree, last_B, jnp.take_along_axis(drawn_BN, last_B[:, None], axis=1)[:, 0], case.depth)


SIMULATED = 3
"""Use of a round's noise."""


def simulated(rule: Rule, profile: tuple[float, ...]) -> Rule:
    """`rule` at work, its verdict replaced by accept lengths drawn from `profile`: speed without a good head.

    `profile[i]` is the probability of accepting `i` drafted tokens; longer paths than the tree has are cut. What is
    written means nothing.
    """

    def accept(case: Case) -> Accepted:
        accepted = rule.accept(case)
        uniform = functools.partial(jax.random.uniform, shape=())
        chance_B = round_noise(case.sampling.seed_B, case.length_B, SIMULATED, uniform)
        ends = jnp.cumsum(jnp.asarray(profile))[:-1]
        count_B1 = jnp.sum(chance_B[:, None] >= ends, axis=1, keepdims=True)
        fits_BN = case.tree.valid_BN & (case.tree.depth_BN <= count_B1)
        # The bonus token is the rule's own, so that none of its work is left out of the program.
        return path_to(case.tree, deepest(case.tree, fits_BN), accepted.token_BP[:, -1], case.depth)

    return dataclasses.replace(rule, name=f"{rule.name}, simulated", accept=accept, lossless=False)


RULES = {
    rule.name: rule
    for rule in (
        # The target's own draws: the same text as without a drafter, token for token.
        Rule("target-draw", ("topk",), target_draw),
        # RSD's and Sequoia's; with topk, EAGLE-2's.
        Rule("recursive-rejection", ("swor", "topk"), from_the_root),
        # Multi-step speculative sampling.
        Rule("specinfer", ("sample",), from_the_root),
        # Leviathan's and Chen's.
        Rule("speculative-sampling", ("sample", "swor"), from_the_root, chains_only=True),
        Rule("block", ("sample", "swor"), from_the_leaves, chains_only=True),
        Rule("traversal", DRAFT_MODES, from_the_leaves),
        # Medusa's, the one that changes what is written.
        Rule("typical", DRAFT_MODES, typical, lossless=False),
    )
}
"""By name."""
DEFAULT_RULES: dict[DraftMode, str] = {"topk": "target-draw", "sample": "specinfer", "swor": "recursive-rejection"}


def rule_named(name: str | None, mode: DraftMode) -> Rule:
    """The rule of this name; without one, the usual rule for the draft mode. ValueError lists the names."""
    name = DEFAULT_RULES[mode] if name is None else name
    if name not in RULES:
        raise ValueError(f"there is no rule {name!r}; the rules are {', '.join(RULES)}")
    return RULES[name]
