"""The training step: frozen target, drafter and optimizer in one pure function, which all compilers wrap."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxspec.base import Array, Learner, Params, SharedTables
from jaxspec.distillation.loss import batch_loss
from jaxspec.distillation.metrics import Sums
from jaxspec.distillation.task import Batch, Frozen, Task, TrainState
from jaxspec.parallel.rows import sum_gradients

GradientFunction = Callable[[Task, Frozen, Params, Batch, Array], tuple[Params, Sums]]
"""`(task, frozen, params, batch, key) -> (gradient of the mean loss of the global batch, the sums behind it)`."""


def loss_gradient(
    task: Task, frozen: Frozen, params: Params, batch: Batch, key: Array, axes: tuple[str, ...] = ()
) -> tuple[Params, Sums]:
    """Returns the gradient of the mean loss of one global batch, and the sums behind it.

    With `axes` every device of a `shard_map` or `pmap` differentiates its own rows; the sums over devices are here.
    """

    def loss(params: Params) -> tuple[Array, Sums]:
        return batch_loss(task, frozen, params, batch, key, learning=True, axes=axes)

    gradient, sums = jax.grad(loss, has_aux=True)(params)
    return sum_gradients(gradient, axes), sums


def train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    frozen: Frozen,
    state: TrainState,
    batch: Batch,
    *,
    gradient_of: GradientFunction = loss_gradient,
) -> tuple[TrainState, Array]:
    """Returns the state after one update of the drafter on one global batch, and the batch's mean loss.

    The loss is normalised by the tokens of the whole batch over the whole mesh. `gradient_of` is how the gradient is
    computed: by default on the arrays as they are, in `compilers` on each device's own rows.
    """
    key = jax.random.fold_in(state.key, state.step)
    gradient, sums = gradient_of(task, frozen, state.params, batch, key)
    loss = sums.mean_loss(task.objective)
    return update(optimizer, state, gradient, loss), loss


def update(optimizer: optax.GradientTransformation, state: TrainState, gradient: Params, loss: Array) -> TrainState:
    """Returns the state after a step; if the loss is not finite, weights and optimizer as they were."""
    updates, moments = optimizer.update(gradient, state.optimizer, state.params)
    # A caller that sees the loss and stops has then lost nothing.
    fine = jnp.isfinite(loss)
    params, moments = jax.tree.map(
        lambda new, old: jnp.where(fine, new, old),
        (optax.apply_updates(state.params, updates), moments),
        (state.params, state.optimizer),
    )
    return TrainState(params, moments, state.step + 1, state.key)


def eval_step(task: Task, frozen: Frozen, params: Params, batch: Batch) -> Sums:
    """Returns the sums of one held-out batch, without noise."""
    return batch_loss(task, frozen, params, batch, None, learning=False)[1]


def init_state(
    drafter: Learner,
    optimizer: optax.GradientTransformation,
    key: Array,
    shared: SharedTables | None = None,
    params: Params = None,
) -> TrainState:
    """Returns the state of step 0: the weights `params`, or fresh ones, and a fresh optimizer.

    `shared` is for drafters that begin with copies of the target's tables.
    """
    init_key, train_key = jax.random.split(key)
    params = drafter.init_params(init_key, shared) if params is None else params
    return TrainState(params, optimizer.init(params), jnp.int32(0), train_key)
