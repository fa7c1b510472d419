"""The arguments of a distillation step: the static task, the frozen arrays, the state, the batch."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from jaxspec.base import Array, Learner, Params, SharedTables, Target, TargetOutput
from jaxspec.data.target_outputs import Likely, Stored, Whole
from jaxspec.distillation.objective import Objective


@dataclasses.dataclass(frozen=True)
class Task:
    """A drafter, the target it learns from, and the objective. Hashable: static to `jit`."""

    target: Target
    drafter: Learner
    objective: Objective


class Frozen(NamedTuple):
    """The arrays that a step reads and never changes."""

    params: Params
    """The target's weights."""
    vocab_U: Array | None = None
    """Draft vocabulary: ascending ids of the tokens that the drafter scores; None for all."""


class TrainState(NamedTuple):
    """The state that training carries and a checkpoint keeps; weights are fp32 masters."""

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
    """Tokens to train on: the assistant's."""
    stored: Stored | None = None
    """The target's outputs, where they are read from disk."""

    @property
    def likely(self) -> Likely | None:
        """The target's likeliest tokens, where they are stored."""
        return None if self.stored is None else self.stored.likely

    @property
    def whole(self) -> Whole | None:
        """The facts of the target's whole distribution, where they are stored."""
        return None if self.stored is None else self.stored.whole


class StepKeys(NamedTuple):
    """PRNG keys of one step, by use."""

    noise: Array
    """Noise on the input features."""
    slots: Array
    """Positions that mask tokens are trained at."""
    losses: Array
    """Draws of sampled losses."""


class StepInputs(NamedTuple):
    """A batch, the target's output for it, and the keys of its draws (None: no noise, no draws)."""

    batch: Batch
    target: TargetOutput
    keys: StepKeys | None


def read_tables(target: Target, frozen: Frozen) -> SharedTables:
    """Returns the target's embedding and the rows of its LM head that the drafter scores; no gradient passes."""
    tables: SharedTables = jax.lax.stop_gradient(target.shared_tables(frozen.params))
    ids = frozen.vocab_U
    return tables if ids is None else tables._replace(head_VD=tables.head_VD[ids])
