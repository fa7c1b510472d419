"""Distillation: the frozen target and the drafter's update in one program; losses as global (sum, count)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxspec.base import Array, Borrowed, Learner, Params, Target, TargetOutput, Unrolled
from jaxspec.layers import segment_mask
from jaxspec.losses import (
    FEATURE_LOSSES,
    Scores,
    agreement,
    divides_by_weights,
    expected_acceptance,
    logit_loss,
    position_weights,
)
from jaxspec.losses.loss import mean
from jaxspec.sampling import argmax
from jaxspec.stored import Likely, Stored, lump, restore


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: `sum_step c_step sum_name weight * mean over trained tokens of loss_name`.

    EAGLE (section 4.2): one step, SmoothL1 on features with weight 1, soft cross-entropy on tokens with weight 0.1.
    HASS adds steps and the top-k loss.
    """

    steps: int = 1
    """Draft steps `T` unrolled from every position; more than one is HASS's context alignment."""
    weights: tuple[tuple[str, float], ...] = (("smooth_l1", 1.0), ("soft_cross_entropy", 0.1))
    """Losses by name (`losses.FEATURE_LOSSES` and `losses.logit_loss`), each with its weight."""
    step_decay: float = 1.0
    """Step `j`, from 0, counts `step_decay^j`: 1 in HASS, 0.8 in EAGLE-3 and Medusa."""
    step_weights: tuple[float, ...] = ()
    """Or one weight a step."""
    feature_steps: int | None = None
    """Steps whose features are held to the target's; None for all."""
    position_weights: str = "none"
    """Weights by what the text's own tokens got, see `losses.position_weights`."""
    noise: float = 0.2
    """Width of the uniform noise on the input features: `U(-1/2, 1/2) * noise * 512 / document length`."""
    reference_mask: bool = False
    """Gate each pair by its *feature's* token as the released EAGLE trainer does, which never trains the first pair of
    an answer, instead of by the token it predicts."""
    chunk: int = 128
    """Positions whose logits are alive at once."""

    def __post_init__(self) -> None:
        for name, _ in self.weights:
            if name not in FEATURE_LOSSES:
                logit_loss(name)
        divides_by_weights(self.position_weights)  # names an unknown one
        if self.steps < 1 or self.chunk < 1:
            raise ValueError(f"steps={self.steps} and chunk={self.chunk} must be at least 1")
        if self.step_weights and len(self.step_weights) != self.steps:
            raise ValueError(
                f"step_weights has {len(self.step_weights)} numbers for steps={self.steps}: give one a step"
            )

    @property
    def per_step(self) -> tuple[float, ...]:
        """What each step counts."""
        return self.step_weights or tuple(self.step_decay**j for j in range(self.steps))


class TrainState(NamedTuple):
    """What training carries and a checkpoint keeps; fp32 masters."""

    params: Params
    optimizer: Any
    step: Array
    key: Array


class Batch(NamedTuple):
    """Packed documents, as `data.packing` makes them."""

    tokens_BL: Array
    segments_BL: Array
    """1, 2, .. for the documents of a row; 0 on padding."""
    positions_BL: Array
    """From 0 in each document."""
    loss_mask_BL: Array
    """Tokens worth predicting: the assistant's."""
    stored: Stored | None = None
    """What the target made of them, where that is read from disk."""


class Sums(NamedTuple):
    """Totals over tokens, by draft step; to be divided by their counts after all batches and devices are added."""

    loss_TM: dict[str, Array]
    """Weighted sums of every loss's parts."""
    weight_T: dict[str, Array]
    """What each is divided by: trained tokens, or the sum of their weights."""
    agree_T: Array
    """Positions whose argmaxes agree, by draft step."""
    accept_T: Array
    """Sum of `sum_v min(p, q)`, by draft step."""
    chain_greedy_T: Array
    """Positions whose first `t` argmaxes all agree."""
    chain_sampled_T: Array
    """Sum of the product of the first `t` acceptances."""
    count_T: Array
    """Tokens at each draft step."""

    def losses(self, name: str) -> list[Array]:
        """One loss's mean at every step."""
        combine = combiner(name)
        return [combine(*both) for both in zip(self.loss_TM[name], self.weight_T[name], strict=True)]

    def mean_loss(self, objective: Objective) -> Array:
        """The objective: each step's weighted losses over that step's tokens, summed over the steps it trains."""
        total = jnp.zeros(())
        for name, weight in objective.weights:
            count = objective.feature_steps if name in FEATURE_LOSSES else None
            steps = zip(self.losses(name), objective.per_step[:count], strict=False)
            total += weight * sum(c * mean for mean, c in steps)
        return total

    def summary(self, objective: Objective) -> dict[str, float]:
        """Means: the loss, then of the first draft step its parts, agreement and acceptance, and simulated tau.

        Simulated tau is `1 + sum_t mean(product of the first t acceptances)`, a chain of `T` drafts whose context is
        the text itself: expected acceptances stand for temperature 1, agreements for greedy decoding.
        """
        count_T = jnp.maximum(self.count_T, 1)
        parts = {name: float(self.losses(name)[0]) for name in self.loss_TM}
        return {
            "loss": float(self.mean_loss(objective)),
            **parts,
            "top1_agreement": float(self.agree_T[0] / count_T[0]),
            "expected_acceptance": float(self.accept_T[0] / count_T[0]),
            "simulated_tau": float(1 + jnp.sum(self.chain_sampled_T / count_T)),
            "simulated_tau_greedy": float(1 + jnp.sum(self.chain_greedy_T / count_T)),
            "tokens": int(self.count_T[0]),
        }


def combiner(name: str) -> Callable[[Array, Array], Array]:
    """From a loss's sums `[M]` and their weight to its mean."""
    return mean if name in FEATURE_LOSSES else logit_loss(name).combine


def shift(x_BL: Array, by: int) -> Array:
    """`x` moved left by `by` positions, zeros behind."""
    width = [(0, 0)] * x_BL.ndim
    width[1] = (0, by)
    return jnp.pad(x_BL[:, by:], width)


def step_masks(batch: Batch, objective: Objective) -> Array:
    """`[T, B, L]`: whether the pair at position `i` is trained at draft step `j`.

    It predicts the token at `i + j + 2` from the target's feature at `i + j + 1`, so both must lie in the document.
    """
    masks = []
    for j in range(objective.steps):
        same = (shift(batch.segments_BL, j + 2) == batch.segments_BL) & (batch.segments_BL > 0)
        wanted = shift(batch.loss_mask_BL, 0 if objective.reference_mask else j + 2)
        masks.append(same & wanted.astype(bool))
    return jnp.stack(masks)


def add_noise(features_BLD: Array, segments_BL: Array, key: Array, noise: float) -> Array:
    """Features with EAGLE's input noise: `U(-1/2, 1/2) * noise * 512 / length` of the token's own document."""
    if not noise:
        return features_BLD
    same = segments_BL[:, :, None] == segments_BL[:, None, :]
    scale_BL = noise * 512.0 / jnp.maximum(jnp.sum(same, axis=-1), 1)
    u = jax.random.uniform(key, features_BLD.shape, jnp.float32, -0.5, 0.5)
    return (features_BLD + u * scale_BL[..., None]).astype(features_BLD.dtype)


def loss_sums(
    target: Target,
    drafter: Learner,
    frozen: Params,
    params: Params,
    batch: Batch,
    key: Array | None,
    objective: Objective,
    vocab_U: Array | None = None,
) -> Sums:
    """All sums of one batch; differentiate its `mean_loss`. `key` draws the input noise; None adds none.

    The target runs once and its head once a position, however many draft steps are unrolled. Logits of target and draft
    live for `chunk` positions at a time; none of shape `[B, L, V]` is ever made. With the draft vocabulary `vocab`
    (ascending ids) the drafter scores these tokens alone, and positions whose likeliest token is not among them train
    no logits (EAGLE-3); acceptance counts what is missing as rejected.
    """
    noise_key, slot_key, draw_key = (None,) * 3 if key is None else jax.random.split(key, 3)
    out = read_batch(target, frozen, batch)
    borrowed = lend(target, frozen, vocab_U)
    unrolled = unroll_batch(drafter, params, borrowed, batch, out, objective, noise_key, slot_key)
    teacher = Teacher(target, frozen, vocab_U)
    return judge_batch(drafter, params, borrowed, teacher, batch, out, unrolled, objective, draw_key)


def read_batch(target: Target, frozen: Params, batch: Batch) -> TargetOutput:
    """What the frozen target makes of a batch, or made of it."""
    if batch.stored is not None:
        return restore(batch.stored, target.borrowed(frozen).embed_VD.dtype)
    mask_BLM = segment_mask(batch.segments_BL)
    return jax.lax.stop_gradient(target.forward(frozen, batch.tokens_BL, batch.positions_BL, mask_BLM))


def lend(target: Target, frozen: Params, vocab_U: Array | None) -> Borrowed:
    """The target's tables for a drafter that scores `vocab`."""
    whole: Borrowed = jax.lax.stop_gradient(target.borrowed(frozen))
    return whole if vocab_U is None else whole._replace(head_VD=whole.head_VD[vocab_U])


def unroll_batch(
    drafter: Learner,
    params: Params,
    borrowed: Borrowed,
    batch: Batch,
    out: TargetOutput,
    objective: Objective,
    noise_key: Array | None,
    slot_key: Array | None,
) -> Unrolled:
    """The draft steps from every position of a batch."""
    read_BLD = out.read_BLD
    if noise_key is not None:
        read_BLD = add_noise(read_BLD, batch.segments_BL, noise_key, objective.noise)
    rows = (batch.tokens_BL, read_BLD, batch.positions_BL, segment_mask(batch.segments_BL))
    return drafter.unroll(params, borrowed, *rows, objective.steps, slot_key)


def judge_batch(
    drafter: Learner,
    params: Params,
    borrowed: Borrowed,
    teacher: Teacher,
    batch: Batch,
    out: TargetOutput,
    unrolled: Unrolled,
    objective: Objective,
    draw_key: Array | None,
) -> Sums:
    """The sums of draft steps held against the target's own logits."""
    mask_TBL = step_masks(batch, objective)
    if unrolled.kept_TBL is not None:
        mask_TBL &= unrolled.kept_TBL
    judge = functools.partial(judge_chunk, drafter, params, borrowed, teacher, objective)
    likely = None if batch.stored is None else batch.stored.likely
    values = in_chunks(judge, unrolled, out.features_BLD, batch.tokens_BL, mask_TBL, draw_key, objective, likely)
    return totals(values, mask_TBL, objective)


class Teacher(NamedTuple):
    """The frozen target's head."""

    target: Target
    frozen: Params
    vocab_U: Array | None


class Chunk(NamedTuple):
    """Some predicted positions: step `j`'s row is the pair that stands `j + 1` positions before."""

    hidden_TBCD: Array
    features_TBCD: Array | None
    wanted_BCD: Array
    """The target's feature at the position, which its logits for the token after are made of."""
    token_BC: Array
    """The token after."""
    mask_TBC: Array
    key: Array
    likely: Likely | None = None
    """The target's likeliest tokens at the position, where these are to be learned from instead of its logits."""


class Judged(NamedTuple):
    """What each draft step made of each position."""

    loss_TBCM: dict[str, Array]
    learns_TBC: Array
    """Whether its logits are trained."""
    agree_TBC: Array
    accept_TBC: Array
    draft_gold_TBC: Array
    """The draft's probability of the text's own token."""
    target_gold_TBC: Array


def judge_chunk(
    drafter: Learner, params: Params, borrowed: Borrowed, teacher: Teacher, objective: Objective, chunk: Chunk
) -> Judged:
    """Losses and measures of every step; the target's logits are made once for all of them.

    With `likely` in the chunk both distributions are those of its tokens and of all others taken as one.
    """
    token_BC, rest_BC, lumped_BC = chunk.token_BC, None, None
    learns_BC = jnp.ones(token_BC.shape, bool)
    if (likely := chunk.likely) is not None:
        logits_BCV, lumped_BC = jnp.concatenate([likely.logp_BLR, likely.rest_BL1], axis=-1), likely.rest_BL1[..., 0]
        same_BCR = likely.token_BLR == token_BC[..., None]
        token_BC = jnp.where(jnp.any(same_BCR, axis=-1), jnp.argmax(same_BCR, axis=-1), -1)
    else:
        logits_BCV = teacher.target.logits(teacher.frozen, chunk.wanted_BCD)
    if (ids := teacher.vocab_U) is not None:
        everything = jax.nn.logsumexp(logits_BCV, axis=-1)
        learns_BC = jnp.any(argmax(logits_BCV)[..., None] == ids, axis=-1)
        logits_BCV = logits_BCV[..., ids]
        inside = jnp.minimum(jax.nn.logsumexp(logits_BCV, axis=-1) - everything, -1e-7)
        rest_BC = jnp.log(-jnp.expm1(inside))
        place = jnp.minimum(jnp.searchsorted(ids, token_BC), ids.shape[0] - 1)
        token_BC = jnp.where(ids[place] == token_BC, place, -1)
    logits_BCV = jax.lax.stop_gradient(logits_BCV)
    named = [(name, logit_loss(name)) for name, _ in objective.weights if name not in FEATURE_LOSSES]

    def one(step: int) -> Judged:
        draft = drafter.logits(params, borrowed, chunk.hidden_TBCD[step], step)
        if likely is not None:
            draft = lump(draft, likely.token_BLR)
        key = jax.random.fold_in(chunk.key, step)
        scores = Scores(draft, logits_BCV, token_BC, key, rest_BC, lumped_BC)
        losses = {name: loss.parts(scores) for name, loss in named}
        for name, _ in objective.weights:
            if name in FEATURE_LOSSES:
                if chunk.features_TBCD is None:
                    raise ValueError(f"loss {name!r} needs a drafter that predicts features: leave it out")
                losses[name] = FEATURE_LOSSES[name](chunk.features_TBCD[step], chunk.wanted_BCD)[..., None]
        scores = scores._replace(draft=jax.lax.stop_gradient(draft))
        agree = agreement(scores.draft, logits_BCV) * learns_BC
        accept = expected_acceptance(scores.draft, logits_BCV, rest_BC)
        known = token_BC >= 0
        at = jnp.maximum(token_BC, 0)[..., None]
        gold = [
            jnp.where(known, jnp.exp(jnp.take_along_axis(jax.nn.log_softmax(x), at, axis=-1)[..., 0]), 0.0)
            for x in (scores.draft, logits_BCV)
        ]
        return Judged(losses, learns_BC, agree, accept, *gold)

    # Not a branch a step: what the losses ask of the target's logits alone is then computed once for all steps.
    return jax.tree.map(lambda *x: jnp.stack(x), *map(one, range(len(chunk.mask_TBC))))


def in_chunks(
    judge: Callable[[Chunk], Judged],
    unrolled: Unrolled,
    features_BLD: Array,
    tokens_BL: Array,
    mask_TBL: Array,
    key: Array | None,
    objective: Objective,
    likely: Likely | None = None,
) -> Judged:
    """`judge` over chunks of predicted positions, laid back to the pairs they come from: everything `[T, B, L]`.

    Each row's positions that most steps are trained on come first, so that the last chunks are empty; these are
    skipped: what teaches nothing (the user's turns, padding) costs no logits.
    """
    steps, (batch, length) = mask_TBL.shape[0], tokens_BL.shape
    aligned_TBL = by_position(mask_TBL)
    order_BL = jnp.argsort(-jnp.sum(aligned_TBL, axis=0), axis=1, stable=True)
    size = min(objective.chunk, length)
    missing = -length % size

    def cut(x_TBL: Array) -> Array:
        trailing = x_TBL.shape[3:]
        order = order_BL.reshape(1, *order_BL.shape, *(1 for _ in trailing))
        x_TBL = jnp.take_along_axis(x_TBL, order, axis=2)
        x_TBL = jnp.pad(x_TBL, [(0, 0), (0, 0), (0, missing), *((0, 0) for _ in trailing)])
        return jnp.moveaxis(x_TBL.reshape(*x_TBL.shape[:2], -1, size, *trailing), 2, 0)

    key = jax.random.key(0) if key is None else key
    count = (length + missing) // size
    pieces = Chunk(
        cut(by_position(unrolled.hidden_TBLD)),
        None if unrolled.features_TBLD is None else cut(by_position(unrolled.features_TBLD)),
        cut(features_BLD[None])[:, 0],
        cut(shift(tokens_BL, 1)[None])[:, 0],
        cut(aligned_TBL),
        jax.random.split(key, count),
        jax.tree.map(lambda x: cut(x[None])[:, 0], likely),
    )

    @jax.checkpoint
    def one(piece: Chunk) -> Judged:
        return jax.lax.cond(jnp.any(piece.mask_TBC), judge, lambda piece: zeros(judge, piece), piece)

    back_BL = jnp.argsort(order_BL, axis=1)

    def lay(x_XTBC: Array) -> Array:
        trailing = x_XTBC.shape[4:]
        x_TBL = jnp.moveaxis(x_XTBC, 0, 2).reshape(steps, batch, -1, *trailing)[:, :, :length]
        back = back_BL.reshape(1, batch, length, *(1 for _ in trailing))
        return by_pair(jnp.take_along_axis(x_TBL, back, axis=2))

    return jax.tree.map(lay, jax.lax.map(one, pieces))


def by_position(x_TBL: Array) -> Array:
    """Step `j`'s rows moved `j + 1` to the right: from the pair to the position it predicts the feature of."""
    return jnp.stack([_moved(x, j + 1) for j, x in enumerate(x_TBL)])


def by_pair(x_TBL: Array) -> Array:
    """The way back."""
    return jnp.stack([shift(x, j + 1) for j, x in enumerate(x_TBL)])


def _moved(x_BL: Array, by: int) -> Array:
    width = [(0, 0)] * x_BL.ndim
    width[1] = (by, 0)
    return jnp.pad(x_BL, width)[:, : x_BL.shape[1]]


def totals(judged: Judged, mask_TBL: Array, objective: Objective) -> Sums:
    """The sums over all trained positions."""
    learns_TBL = mask_TBL & judged.learns_TBC
    weight_TBL = position_weights(objective.position_weights, judged.draft_gold_TBC, judged.target_gold_TBC, learns_TBL)
    weight_TBL = weight_TBL * learns_TBL
    counted_TBL = weight_TBL if divides_by_weights(objective.position_weights) else learns_TBL.astype(jnp.float32)
    losses = {}
    for name, value in judged.loss_TBCM.items():
        by = mask_TBL if name in FEATURE_LOSSES else weight_TBL
        losses[name] = jnp.sum(jnp.where((by > 0)[..., None], value * by[..., None], 0.0), axis=(1, 2))
    weight_T = {name: mask_TBL if name in FEATURE_LOSSES else counted_TBL for name in losses}
    chain_TBL = jnp.cumprod(mask_TBL, axis=0)

    def total(x_TBL: Array) -> Array:
        return jnp.sum(x_TBL, axis=(1, 2))

    return Sums(
        losses,
        {name: total(w.astype(jnp.float32)) for name, w in weight_T.items()},
        total(judged.agree_TBC * mask_TBL),
        total(judged.accept_TBC * mask_TBL),
        total(jnp.cumprod(judged.agree_TBC, axis=0) * chain_TBL),
        total(jnp.cumprod(judged.accept_TBC, axis=0) * chain_TBL),
        total(mask_TBL.astype(jnp.int32)),
    )


def zeros(like: Any, *arguments: Any) -> Any:
    """Zeros of the shape that `like(*arguments)` has."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(like, *arguments))


def train_step(
    target: Target,
    drafter: Learner,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    frozen: Params,
    state: TrainState,
    batch: Batch,
    vocab_U: Array | None = None,
) -> tuple[TrainState, Array, Sums]:
    """One update of the drafter on one global batch. Returns the new state, the mean loss, and the sums behind it.

    The loss is normalised by the tokens of the whole batch over the whole mesh. If it is not finite the state is
    kept as it was, so the caller that sees the loss and stops has lost nothing.
    """
    key = jax.random.fold_in(state.key, state.step)

    def loss(params: Params) -> tuple[Array, Sums]:
        sums = loss_sums(target, drafter, frozen, params, batch, key, objective, vocab_U)
        return sums.mean_loss(objective), sums

    (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.optimizer, state.params)
    fine = jnp.isfinite(value)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(fine, new, old), (params, opt_state), (state.params, state.optimizer)
    )
    return TrainState(params, opt_state, state.step + 1, state.key), value, sums


def eval_step(
    target: Target,
    drafter: Learner,
    objective: Objective,
    frozen: Params,
    params: Params,
    batch: Batch,
    vocab_U: Array | None = None,
) -> Sums:
    """The sums of one held-out batch, without noise."""
    return loss_sums(target, drafter, frozen, params, batch, None, objective, vocab_U)


def init_state(
    drafter: Learner,
    optimizer: optax.GradientTransformation,
    key: Array,
    borrowed: Borrowed | None = None,
    params: Params = None,
) -> TrainState:
    """The weights `params`, or fresh ones, and a fresh optimizer.

    `borrowed` is for drafters that begin with copies of the target's tables.
    """
    init_key, train_key = jax.random.split(key)
    params = drafter.init_params(init_key, borrowed) if params is None else params
    return TrainState(params, optimizer.init(params), jnp.int32(0), train_key)
