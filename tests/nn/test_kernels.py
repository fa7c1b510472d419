"""Kernels of accelerators attend as plain attention does; their choice, their refusals, and their place on a mesh."""

import functools
import os
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.base import Packed
from jaxspec.nn import kernels
from jaxspec.nn.attention import AttentionOptions, PerQueryKeys, attend, attend_text, segment_mask
from jaxspec.nn.kernels import attend_cudnn, attend_splash, choose_kernel, takes
from jaxspec.nn.quantization import CONTRACTED, quantize
from jaxspec.parallel.mesh import batch_sharding, make_mesh
from jaxspec.planning import decode_program
from jaxspec.targets.decoder import Decoder, LlamaConfig

LENGTH, CHANNELS = 200, 16
TPU, NVIDIA, AMD, CPU = (
    SimpleNamespace(platform=platform, device_kind=kind)
    for platform, kind in (("tpu", "TPU v6 lite"), ("gpu", "NVIDIA H100"), ("gpu", "AMD MI300X"), ("cpu", "cpu"))
)


def given(batch: int = 2, kv_heads: int = 2, group: int = 2) -> tuple[Any, ...]:
    """Returns queries, keys, values and segments: row 0 has three documents and padding, row 1 is one document."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    segments = np.zeros((batch, LENGTH), np.int32)
    segments[:, :150], segments[:, 150:170], segments[:, 170:190] = 1, 2, 3
    segments[1] = 1
    q = normal(batch, LENGTH, kv_heads, group, CHANNELS)
    return (
        q,
        normal(batch, kv_heads, CHANNELS, LENGTH),
        normal(batch, kv_heads, LENGTH, CHANNELS),
        jnp.asarray(segments),
    )


@jax.jit
def plain(q: Any, k: Any, v: Any, segments: Any) -> jax.Array:
    """Returns plain attention within the segments."""
    return attend(q, k, v, segment_mask(segments))


def per_query_pairs(parts: int, batch: int = 2, kv_heads: int = 2) -> Any:
    """Returns keys and values of earlier draft steps, one of each step for every query."""
    rng = np.random.default_rng(1)
    shapes = (batch, kv_heads, CHANNELS, LENGTH), (batch, kv_heads, LENGTH, CHANNELS)
    return tuple(tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes) for _ in range(parts))


def dense(q: Any, k: Any, v: Any, segments: Any, pairs: Any) -> jax.Array:
    """Returns one softmax over all keys, the per-query keys among them, under one mask for all."""
    keys = jnp.concatenate([k, *(k for k, _ in pairs)], axis=3)
    values = jnp.concatenate([v, *(v for _, v in pairs)], axis=2)
    itself = jnp.broadcast_to(jnp.eye(LENGTH, dtype=bool), (len(q), LENGTH, LENGTH))
    return attend(q, keys, values, jnp.concatenate([segment_mask(segments), *[itself] * len(pairs)], axis=2))


def with_gradients(function: Any, q: Any, k: Any, v: Any, segments: Any) -> Any:
    """Returns the attention, padding included, and the gradients of a weighted sum of it."""
    weight = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    @jax.jit
    def run(*args: Any) -> Any:
        mixed, back = jax.vjp(lambda *inner: function(*inner, segments), *args)
        return mixed, back(weight)

    return run(q, k, v)


def test_splash_is_the_plain_attention_and_has_its_gradients():
    """Grouped heads, packed documents, padding, and a length that is no multiple of the block."""
    arguments = given()
    expected = with_gradients(plain, *arguments)
    found = with_gradients(functools.partial(attend_splash, interpret=True), *arguments)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)


@pytest.mark.parametrize("way", ["splash", "xla", "xla in blocks", "xla in blocks, row by row"])
def test_per_query_keys_are_columns_of_the_one_softmax(way: str):
    """With their gradients. Splash takes two blocks of queries, each with the block on the diagonal of every step."""
    pairs, arguments = per_query_pairs(2), given()

    def run(q: Any, k: Any, v: Any, pairs: Any, segments: Any) -> jax.Array:
        if way == "splash":
            return attend_splash(q, k, v, segments, pairs, interpret=True)
        options = AttentionOptions(query_block=64 if "blocks" in way else None, row_by_row="row by row" in way)
        return attend_text(q, k, v, Packed(segments), per_query=PerQueryKeys(pairs), options=options)

    def both(function: Any) -> Any:
        weight = jnp.cos(jnp.arange(arguments[0].size, dtype=jnp.float32)).reshape(arguments[0].shape)
        mixed, back = jax.vjp(function, *arguments[:3], pairs)
        return mixed, back(weight)

    expected = jax.jit(lambda: both(lambda q, k, v, pairs: dense(q, k, v, arguments[3], pairs)))()
    found = jax.jit(lambda: both(lambda q, k, v, pairs: run(q, k, v, pairs, arguments[3])))()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)


@pytest.mark.parametrize("block", [None, 64])
def test_keys_of_score_zero_take_their_share_of_the_softmax(block: int | None):
    q, k, v, segments = given()
    zeros = jnp.arange(LENGTH)[None] % 3
    per_query, options = PerQueryKeys(per_query_pairs(1), zeros), AttentionOptions(query_block=block, kernel="splash")
    found = attend_text(q, k, v, Packed(segments), per_query=per_query, options=options)
    more = jnp.zeros((2, 2, CHANNELS, 2)), jnp.zeros((2, 2, 2, CHANNELS))
    (own_k, own_v), seen = per_query_pairs(1)[0], jnp.broadcast_to(jnp.arange(2) < zeros[..., None], (2, LENGTH, 2))
    itself = jnp.broadcast_to(jnp.eye(LENGTH, dtype=bool), (2, LENGTH, LENGTH))
    keys, values = jnp.concatenate([k, own_k, more[0]], axis=3), jnp.concatenate([v, own_v, more[1]], axis=2)
    expected = attend(q, keys, values, jnp.concatenate([segment_mask(segments), itself, seen], axis=2))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_cudnns_mask_and_layout_are_those_of_the_plain_attention(monkeypatch: pytest.MonkeyPatch):
    asked, attention = [], jax.nn.dot_product_attention

    def by_xla(*arguments: Any, implementation: str, **others: Any) -> jax.Array:
        asked.append(implementation)
        return attention(*arguments, **others)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    np.testing.assert_allclose(jax.jit(attend_cudnn)(*given()), plain(*given()), atol=1e-5)
    assert asked == ["cudnn"]


@pytest.mark.parametrize(
    ("device", "dtype", "best"),
    [
        (TPU, "bfloat16", "splash"), (TPU, "float32", "splash"), (NVIDIA, "bfloat16", "cudnn"),
        (NVIDIA, "float32", "xla"), (AMD, "bfloat16", "xla"), (CPU, "bfloat16", "xla"),
    ],
)  # fmt: skip
def test_auto_is_the_best_kernel_of_the_platform(device: Any, dtype: str, best: str):
    assert choose_kernel("auto", device, dtype) == best
    assert choose_kernel("xla", device, dtype) == "xla"


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "match"),
    [
        ("splash", CPU, "bfloat16", "attention=splash is for TPUs, and the mesh has cpu: set attention=auto"),
        ("cudnn", TPU, "bfloat16", "attention=cudnn is for NVIDIA's GPUs, and the mesh has TPU v6 lite"),
        ("cudnn", AMD, "bfloat16", "the mesh has AMD MI300X"),
        ("cudnn", NVIDIA, "float32", "attention=cudnn takes no float32: set dtype=bfloat16"),
    ],
)
def test_a_kernel_that_does_not_run_there_is_refused_in_a_sentence(asked: Any, device: Any, dtype: str, match: str):
    with pytest.raises(ValueError, match=match):
        choose_kernel(asked, device, dtype)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (4, 1, 2)], ids=str)
def test_each_device_attends_to_its_rows_and_heads(sizes: Any, monkeypatch: pytest.MonkeyPatch):
    """The second mesh does not divide the rows evenly, so they are whole on every device."""
    shapes = []

    def kernel(q: Any, *others: Any) -> jax.Array:
        shapes.append(q.shape[::2])
        return plain(q, *others)

    monkeypatch.setitem(kernels.KERNELS, "splash", kernel)
    arguments = given(batch=4 if sizes == (2, 2, 2) else 2)
    options = AttentionOptions(kernel="splash")
    run = jax.jit(lambda q, k, v, segments: attend_text(q, k, v, Packed(segments), options=options))
    if sizes is None:
        found = run(*arguments)
    else:
        with jax.set_mesh(make_mesh(*sizes)):
            found = run(*arguments)
    np.testing.assert_allclose(found, plain(*arguments), atol=1e-6)
    rows, heads = {None: (2, 2), (2, 2, 2): (1, 1), (4, 1, 2): (2, 1)}[sizes]
    assert shapes == [(rows, heads, CHANNELS)]


def test_other_masks_and_what_a_kernel_does_not_take_are_left_to_xla(monkeypatch: pytest.MonkeyPatch):
    assert takes("cudnn", 200, 64) and not takes("cudnn", 201, 64) and not takes("cudnn", 200, 256)
    assert not takes("cudnn", 200, 64, per_query_pairs(1)) and takes("splash", 200, 64, per_query_pairs(1))
    monkeypatch.setattr("jaxspec.nn.kernels.KERNELS", {})
    q, k, v, segments = given(batch=2, kv_heads=1)
    q, k, v, segments = q[:, :9], k[..., :9], v[:, :, :9], segments[:, :9]
    expected = plain(q, k, v, segments)
    run = jax.jit(functools.partial(attend_text, options=AttentionOptions(kernel="cudnn", query_block=4)))
    for mask in (Packed(segments), segment_mask(segments)):
        np.testing.assert_allclose(run(q, k, v, mask), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh", "compile_fully")
def test_a_targets_layer_with_splash_and_int8_weights_compiles_for_tpus_that_are_not_here():
    """Two rows and two key-value heads over four chips; matmuls read int8, and no matrix is converted in memory."""
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    mesh = decode_program.tpu_mesh("v6e:2x2", data=2, tensor=2)
    kernel = choose_kernel("auto", mesh.devices.flat[0], "bfloat16")
    model = Decoder(LlamaConfig(256, 512, 1, 8, 2, 64, 1536), dtype=jnp.bfloat16, kernel=kernel)

    def init(key: jax.Array) -> Any:
        params = model.init_params(key)
        for name in CONTRACTED:
            params["layers"] |= quantize(name, params["layers"][name])
        return params

    def run(params: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        return model.forward(params, tokens, tokens, Packed(segments)).features_BLD

    params = decode_program.place(mesh, jax.eval_shape(init, jax.random.key(0)))
    rows = jax.ShapeDtypeStruct((2, 640), jnp.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(params, rows, rows).compile().as_text() or ""
    program = text[text.index("\nENTRY") :]
    assert "tpu_custom_call" in text and "splash" in text
    assert "s8[1,512,768]" in program and not re.search(r"(bf16|f32)\[(1,)?(512,768|768,512)\]", program)
