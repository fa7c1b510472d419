"""A target of experts on a mesh: its logits, a step of distillation and a generation are those of one device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_models import random_weights
from toys import batch_of, texts_of

from jaxspec.decoding.generation import generate
from jaxspec.decoding.rounds import Engine, Weights
from jaxspec.distillation.compilers import compile_step
from jaxspec.distillation.objective import Objective
from jaxspec.distillation.step import init_state, train_step
from jaxspec.distillation.task import Batch, Frozen, Task
from jaxspec.drafters import Eagle, EagleConfig
from jaxspec.nn.attention import causal_mask
from jaxspec.nn.options import Options
from jaxspec.parallel.mesh import batch_sharding, make_mesh, shardings
from jaxspec.targets.decoder import Decoder, DecoderConfig
from jaxspec.trees import chain

SHAPE = (64, 16, 2, 4, 4, 8, 24)
"""Vocabulary, width, layers, heads, key-value heads, head size, MLP."""
OPTIONS = {
    "mixtral": Options(windows=(6, 6), experts=4, chosen=2, expert_mlp=24),
    "qwen3_moe": Options(
        qkv_bias=True, out_bias=True, qk_norm=True, experts=8, chosen=3, expert_mlp=8, renormalize=False
    ),
}
TARGETS = {
    family: Decoder(DecoderConfig(*SHAPE, family=family, options=options)) for family, options in OPTIONS.items()
}
DRAFTER = Eagle(EagleConfig(16, 4, 4, 8, 32))
OPTIMIZER = optax.sgd(0.5)
OBJECTIVE = Objective(chunk=8, weights=(("smooth_l1", 1.0), ("soft_cross_entropy", 1.0)))
SIZES = [(2, 2, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow), pytest.param((8, 1, 1), marks=pytest.mark.slow)]
MESHES = pytest.mark.parametrize("sizes", SIZES, ids=str)
FAMILIES = pytest.mark.parametrize("family", TARGETS)


@functools.cache
def weights(family: str) -> Any:
    return random_weights(TARGETS[family], 0.3, 1)


def logits(family: str, params: Any, tokens: Any) -> jax.Array:
    target = TARGETS[family]
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return target.logits(params, target.forward(params, tokens, places, causal_mask(tokens.shape[1])).features_BLD)


@MESHES
@FAMILIES
def test_logits_on_a_mesh_are_those_of_one_device(family: str, sizes: tuple[int, int, int]):
    tokens, mesh = np.random.default_rng(0).integers(0, 64, (8, 12)), make_mesh(*sizes)
    run = jax.jit(functools.partial(logits, family))
    expected = run(weights(family), tokens)
    placed = jax.device_put(weights(family), shardings(mesh, weights(family)))
    for name in ("expert_gate", "expert_up", "expert_down"):
        stacked = placed["layers"][name]
        assert stacked.sharding.shard_shape(stacked.shape)[1] == stacked.shape[1] // sizes[2]
    with jax.set_mesh(mesh):
        compiled = run.lower(placed, jax.device_put(tokens, batch_sharding(mesh))).compile()
    np.testing.assert_allclose(
        compiled(placed, jax.device_put(tokens, batch_sharding(mesh))), expected, rtol=1e-5, atol=1e-5
    )
    # Each device sorts its own rows. Nothing but the sum over the experts' axis leaves it.
    rows = 8 * 12 * OPTIONS[family].chosen // (sizes[0] * sizes[1])
    sorts = [line for line in (compiled.as_text() or "").splitlines() if " sort(" in line]
    assert sorts and all(f"s32[{rows}]" in line or f"[{rows},1]" in line for line in sorts)


def batch() -> Batch:
    rng = np.random.default_rng(0)
    segments = np.repeat([[1] * 9 + [2] * 5 + [0] * 2], 8, axis=0)
    positions = np.repeat([[*range(9), *range(5), 0, 0]], 8, axis=0)
    answers = (segments > 0) & (positions >= rng.integers(2, 4, (8, 1)))
    return Batch(*[jnp.asarray(x) for x in (rng.integers(0, 64, (8, 16)), segments, positions, answers)])  # type: ignore[arg-type]


@MESHES
@pytest.mark.parametrize("family", [pytest.param("mixtral", marks=pytest.mark.slow), "qwen3_moe"])
def test_a_step_on_a_mesh_is_that_of_one_device(family: str, sizes: tuple[int, int, int]):
    task, mesh, frozen = Task(TARGETS[family], DRAFTER, OBJECTIVE), make_mesh(*sizes), Frozen(weights(family))
    state = init_state(DRAFTER, OPTIMIZER, jax.random.key(2))
    expected, loss = jax.jit(functools.partial(train_step, task, OPTIMIZER))(frozen, state, batch())
    step = compile_step("jit", mesh, task, OPTIMIZER)
    frozen, state = (jax.device_put(x, shardings(mesh, x)) for x in (frozen, jax.tree.map(jnp.copy, state)))
    state, found = step(frozen, state, jax.device_put(batch(), batch_sharding(mesh)))
    assert float(found) == pytest.approx(float(loss), rel=1e-5)
    for a, b in zip(jax.tree.leaves(expected.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
@FAMILIES
def test_a_generation_on_a_mesh_is_that_of_one_device(family: str):
    target, mesh = TARGETS[family].clone(stacked=False), make_mesh(2, 1, 4)
    models = Weights(random_weights(target, 0.3, 1), random_weights(DRAFTER, 0.3, 2))
    prompts = [np.arange(5, dtype=np.int32), np.arange(20, 31, dtype=np.int32)]
    requests = batch_of(prompts, max_new_tokens=12, temperature=[0.0, 0.8], seed=[0, 7])
    engine = Engine(target, DRAFTER, chain(3))
    alone = generate(engine, models, requests)
    with jax.set_mesh(mesh):
        spread = generate(
            engine,
            jax.device_put(models, shardings(mesh, models)),
            jax.device_put(requests, batch_sharding(mesh)),
        )
    assert texts_of(spread) == texts_of(alone)
