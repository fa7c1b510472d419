"""The loss of one batch: the target's output, the draft steps from every position, their scores."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Packed, Params, SharedTables, Target, TargetOutput, Unrolled, UnrollInputs
from jaxspec.data.target_outputs import restore
from jaxspec.distillation.chunks import Chunk, Layout, by_pair, by_position, shift
from jaxspec.distillation.metrics import StepMasks, Sums, sum_devices, sum_metrics
from jaxspec.distillation.objective import Objective
from jaxspec.distillation.scoring import (
    Heads,
    Outputs,
    additive_loss,
    find_learnable,
    loss_rates,
    read_heads,
    score_chunks,
)
from jaxspec.distillation.task import Batch, Frozen, StepInputs, StepKeys, Task, read_tables
from jaxspec.parallel.rows import gather_width


def batch_loss(
    task: Task,
    frozen: Frozen,
    params: Params,
    batch: Batch,
    key: Array | None,
    *,
    learning: bool,
    axes: tuple[str, ...] = (),
) -> tuple[Array, Sums]:
    """Returns what to differentiate by `params`, and the sums behind the loss. Without `key` there is no noise.

    The target runs once and its head once a position, however many draft steps are unrolled. Logits of target and draft
    live for `objective.chunk` positions at a time; none of shape `[B, L, V]` is ever made. With a draft vocabulary the
    drafter scores its tokens alone, and positions whose likeliest token is not among them train no logits (EAGLE-3);
    acceptance counts what is missing as rejected. For `learning` see `score_batch`.

    In a `shard_map` or `pmap` whose devices hold some rows each, `axes` are the mesh axes over which they are spread.
    """
    out = read_target(task.target, frozen.params, batch)
    inputs = StepInputs(batch, out, None if key is None else split_key(key, axes))
    # Gathered once, outside the loop over chunks, which would gather them for every chunk.
    params = gather_width(params)
    unrolled = unroll_batch(task, params, read_tables(task.target, frozen), inputs, axes)
    heads = read_heads(task, frozen._replace(params=gather_width(frozen.params)), batch)
    return score_batch(task, task.drafter.scoring(params), heads, inputs, unrolled, learning=learning, axes=axes)


def split_key(key: Array, axes: tuple[str, ...] = ()) -> StepKeys:
    """Returns the keys of one step, alike on all devices but for those of sampled losses."""
    noise, slots, losses = jax.random.split(key, 3)
    if axes:
        losses = jax.random.fold_in(losses, jax.lax.axis_index(axes))
    return StepKeys(noise, slots, losses)


def read_target(target: Target, params: Params, batch: Batch) -> TargetOutput:
    """Returns the frozen target's output for a batch: of its forward pass, or as it is stored."""
    if batch.stored is not None:
        return restore(batch.stored, target.shared_tables(params).embed_VD.dtype)
    mask = Packed(batch.segments_BL)
    return jax.lax.stop_gradient(target.forward(params, batch.tokens_BL, batch.positions_BL, mask))


def unroll_batch(
    task: Task, params: Params, shared: SharedTables, inputs: StepInputs, axes: tuple[str, ...] = ()
) -> Unrolled:
    """Returns the draft steps from every position of a batch."""
    batch, keys, steps = inputs.batch, inputs.keys, task.objective.steps
    read_BLD, rows, slot_keys_B = inputs.target.read_BLD, batch.tokens_BL.shape[0], None
    if keys is not None:
        read_BLD = add_noise(read_BLD, batch.segments_BL, row_keys(keys.noise, rows, axes), task.objective.noise)
        slot_keys_B = row_keys(keys.slots, rows, axes)
    mask = Packed(batch.segments_BL)
    unroll_inputs = UnrollInputs(batch.tokens_BL, read_BLD, batch.positions_BL, mask, slot_keys_B)
    return task.drafter.unroll(params, shared, unroll_inputs, steps)


def add_noise(features_BLD: Array, segments_BL: Array, keys_B: Array, noise: float) -> Array:
    """Adds EAGLE's feature noise: `U(-1/2, 1/2) * noise * 512 / length` of the token's own document."""
    if not noise:
        return features_BLD
    same = segments_BL[:, :, None] == segments_BL[:, None, :]
    scale_BL = noise * 512.0 / jnp.maximum(jnp.sum(same, axis=-1), 1)
    u = jax.vmap(lambda key: jax.random.uniform(key, features_BLD.shape[1:], jnp.float32, -0.5, 0.5))(keys_B)
    return (features_BLD + u * scale_BL[..., None]).astype(features_BLD.dtype)


def row_keys(key: Array, rows: int, axes: tuple[str, ...] = ()) -> Array:
    """Returns a key for each row `[B]`, the same however the rows are spread; `axes` as in `batch_loss`."""
    first = jax.lax.axis_index(axes) * rows if axes else 0
    return jax.vmap(functools.partial(jax.random.fold_in, key))(first + jnp.arange(rows))


def score_batch(
    task: Task,
    scoring: Params,
    heads: Heads,
    inputs: StepInputs,
    unrolled: Unrolled,
    *,
    learning: bool,
    axes: tuple[str, ...] = (),
) -> tuple[Array, Sums]:
    """Returns what to differentiate, and the sums of all rows: the draft steps compared with the target's logits.

    The first is 0 unless `learning`, and the second constant if so. The first's gradient, summed over the devices of
    `axes`, is that of `Sums.mean_loss`; nothing but constants in it is exchanged between those devices, so that each
    can differentiate it by itself.
    """
    objective = task.objective
    masks = find_masks(task, heads, inputs, unrolled)
    layout = Layout.of(by_position(masks.trained_TBL), objective.chunk)
    chunks = cut_chunks(layout, inputs, unrolled, masks)
    passing = learning and objective.additive
    loss = jnp.zeros(())
    if passing:
        rates, outputs = loss_rates(objective, masks, axes), Outputs(chunks.hidden_TBCD, chunks.features_TBCD)
        constant = chunks._replace(hidden_TBCD=None, features_TBCD=None)
        scored: Any = additive_loss(task, scoring, outputs, heads, rates, constant)
        loss, metrics = scored
    else:
        metrics = score_chunks(task, scoring, heads, chunks)
    metrics = jax.tree.map(lambda x: by_pair(layout.join(x)), metrics)
    own = sum_metrics(metrics, masks, objective)
    sums = sum_devices(jax.lax.stop_gradient(own) if learning else own, axes)
    if learning and not passing:
        # The chain rule at the sums of all devices: this device's sums times the loss's slope by each.
        slopes = jax.grad(lambda loss_TM: sums._replace(loss_TM=loss_TM).mean_loss(objective))(sums.loss_TM)
        loss = sum((jnp.vdot(slopes[name], own.loss_TM[name]) for name in slopes), loss)
    return loss, sums


def step_masks(batch: Batch, objective: Objective) -> Array:
    """Returns `[T, B, L]`: whether the pair at position `i` is trained at draft step `j`.

    It predicts the token at `i + j + 2` from the target's feature at `i + j + 1`, so both must lie in the document.
    """
    masks = []
    for j in range(objective.steps):
        same = (shift(batch.segments_BL, j + 2) == batch.segments_BL) & (batch.segments_BL > 0)
        wanted = shift(batch.loss_mask_BL, 0 if objective.reference_mask else j + 2)
        masks.append(same & wanted.astype(bool))
    return jnp.stack(masks)


def find_masks(task: Task, heads: Heads, inputs: StepInputs, unrolled: Unrolled) -> StepMasks:
    """Returns where each draft step counts: what was unrolled and, for logits, what the drafter can score."""
    mask_TBL = step_masks(inputs.batch, task.objective)
    if unrolled.kept_TBL is not None:
        mask_TBL &= unrolled.kept_TBL
    learnable_BL = find_learnable(task.target, heads, inputs, task.objective.chunk)
    return StepMasks(mask_TBL, mask_TBL & by_pair(jnp.broadcast_to(learnable_BL, mask_TBL.shape)))


def cut_chunks(layout: Layout, inputs: StepInputs, unrolled: Unrolled, masks: StepMasks) -> Chunk:
    """Returns the chunks of a batch, stacked on a leading axis `X`."""
    batch, keys, features_TBLD = inputs.batch, inputs.keys, unrolled.features_TBLD
    return Chunk(
        layout.cut(by_position(unrolled.hidden_TBLD)),
        None if features_TBLD is None else layout.cut(by_position(features_TBLD)),
        layout.cut_rows(inputs.target.features_BLD),
        layout.cut_rows(shift(batch.tokens_BL, 1)),
        layout.cut(by_position(masks.trained_TBL)),
        layout.cut(by_position(masks.logits_TBL)),
        jax.random.split(jax.random.key(0) if keys is None else keys.losses, layout.chunks),
        *jax.tree.map(layout.cut_rows, (batch.likely, batch.whole)),
    )
