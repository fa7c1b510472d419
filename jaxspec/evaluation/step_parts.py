"""A distillation step and its parts as programs of their own, on random arrays: what is counted and timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Params
from jaxspec.distillation.loss import read_target, score_batch, split_key, unroll_batch
from jaxspec.distillation.scoring import read_heads
from jaxspec.distillation.step import init_state, train_step, update
from jaxspec.distillation.task import Batch, Frozen, StepInputs, Task, read_tables
from jaxspec.evaluation.machine import TimedProgram
from jaxspec.training.resolve import DistillStep

PARTS = ("target", "drafter", "head_and_loss", "optimizer")
"""Parts of a step, by the names of `parts_of`."""


class StepArguments(NamedTuple):
    """The arguments of a training step, abstract or not."""

    frozen: Frozen
    state: Any
    batch: Batch


def random_arguments(
    arm: DistillStep, params: Params, *, rows: tuple[int, int], scored: int = 0, seed: int = 0
) -> StepArguments:
    """Returns fresh weights and a random batch `[B, L]` of `rows`; under `jax.eval_shape`, their shapes.

    `scored` is the size of the draft vocabulary, 0 for all tokens of the target, whose weights are `params`.
    """
    key = jax.random.key(seed)
    tokens_BL = jax.random.randint(key, rows, 0, arm.task.target.config.vocab)  # type: ignore[attr-defined]
    ones_BL = jnp.ones(rows, jnp.int32)
    positions_BL = jnp.broadcast_to(jnp.arange(rows[1]), rows)
    frozen = Frozen(params, jnp.arange(scored) if scored else None)
    state = init_state(arm.task.drafter, arm.optimizer, key, read_tables(arm.task.target, frozen))
    return StepArguments(frozen, state, Batch(tokens_BL, ones_BL, positions_BL, ones_BL))


def step_of(arm: DistillStep) -> Callable[..., Any]:
    """Returns the whole update: `(frozen, state, batch) -> (state, loss)`."""
    return functools.partial(train_step, arm.task, arm.optimizer)


def draft(task: Task, params: Params, frozen: Frozen, batch: Batch, out: Any, key: Any) -> Any:
    """The draft steps of a batch."""
    return unroll_batch(task, params, read_tables(task.target, frozen), StepInputs(batch, out, split_key(key)))


def draft_and_back(task: Task, against: Any, params: Params, *rest: Any) -> Any:
    """The draft steps, and the weights' gradient where that of the outputs is `against`."""

    def outputs(params: Params) -> Any:
        unrolled = draft(task, params, *rest)
        return tuple(unrolled[:2]), unrolled.kept_TBL

    drafted, back, kept = jax.vjp(outputs, params, has_aux=True)
    return drafted, kept, back(tuple(against[:2]))


def score_and_back(task: Task, unrolled: Any, params: Params, frozen: Frozen, *inputs: Any) -> Any:
    """The loss of draft steps, and its gradient by their outputs and by the weights that score them."""
    batch, out, key = inputs

    def loss(scoring: Params, outputs: Any) -> Any:
        drafted = unrolled._replace(hidden_TBLD=outputs[0], features_TBLD=outputs[1])
        step_inputs = StepInputs(batch, out, split_key(key))
        part, sums = score_batch(task, scoring, read_heads(task, frozen, batch), step_inputs, drafted, learning=True)
        return part, sums.mean_loss(task.objective)  # the step needs no more of the sums

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(task.drafter.scoring(params), tuple(unrolled[:2]))


def parts_of(arm: DistillStep, arguments: StepArguments, run: Callable[..., Any]) -> dict[str, TimedProgram]:
    """Returns the parts of a step as programs; `run(program, *arguments)` computes what one hands to the next.

    Together they have the step's matmuls. The drafter's gradient is taken against its own outputs, for want of others.
    """
    task, (frozen, state, batch) = arm.task, arguments
    read = functools.partial(read_target, task.target)
    out = run(read, frozen.params, batch)
    inputs = (state.params, frozen, batch, out, state.key)
    unrolled = run(functools.partial(draft, task), *inputs)
    return {
        "target": TimedProgram(read, (frozen.params, batch)),
        "drafter": TimedProgram(functools.partial(draft_and_back, task), (unrolled, *inputs)),
        "head_and_loss": TimedProgram(functools.partial(score_and_back, task), (unrolled, *inputs)),
        "optimizer": TimedProgram(functools.partial(update, arm.optimizer), (state, state.params, jnp.float32(0.0))),
    }
