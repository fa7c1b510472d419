"""Distillation: the frozen target and the drafter's update in one program; losses as global (sum, count)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxspec.base import Array, Learner, Packed, Params, SharedTables, Target, TargetOutput, Unrolled, UnrollInputs
from jaxspec.data.target_outputs import Stored, restore
from jaxspec.distillation.chunks import (
    Chunk,
    Judge,
    Judged,
    Layout,
    Teacher,
    Worth,
    by_pair,
    by_position,
    judge_again,
    judge_chunk,
    judge_in_passing,
    learnable,
    shift,
)
from jaxspec.distillation.objective import Objective, combiner, steps_of
from jaxspec.losses import FEATURE_LOSSES, divides_by_weights, position_weights
from jaxspec.parallel.rows import gather_width, sum_gradients


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
            steps = zip(self.losses(name), steps_of(name, objective), strict=False)
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


def row_keys(key: Array, rows: int, axes: tuple[str, ...]) -> Array:
    """A key for each row `[B]`, the same however the rows are spread; `axes` as in `judged_batch`."""
    first = jax.lax.axis_index(axes) * rows if axes else 0
    return jax.vmap(functools.partial(jax.random.fold_in, key))(first + jnp.arange(rows))


def add_noise(features_BLD: Array, segments_BL: Array, keys_B: Array, noise: float) -> Array:
    """Features with EAGLE's input noise: `U(-1/2, 1/2) * noise * 512 / length` of the token's own document."""
    if not noise:
        return features_BLD
    same = segments_BL[:, :, None] == segments_BL[:, None, :]
    scale_BL = noise * 512.0 / jnp.maximum(jnp.sum(same, axis=-1), 1)
    u = jax.vmap(lambda key: jax.random.uniform(key, features_BLD.shape[1:], jnp.float32, -0.5, 0.5))(keys_B)
    return (features_BLD + u * scale_BL[..., None]).astype(features_BLD.dtype)


def judged_batch(
    target: Target,
    drafter: Learner,
    frozen: Params,
    params: Params,
    batch: Batch,
    key: Array | None,
    objective: Objective,
    vocab_U: Array | None = None,
    *,
    learning: bool,
    axes: tuple[str, ...] = (),
) -> tuple[Array, Sums]:
    """What to differentiate for one batch, and the sums behind its loss. `key` draws the input noise; None adds none.

    The target runs once and its head once a position, however many draft steps are unrolled. Logits of target and draft
    live for `chunk` positions at a time; none of shape `[B, L, V]` is ever made. With the draft vocabulary `vocab`
    (ascending ids) the drafter scores these tokens alone, and positions whose likeliest token is not among them train
    no logits (EAGLE-3); acceptance counts what is missing as rejected. For `learning` see `judge_batch`.

    In a `shard_map` or `pmap` whose devices hold some rows each, `axes` are the mesh axes over which they are spread.
    """
    out = read_batch(target, frozen, batch)
    params = gather_width(params)
    shared = lend(target, frozen, vocab_U)
    noise_key, slot_key, draw_key = (None,) * 3 if key is None else jax.random.split(key, 3)
    unrolled = unroll_batch(drafter, params, shared, batch, out, objective, noise_key, slot_key, axes)
    whole = gather_width(frozen)  # what every chunk reads of it: the rest is never gathered
    teacher, shared = Teacher(target, whole, vocab_U), lend(target, whole, vocab_U)
    if draw_key is not None and axes:
        draw_key = jax.random.fold_in(draw_key, jax.lax.axis_index(axes))
    return judge_batch(
        drafter, params, shared, teacher, batch, out, unrolled, objective, draw_key, learning=learning, axes=axes
    )


def read_batch(target: Target, frozen: Params, batch: Batch) -> TargetOutput:
    """What the frozen target makes of a batch, or made of it."""
    if batch.stored is not None:
        return restore(batch.stored, target.shared_tables(frozen).embed_VD.dtype)
    seen = Packed(batch.segments_BL)
    return jax.lax.stop_gradient(target.forward(frozen, batch.tokens_BL, batch.positions_BL, seen))


def lend(target: Target, frozen: Params, vocab_U: Array | None) -> SharedTables:
    """The target's tables for a drafter that scores `vocab`."""
    whole: SharedTables = jax.lax.stop_gradient(target.shared_tables(frozen))
    return whole if vocab_U is None else whole._replace(head_VD=whole.head_VD[vocab_U])


def unroll_batch(
    drafter: Learner,
    params: Params,
    shared: SharedTables,
    batch: Batch,
    out: TargetOutput,
    objective: Objective,
    noise_key: Array | None,
    slot_key: Array | None,
    axes: tuple[str, ...] = (),
) -> Unrolled:
    """The draft steps from every position of a batch."""
    read_BLD, rows = out.read_BLD, batch.tokens_BL.shape[0]
    if noise_key is not None:
        read_BLD = add_noise(read_BLD, batch.segments_BL, row_keys(noise_key, rows, axes), objective.noise)
    slot_keys_B = None if slot_key is None else row_keys(slot_key, rows, axes)
    seen = Packed(batch.segments_BL)
    inputs = UnrollInputs(batch.tokens_BL, read_BLD, batch.positions_BL, seen, slot_keys_B)
    return drafter.unroll(params, shared, inputs, objective.steps)


def judge_batch(
    drafter: Learner,
    params: Params,
    shared: SharedTables,
    teacher: Teacher,
    batch: Batch,
    out: TargetOutput,
    unrolled: Unrolled,
    objective: Objective,
    draw_key: Array | None,
    *,
    learning: bool,
    axes: tuple[str, ...] = (),
) -> tuple[Array, Sums]:
    """Draft steps held against the target's own logits: what to differentiate, and the sums of all rows.

    The first is 0 unless `learning`, and the second constant if so. The first's gradient, summed over the devices of
    `axes`, is that of `Sums.mean_loss`; it holds nothing that those devices exchange but constants, so that it can be
    differentiated on each by itself.
    """
    mask_TBL = step_masks(batch, objective)
    if unrolled.kept_TBL is not None:
        mask_TBL &= unrolled.kept_TBL
    learns_BL = learnable(teacher, out.features_BLD, objective.chunk)
    learns_TBL = mask_TBL & by_pair(jnp.broadcast_to(learns_BL, mask_TBL.shape))
    layout = Layout.of(by_position(mask_TBL), objective.chunk)
    pieces = Chunk(
        layout.cut(by_position(unrolled.hidden_TBLD)),
        None if unrolled.features_TBLD is None else layout.cut(by_position(unrolled.features_TBLD)),
        layout.cut(out.features_BLD[None])[:, 0],
        layout.cut(shift(batch.tokens_BL, 1)[None])[:, 0],
        layout.cut(by_position(mask_TBL)),
        layout.cut(by_position(learns_TBL)),
        jax.random.split(jax.random.key(0) if draw_key is None else draw_key, layout.chunks),
        None if batch.stored is None else jax.tree.map(lambda x: layout.cut(x[None])[:, 0], batch.stored.likely),
    )
    in_passing = learning and objective.additive
    if in_passing:

        def bind(lent: Any) -> tuple[Judge, Worth]:
            shared, frozen, vocab_U, rates = lent
            held = teacher._replace(frozen=frozen, vocab_U=vocab_U)
            return functools.partial(judge_chunk, drafter, shared, held, objective), functools.partial(worth, rates)

        rates = loss_rates(objective, mask_TBL, learns_TBL, axes)
        lent = (shared, teacher.frozen, teacher.vocab_U, rates)
        part, judged = judge_in_passing(bind, lent, params, pieces)
    else:
        judge = functools.partial(judge_chunk, drafter, shared, teacher, objective)
        part, judged = jnp.zeros(()), judge_again(judge, params, pieces)
    judged = jax.tree.map(lambda x: by_pair(layout.lay(x)), judged)
    own = totals(judged, mask_TBL, learns_TBL, objective)
    sums = across(jax.lax.stop_gradient(own) if learning else own, axes)
    if learning and not in_passing:
        slopes = jax.grad(lambda loss_TM: sums._replace(loss_TM=loss_TM).mean_loss(objective))(sums.loss_TM)
        part = sum((jnp.vdot(slopes[name], own.loss_TM[name]) for name in slopes), part)
    return part, sums


def across(tree: Any, axes: tuple[str, ...]) -> Any:
    """Sums over the devices of `axes`."""
    return jax.tree.map(lambda x: jax.lax.psum(x, axes), tree) if axes else tree


def loss_rates(
    objective: Objective, mask_TBL: Array, learns_TBL: Array, axes: tuple[str, ...] = ()
) -> dict[str, Array]:
    """What one token of each draft step adds to the objective for each unit of a loss: name -> `[T]`."""
    rates = {}
    for name, weight in objective.weights:
        count_T = across(jnp.sum(mask_TBL if name in FEATURE_LOSSES else learns_TBL, axis=(1, 2)), axes)
        steps = steps_of(name, objective)
        per_step_T = jnp.asarray(steps + (0.0,) * (objective.steps - len(steps)), jnp.float32)
        rates[name] = weight * per_step_T / jnp.maximum(count_T, 1)
    return rates


def worth(rates: dict[str, Array], piece: Chunk, judged: Judged) -> Array:
    """A chunk's part of an additive objective."""
    total = jnp.zeros(())
    for name, rate_T in rates.items():
        trained_TBC = piece.mask_TBC if name in FEATURE_LOSSES else piece.learns_TBC
        total += jnp.sum(rate_T[:, None, None] * jnp.where(trained_TBC, judged.loss_TBCM[name][..., 0], 0.0))
    return total


def totals(judged: Judged, mask_TBL: Array, learns_TBL: Array, objective: Objective) -> Sums:
    """The sums over all trained positions."""
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


def gradients(
    target: Target,
    drafter: Learner,
    objective: Objective,
    frozen: Params,
    params: Params,
    batch: Batch,
    key: Array,
    vocab_U: Array | None = None,
    axes: tuple[str, ...] = (),
) -> tuple[Params, Sums]:
    """The gradient of the mean loss of one global batch, and the sums behind it.

    With `axes` every device of a `shard_map` or `pmap` differentiates its own rows; the sums over devices are here.
    """

    def loss(params: Params) -> tuple[Array, Sums]:
        arguments = (target, drafter, frozen, params, batch, key, objective, vocab_U)
        return judged_batch(*arguments, learning=True, axes=axes)

    gradient, sums = jax.grad(loss, has_aux=True)(params)
    return sum_gradients(gradient, axes), sums


def update(optimizer: optax.GradientTransformation, state: TrainState, gradient: Params, loss: Array) -> TrainState:
    """The state after a step; if the loss is not finite, weights and optimizer as they were.

    So a caller that sees the loss and stops has lost nothing.
    """
    updates, moments = optimizer.update(gradient, state.optimizer, state.params)
    fine = jnp.isfinite(loss)
    params, moments = jax.tree.map(
        lambda new, old: jnp.where(fine, new, old),
        (optax.apply_updates(state.params, updates), moments),
        (state.params, state.optimizer),
    )
    return TrainState(params, moments, state.step + 1, state.key)


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

    The loss is normalised by the tokens of the whole batch over the whole mesh.
    """
    key = jax.random.fold_in(state.key, state.step)
    gradient, sums = gradients(target, drafter, objective, frozen, state.params, batch, key, vocab_U)
    loss = sums.mean_loss(objective)
    return update(optimizer, state, gradient, loss), loss, sums


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
    return judged_batch(target, drafter, frozen, params, batch, None, objective, vocab_U, learning=False)[1]


def init_state(
    drafter: Learner,
    optimizer: optax.GradientTransformation,
    key: Array,
    shared: SharedTables | None = None,
    params: Params = None,
) -> TrainState:
    """The weights `params`, or fresh ones, and a fresh optimizer.

    `shared` is for drafters that begin with copies of the target's tables.
    """
    init_key, train_key = jax.random.split(key)
    params = drafter.init_params(init_key, shared) if params is None else params
    return TrainState(params, optimizer.init(params), jnp.int32(0), train_key)
