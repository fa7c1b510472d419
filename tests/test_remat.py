"""What the backward pass computes again changes its memory and not its results; nor does a scan over layers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drafter_toys import BATCH, LENGTH, Toy

from jaxspec.base import Packed
from jaxspec.drafters import Eagle, EagleConfig
from jaxspec.layers import Remat
from jaxspec.targets.llama import Llama, LlamaConfig, unstack

CONFIG = LlamaConfig(32, 32, 4, 4, 2, 8, 128)


def text(rows: int, length: int) -> tuple[Any, ...]:
    """Tokens, positions and packed documents."""
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, CONFIG.vocab)
    segments = jnp.broadcast_to(1 + (jnp.arange(length) > length // 3), tokens.shape)
    return tokens, jnp.broadcast_to(jnp.arange(length), tokens.shape), Packed(segments)


@pytest.mark.parametrize("kind", ["eagle", "medusa", "parallelspec", "draft_lm"])
@pytest.mark.usefixtures("compile_quickly")
def test_gradients_through_what_is_computed_again_are_the_same(kind: str):
    t = Toy(kind)
    at, seen = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH)), Packed(jnp.ones((BATCH, LENGTH), jnp.int32))

    def loss(drafter: Any, params: Any) -> jax.Array:
        out = drafter.unroll(params, t.borrowed, t.tokens[:, :LENGTH], t.features[:, :LENGTH], at, seen, 3)
        return jnp.mean(out.hidden_TBLD**2)

    def gradient(remat: Remat) -> Any:
        return jax.jit(jax.grad(functools.partial(loss, t.drafter.clone(remat=remat))))(t.params)

    expected = gradient("none")
    for remat in ("dots", "full") if kind == "draft_lm" else ("full",):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), gradient(remat), expected)


def test_the_less_is_kept_the_less_memory_a_target_and_a_head_take():
    tokens, positions, seen = text(2, 128)
    head = Eagle(EagleConfig(32, 4, 2, 8, 128))

    def target_loss(remat: Remat, params: Any) -> jax.Array:
        return jnp.sum(Llama(CONFIG, remat=remat).forward(params, tokens, positions, seen).features_BLD)

    def head_loss(remat: Remat, params: Any) -> jax.Array:
        given = (borrowed, tokens, borrowed.embed_VD[tokens], positions, seen)
        return jnp.sum(head.clone(remat=remat).unroll(params, *given, 4).hidden_TBLD)

    def temporaries(loss: Any, remat: Remat, params: Any) -> int:
        compiled = jax.jit(jax.grad(functools.partial(loss, remat))).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    params = Llama(CONFIG).init_params(jax.random.key(0))
    borrowed = Llama(CONFIG).borrowed(params)
    least, less, most = (temporaries(target_loss, remat, params) for remat in ("full", "dots", "none"))
    assert least < less < most
    params = head.init_params(jax.random.key(0))
    assert temporaries(head_loss, "full", params) < temporaries(head_loss, "none", params)


@pytest.mark.usefixtures("compile_quickly")
def test_a_scan_over_layers_is_the_layers_one_after_another():
    stacked = Llama(CONFIG, taps=(1, 3))
    params = stacked.init_params(jax.random.key(0))

    @functools.partial(jax.jit, static_argnums=0)
    def read(target: Llama, params: Any) -> Any:
        return target.forward(params, *text(2, 24))

    found, expected = read(stacked, params), read(stacked.clone(stacked=False), unstack(params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found, expected)
