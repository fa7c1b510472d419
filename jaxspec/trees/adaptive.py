"""Adaptive trees: each round decides how deep to draft and how many nodes to verify, inside one compiled program.

A level of drafting, or a larger budget of nodes, is taken where the tokens that it is expected to add are more than the
tokens that decoding writes anyway in the seconds that it takes: an exchange rate in tokens a second. Expected tokens
are sums of calibrated draft probabilities; seconds are those of a cost table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import ROOT, Array, Children, ChooseChildren, DraftLogits, DraftMode, Frontier, Tree
from jaxspec.sampling import top_k
from jaxspec.trees.dynamic import Candidates, DynamicTree, Front, best_of_pool
from jaxspec.trees.lookup import Branch, LookupBranch, MatchCounts, attach
from jaxspec.trees.shape import root_alone

MEMORY = 1 / 32
"""Share of the newest round in a row's exchange rate: slow, so that it follows a text and not a token."""
UNLIKELY = 1e-4
"""Least calibrated probability of a child: none is impossible for having been missed in a finite profile."""


class PolicyState(NamedTuple):
    """State of an adaptive tree, carried from round to round; a row's own."""

    tokens_B: Array
    """Tokens of a round, a moving average."""
    seconds_B: Array
    """Seconds that the cost table gives a round, a moving average."""
    budgets_BX: Array
    """Rounds that verified each of the budgets."""
    levels_BT: Array
    """Rounds that drafted each number of levels, from 1 on."""
    lookup: MatchCounts | None = None
    """Of a looked-up branch."""


class Drafting(NamedTuple):
    """The means to draft a round's tree: the arguments of `TreePolicy.grow`, in its order."""

    draft: DraftLogits
    choose: ChooseChildren
    scratch: Any
    """With a looked-up branch `scratch.lookup` is what was found in the text."""
    root_logits_BV: Array
    root_token_B: Array


class RoundPlan(NamedTuple):
    """The drafted candidates of a round, and the decision about them."""

    pool: Candidates
    root_B: Array
    index: Array
    """Place among the budgets, the same for all rows."""
    levels: Array
    """Levels that were drafted, the root's children included."""
    branch: Branch | None = None
    """Looked-up tokens, which the pool holds too."""


@dataclasses.dataclass(frozen=True)
class AdaptiveTree:
    """A dynamic tree (EAGLE-2), with or without a looked-up branch, that drafts and verifies as much as pays.

    `base` bounds what is drafted: the most levels, and the beam. Children are the likeliest tokens, so the tree is a
    function of the committed text and of what was accepted in it, and any rule that is lossless for such trees stays
    so. All rows of a batch share a decision, since they share the target's call; with `ragged` the call's nodes go to
    the rows where they are worth most. Raises ValueError where budgets, costs and calibration do not go together.
    """

    base: DynamicTree | None
    """None: nothing is drafted but the looked-up branch."""
    budgets: tuple[int, ...]
    """Nodes that a round may verify, root included, rising: each is compiled. 1 is plain decoding."""
    verify_seconds: tuple[float, ...]
    """Seconds of the target's call and the rule, a budget each."""
    level_seconds: float
    """Seconds of one level of drafting behind the root's children."""
    fixed_seconds: float
    """Seconds of a round besides: the drafter reads what was accepted and drafts the root's children, the commit."""
    rate: float
    """Tokens a second and row to begin with, such as those of the best fixed tree."""
    calibration: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()
    """For each depth from 1 on, draft probabilities and what share of such children is accepted, both rising; the last
    depth stands for deeper ones. Empty: draft probabilities are believed."""
    reach: tuple[float, ...] = ()
    """For each depth from 1 on, the probability that a child of an accepted node's beam is accepted; the last stands
    for deeper ones. Empty: 1, the most that a level can add."""
    lookup: LookupBranch | None = None
    """A branch of looked-up tokens; the drafter must be one that looks up (`drafters.prompt_lookup`)."""
    ragged: bool = False
    """Budgets are means over the rows of a batch: the likeliest nodes of all rows together are verified, of a row up to
    the largest budget. The rule must be target-draw."""

    def __post_init__(self) -> None:
        if not all(isinstance(nodes, int) for nodes in self.budgets):
            raise ValueError(f"the budgets of an adaptive tree are whole numbers of nodes, not {self.budgets}")
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)) or self.budgets[0] < 1:
            raise ValueError(f"the budgets of an adaptive tree must rise from 1 node or more, not {self.budgets}")
        if self.base is None and self.lookup is None:
            raise ValueError("an adaptive tree needs a dynamic tree, a lookup branch, or both to draft from")
        if self.budgets[-1] > 1 + len(self._depths):
            raise ValueError(f"the largest budget is {self.budgets[-1]} nodes, and {len(self._depths)} are drafted")
        seconds = (*self.verify_seconds, self.level_seconds, self.fixed_seconds)
        if len(self.verify_seconds) != len(self.budgets) or min(seconds) < 0 or min(self.verify_seconds) <= 0:
            raise ValueError("an adaptive tree needs the seconds of a call for each of its budgets, all above 0")
        if not self.rate > 0:
            raise ValueError(f"an adaptive tree begins with a rate above 0 tokens/s, not {self.rate}")
        for drafted, accepted in self.calibration:
            rising = all(list(x) == sorted(x) and 0 <= x[0] and x[-1] <= 1 for x in (drafted, accepted) if x)
            if not drafted or len(drafted) != len(accepted) or not rising:
                raise ValueError("a calibration must map rising draft probabilities to rising shares, all in [0, 1]")

    @property
    def nodes(self) -> int:
        """Nodes of the largest budget."""
        return self.budgets[-1]

    @property
    def depth(self) -> int:
        """Greatest depth of a node."""
        return int(self._depths.max())

    @property
    def slots(self) -> int:
        """Expanded nodes, if all levels are drafted."""
        return 0 if self.base is None else self.base.slots

    @property
    def modes(self) -> tuple[DraftMode, ...]:
        """`topk` alone."""
        # A budget is chosen by the tokens that were drafted. A drawn token that is verified for what it is no longer
        # has the distribution that it was drawn from.
        return ("topk",)

    @property
    def spec(self) -> str:
        """A name to print; `parse_tree` reads it if there is one budget, else a tree file holds the whole."""
        branch = [] if self.lookup is None else [f"lookup:{self.lookup.length}"]
        drafted = [] if self.base is None else [self.base.spec]
        words = "+".join(branch + drafted)
        return words if len(self.budgets) == 1 else f"adaptive:{words}"

    @property
    def levels(self) -> int:
        """Most levels that are drafted, the root's children included."""
        return 1 if self.base is None else self.base.depth

    @property
    def _depths(self) -> np.ndarray:
        """Depth of every candidate, in the order of the pool."""
        drafted = np.zeros(0, np.int32) if self.base is None else self.base.depths
        branch = 0 if self.lookup is None else self.lookup.length
        return np.concatenate([drafted, np.arange(1, branch + 1, dtype=np.int32)])

    def begin(self, zeros_B: Array) -> PolicyState:
        """Returns the state of rows that have had no round, made of integer zeros that lie where the rows do."""
        nothing_B = zeros_B.astype(jnp.float32)
        seconds = self.fixed_seconds + self.verify_seconds[-1]
        # Integers by broadcasting the rows' own zeros: fresh ones would lie on another device than the state.
        budgets_BX, levels_BT = (
            jnp.broadcast_to(zeros_B[:, None], (len(zeros_B), n)) for n in (len(self.budgets), self.levels)
        )
        looked = None if self.lookup is None else self.lookup.begin(zeros_B)
        return PolicyState(nothing_B + self.rate * seconds, nothing_B + seconds, budgets_BX, levels_BT, looked)

    def plan(self, by: Drafting, policy: PolicyState, running_B: Array) -> RoundPlan:
        """Drafts level by level while a level pays, then chooses the budget that pays most."""
        rate = exchange_rate(policy, running_B)
        branch = None
        if self.lookup is not None:
            assert policy.lookup is not None
            branch = self.lookup.branch(by.scratch.lookup, policy.lookup)
        levels = jnp.int32(1)
        if self.base is None:
            empty = jnp.zeros((len(running_B), 0))
            pool = Candidates(empty.astype(jnp.int32), empty, empty, empty.astype(jnp.int32))
        else:
            known_BT = _reached_by(branch, self.levels, len(running_B))
            pays = functools.partial(self._pays, rate, known_BT, running_B)
            pool, levels = self._draft(self.base, by, pays)
        if branch is not None:
            pool = attach(pool, branch)
        return RoundPlan(pool, by.root_token_B, self._budget(pool, rate, running_B), levels, branch)

    def _draft(self, base: DynamicTree, by: Drafting, pays: Callable[[Front, int], Array]) -> tuple[Candidates, Array]:
        """Returns the candidates of the levels that pay, and the number of these levels."""
        first, front = base.begin(self._calibrated(by.choose(by.root_logits_BV[:, None], base.beam, ROOT), 1))
        scratch = by.scratch
        pool = [first]
        going, levels = jnp.bool_(True), jnp.int32(1)
        for d in range(1, base.depth):
            going &= pays(front, d + 1)
            level, front, scratch = self._level(base, by, d, going, (scratch, front))
            pool.append(level)
            levels += going
        return Candidates(*(jnp.concatenate(p, axis=1) for p in zip(*pool, strict=True))), levels

    def cut(self, plan: RoundPlan, nodes: int) -> Tree:
        """Returns the tree of the root and the best `nodes - 1` candidates."""
        if nodes == 1:
            return root_alone(plan.root_B)
        return best_of_pool(plan.pool, self._depths, nodes, plan.root_B)[0]

    def cut_ragged(self, plan: RoundPlan, nodes: int, running_B: Array) -> Tree:
        """Returns trees of the largest budget, in which the best `nodes - 1` candidates a row on average are valid.

        They are the best of all running rows together; a row that has ended keeps its root.
        """
        batch, most = len(running_B), self.nodes - 1
        score_BK, _ = top_k(jnp.where(running_B[:, None], plan.pool.score_BQ, -jnp.inf), most)
        # The first of equals: of a row, those that `best_of_pool` has first.
        _, chosen = top_k(score_BK.reshape(1, -1), (nodes - 1) * batch)
        drafted_B = jnp.sum(chosen[0] // most == jnp.arange(batch)[:, None], axis=1)
        return best_of_pool(plan.pool, self._depths, self.nodes, plan.root_B, drafted_B)[0]

    def grow(
        self, draft: DraftLogits, choose: ChooseChildren, scratch: Any, root_logits_BV: Array, root_token_B: Array
    ) -> Tree:
        """Returns the tree of the largest budget, as a row in its first round drafts it."""
        running_B = jnp.ones(len(root_token_B), bool)
        policy = self.begin(jnp.zeros(len(root_token_B), jnp.int32))
        by = Drafting(draft, choose, scratch, root_logits_BV, root_token_B)
        return self.cut(self.plan(by, policy, running_B), self.nodes)

    def learn(
        self, policy: PolicyState, plan: RoundPlan, token_BP: Array, count_B: Array, running_B: Array
    ) -> PolicyState:
        """Returns the state behind a round that accepted `count` drafted tokens; rows that have ended keep theirs.

        `token_BP` are the accepted tokens and the bonus token behind them.
        """
        seconds = self.fixed_seconds + self.level_seconds * (plan.levels - 1) + self._verify_seconds[plan.index]
        share_B = jnp.where(running_B, MEMORY, 0.0)
        used_X, drafted_T = (
            (jnp.arange(n) == at).astype(jnp.int32)
            for n, at in ((len(self.budgets), plan.index), (self.levels, plan.levels - 1))
        )
        looked = policy.lookup
        if self.lookup is not None:
            assert looked is not None and plan.branch is not None
            looked = self.lookup.count(looked, plan.branch, token_BP, count_B, running_B)
        return PolicyState(
            policy.tokens_B + share_B * (count_B + 1 - policy.tokens_B),
            policy.seconds_B + share_B * (seconds - policy.seconds_B),
            policy.budgets_BX + jnp.where(running_B[:, None], used_X, 0),
            policy.levels_BT + jnp.where(running_B[:, None], drafted_T, 0),
            looked,
        )

    @property
    def _verify_seconds(self) -> Array:
        return jnp.asarray(self.verify_seconds, jnp.float32)

    def _level(
        self, base: DynamicTree, by: Drafting, d: int, going: Array, carry: tuple[Any, Front]
    ) -> tuple[Candidates, Front, Any]:
        """Expands the frontier at depth `d` where `going`; else no candidate of the level can be chosen."""
        slot = base.beam * (d - 1)

        def expand(scratch: Any, front: Front) -> tuple[Candidates, Front, Any]:
            frontier = Frontier(front.token_BW, front.parent_slot_BW, front.visible_BWM, d, slot)
            logits_BWV, scratch = by.draft(scratch, frontier)
            found = self._calibrated(by.choose(logits_BWV, base.beam, slot), d + 1)
            return *base.expand(front, found, frontier), scratch

        shapes = jax.eval_shape(expand, *carry)

        def stop(scratch: Any, front: Front) -> tuple[Candidates, Front, Any]:
            level, beyond, after = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            # Drafters of one pass keep their logits from the first level on; behind a level that stops none is drafted.
            scratch = jax.tree.map(
                lambda had, new: new if had is None else had, scratch, after, is_leaf=lambda x: x is None
            )
            never = jnp.full_like(level.score_BQ, -jnp.inf)
            level = level._replace(score_BQ=never, bound_BQ=never)
            return level, beyond._replace(score_BW=jnp.full_like(beyond.score_BW, -jnp.inf)), scratch

        return jax.lax.cond(going, expand, stop, *carry)

    def _calibrated(self, found: Children, depth: int) -> Children:
        """Returns children of depth `depth` with the probability of being accepted in the place of the draft's."""
        if not self.calibration:
            return found
        drafted, accepted = self.calibration[min(depth, len(self.calibration)) - 1]
        # Straight lines between the points; equal values keep the draft's order, since ties go to the elder sibling.
        share_BWR = jnp.interp(jnp.exp(found.logp_BWR), *(jnp.asarray(x, jnp.float32) for x in (drafted, accepted)))
        logp_BWR = jnp.where(found.logp_BWR > -jnp.inf, jnp.log(jnp.maximum(share_BWR, UNLIKELY)), -jnp.inf)
        return found._replace(logp_BWR=logp_BWR, bound_BWR=logp_BWR)

    def _pays(self, rate: Array, known_BT: Array, running_B: Array, front: Front, depth: int) -> Array:
        """Returns whether the children of a frontier, of this depth, are expected to add more than they cost.

        What a looked-up branch, which reaches the depth with probability `known`, adds anyway is not counted.
        """
        reach = self.reach[min(depth, len(self.reach)) - 1] if self.reach else 1.0
        reached_B = reach * jnp.minimum(jnp.sum(jnp.exp(front.score_BW), axis=1), 1.0)
        added_B = jnp.maximum(reached_B - known_BT[:, depth - 1], 0.0)
        return jnp.sum(jnp.where(running_B, added_B, 0.0)) > rate * self.level_seconds

    def _budget(self, pool: Candidates, rate: Array, running_B: Array) -> Array:
        """Returns the place of the budget whose expected tokens less their price in tokens are the most."""
        most = self.nodes - 1
        gains = [jnp.zeros(())] * len(self.budgets)
        if most:
            score_BK, _ = top_k(pool.score_BQ, most)
            worth_BK = jnp.where(running_B[:, None], jnp.exp(score_BK), 0.0)
            batch = len(worth_BK) if self.ragged else 1
            worth_K = -jnp.sort(-worth_BK.reshape(-1)) if self.ragged else jnp.sum(worth_BK, axis=0)
            sums_K = jnp.cumsum(worth_K)
            gains = [sums_K[(n - 1) * batch - 1] if n > 1 else jnp.zeros(()) for n in self.budgets]
        # The first of equals, which is the smallest.
        return jnp.argmax(jnp.stack(gains) - rate * self._verify_seconds).astype(jnp.int32)


def _reached_by(branch: Branch | None, depth: int, batch: int) -> Array:
    """Returns the probability `[B, T]` that a branch is right up to each depth; 0 behind its end, and without one."""
    if branch is None:
        return jnp.zeros((batch, depth))
    reached_BK = jnp.exp(branch.logp_BK[:, :depth])
    return jnp.pad(reached_BK, ((0, 0), (0, depth - reached_BK.shape[1])))


def exchange_rate(policy: PolicyState, running_B: Array) -> Array:
    """Returns the tokens a second of all running rows together: what a second of a round must bring."""
    rate_B = policy.tokens_B / jnp.where(policy.seconds_B > 0, policy.seconds_B, 1.0)
    return jnp.sum(jnp.where(running_B, rate_B, 0.0))
