"""Draft steps compared with the target's logits, a chunk of positions at a time.

A chunk of *positions* bounds memory as a chunk of the vocabulary would, and needs no online softmax. All arrays that
the loop over chunks reads are its arguments: `scoring`, the weights it differentiates (`Learner.scoring`), and `heads`,
`rates` and `chunks`, which are constant.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxspec.base import Array, Params, SharedTables, Target
from jaxspec.data.target_outputs import lump
from jaxspec.distillation.chunks import Chunk, Layout, skip_empty
from jaxspec.distillation.metrics import ChunkMetrics, StepMasks, sum_devices
from jaxspec.distillation.objective import Objective, steps_of
from jaxspec.distillation.task import Batch, Frozen, StepInputs, Task, read_tables
from jaxspec.losses import FEATURE_LOSSES, Scores, agreement, expected_acceptance, logit_loss
from jaxspec.losses.loss import log_probs, of_token
from jaxspec.parallel.mesh import AXIS_RULES, splits
from jaxspec.sampling import argmax

Rates = dict[str, Array]
"""Name of a loss -> `[T]`, see `loss_rates`."""


class Heads(NamedTuple):
    """The frozen arrays that logits are computed with."""

    shared: SharedTables
    """The rows of the target's LM head that the drafter scores, for a drafter without its own; no embedding."""
    target: Params
    """`Target.scoring`: the target's LM head; its rows of the draft vocabulary where the rest is stored."""
    vocab_U: Array | None
    """As `Frozen`'s."""


def read_heads(task: Task, frozen: Frozen, batch: Batch) -> Heads:
    """Returns what the loop over chunks reads of the frozen arrays, and no more: what is in here is gathered.

    Of a batch that holds the facts of the whole distribution, the target scores the draft vocabulary alone.
    """
    shared = read_tables(task.target, frozen)
    own_head = task.drafter.vocab is not None
    tables = shared._replace(embed_VD=None, **({"head_VD": None} if own_head else {}))
    head, ids = task.target.scoring(frozen.params), frozen.vocab_U
    if ids is not None and batch.whole is not None:
        head = jax.tree.map(lambda table_V: table_V[ids], head)
    return Heads(tables, head, ids)


class TargetScores(NamedTuple):
    """The target's side of a chunk, the same for all draft steps."""

    logits_BCV: Array
    """Of the tokens that the drafter scores, or of the likeliest and all others as one."""
    token_BC: Array
    """Place of the label, the next token of the text, among these; -1 where it is not."""
    gold_BC: Array
    """Its probability."""
    rest_BC: Array | None
    """Log of the mass outside a draft vocabulary."""
    lumped_BC: Array | None
    """Log of the mass of the tokens taken as one."""


def score_target(target: Target, heads: Heads, chunk: Chunk) -> TargetScores:
    """Returns the target's logits at a chunk, computed once for all draft steps, or its stored likeliest tokens."""
    token_BC, rest_BC, lumped_BC = chunk.token_BC, None, None
    if (likely := chunk.likely) is None:
        logits_BCV = jax.lax.stop_gradient(target.logits(heads.target, chunk.target_features_BCD))
    else:
        logits_BCV, lumped_BC = jnp.concatenate([likely.logp_BLR, likely.rest_BL1], axis=-1), likely.rest_BL1[..., 0]
        same_BCR = likely.token_BLR == token_BC[..., None]
        token_BC = jnp.where(jnp.any(same_BCR, axis=-1), jnp.argmax(same_BCR, axis=-1), -1)
    if (ids := heads.vocab_U) is not None:
        if chunk.whole is None:
            everything = jax.nn.logsumexp(logits_BCV, axis=-1)
            logits_BCV = logits_BCV[..., ids]
        else:
            everything = chunk.whole.total_BL1[..., 0]
        # At least 1e-7 is left outside: rounding may leave none, whose log is -inf.
        inside = jnp.minimum(jax.nn.logsumexp(logits_BCV, axis=-1) - everything, -1e-7)
        rest_BC = jnp.log(-jnp.expm1(inside))
        known, place = _find(ids, token_BC)
        token_BC = jnp.where(known, place, -1)
    return TargetScores(logits_BCV, token_BC, _gold(logits_BCV, token_BC), rest_BC, lumped_BC)


def score_chunk(task: Task, scoring: Params, heads: Heads, chunk: Chunk) -> ChunkMetrics:
    """Returns losses and measures of every draft step at a chunk.

    With `likely` in the chunk both distributions are those of its tokens and of all others taken as one.
    """
    target = score_target(task.target, heads, chunk)
    # A Python loop: what the losses need of the target's logits alone is then computed once for all steps.
    steps = [score_step(task, scoring, heads, chunk, target, step) for step in range(len(chunk.mask_TBC))]
    return jax.tree.map(lambda *x: jnp.stack(x), *steps)


def score_step(
    task: Task, scoring: Params, heads: Heads, chunk: Chunk, target: TargetScores, step: int
) -> ChunkMetrics:
    """Returns losses and measures of one draft step at a chunk, without the axis `T`."""
    draft = task.drafter.logits(scoring, heads.shared, chunk.hidden_TBCD[step], step)
    if chunk.likely is not None:
        draft = lump(draft, chunk.likely.token_BLR)
    key = jax.random.fold_in(chunk.key, step)
    scores = Scores(draft, target.logits_BCV, target.token_BC, key, target.rest_BC, target.lumped_BC)
    losses = {}
    for name, _ in task.objective.weights:
        if name not in FEATURE_LOSSES:
            losses[name] = logit_loss(name).parts(scores)
        elif chunk.features_TBCD is None:
            raise ValueError(f"loss {name!r} needs a drafter that predicts features: leave it out")
        else:
            losses[name] = FEATURE_LOSSES[name](chunk.features_TBCD[step], chunk.target_features_BCD)[..., None]
    draft = jax.lax.stop_gradient(draft)
    agree = agreement(draft, target.logits_BCV) * chunk.logit_mask_TBC[step]
    accept = expected_acceptance(draft, target.logits_BCV, target.rest_BC)
    return ChunkMetrics(losses, agree, accept, _gold(draft, target.token_BC), target.gold_BC)


def chunk_loss(rates: Rates, chunk: Chunk, metrics: ChunkMetrics) -> Array:
    """Returns a chunk's part of an additive objective."""
    total = jnp.zeros(())
    for name, rate_T in rates.items():
        trained_TBC = chunk.mask_TBC if name in FEATURE_LOSSES else chunk.logit_mask_TBC
        total += jnp.sum(rate_T[:, None, None] * jnp.where(trained_TBC, metrics.loss_TBCM[name][..., 0], 0.0))
    return total


def loss_rates(objective: Objective, masks: StepMasks, axes: tuple[str, ...] = ()) -> Rates:
    """Returns what one token of each draft step adds to the objective for each unit of a loss."""
    rates = {}
    for name, weight in objective.weights:
        mask_TBL = masks.trained_TBL if name in FEATURE_LOSSES else masks.logits_TBL
        count_T = sum_devices(jnp.sum(mask_TBL, axis=(1, 2)), axes)
        steps = steps_of(name, objective)
        per_step_T = jnp.asarray(steps + (0.0,) * (objective.steps - len(steps)), jnp.float32)
        rates[name] = weight * per_step_T / jnp.maximum(count_T, 1)
    return rates


def find_learnable(target: Target, heads: Heads, inputs: StepInputs, chunk: int) -> Array:
    """Returns `[B, L]`: whether the target's likeliest token after a feature is one that the drafter scores."""
    ids, features_BLD = heads.vocab_U, inputs.target.features_BLD
    if ids is None:
        return jnp.ones(features_BLD.shape[:2], bool)
    if inputs.batch.whole is not None:
        return _find(ids, inputs.batch.whole.token_BL1[..., 0])[0]

    def find(features_BCD: Array) -> Array:
        return _find(ids, argmax(target.logits(heads.target, features_BCD)))[0]

    layout = Layout.of(jnp.ones((1, *features_BLD.shape[:2]), bool), chunk)
    return layout.join(jax.lax.map(find, layout.cut_rows(features_BLD))[:, None])[0]


def _gold(logits: Array, token: Array) -> Array:
    """The probability of the label, 0 where that is -1."""
    return jnp.where(token < 0, 0.0, jnp.exp(of_token(log_probs(logits), token)))


def _find(ids_U: Array, token: Array) -> tuple[Array, Array]:
    """Returns whether a token is among ascending ids, and its place there."""
    place = jnp.minimum(jnp.searchsorted(ids_U, token), ids_U.shape[0] - 1)
    return ids_U[place] == token, place


def score_chunks(task: Task, scoring: Params, heads: Heads, chunks: Chunk) -> ChunkMetrics:
    """Returns the metrics of all chunks `[X, T, B, C, ...]`; the backward pass scores each chunk a second time.

    For losses whose weights depend on what was drafted (TVD++ standardised over the batch, position weights), and for
    evaluation. Chunks without a trained token are skipped.
    """
    score = jax.checkpoint(functools.partial(skip_empty, functools.partial(score_chunk, task, scoring, heads)))
    return jax.lax.map(score, chunks)


class Outputs(NamedTuple):
    """The outputs of the draft steps, cut to chunks: what a loss is differentiated by besides `scoring`."""

    hidden_XTBCD: Array
    features_XTBCD: Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def additive_loss(
    task: Task, scoring: Params, outputs: Outputs, heads: Heads, rates: Rates, chunks: Chunk
) -> tuple[Array, ChunkMetrics]:
    """Returns the sum of `chunk_loss` over all chunks, and their metrics, which are constant.

    For objectives that are sums over tokens with weights known beforehand. The gradient is computed chunk by chunk on
    the way there, while the logits are at hand: the backward pass computes no logits again, and what is kept is as
    large as the draft steps' outputs. Half the time of an EAGLE step on a CPU, against `score_chunks`. Outputs within
    `chunks` are ignored: those of `outputs` count. Chunks without a trained token are skipped.
    """
    return _loss_and_gradient(task, scoring, outputs, heads, rates, chunks)[0]


def _loss_and_gradient(
    task: Task, scoring: Params, outputs: Outputs, heads: Heads, rates: Rates, chunks: Chunk
) -> tuple[tuple[Array, ChunkMetrics], tuple[Params, Outputs]]:
    """Returns `additive_loss` and its gradient by `scoring` and `outputs`."""
    chunks = chunks._replace(hidden_TBCD=outputs.hidden_XTBCD, features_TBCD=outputs.features_XTBCD)
    (loss, by_scoring), (metrics, by_outputs) = _scan_own_rows(task, scoring, heads, rates, chunks)
    return (loss, metrics), (by_scoring, Outputs(*by_outputs))


def _scale_gradient(
    task: Task, gradient: tuple[Params, Outputs], cotangents: tuple[Array, ChunkMetrics]
) -> tuple[Any, ...]:
    """Returns the gradient times what arrives for the loss; the frozen arrays have none."""
    by, _ = cotangents
    return *jax.tree.map(lambda g: (by * g).astype(g.dtype), gradient), None, None, None


additive_loss.defvjp(_loss_and_gradient, _scale_gradient)


def _chunk_value(
    scoring: Params, hidden: Array, features: Array | None, task: Task, heads: Heads, rates: Rates, chunk: Chunk
) -> tuple[Array, ChunkMetrics]:
    """Returns `chunk_loss` of a chunk with these outputs, and its metrics."""
    chunk = chunk._replace(hidden_TBCD=hidden, features_TBCD=features)
    metrics = score_chunk(task, scoring, heads, chunk)
    return chunk_loss(rates, chunk, metrics), metrics


_chunk_gradient = jax.value_and_grad(_chunk_value, argnums=(0, 1, 2), has_aux=True)


def _scan_chunks(task: Task, scoring: Params, heads: Heads, rates: Rates, chunks: Chunk) -> Any:
    """Returns `((loss, gradient by scoring), (metrics, gradient by the outputs))`: sums, and of each chunk."""

    def add(carry: tuple[Array, Params], chunk: Chunk) -> tuple[Any, Any]:
        differentiate = functools.partial(_differentiate, task, scoring, heads, rates)
        (loss, metrics), (by_scoring, *by_outputs) = skip_empty(differentiate, chunk)
        total, gradient = carry
        return (total + loss, jax.tree.map(jnp.add, gradient, by_scoring)), (metrics, by_outputs)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), scoring)
    return jax.lax.scan(add, (jnp.zeros(()), zeros), chunks)


def _differentiate(task: Task, scoring: Params, heads: Heads, rates: Rates, chunk: Chunk) -> Any:
    return _chunk_gradient(scoring, chunk.hidden_TBCD, chunk.features_TBCD, task, heads, rates, chunk)


def _scan_own_rows(task: Task, scoring: Params, heads: Heads, rates: Rates, chunks: Chunk) -> Any:
    """Returns `_scan_chunks`; under a mesh that spreads rows and no vocabulary each device scans its own rows.

    The sums of the devices then meet once: left alone, XLA exchanges the gradient of an LM head for every chunk.
    """
    mesh, devices, rows = jax.sharding.get_abstract_mesh(), splits("batch"), chunks.token_BC.shape[1]
    if mesh.manual_axes or devices == 1 or rows % devices or splits("vocab") > 1:
        return _scan_chunks(task, scoring, heads, rates, chunks)
    over = AXIS_RULES["batch"]
    by_chunk, by_step = P(None, over), P(None, None, over)

    def scan(*arrays: Any) -> tuple[Any, Any]:
        sums, each = _scan_chunks(task, *arrays)
        return jax.tree.map(lambda x: x[None], sums), each

    specs: dict[str, Any] = dict.fromkeys(Chunk._fields, by_step)
    specs |= {"key": P(), "target_features_BCD": by_chunk, "token_BC": by_chunk}
    specs |= {"likely": by_chunk, "whole": by_chunk}
    specs |= {name: None for name, x in chunks._asdict().items() if x is None}
    # Arguments, never closures: an array of another placement that the body closed over would be refused.
    in_specs = (P(), P(), P(), Chunk(**specs))
    spread = jax.shard_map(scan, in_specs=in_specs, out_specs=(P(over), by_step), check_vma=False)
    sums, each = spread(scoring, heads, rates, chunks)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums), each
