"""Adaptive trees: each round decides how deep to draft and how many nodes to verify, inside one compiled program.

A level of drafting, or a larger budget of nodes, is taken where the tokens that it is expected to add are more than the
tokens that decoding writes anyway in the seconds that it takes: an exchange rate in tokens a second. Expected tokens
are sums of calibrated draft probabilities; seconds are those of a cost table.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import ROOT, Array, Children, ChooseChildren, DraftLogits, DraftMode, Frontier, Tree
from jaxspec.sampling import top_k
from jaxspec.trees.dynamic import Candidates, DynamicTree, Front
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


class Plan(NamedTuple):
    """The drafted candidates of a round, and the decision about them."""

    pool: Candidates
    root_B: Array
    index: Array
    """Place among the budgets, the same for all rows."""
    levels: Array
    """Levels that were drafted, the root's children included."""


@dataclasses.dataclass(frozen=True)
class AdaptiveTree:
    """A dynamic tree (EAGLE-2) that drafts and verifies as much as pays.

    `base` bounds it: the most levels, its beam, and the nodes of the largest budget. Children are the likeliest tokens,
    so the tree is a function of the committed text and of what was accepted in it, and any rule that is lossless for
    such trees stays so. All rows of a batch share a decision, since they share the target's call. Raises ValueError
    where budgets, costs and calibration do not go together.
    """

    base: DynamicTree
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

    def __post_init__(self) -> None:
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)) or self.budgets[0] < 1:
            raise ValueError(f"the budgets of an adaptive tree must rise from 1 node or more, not {self.budgets}")
        if self.budgets[-1] != self.base.nodes:
            raise ValueError(f"the largest budget must be the nodes of {self.base.spec}, not {self.budgets[-1]}")
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
        return self.base.nodes

    @property
    def depth(self) -> int:
        """Greatest depth of a node."""
        return self.base.depth

    @property
    def slots(self) -> int:
        """Expanded nodes, if all levels are drafted."""
        return self.base.slots

    @property
    def modes(self) -> tuple[DraftMode, ...]:
        """`topk` alone."""
        # A budget is chosen by the tokens that were drafted. A drawn token that is verified for what it is no longer
        # has the distribution that it was drawn from.
        return ("topk",)

    @property
    def spec(self) -> str:
        """A name to print; a tree file holds the whole."""
        return f"adaptive:{self.base.spec.partition(':')[2]}"

    def begin(self, zeros_B: Array) -> PolicyState:
        """Returns the state of rows that have had no round, made of integer zeros that lie where the rows do."""
        nothing_B = zeros_B.astype(jnp.float32)
        seconds = self.fixed_seconds + self.verify_seconds[-1]
        # Integers by broadcasting the rows' own zeros: fresh ones would lie on another device than the state.
        counts = [jnp.broadcast_to(zeros_B[:, None], (len(zeros_B), n)) for n in (len(self.budgets), self.depth)]
        return PolicyState(nothing_B + self.rate * seconds, nothing_B + seconds, *counts)

    def plan(
        self,
        draft: DraftLogits,
        choose: ChooseChildren,
        scratch: Any,
        root_logits_BV: Array,
        root_token_B: Array,
        *,
        policy: PolicyState,
        running_B: Array,
    ) -> Plan:
        """Drafts level by level while a level pays, then chooses the budget that pays most."""
        beam, batch = self.base.beam, len(root_token_B)
        rate = exchange_rate(policy, running_B)
        found = self._calibrated(choose(root_logits_BV[:, None], beam, ROOT), 1)
        token, score, bound = (x[:, 0] for x in found[:3])
        nowhere = jnp.full((batch, beam), ROOT)
        pool = [Candidates(token, score, bound, nowhere)]
        itself = jnp.broadcast_to(jnp.eye(beam, dtype=bool), (batch, beam, beam))
        front = Front(token, score, jnp.broadcast_to(jnp.arange(beam), (batch, beam)), nowhere, itself)
        going, levels = jnp.bool_(True), jnp.int32(1)
        for d in range(1, self.depth):
            going &= self._expected(front, d + 1, running_B) > rate * self.level_seconds
            level, front, scratch = self._level(going, d, draft, choose, scratch, front)
            pool.append(level)
            levels += going
        candidates = Candidates(*(jnp.concatenate(p, axis=1) for p in zip(*pool, strict=True)))
        return Plan(candidates, root_token_B, self._budget(candidates, rate, running_B), levels)

    def cut(self, plan: Plan, nodes: int) -> Tree:
        """Returns the tree of the root and the best `nodes - 1` candidates."""
        if nodes == 1:
            return root_alone(plan.root_B)
        # As many slots as levels, all unused: likeliest children have no distributions.
        return dataclasses.replace(self.base, nodes=nodes).rerank(plan.pool, [], [], plan.root_B)

    def grow(
        self, draft: DraftLogits, choose: ChooseChildren, scratch: Any, root_logits_BV: Array, root_token_B: Array
    ) -> Tree:
        """Returns the tree of the largest budget, as a row in its first round drafts it."""
        running_B = jnp.ones(len(root_token_B), bool)
        policy = self.begin(jnp.zeros(len(root_token_B), jnp.int32))
        plan = self.plan(draft, choose, scratch, root_logits_BV, root_token_B, policy=policy, running_B=running_B)
        return self.cut(plan, self.nodes)

    def learn(self, policy: PolicyState, plan: Plan, count_B: Array, running_B: Array) -> PolicyState:
        """Returns the state behind a round that accepted `count` drafted tokens; rows that have ended keep theirs."""
        seconds = self.fixed_seconds + self.level_seconds * (plan.levels - 1) + self._verify_seconds[plan.index]
        share_B = jnp.where(running_B, MEMORY, 0.0)
        used_X, drafted_T = (
            (jnp.arange(n) == at).astype(jnp.int32)
            for n, at in ((len(self.budgets), plan.index), (self.depth, plan.levels - 1))
        )
        return PolicyState(
            policy.tokens_B + share_B * (count_B + 1 - policy.tokens_B),
            policy.seconds_B + share_B * (seconds - policy.seconds_B),
            policy.budgets_BX + jnp.where(running_B[:, None], used_X, 0),
            policy.levels_BT + jnp.where(running_B[:, None], drafted_T, 0),
        )

    @property
    def _verify_seconds(self) -> Array:
        return jnp.asarray(self.verify_seconds, jnp.float32)

    def _level(
        self, going: Array, d: int, draft: DraftLogits, choose: ChooseChildren, scratch: Any, front: Front
    ) -> tuple[Candidates, Front, Any]:
        """Expands the frontier at depth `d` where `going`; else no candidate of the level can be chosen."""
        slot = self.base.beam * (d - 1)

        def expand(scratch: Any, front: Front) -> tuple[Candidates, Front, Any]:
            frontier = Frontier(front.token_BW, front.parent_slot_BW, front.visible_BWM, d, slot)
            logits_BWV, scratch = draft(scratch, frontier)
            found = self._calibrated(choose(logits_BWV, self.base.beam, slot), d + 1)
            return *self.base.expand(front, found, frontier), scratch

        shapes = jax.eval_shape(expand, scratch, front)

        def stop(scratch: Any, front: Front) -> tuple[Candidates, Front, Any]:
            level, beyond, _ = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            never = jnp.full_like(level.score_BQ, -jnp.inf)
            level = level._replace(score_BQ=never, bound_BQ=never)
            return level, beyond._replace(score_BW=jnp.full_like(beyond.score_BW, -jnp.inf)), scratch

        return jax.lax.cond(going, expand, stop, scratch, front)

    def _calibrated(self, found: Children, depth: int) -> Children:
        """Returns children of depth `depth` with the probability of being accepted in the place of the draft's."""
        if not self.calibration:
            return found
        drafted, accepted = self.calibration[min(depth, len(self.calibration)) - 1]
        # Straight lines between the points; equal values keep the draft's order, since ties go to the elder sibling.
        share_BWR = jnp.interp(jnp.exp(found.logp_BWR), *(jnp.asarray(x, jnp.float32) for x in (drafted, accepted)))
        logp_BWR = jnp.where(found.logp_BWR > -jnp.inf, jnp.log(jnp.maximum(share_BWR, UNLIKELY)), -jnp.inf)
        return found._replace(logp_BWR=logp_BWR, bound_BWR=logp_BWR)

    def _expected(self, front: Front, depth: int, running_B: Array) -> Array:
        """Returns the tokens that the children of a frontier are expected to add, over all running rows."""
        reach = self.reach[min(depth, len(self.reach)) - 1] if self.reach else 1.0
        reached_B = jnp.minimum(jnp.sum(jnp.exp(front.score_BW), axis=1), 1.0)
        return reach * jnp.sum(jnp.where(running_B, reached_B, 0.0))

    def _budget(self, pool: Candidates, rate: Array, running_B: Array) -> Array:
        """Returns the place of the budget whose expected tokens less their price in tokens are the most."""
        most = self.nodes - 1
        gains = [jnp.zeros(())] * len(self.budgets)
        if most:
            score_BK, _ = top_k(pool.score_BQ, most)
            sums_K = jnp.cumsum(jnp.sum(jnp.where(running_B[:, None], jnp.exp(score_BK), 0.0), axis=0))
            gains = [sums_K[n - 2] if n > 1 else jnp.zeros(()) for n in self.budgets]
        # The first of equals, which is the smallest.
        return jnp.argmax(jnp.stack(gains) - rate * self._verify_seconds).astype(jnp.int32)


def exchange_rate(policy: PolicyState, running_B: Array) -> Array:
    """Returns the tokens a second of all running rows together: what a second of a round must bring."""
    rate_B = policy.tokens_B / jnp.where(policy.seconds_B > 0, policy.seconds_B, 1.0)
    return jnp.sum(jnp.where(running_B, rate_B, 0.0))
