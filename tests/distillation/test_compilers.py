"""All compilers make the same step of the same loss, on every mesh they take, and it is one device's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxspec.distillation.compilers import compile_step
from jaxspec.distillation.objective import Objective
from jaxspec.distillation.step import init_state, train_step
from jaxspec.distillation.task import Batch, Frozen, Task
from jaxspec.drafters import Eagle, EagleConfig
from jaxspec.parallel.mesh import batch_sharding, make_mesh, shardings
from jaxspec.targets.decoder import Decoder, LlamaConfig

TARGET = Decoder(LlamaConfig(64, 16, 2, 4, 2, 8, 32))
DRAFTER = Eagle(EagleConfig(16, 4, 2, 8, 32))
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.5))
OBJECTIVE = Objective(steps=2, chunk=8, weights=(("smooth_l1", 1.0), ("soft_cross_entropy", 0.1), ("top_k:4", 1.0)))
BY_SUMS = Objective(chunk=8, weights=(("tvdpp_exact", 1.0),))
"""An objective that is no sum over tokens."""
SOME = tuple(range(0, 64, 3))
"""A draft vocabulary."""


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(0)
    segments = np.repeat([[1] * 11 + [2] * 9 + [0] * 4], 8, axis=0)
    positions = np.repeat([[*range(11), *range(9), 0, 0, 0, 0]], 8, axis=0)
    answers = (segments > 0) & (positions >= rng.integers(2, 8, (8, 1)))  # rows train on different numbers of tokens
    tokens = rng.integers(0, 64, (8, 24))
    return Batch(*[jnp.asarray(x) for x in (tokens, segments, positions, answers)])  # type: ignore[arg-type]


@functools.cache
def begun():
    frozen = jax.tree.map(lambda a: a * 4, jax.jit(TARGET.init_params)(jax.random.key(0)))
    return frozen, init_state(DRAFTER, OPTIMIZER, jax.random.key(2))


@functools.cache
def alone(objective: Objective):
    return jax.jit(functools.partial(train_step, Task(TARGET, DRAFTER, objective), OPTIMIZER))


@pytest.mark.parametrize(
    ("compiler", "mesh", "objective", "vocab"),
    [
        ("jit", (2, 2, 2), OBJECTIVE, None),
        ("jit", (2, 4, 1), OBJECTIVE, SOME),
        ("shard_map", (1, 8, 1), OBJECTIVE, None),
        ("shard_map", (2, 4, 1), BY_SUMS, None),
        ("pmap", (8, 1, 1), OBJECTIVE, None),
        pytest.param("jit", (4, 1, 2), OBJECTIVE, None, marks=pytest.mark.slow),
        pytest.param("jit", (1, 8, 1), BY_SUMS, None, marks=pytest.mark.slow),
        pytest.param("shard_map", (8, 1, 1), OBJECTIVE, SOME, marks=pytest.mark.slow),
        pytest.param("pmap", (8, 1, 1), BY_SUMS, None, marks=pytest.mark.slow),
    ],
)
def test_two_steps_equal_those_of_one_device(compiler, mesh, objective: Objective, vocab, batch: Batch):
    weights, state = begun()
    expected, losses = state, []
    frozen = Frozen(weights, None if vocab is None else jnp.asarray(vocab))
    for _ in range(2):
        expected, loss = alone(objective)(frozen, expected, batch)
        losses.append(float(loss))
    grid = make_mesh(*mesh)
    step = compile_step(compiler, grid, Task(TARGET, DRAFTER, objective), OPTIMIZER)
    frozen, state = (jax.device_put(x, shardings(grid, x)) for x in (frozen, jax.tree.map(jnp.copy, state)))
    for expected_loss in losses:
        state, loss = step(frozen, state, jax.device_put(batch, batch_sharding(grid)))
        assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    for a, b in zip(jax.tree.leaves(expected.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_mesh_that_a_compiler_does_not_take_is_refused():
    arguments = Task(TARGET, DRAFTER, OBJECTIVE), OPTIMIZER
    with pytest.raises(ValueError, match=r"set mesh\.tensor=1, or compiler=jit"):
        compile_step("shard_map", make_mesh(2, 2, 2), *arguments)
    with pytest.raises(ValueError, match=r"set mesh\.fsdp, mesh\.tensor and mesh\.slices to 1"):
        compile_step("pmap", make_mesh(4, 2, 1), *arguments)
