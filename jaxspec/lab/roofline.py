"""Costs of the parts of a round by the roofline: bytes at the device's bandwidth, or FLOPs at its peak."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.base import KVCache, TokenMajorCache
from jaxspec.decoding.rounds import shared_tables
from jaxspec.lab.devices import DevicePeaks
from jaxspec.lab.round_parts import Grid, PartPrograms, Point, sampling_at
from jaxspec.lab.shapes import shortened
from jaxspec.planning.decode_program import abstract_state
from jaxspec.planning.flops import count_flops
from jaxspec.planning.work import Work, target_work, weight_bytes
from jaxspec.serving.loading import Models

LOGIT_BYTES = 8
"""Bytes of a logit, fp32, that is written once and read once."""


class Roofline:
    """The work of the parts of a round, by formula, and the time that a device's peak rates allow for it.

    `routed` reads only the experts that uniform routing reaches. `overhead` is added to every part, in seconds.
    """

    def __init__(
        self, models: Models, grid: Grid, peaks: DevicePeaks, *, overhead: float = 0.0, routed: bool = False
    ) -> None:
        self.models, self.grid, self.peaks, self.overhead, self.routed = models, grid, peaks, overhead, routed
        # The drafter's work does not depend on the target's layers, and few are traced in no time.
        self.short = shortened(models, min(2, models.config.layers))
        self.programs = PartPrograms(self.short, functools.partial(sampling_at, 0.0))
        self.states: dict[tuple[int, int], Any] = {}
        self.itemsize = models.engine.target.empty_cache(1, 1).v_YBKSC.dtype.itemsize

    def points(self, batch: int, context: int) -> list[Point]:
        """Returns the parts to price at one batch and context; `commit` becomes the row `rest`."""
        drafting = self.models.engine.tree is not None
        commit = [Point("commit", 1, 0, batch, context)] if drafting else []
        return [*self.grid.points(self.models.engine, batch, context), *commit]

    def measure(self, point: Point) -> float:
        """Returns the least seconds of a part."""
        work = self.work(point)
        return max(work.bytes / self.peaks.bandwidth, work.flops / self.peaks.flops) + self.overhead

    def work(self, point: Point) -> Work:
        """Returns bytes and FLOPs of a part."""
        if point.part in ("plain", "verify"):
            return self._target(point)
        return self._commit(point) if point.part == "commit" else self._drafting(point)

    def _target(self, point: Point) -> Work:
        """Returns the work of the target's call; the logits are written, and read by the rule."""
        config = self.models.config
        call = target_work(
            self.models.weights.target, config, batch=point.batch, tokens=point.nodes, prefix=point.context,
            itemsize=self.itemsize, routed=self.routed,
        )  # fmt: skip
        return call + Work(LOGIT_BYTES * point.batch * point.nodes * config.vocab, 0.0)

    def _drafting(self, point: Point) -> Work:
        """Returns the work of a call of the drafter: its weights, an LM head, its cache up to the context, logits."""
        drafter: Any = self.models.engine.drafter
        weights = self.models.weights
        shared = jax.eval_shape(functools.partial(shared_tables, self.models.engine), weights)
        layers, head, one_head = weight_bytes(drafter, weights.drafter, shared)
        reads = layers + self._draft_cache_bytes(point) + head
        scored = 1 if point.part == "extend" else point.width
        if drafter.one_pass and point.part == "draft":
            heads = 1 if one_head else max(1, (drafter.deepest or 1) - 1)
            reads, scored = heads * head, max(1, (drafter.deepest or 1) - 1)
        logits = LOGIT_BYTES * point.batch * scored * shared.head_VD.shape[0]
        return Work(float(reads + logits), float(self._flops(point)))

    def _flops(self, point: Point) -> int:
        state = self._state(point)
        program = self.programs.program(point, state)
        zero = jax.ShapeDtypeStruct((), jnp.int32)
        return count_flops(program.step, self.short.weights, state, program.given, zero).total

    def _state(self, point: Point) -> Any:
        place = point.batch, point.context
        if place not in self.states:
            models, capacity = self.short, point.context + self.grid.room
            state = abstract_state(models.engine, models.weights, batch=point.batch, capacity=capacity, slots=64)
            self.states[place] = state
        return self.states[place]

    def _draft_cache_bytes(self, point: Point) -> float:
        """Returns the bytes of the drafter's keys and values up to the context."""
        draft = self._state(point).draft
        leaves = jax.tree.leaves(draft, is_leaf=lambda x: isinstance(x, KVCache | TokenMajorCache))
        caches = [c for c in leaves if isinstance(c, KVCache | TokenMajorCache)]
        whole = sum(a.size * a.dtype.itemsize for c in caches for a in c)
        return whole * point.context / (point.context + self.grid.room)

    def _commit(self, point: Point) -> Work:
        """Returns the work of writing the longest path of the reference tree to the target's cache."""
        c, path = self.models.config, self.models.engine.path
        slot = 2 * c.layers * c.kv_heads * c.head_dim * self.itemsize
        return Work(2.0 * slot * path * point.batch, 0.0)
