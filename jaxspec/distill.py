"""Distillation: the frozen target and the drafter's update in one program; losses as global (sum, count)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxspec.base import Array, Borrowed, Params, Target
from jaxspec.layers import segment_mask
from jaxspec.losses import FEATURE_LOSSES, agreement, expected_acceptance, soft_cross_entropy

LOGIT_LOSSES = {"soft_cross_entropy": soft_cross_entropy}


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: `sum_name weight * mean over masked tokens of loss_name`, summed over draft steps.

    EAGLE (section 4.2): one step, SmoothL1 on features with weight 1, soft cross-entropy on tokens with weight 0.1.
    """

    steps: int = 1
    """Draft steps `T` unrolled from every position; more than one is HASS's context alignment."""
    weights: tuple[tuple[str, float], ...] = (("smooth_l1", 1.0), ("soft_cross_entropy", 0.1))
    noise: float = 0.2
    """Width of the uniform noise on the input features: `U(-1/2, 1/2) * noise * 512 / document length`."""
    reference_mask: bool = False
    """Gate each pair by its *feature's* token as the released EAGLE trainer does, which never trains the first pair of
    an answer, instead of by the token it predicts."""
    chunk: int = 128
    """Positions whose logits are alive at once."""

    def __post_init__(self) -> None:
        known = {**FEATURE_LOSSES, **LOGIT_LOSSES}
        for name, _ in self.weights:
            if name not in known:
                raise ValueError(f"loss {name!r} is unknown: choose from {', '.join(sorted(known))}")
        if self.steps < 1 or self.chunk < 1:
            raise ValueError(f"steps={self.steps} and chunk={self.chunk} must be at least 1")


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


class Sums(NamedTuple):
    """Totals over tokens, by draft step; to be divided by their counts after all batches and devices are added."""

    loss_T: dict[str, Array]
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

    def mean_loss(self, objective: Objective) -> Array:
        """The objective: each step's weighted losses over that step's tokens, summed over the steps it trains."""
        mean_T = sum(weight * self.loss_T[name] for name, weight in objective.weights) / jnp.maximum(self.count_T, 1)
        return jnp.sum(mean_T[: objective.steps])

    def summary(self, objective: Objective) -> dict[str, float]:
        """Means: the loss, then of the first draft step its parts, agreement and acceptance, and simulated tau.

        Simulated tau is `1 + sum_t mean(product of the first t acceptances)`, a chain of `T` drafts whose context is
        the text itself: expected acceptances stand for temperature 1, agreements for greedy decoding.
        """
        count_T = jnp.maximum(self.count_T, 1)
        parts = {name: float(value[0] / count_T[0]) for name, value in self.loss_T.items()}
        return {
            "loss": float(self.mean_loss(objective)),
            **parts,
            "top1_agreement": float(self.agree_T[0] / count_T[0]),
            "expected_acceptance": float(self.accept_T[0] / count_T[0]),
            "simulated_tau": float(1 + jnp.sum(self.chain_sampled_T / count_T)),
            "simulated_tau_greedy": float(1 + jnp.sum(self.chain_greedy_T / count_T)),
            "tokens": int(self.count_T[0]),
        }


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
    target: Target, drafter: Any, frozen: Params, params: Params, batch: Batch, key: Array | None, objective: Objective
) -> Sums:
    """All sums of one batch; differentiate its `mean_loss`. `key` draws the input noise; None adds none.

    Logits of target and draft live for `chunk` positions at a time; none of shape `[B, L, V]` is ever made.
    """
    out = target.forward(frozen, batch.tokens_BL, batch.positions_BL, segment_mask(batch.segments_BL))
    features_BLD = jax.lax.stop_gradient(out.features_BLD)
    noisy = features_BLD if key is None else add_noise(features_BLD, batch.segments_BL, key, objective.noise)
    borrowed: Borrowed = jax.lax.stop_gradient(target.borrowed(frozen))
    hidden_TBLD = drafter.unroll(
        params,
        borrowed,
        shift(batch.tokens_BL, 1),
        noisy,
        batch.positions_BL,
        segment_mask(batch.segments_BL),
        objective.steps,
    )
    wanted_TBLD = jnp.stack([shift(features_BLD, j + 1) for j in range(objective.steps)])

    @jax.checkpoint
    def chunk_sums(piece: tuple[Array, Array, Array]) -> Sums:
        return jax.lax.cond(jnp.any(piece[2]), score, lambda *piece: zeros(score, *piece), *piece)

    def score(hidden: Array, wanted: Array, mask_TBC: Array) -> Sums:
        flat = (-1, hidden.shape[2], hidden.shape[3])
        draft = drafter.logits(params, borrowed, hidden.reshape(flat)).reshape(*hidden.shape[:3], -1)
        teacher = jax.lax.stop_gradient(target.logits(frozen, wanted.reshape(flat))).reshape(draft.shape)
        losses = {}
        for name, _ in objective.weights:
            value = (
                FEATURE_LOSSES[name](hidden, wanted) if name in FEATURE_LOSSES else LOGIT_LOSSES[name](draft, teacher)
            )
            losses[name] = jnp.sum(jnp.where(mask_TBC, value, 0.0), axis=(1, 2))
        draft = jax.lax.stop_gradient(draft)
        agree, accept = agreement(draft, teacher), expected_acceptance(draft, teacher)
        chain = jnp.cumprod(mask_TBC, axis=0)

        def total(x_TBC: Array) -> Array:
            return jnp.sum(x_TBC, axis=(1, 2))

        return Sums(
            losses,
            total(agree * mask_TBC),
            total(accept * mask_TBC),
            total(jnp.cumprod(agree, axis=0) * chain),
            total(jnp.cumprod(accept, axis=0) * chain),
            total(mask_TBC.astype(jnp.int32)),
        )

    pieces = in_chunks(hidden_TBLD, wanted_TBLD, step_masks(batch, objective), objective.chunk)
    parts = jax.lax.map(chunk_sums, pieces)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)


def zeros(like: Any, *arguments: Any) -> Any:
    """Zeros of the shape that `like(*arguments)` has."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(like, *arguments))


def in_chunks(hidden_TBLD: Array, wanted_TBLD: Array, mask_TBL: Array, chunk: int) -> tuple[Array, Array, Array]:
    """The three as `[chunks, T, B, chunk, ...]`, each row's trained positions first, so that the last chunks are empty.

    A chunk without a trained position is skipped: what teaches nothing (the user's turns, padding) costs no logits.
    """
    order_BL = jnp.argsort(~jnp.any(mask_TBL, axis=0), axis=1, stable=True)
    length = order_BL.shape[1]
    chunk = min(chunk, length)
    missing = -length % chunk

    def cut(x_TBL: Array) -> Array:
        trailing = x_TBL.shape[3:]
        order = order_BL.reshape(1, *order_BL.shape, *(1 for _ in trailing))
        x_TBL = jnp.take_along_axis(x_TBL, order, axis=2)
        x_TBL = jnp.pad(x_TBL, [(0, 0), (0, 0), (0, missing), *((0, 0) for _ in trailing)])
        split = x_TBL.reshape(*x_TBL.shape[:2], -1, chunk, *trailing)
        return jnp.moveaxis(split, 2, 0)

    return cut(hidden_TBLD), cut(wanted_TBLD), cut(mask_TBL)


def train_step(
    target: Target,
    drafter: Any,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    frozen: Params,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Array, Sums]:
    """One update of the drafter on one global batch. Returns the new state, the mean loss, and the sums behind it.

    The loss is normalised by the tokens of the whole batch over the whole mesh. If it is not finite the state is
    kept as it was, so the caller that sees the loss and stops has lost nothing.
    """
    key = jax.random.fold_in(state.key, state.step)

    def loss(params: Params) -> tuple[Array, Sums]:
        sums = loss_sums(target, drafter, frozen, params, batch, key, objective)
        return sums.mean_loss(objective), sums

    (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.optimizer, state.params)
    fine = jnp.isfinite(value)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(fine, new, old), (params, opt_state), (state.params, state.optimizer)
    )
    return TrainState(params, opt_state, state.step + 1, state.key), value, sums


def eval_step(target: Target, drafter: Any, objective: Objective, frozen: Params, params: Params, batch: Batch) -> Sums:
    """The sums of one held-out batch, without noise."""
    return loss_sums(target, drafter, frozen, params, batch, None, objective)


def init_state(drafter: Any, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """Fresh weights and optimizer."""
    init_key, train_key = jax.random.split(key)
    params = drafter.init_params(init_key)
    return TrainState(params, optimizer.init(params), jnp.int32(0), train_key)
