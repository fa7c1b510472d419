"""Twenty steps of every drafter on meshes of eight devices give the loss curve of one."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.distillation.compilers import compile_step, lower_step
from jaxspec.distillation.objective import Objective
from jaxspec.distillation.optimizer import make_optimizer, make_schedule
from jaxspec.distillation.step import init_state
from jaxspec.distillation.task import Batch, Frozen, Task
from jaxspec.drafters import (
    DRAFTERS,
    DraftLM,
    DraftLMConfig,
    Eagle,
    Eagle3,
    Eagle3Config,
    EagleConfig,
    Fspad,
    FspadConfig,
    Medusa,
    MedusaConfig,
    ParallelSpec,
    ParallelSpecConfig,
    PEagle,
    PEagleConfig,
)
from jaxspec.parallel.mesh import batch_sharding, make_mesh, shardings
from jaxspec.planning import cost, decode_program, hlo
from jaxspec.targets.decoder import Decoder, LlamaConfig

STEPS, VOCAB, LENGTH, ROWS, CHUNK = 20, 64, 24, 8, 7
SHAPE = (16, 8, 8, 4, 32)
"""Width, heads, key-value heads, head size, MLP: every axis takes eight devices."""
TARGET = Decoder(LlamaConfig(VOCAB, 16, 3, 8, 8, 4, 32))
HASS = Objective(steps=3, weights=(("smooth_l1", 1.0), ("soft_cross_entropy", 0.1), ("top_k:4", 1.0)), chunk=CHUNK)
PAIRS: dict[str, tuple[Any, Objective]] = {
    "eagle": (Eagle(EagleConfig(*SHAPE)), HASS),
    "fspad": (Fspad(FspadConfig(*SHAPE)), Objective(chunk=CHUNK)),
    "eagle3": (
        Eagle3(Eagle3Config(*SHAPE, vocab=VOCAB, taps=(0, 1, 2))),
        Objective(steps=2, weights=(("soft_cross_entropy", 1.0),), step_decay=0.8, noise=0.0, chunk=CHUNK),
    ),
    "medusa": (
        Medusa(MedusaConfig(16, 3, vocab=VOCAB)),
        Objective(steps=3, weights=(("cross_entropy", 1.0),), step_decay=0.8, noise=0.0, chunk=CHUNK),
    ),
    "parallelspec": (
        ParallelSpec(ParallelSpecConfig(*SHAPE, tokens=3, keep=0.7)),
        Objective(steps=3, weights=(("smooth_l1", 1.0), ("kl", 1.0)), feature_steps=1, chunk=CHUNK),
    ),
    "peagle": (
        PEagle(PEagleConfig(*SHAPE, vocab=VOCAB, taps=(0, 1, 2), tokens=3, layers=2, mask_token=3, embed_vocab=VOCAB)),
        Objective(steps=3, weights=(("kl", 1.0),), noise=0.0, chunk=CHUNK),
    ),
    "draft_lm": (
        DraftLM(DraftLMConfig(VOCAB, 16, 1, 8, 8, 4, 32)),
        Objective(weights=(("tvdpp_exact_pos", 1.0),), noise=0.0, chunk=CHUNK),
    ),
}


def test_every_drafter_is_here():
    assert PAIRS.keys() == DRAFTERS.keys()


def batch() -> Batch:
    rng = np.random.default_rng(0)
    segments = np.repeat([[1] * 11 + [2] * 9 + [0] * 4], ROWS, axis=0)
    positions = np.repeat([[*range(11), *range(9), 0, 0, 0, 0]], ROWS, axis=0)
    answers = (segments > 0) & (positions >= rng.integers(2, 8, (ROWS, 1)))
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH))
    return Batch(*[jnp.asarray(x) for x in (tokens, segments, positions, answers)])  # type: ignore[arg-type]


def placed(name: str, mesh: jax.sharding.Mesh) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns a step's task and optimizer, and its weights, state and rows on a mesh."""
    drafter, objective = PAIRS[name]
    rate = make_schedule(peak_lr=1e-3, steps=STEPS, warmup_steps=2, schedule="linear")
    optimizer = make_optimizer(rate, clip_value=0.5)
    frozen = Frozen(jax.tree.map(lambda a: a * 4, jax.jit(TARGET.init_params)(jax.random.key(0))))
    state = init_state(drafter, optimizer, jax.random.key(1), TARGET.shared_tables(frozen.params))
    frozen, state = (jax.device_put(x, shardings(mesh, x)) for x in (frozen, state))
    task = Task(TARGET.clone(taps=drafter.taps), drafter, objective)
    return (task, optimizer), (frozen, state, jax.device_put(batch(), batch_sharding(mesh)))


@functools.cache
def curve(name: str, sizes: tuple[int, int, int] | None) -> list[float]:
    """The losses on a mesh of these sizes, or on one device."""
    mesh = make_mesh(devices=jax.devices()[:1]) if sizes is None else make_mesh(*sizes)
    models, (frozen, state, rows) = placed(name, mesh)
    step, losses = compile_step("jit", mesh, *models), []
    for _ in range(STEPS):
        state, loss = step(frozen, state, rows)
        losses.append(float(loss))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
@pytest.mark.parametrize("name", PAIRS)
def test_a_curve_on_a_mesh_is_that_of_one_device(name: str, sizes: tuple[int, int, int]):
    alone = curve(name, None)
    assert alone[-1] < alone[0]
    most = max(map(abs, alone))  # TVD++ passes through 0
    np.testing.assert_allclose(curve(name, sizes), alone, rtol=1e-5, atol=1e-5 * most)


@pytest.mark.parametrize("name", PAIRS)
def test_devices_send_weights_and_sums_and_no_activations(name: str):
    """On a mesh that spreads rows and weights alike. Of activations none of every row and of several channels."""
    mesh = make_mesh(1, 8, 1)
    models, arguments = placed(name, mesh)
    program = hlo.parse(lower_step("jit", mesh, *models, *arguments).compile().as_text() or "")
    found = (cost.message_of(i, 8) for lines in program.computations.values() for i in lines)
    # What no weight has: a row's positions, those that mask tokens keep, those of a chunk; of one row, of all together.
    kept = {math.ceil(LENGTH * 0.7**depth) for depth in range(3)} | {CHUNK}
    lengths = {n * rows for n in kept for rows in (1, ROWS)}
    sent = {message.largest for message in found if message is not None}
    assert not [s for s in sent if lengths & set(s.dims) and s.size > ROWS * LENGTH], f"{sent}"
    # The target's layers come by one after another; of the loop over chunks nothing, and gradients once.
    assert {i.kind for i in decode_program._in_loops(program) if i.kind in hlo.COLLECTIVES} <= {"all-gather"}
