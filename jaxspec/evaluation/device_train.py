"""Training steps measured on a device, whole and part by part, with random weights."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspec.distillation.task import Frozen
from jaxspec.evaluation import stand_ins
from jaxspec.evaluation.machine import TimedProgram
from jaxspec.evaluation.measurements import Figures, Measurement
from jaxspec.evaluation.step_parts import StepArguments, parts_of, random_arguments, step_of
from jaxspec.planning.flops import Flops, count_flops
from jaxspec.training.resolve import DistillStep

SAMPLES = 3
"""Runs of a program whose median counts."""


class TrainingStep(NamedTuple):
    """A recipe's step as it runs, and as its FLOPs are counted: without kernels, whose matmuls cannot be."""

    run: DistillStep
    counted: DistillStep


class TrainBench:
    """Measures the steps of some recipes; those of one follow each other and share its arrays.

    `make` returns the step of a recipe, by name. Raises whatever a measurement runs into.
    """

    def __init__(self, make: Callable[[str], TrainingStep], rows: tuple[int, int]) -> None:
        self.make, self.rows = make, rows
        self.steps: dict[str, TrainingStep] = {}
        self.arguments: tuple[str, StepArguments] | None = None
        self.parts: dict[str, dict[str, TimedProgram]] = {}

    def measure(self, m: Measurement) -> Figures:
        """Returns the figures of a whole step or of one of its parts."""
        recipe, part = m.settings["recipe"], m.kind.removeprefix("train_")
        step = self._step(recipe)
        arguments = self._arguments(recipe)
        if part == "step":
            found = self._whole(recipe, step, arguments)
            tokens = self.rows[0] * self.rows[1]
            return found | {"tokens_per_second": tokens / found["seconds"]}
        if recipe not in self.parts:
            self.parts = {recipe: parts_of(step.run, arguments, lambda program, *given: jax.jit(program)(*given))}
        program = self.parts[recipe][part]
        flops = self._abstract_parts(recipe)[part]
        return timed_figures(jax.jit(program.program), program.arguments, flops)

    def _step(self, recipe: str) -> TrainingStep:
        if recipe not in self.steps:
            self.steps[recipe] = self.make(recipe)
        return self.steps[recipe]

    @functools.cached_property
    def _target(self) -> Any:
        """Weights of the target, which all recipes share."""
        return stand_ins.fill(self._target_shapes, stand_ins.WEIGHT_SCALE)

    @property
    def _target_shapes(self) -> Any:
        target: Any = next(iter(self.steps.values())).run.task.target
        return jax.eval_shape(target.init_params, jax.random.key(0))

    def _arguments(self, recipe: str) -> StepArguments:
        """Returns weights, optimizer state and a batch of one recipe; those of the one before are let go."""
        if self.arguments is None or self.arguments[0] != recipe:
            self.arguments, self.parts = None, {}
            arm = self._step(recipe).run
            made = jax.jit(functools.partial(_besides_target, arm, self.rows))(self._target)
            self.arguments = recipe, made._replace(frozen=Frozen(self._target))
        return self.arguments[1]

    def _whole(self, recipe: str, step: TrainingStep, arguments: StepArguments) -> Figures:
        """Times the update; its state is handed from step to step, as in training."""
        self.arguments = None  # the step takes the state over
        whole = jax.jit(step_of(step.run), donate_argnums=1)
        shapes = jax.eval_shape(lambda *a: a, *arguments)
        flops = count_flops(step_of(step.counted), *shapes)
        compiling = time.perf_counter()
        compiled = whole.lower(*arguments).compile()
        compiling = time.perf_counter() - compiling
        state = arguments.state
        samples = []
        for _ in range(SAMPLES + 1):
            started = time.perf_counter()
            state, _ = jax.block_until_ready(compiled(arguments.frozen, state, arguments.batch))
            samples.append(time.perf_counter() - started)
        self.arguments = recipe, arguments._replace(state=state)
        return work_figures(float(np.median(samples[1:])), flops, compiling)

    def _abstract_parts(self, recipe: str) -> dict[str, Flops]:
        """Returns the FLOPs of the parts."""
        arm = self._step(recipe).counted
        shapes = StepArguments(
            *jax.eval_shape(functools.partial(random_arguments, arm, rows=self.rows), self._target_shapes)
        )
        parts = parts_of(arm, shapes, jax.eval_shape)
        return {name: count_flops(p.program, *p.arguments) for name, p in parts.items()}


def _besides_target(arm: DistillStep, rows: tuple[int, int], params: Any) -> StepArguments:
    """Returns `random_arguments` without the target's weights, which a program would copy."""
    return random_arguments(arm, params, rows=rows)._replace(frozen=Frozen(None))


def timed_figures(program: Any, arguments: tuple[Any, ...], flops: Flops) -> Figures:
    """Returns the figures of a program that takes much longer than it takes to call."""
    compiling = time.perf_counter()
    compiled = program.lower(*arguments).compile()
    compiling = time.perf_counter() - compiling
    samples = []
    for _ in range(SAMPLES + 1):
        started = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        samples.append(time.perf_counter() - started)
        del result  # behind the clock
    return work_figures(float(np.median(samples[1:])), flops, compiling)


def work_figures(seconds: float, flops: Flops, compiling: float) -> Figures:
    """Returns the keys of a row. FLOPs that are done a second time do not count, as in MFU."""
    return {
        "seconds": seconds,
        "flops": flops.model,
        "recomputed_flops": flops.recomputed,
        "flops_per_second": flops.model / seconds,
        "compile_seconds": compiling,
    }
