"""int8 weights are at most half a step from the exact ones, take half of bf16's bytes, and are the same on a mesh."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_weights

from jaxspec.base import Packed
from jaxspec.interchange.hf import load_target, write_llama
from jaxspec.nn.quantization import CONTRACTED, quantize, scale_name
from jaxspec.parallel.mesh import make_mesh
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.training.next_token import TokenBatch, next_token_loss

CONFIG = LlamaConfig(64, 64, 2, 8, 4, 8, 128)


@functools.cache
def weights() -> Any:
    """Returns weights whose next-token distributions differ well."""
    return random_weights(Decoder(CONFIG), 0.12, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    write_llama(path, weights(), CONFIG, dtype="float32")
    return path


def exact(layer: dict[str, Any], name: str) -> np.ndarray:
    """Returns the matrix that a quantized one stands for."""
    return np.asarray(layer[name]) * np.expand_dims(layer[scale_name(name)], CONTRACTED[name])


@pytest.mark.parametrize("name", CONTRACTED)
def test_no_weight_is_further_than_half_a_step(name: str):
    weight = weights()["layers"][name].copy()
    weight[..., 0] = 0
    made = jax.device_get(jax.jit(quantize, static_argnums=0)(name, weight))
    assert made[name].dtype == np.int8 and made[scale_name(name)].dtype == np.float32
    half = np.expand_dims(made[scale_name(name)] / 2, CONTRACTED[name])
    assert np.all(np.abs(exact(made, name) - weight) <= half * (1 + 1e-4))
    assert np.all(exact(made, name)[..., 0] == 0)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_target_read_as_int8_takes_half_of_bf16_and_is_the_same_on_a_mesh(folder: Path, stacked: bool):
    read = functools.partial(load_target, folder, dtype=jnp.bfloat16, stacked=stacked)
    whole, narrow = read().params, read(weights="int8").params
    matrices = [x for x in jax.tree.leaves(whole["layers"]) if x.ndim > 1 + stacked]
    scales = [x for x in jax.tree.leaves(narrow["layers"]) if x.dtype == jnp.float32]

    def held(leaves: Any) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(leaves))

    assert held(whole) - held(narrow) == held(matrices) // 2 - held(scales)
    assert held(narrow["layers"]) < 0.6 * held(whole["layers"])
    spread = read(weights="int8", mesh=make_mesh(2, 2, 2)).params
    jax.tree.map(np.testing.assert_array_equal, spread, narrow)
    layer = spread["layers"] if stacked else spread["layers"][0]
    assert layer["gate"].addressable_shards[0].data.nbytes == layer["gate"].nbytes // 4
    assert layer["gate_scale"].addressable_shards[0].data.nbytes == layer["gate_scale"].nbytes // 2


def test_the_int8_forward_is_that_of_the_weights_it_stands_for_and_loses_little(folder: Path):
    tokens = jax.random.randint(jax.random.key(1), (4, 32), 0, CONFIG.vocab)
    everything = jnp.ones_like(tokens)
    batch = TokenBatch(tokens, everything, jnp.broadcast_to(jnp.arange(32), (4, 32)), everything > 0)

    @functools.partial(jax.jit, static_argnums=0)
    def run(model: Decoder, params: Any) -> Any:
        features = model.forward(params, tokens, batch.positions_BL, Packed(everything)).features_BLD
        return features, jnp.mean(next_token_loss(model, params, batch, block=32))

    model, whole, _ = load_target(folder, dtype=jnp.float32)
    narrow = load_target(folder, dtype=jnp.float32, weights="int8").params
    layers = [
        {name: exact(layer, name) if name in CONTRACTED else layer[name] for name in weights()["layers"]}
        for layer in narrow["layers"]
    ]
    features, loss = run(model, narrow)
    np.testing.assert_allclose(features, run(model, {**narrow, "layers": layers})[0], atol=1e-4)
    expected, exact_loss = run(model, whole)
    assert 0 < jnp.sqrt(jnp.mean((features - expected) ** 2)) < 0.03  # of features whose mean square is 1
    assert abs(loss - exact_loss) < 2e-3 * exact_loss
