"""Rematerialization changes the memory of the backward pass and not its results; nor does a scan over layers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drafter_toys import KINDS, VOCAB, WIDTH

from jaxspec.base import Packed, SharedTables, UnrollInputs
from jaxspec.nn.remat import Remat
from jaxspec.targets.decoder import Decoder, LlamaConfig, unstack

CONFIG = LlamaConfig(32, 32, 4, 4, 2, 8, 128)


def text(rows: int, length: int) -> tuple[Any, ...]:
    """Returns tokens, positions and packed documents."""
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, CONFIG.vocab)
    segments = jnp.broadcast_to(1 + (jnp.arange(length) > length // 3), tokens.shape)
    return tokens, jnp.broadcast_to(jnp.arange(length), tokens.shape), Packed(segments)


class DrafterLoss:
    """A drafter and a loss of its outputs, to be differentiated."""

    def __init__(self, kind: str):
        self.drafter, rows, length = KINDS[kind], 2, 24
        tokens, *seen = text(rows, length)
        table = jnp.cos(jnp.arange(CONFIG.vocab * WIDTH, dtype=jnp.float32)).reshape(CONFIG.vocab, WIDTH)
        read = table[tokens] if not self.drafter.taps else jnp.tile(table[tokens], len(self.drafter.taps))
        self.given = (SharedTables(table, table), UnrollInputs(tokens % VOCAB, read, *seen), 3)

    def loss(self, remat: Remat, params: Any) -> jax.Array:
        return jnp.mean(self.drafter.clone(remat=remat).unroll(params, *self.given).hidden_TBLD ** 2)


def kept_bytes(loss: Any, params: Any) -> int:
    """Returns the bytes that the forward pass keeps for the backward pass."""
    back = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))


def target_loss(remat: Remat, params: Any) -> jax.Array:
    return jnp.sum(Decoder(CONFIG, remat=remat).forward(params, *text(2, 128)).features_BLD)


@pytest.mark.parametrize("kind", ["eagle", "eagle3", "medusa", "parallelspec", "draft_lm"])
def test_a_drafter_keeps_less_the_more_it_computes_again(kind: str):
    head = DrafterLoss(kind)
    params = jax.eval_shape(head.drafter.init_params, jax.random.key(0))
    full, dots, none = (kept_bytes(functools.partial(head.loss, remat), params) for remat in ("full", "dots", "none"))
    assert full <= dots < none


def test_gradients_through_what_is_computed_again_are_the_same():
    head = DrafterLoss("eagle")
    params = jax.jit(head.drafter.init_params)(jax.random.key(0))
    found, expected = (jax.jit(jax.grad(functools.partial(head.loss, remat)))(params) for remat in ("full", "none"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


def test_a_target_that_is_trained_takes_less_memory_the_more_it_computes_again():
    """Counts the temporaries of the compiled program: the values that its scan keeps for the backward scan."""
    params = jax.eval_shape(Decoder(CONFIG).init_params, jax.random.key(0))

    def temporaries(remat: Remat) -> int:
        compiled = jax.jit(jax.grad(functools.partial(target_loss, remat))).lower(params).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries("full") < temporaries("dots") < temporaries("none")


def test_a_scan_over_layers_is_the_layers_one_after_another():
    stacked = Decoder(CONFIG, taps=(1, 3))
    params = stacked.init_params(jax.random.key(0))

    @functools.partial(jax.jit, static_argnums=0)
    def read(target: Decoder, params: Any) -> Any:
        return target.forward(params, *text(2, 24))

    found, expected = read(stacked, params), read(stacked.clone(stacked=False), unstack(params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found, expected)
