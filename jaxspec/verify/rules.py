"""Every acceptance rule under one interface: from a tree and the target's logits to the accepted path."""

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
from jaxspec.verify.rejection import RejectionResult, recursive_rejection, traversal_verification

COINS, BONUS, SIMULATED = 1, 2, 3
"""Uses of a round's noise, for `round_noise`; drafting has others."""
TYPICAL_FLOOR, TYPICAL_SHARE = 0.09, 0.3
"""Medusa's `epsilon` and `delta`, as its code sets them (`posterior_threshold`, `posterior_alpha`)."""


class VerifyInputs(NamedTuple):
    """The inputs of a rule in one round."""

    mode: DraftMode
    """How the tree's children were chosen."""
    tree: Tree
    depth: int
    """The tree's `T`, a Python number: it shapes the path."""
    logits_BNV: Array
    """The target's logits at every node."""
    length_B: Array
    """Tokens before the root. No two rounds of a row share it, so their noise is independent."""
    sampling: Sampling


@dataclasses.dataclass(frozen=True)
class Rule:
    """An acceptance rule: which drafted tokens are kept, and how the bonus token behind them is drawn."""

    name: str
    modes: tuple[DraftMode, ...]
    """Draft modes that the rule is right for."""
    accept: Callable[[VerifyInputs], Accepted]
    lossless: bool = True
    """Whether the output has exactly the target's distribution."""
    chains_only: bool = False
    """Whether every node of the tree may have one child at most."""

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


def target_draw(inputs: VerifyInputs) -> Accepted:
    """Follows the target's draws, made with the noise of their positions: `target-draw`, this project's own rule.

    Every accepted token is the target's draw, so the text is that of plain decoding, token for token.
    """
    tree, depth = inputs.tree, inputs.depth
    return follow(tree, draw(inputs.logits_BNV, tree.depth_BN, inputs.length_B + 1, depth + 1, inputs.sampling), depth)


def accept_by(test: Callable[[VerifyInputs, Array, Array], RejectionResult], inputs: VerifyInputs) -> Accepted:
    """Accepts by a rejection rule `(inputs, target's distribution [B, N, V], coins [B, N]) -> RejectionResult`.

    Tosses the coins that the rule needs, and draws the bonus token from the distribution that it leaves.
    """
    nodes, vocab = inputs.logits_BNV.shape[1:]
    noise = functools.partial(round_noise, inputs.sampling.seed_B, inputs.length_B)
    coin_BN = noise(COINS, functools.partial(jax.random.uniform, shape=(nodes,)))
    result = test(inputs, distribution_of(inputs.logits_BNV, inputs.sampling), coin_BN)
    gumbel_BV = noise(BONUS, functools.partial(jax.random.gumbel, shape=(vocab,)))
    return path_to(inputs.tree, result.last_B, argmax(jnp.log(result.rest_BV) + gumbel_BV), inputs.depth)


_RECURSIVE = functools.partial(accept_by, lambda i, p_BNV, coin_BN: recursive_rejection(i.mode, i.tree, p_BNV, coin_BN))
_TRAVERSAL = functools.partial(
    accept_by, lambda i, p_BNV, coin_BN: traversal_verification(i.mode, i.tree, p_BNV, coin_BN, i.depth)
)


def typical_acceptance(inputs: VerifyInputs) -> Accepted:
    """Keeps tokens that are likely enough: Medusa's typical acceptance (arXiv 2401.10774). NOT lossless.

    A token is kept where `p(x) > min(epsilon, delta exp(-H(p)))` under the target's warped distribution. The longest
    kept path is accepted, among equals the one that the target finds likeliest. The bonus token is drawn from the
    target's distribution behind it. Greedy rows keep the target's own argmax, which is exact.
    """
    tree, p_BNV = inputs.tree, distribution_of(inputs.logits_BNV, inputs.sampling)
    # A token of probability 0 adds 0 to the entropy; `0 log 0` would be NaN.
    entropy_BN = -jnp.sum(p_BNV * jnp.log(jnp.where(p_BNV > 0, p_BNV, 1)), axis=-1)
    enough_BN = jnp.minimum(TYPICAL_FLOOR, TYPICAL_SHARE * jnp.exp(-entropy_BN))
    parent_BN = jnp.maximum(tree.parent_BN, 0)
    token_p_BN = jax.vmap(lambda p, parent, token: p[parent, token])(p_BNV, parent_BN, tree.token_BN)
    kept_BN = reached(tree, token_p_BN > jnp.take_along_axis(enough_BN, parent_BN, axis=1))
    logp_BN = jnp.log(jnp.where(token_p_BN > 0, token_p_BN, 1)).at[:, 0].set(0)
    path_logp_BN = jnp.sum(jnp.where(tree.ancestors_BNN, logp_BN[:, None], 0), axis=-1)
    longest_B1 = jnp.take_along_axis(tree.depth_BN, deepest(tree, kept_BN)[:, None], axis=1)
    last_B = argmax(jnp.where(kept_BN & (tree.depth_BN == longest_B1), path_logp_BN, -jnp.inf))
    drawn_BN = draw(inputs.logits_BNV, tree.depth_BN, inputs.length_B + 1, inputs.depth + 1, inputs.sampling)
    return path_to(tree, last_B, jnp.take_along_axis(drawn_BN, last_B[:, None], axis=1)[:, 0], inputs.depth)


def simulated(rule: Rule, profile: tuple[float, ...]) -> Rule:
    """Returns `rule` with its accept lengths replaced by draws from `profile`, to time decoding without a good head.

    `profile[i]` is the probability of accepting `i` drafted tokens. Paths longer than the tree has are cut. The text
    that comes out means nothing.
    """
    accept = functools.partial(_accept_simulated, rule.accept, profile)
    return dataclasses.replace(rule, name=f"{rule.name}, simulated", accept=accept, lossless=False)


def _accept_simulated(
    accept: Callable[[VerifyInputs], Accepted], profile: tuple[float, ...], inputs: VerifyInputs
) -> Accepted:
    """Accepts a path whose length is drawn from `profile`."""
    accepted = accept(inputs)
    uniform = functools.partial(jax.random.uniform, shape=())
    chance_B = round_noise(inputs.sampling.seed_B, inputs.length_B, SIMULATED, uniform)
    ends = jnp.cumsum(jnp.asarray(profile))[:-1]
    count_B1 = jnp.sum(chance_B[:, None] >= ends, axis=1, keepdims=True)
    fits_BN = inputs.tree.valid_BN & (inputs.tree.depth_BN <= count_B1)
    # The bonus token is the rule's own, so that XLA cannot drop any of the rule's work from the program.
    return path_to(inputs.tree, deepest(inputs.tree, fits_BN), accepted.token_BP[:, -1], inputs.depth)


RULES = {
    rule.name: rule
    for rule in (
        # The target's own draws: the same text as without a drafter, token for token.
        Rule("target-draw", ("topk",), target_draw),
        # Recursive rejection sampling (RSD, Sequoia); with topk, EAGLE-2's rule.
        Rule("recursive-rejection", ("swor", "topk"), _RECURSIVE),
        # SpecInfer's multi-step speculative sampling: recursive rejection of independent draws.
        Rule("specinfer", ("sample",), _RECURSIVE),
        # Speculative sampling of Leviathan and Chen: recursive rejection on a chain.
        Rule("speculative-sampling", ("sample", "swor"), _RECURSIVE, chains_only=True),
        # Block verification: traversal verification on a chain.
        Rule("block", ("sample", "swor"), _TRAVERSAL, chains_only=True),
        Rule("traversal", DRAFT_MODES, _TRAVERSAL),
        # Medusa's typical acceptance, the one rule that changes the distribution of the output.
        Rule("typical", DRAFT_MODES, typical_acceptance, lossless=False),
    )
}
"""The rules by name."""
DEFAULT_RULES: dict[DraftMode, str] = {"topk": "target-draw", "sample": "specinfer", "swor": "recursive-rejection"}


def rule_named(name: str | None, mode: DraftMode) -> Rule:
    """Returns the rule of this name; without a name, the default rule of the draft mode.

    Raises ValueError, which lists the names, where there is no such rule.
    """
    name = DEFAULT_RULES[mode] if name is None else name
    if name not in RULES:
        raise ValueError(f"there is no rule {name!r}; the rules are {', '.join(RULES)}")
    return RULES[name]
