"""Matrices laid out for CPUs give the products of those that training holds, for any number of rows."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.drafters.eagle import Eagle, EagleConfig
from jaxspec.nn import matmul
from jaxspec.nn.layer_weights import layer_shapes
from jaxspec.nn.quantization import quantize_layers
from jaxspec.parallel.mesh import make_mesh, replicated
from jaxspec.planning import decode_program
from jaxspec.targets.decoder import Decoder, LlamaConfig

CONFIG = LlamaConfig(vocab=50, width=24, layers=2, heads=6, kv_heads=2, head_dim=4, mlp=40)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", ["qkv", "out", "gate", "down"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 3), (2, 3), (1, 8), (5, 13), (3, 40)])
def test_a_matrix_with_its_outputs_first_gives_the_same_product(name: str, batch: int, length: int):
    matrix = draw(1, *layer_shapes(CONFIG)[name])
    laid = matmul.lay_out({name: jnp.asarray(matrix)})
    assert list(laid) == [matmul.outputs_first(name)]
    width = {"out": CONFIG.heads * CONFIG.head_dim, "down": CONFIG.mlp}.get(name, CONFIG.width)
    x_BLE = draw(2, batch, length, width)
    found = jax.jit(matmul.multiply, static_argnums=1)(laid, name, x_BLE)
    expected = matmul.multiply({name: jnp.asarray(matrix)}, name, jnp.asarray(x_BLE))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "padded"), [(2, 4), (4, 4), (5, 8), (8, 8), (9, 16), (16, 16), (17, 20), (25, 32), (49, 64)]
)
def test_the_matrix_of_few_rows_stays_the_left_operand(rows: int, padded: int):
    """XLA would fold the transposes into a product with the matrix on the right, and lay the matrix out every call."""
    matrix, x = jnp.asarray(draw(1, 64, 32)), jnp.asarray(draw(2, 1, rows, 32))
    text = jax.jit(matmul.multiply_left).lower(matrix, x).compile().as_text() or ""
    assert f"f32[64,{padded}]" in text


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 3), (2, 3), (7, 1), (1, 8), (3, 5)])
def test_few_rows_of_bf16_are_padded_to_those_that_cpus_have_kernels_for(batch: int, length: int):
    matrix, x_BLE = (
        jnp.asarray(draw(i, *shape), jnp.bfloat16) for i, shape in ((1, (24, 40)), (2, (batch, length, 24)))
    )
    assert list(matmul.lay_out({"gate": matrix})) == ["gate"]
    multiply = jax.jit(matmul.multiply, static_argnums=1)
    found = multiply({"gate": matrix}, "gate", x_BLE)
    exact = np.einsum("BLE,EF->BLF", *(np.asarray(a, np.float32) for a in (x_BLE, matrix)))
    assert found.shape == exact.shape and found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=1e-2, atol=2e-2)
    text = multiply.lower({"gate": matrix}, "gate", x_BLE).compile().as_text() or ""
    assert bool(re.search(r"f(32|16)\[(1,)?8,24\]", text)) == (batch * length <= 8)


def test_the_rows_of_a_product_do_not_depend_on_padding():
    matrix, x = jnp.asarray(draw(1, 64, 32)), jnp.asarray(draw(2, 1, 8, 32))
    whole = jax.jit(matmul.multiply_left)(matrix, x)
    for rows in (2, 3, 5, 6, 7):
        np.testing.assert_array_equal(jax.jit(matmul.multiply_left)(matrix, x[:, :rows]), whole[:, :rows])


@pytest.mark.parametrize("int8", [False, True])
def test_a_target_laid_out_gives_the_same_features(int8: bool):
    target = Decoder(CONFIG, stacked=False)
    params = target.init_params(jax.random.key(0))
    if int8:
        params = quantize_layers(params)
    tokens = jnp.arange(7)[None]
    args = (tokens, tokens, jnp.tril(jnp.ones((1, 7, 7), bool)))
    expected, found = (target.forward(p, *args).features_BLD for p in (params, matmul.lay_out(params)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert set(matmul.lay_out(params)) == {"embed", "head", "norm", "layers"}


def test_weights_that_stack_matrices_stay_as_they_are():
    """Medusa's blocks are a matrix a head, and stacked layers a matrix a layer."""
    stacked = Decoder(CONFIG).init_params(jax.random.key(0))
    assert jax.tree.structure(matmul.lay_out(stacked)) == jax.tree.structure(stacked)


def test_a_drafter_reads_its_weights_in_either_layout():
    config = EagleConfig(CONFIG.width, 6, 2, 4, 40, bias=True)
    drafter = Eagle(config)
    params = drafter.init_params(jax.random.key(1))
    laid = matmul.lay_out(params)
    assert {matmul.outputs_first(n) for n in ("fc", "qkv", "out", "gate", "up", "down")} <= set(laid)
    shared = Decoder(CONFIG).shared_tables(Decoder(CONFIG).init_params(jax.random.key(2)))
    tokens, features = jnp.arange(10).reshape(2, 5), jnp.asarray(draw(3, 2, 5, 24))
    count = jnp.array([5, 3])
    results = [
        d.extend(p, shared, d.init_state(p, shared, tokens[:, 0], 16), tokens, features, count)[1]
        for d, p in ((drafter, params), (drafter.clone(token_major=True), laid))
    ]
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_one_row_is_padded_for_tpus_alone():
    """By the compiler's cycles, which know nothing of this function: one row costs what eight do."""
    pytest.importorskip("libtpu")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in decode_program.LIBTPU_ENVIRONMENT.items():
            patch.setenv(name, value)
        mesh = make_mesh(devices=list(decode_program.tpu_mesh("v6e:2x2", data=-1).devices.flat[:1]))
        spec = {"dtype": jnp.bfloat16, "sharding": replicated(mesh)}
        matrix = jax.ShapeDtypeStruct((1024, 2, 2048), **spec)

        def cycles(rows: int) -> int:
            x = jax.ShapeDtypeStruct((1, rows, 1024), **spec)
            with jax.set_mesh(mesh):
                program = jax.jit(lambda m, x: matmul.multiply({"gate": m.reshape(1024, -1)}, "gate", x))
                text = program.lower(matrix, x).compile().as_text() or ""
            return sum(int(n) for n in re.findall(r'"estimated_cycles":"?(\d+)', text))

        assert 0 < cycles(1) < 1.1 * cycles(8)
    one = jax.jit(lambda m, x: matmul.multiply({"gate": m}, "gate", x)).lower(jnp.ones((16, 8)), jnp.ones((1, 1, 16)))
    assert "8x16" not in one.as_text()  # on a CPU the row stays alone
