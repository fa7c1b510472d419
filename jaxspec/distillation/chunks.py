"""Draft steps held against the target's logits, a chunk of positions at a time: no logits of a whole batch exist."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jax.sharding import PartitionSpec as P

from jaxspec.base import Array, Learner, Params, SharedTables, Target
from jaxspec.data.target_outputs import Likely, lump
from jaxspec.distillation.objective import Objective
from jaxspec.losses import FEATURE_LOSSES, Scores, agreement, expected_acceptance, logit_loss
from jaxspec.losses.loss import log_probs, of_token
from jaxspec.parallel.mesh import AXIS_RULES, splits
from jaxspec.sampling import argmax


class Teacher(NamedTuple):
    """The frozen target's head."""

    target: Target
    frozen: Params
    vocab_U: Array | None
    """Ascending ids of the tokens that the drafter scores; None for all."""


class Chunk(NamedTuple):
    """Some predicted positions: step `j`'s row is the pair that stands `j + 1` positions before."""

    hidden_TBCD: Array
    features_TBCD: Array | None
    wanted_BCD: Array
    """The target's feature at the position, which its logits for the token after are made of."""
    token_BC: Array
    """The token after."""
    mask_TBC: Array
    """Where a step is trained and measured."""
    learns_TBC: Array
    """Where its logits are trained."""
    key: Array
    likely: Likely | None = None
    """The target's likeliest tokens at the position, where these are to be learned from instead of its logits."""


class Judged(NamedTuple):
    """What each draft step made of each position."""

    loss_TBCM: dict[str, Array]
    agree_TBC: Array
    accept_TBC: Array
    draft_gold_TBC: Array
    """The draft's probability of the text's own token."""
    target_gold_TBC: Array


Judge = Callable[[Params, Chunk], Judged]
Worth = Callable[[Chunk, Judged], Array]


def judge_chunk(
    drafter: Learner, shared: SharedTables, teacher: Teacher, objective: Objective, params: Params, chunk: Chunk
) -> Judged:
    """Losses and measures of every step; the target's logits are made once for all of them.

    With `likely` in the chunk both distributions are those of its tokens and of all others taken as one.
    """
    token_BC, rest_BC, lumped_BC = chunk.token_BC, None, None
    if (likely := chunk.likely) is None:
        logits_BCV = jax.lax.stop_gradient(teacher.target.logits(teacher.frozen, chunk.wanted_BCD))
    else:
        logits_BCV, lumped_BC = jnp.concatenate([likely.logp_BLR, likely.rest_BL1], axis=-1), likely.rest_BL1[..., 0]
        same_BCR = likely.token_BLR == token_BC[..., None]
        token_BC = jnp.where(jnp.any(same_BCR, axis=-1), jnp.argmax(same_BCR, axis=-1), -1)
    if (ids := teacher.vocab_U) is not None:
        everything = jax.nn.logsumexp(logits_BCV, axis=-1)
        logits_BCV = logits_BCV[..., ids]
        inside = jnp.minimum(jax.nn.logsumexp(logits_BCV, axis=-1) - everything, -1e-7)
        rest_BC = jnp.log(-jnp.expm1(inside))
        known, place = _find(ids, token_BC)
        token_BC = jnp.where(known, place, -1)
    target_gold_BC = _gold(logits_BCV, token_BC)
    named = [(name, logit_loss(name)) for name, _ in objective.weights if name not in FEATURE_LOSSES]

    def one(step: int) -> Judged:
        draft = drafter.logits(params, shared, chunk.hidden_TBCD[step], step)
        if likely is not None:
            draft = lump(draft, likely.token_BLR)
        scores = Scores(draft, logits_BCV, token_BC, jax.random.fold_in(chunk.key, step), rest_BC, lumped_BC)
        losses = {name: loss.parts(scores) for name, loss in named}
        for name, _ in objective.weights:
            if name in FEATURE_LOSSES:
                if chunk.features_TBCD is None:
                    raise ValueError(f"loss {name!r} needs a drafter that predicts features: leave it out")
                losses[name] = FEATURE_LOSSES[name](chunk.features_TBCD[step], chunk.wanted_BCD)[..., None]
        draft = jax.lax.stop_gradient(draft)
        agree = agreement(draft, logits_BCV) * chunk.learns_TBC[step]
        accept = expected_acceptance(draft, logits_BCV, rest_BC)
        return Judged(losses, agree, accept, _gold(draft, token_BC), target_gold_BC)

    # Not a branch a step: what the losses ask of the target's logits alone is then computed once for all steps.
    return jax.tree.map(lambda *x: jnp.stack(x), *map(one, range(len(chunk.mask_TBC))))


def _gold(logits: Array, token: Array) -> Array:
    """The probability of the text's own token, 0 where it is -1."""
    return jnp.where(token < 0, 0.0, jnp.exp(of_token(log_probs(logits), token)))


def _find(ids_U: Array, token: Array) -> tuple[Array, Array]:
    """Whether a token is among ascending ids, and at which place."""
    place = jnp.minimum(jnp.searchsorted(ids_U, token), ids_U.shape[0] - 1)
    return ids_U[place] == token, place


def learnable(teacher: Teacher, features_BLD: Array, chunk: int) -> Array:
    """`[B, L]`: whether the target's likeliest token after a feature is one that the drafter scores."""
    ids = teacher.vocab_U
    if ids is None:
        return jnp.ones(features_BLD.shape[:2], bool)

    def one(features_BCD: Array) -> Array:
        return _find(ids, argmax(teacher.target.logits(teacher.frozen, features_BCD)))[0]

    layout = Layout.of(jnp.ones((1, *features_BLD.shape[:2]), bool), chunk)
    return layout.lay(jax.lax.map(one, layout.cut(features_BLD[None])[:, 0])[:, None])[0]


class Layout(NamedTuple):
    """How the positions of each row are dealt to chunks."""

    order_BL: Array
    """Positions in the order they are taken."""
    size: int

    @classmethod
    def of(cls, mask_TBL: Array, chunk: int) -> Layout:
        """Each row's positions that most steps are trained on come first, so that the last chunks are empty."""
        order_BL = jnp.argsort(-jnp.sum(mask_TBL, axis=0), axis=1, stable=True)
        return cls(order_BL, min(chunk, mask_TBL.shape[-1]))

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-self.order_BL.shape[1] // self.size)

    def cut(self, x_TBL: Array) -> Array:
        """`[T, B, L, ...] -> [chunks, T, B, C, ...]`, zeros behind the last position."""
        trailing = x_TBL.shape[3:]
        missing = self.chunks * self.size - x_TBL.shape[2]
        order = self.order_BL.reshape(1, *self.order_BL.shape, *(1 for _ in trailing))
        x_TBL = jnp.take_along_axis(x_TBL, order, axis=2)
        x_TBL = jnp.pad(x_TBL, [(0, 0), (0, 0), (0, missing), *((0, 0) for _ in trailing)])
        return jnp.moveaxis(x_TBL.reshape(*x_TBL.shape[:2], -1, self.size, *trailing), 2, 0)

    def lay(self, x_XTBC: Array) -> Array:
        """The way back."""
        steps, batch, trailing = *x_XTBC.shape[1:3], x_XTBC.shape[4:]
        length = self.order_BL.shape[1]
        x_TBL = jnp.moveaxis(x_XTBC, 0, 2).reshape(steps, batch, -1, *trailing)[:, :, :length]
        back = jnp.argsort(self.order_BL, axis=1).reshape(1, batch, length, *(1 for _ in trailing))
        return jnp.take_along_axis(x_TBL, back, axis=2)


def judge_again(judge: Judge, params: Params, pieces: Chunk) -> Judged:
    """All chunks judged, each a second time on the way back. Chunks without a trained token are skipped."""

    @jax.checkpoint
    def one(piece: Chunk) -> Judged:
        return _unless_empty(functools.partial(judge, params), piece)

    return jax.lax.map(one, pieces)


def judge_in_passing(
    bind: Callable[[Any], tuple[Judge, Worth]], lent: Any, params: Params, pieces: Chunk
) -> tuple[Array, Judged]:
    """`sum of worth(chunk, judge(chunk))` over all chunks, and what was judged, which is constant.

    The gradient is made chunk by chunk on the way there, while the logits are at hand: backward nothing is computed
    again, and what is kept is as large as the draft steps' outputs. Chunks without a trained token are skipped. `bind`
    gives both functions, of the constant arrays `lent`, and they read no others.
    """

    @jax.custom_vjp
    def run(params: Params, hidden: Array, features: Array | None, rest: Chunk) -> tuple[Array, Judged]:
        return forward(params, hidden, features, rest)[0]

    def forward(params: Params, hidden: Array, features: Array | None, rest: Chunk) -> tuple[Any, Any]:
        pieces = rest._replace(hidden_TBCD=hidden, features_TBCD=features)
        leaves, tree = jax.tree.flatten((params, lent))

        def value(leaves: list[Any], hidden: Array, features: Array | None, piece: Chunk) -> tuple[Array, Judged]:
            params, lent = tree.unflatten(leaves)
            judge, worth = bind(lent)
            judged = judge(params, piece._replace(hidden_TBCD=hidden, features_TBCD=features))
            return worth(piece, judged), judged

        first = jax.tree.map(lambda x: x[0], pieces)
        used = _used(lambda leaves: value(leaves, first.hidden_TBCD, first.features_TBCD, first), leaves)
        learns = [n < len(jax.tree.leaves(params)) for n in range(len(leaves))]
        own, given = (
            {n: leaf for n, leaf in enumerate(leaves) if used[n] and learns[n] == trained} for trained in (True, False)
        )

        def every(own: dict[int, Array], given: dict[int, Array], pieces: Chunk) -> tuple[Any, Any]:
            def by_own(own: dict[int, Array], *arguments: Any) -> tuple[Array, Judged]:
                read = own | given
                return value([read.get(n, leaf) for n, leaf in enumerate(leaves)], *arguments)

            def learn(piece: Chunk) -> Any:
                differentiate = jax.value_and_grad(by_own, argnums=(0, 1, 2), has_aux=True)
                return differentiate(own, piece.hidden_TBCD, piece.features_TBCD, piece)

            def one(carry: tuple[Array, dict[int, Array]], piece: Chunk) -> tuple[Any, Any]:
                (part, judged), (own_part, *rows) = _unless_empty(learn, piece)
                total, own_total = carry
                return (total + part, jax.tree.map(jnp.add, own_total, own_part)), (judged, rows)

            nothing = {n: jnp.zeros(x.shape, x.dtype) for n, x in own.items()}
            return jax.lax.scan(one, (jnp.zeros(()), nothing), pieces)

        (total, own_total), (judged, rows) = _on_own_rows(every, own, given, pieces)
        flat, shape = jax.tree.flatten(params)
        gradient = shape.unflatten([own_total[n] if n in own else jnp.zeros_like(x) for n, x in enumerate(flat)])
        return (total, judged), (gradient, *rows)

    def backward(gradient: Any, wanted: tuple[Array, Judged]) -> tuple[Any, ...]:
        by, _ = wanted
        return *jax.tree.map(lambda g: (by * g).astype(g.dtype), gradient), None

    run.defvjp(forward, backward)
    rest = pieces._replace(hidden_TBCD=None, features_TBCD=None)
    return run(params, pieces.hidden_TBCD, pieces.features_TBCD, rest)


def _on_own_rows(run: Callable[[Any, Any, Chunk], tuple[Any, Any]], own: Any, given: Any, pieces: Chunk) -> Any:
    """`run(own, given, pieces)`: sums over all rows, and of each chunk `[X, T, B, ..]`.

    Under a mesh that spreads rows and no vocabulary each device runs its own rows, and what all sum is exchanged once:
    left alone, XLA exchanges the gradient of an LM head for every chunk. All arrays that `run` reads are its arguments.
    """
    mesh, devices, rows = jax.sharding.get_abstract_mesh(), splits("batch"), pieces.token_BC.shape[1]
    if mesh.manual_axes or devices == 1 or rows % devices or splits("vocab") > 1:
        return run(own, given, pieces)
    over = AXIS_RULES["batch"]
    by_chunk, by_step = P(None, over), P(None, None, over)

    def part(own: Any, given: Any, pieces: Chunk) -> tuple[Any, Any]:
        sums, each = run(own, given, pieces)
        return jax.tree.map(lambda x: x[None], sums), each

    where: dict[str, Any] = dict.fromkeys(Chunk._fields, by_step)
    where |= {"key": P(), "wanted_BCD": by_chunk, "token_BC": by_chunk, "likely": by_chunk}
    where |= {name: None for name, x in pieces._asdict().items() if x is None}
    lie = (P(), P(), Chunk(**where))
    sums, each = jax.shard_map(part, in_specs=lie, out_specs=(P(over), by_step), check_vma=False)(own, given, pieces)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums), each


def _used(function: Callable[[list[Array]], Any], leaves: list[Array]) -> list[bool]:
    """Which of some arrays a function of them reads."""
    _, used = partial_eval.dce_jaxpr((closed := jax.make_jaxpr(function)(leaves)).jaxpr, [True] * len(closed.out_avals))
    return used


def _unless_empty(run: Callable[[Chunk], Any], piece: Chunk) -> Any:
    """`run(piece)`, or zeros if nothing is trained there."""

    def nothing(piece: Chunk) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, piece))

    return jax.lax.cond(jnp.any(piece.mask_TBC), run, nothing, piece)


def by_position(x_TBL: Array) -> Array:
    """Step `j`'s rows moved `j + 1` to the right: from the pair to the position it predicts the feature of."""
    return jnp.stack([_moved(x, j + 1) for j, x in enumerate(x_TBL)])


def by_pair(x_TBL: Array) -> Array:
    """The way back."""
    return jnp.stack([shift(x, j + 1) for j, x in enumerate(x_TBL)])


def shift(x_BL: Array, by: int) -> Array:
    """`x` moved left by `by` positions, zeros behind."""
    return jnp.pad(x_BL[:, by:], [(0, 0), (0, by), *((0, 0) for _ in x_BL.shape[2:])])


def _moved(x_BL: Array, by: int) -> Array:
    """`x` moved right by `by` positions, zeros in front."""
    return jnp.pad(x_BL, [(0, 0), (by, 0), *((0, 0) for _ in x_BL.shape[2:])])[:, : x_BL.shape[1]]
