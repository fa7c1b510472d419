"""Muon: orthogonal steps for matrices, however they are stacked and shaped, and Adam's for all else."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxspec.distillation.optimizer import make_optimizer
from jaxspec.drafters import Fspad, FspadConfig, Medusa, MedusaConfig

HEAD = Fspad(FspadConfig(16, 4, 2, 6, 20))
RATE = 1e-2


def first_step(params: Any, **how: Any) -> tuple[Any, Any]:
    """The update from random gradients, and those."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    gradient = jax.tree.unflatten(tree, [jax.random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)])
    optimizer = make_optimizer(lambda count: jnp.asarray(RATE), **how)
    return jax.jit(lambda: optimizer.update(gradient, optimizer.init(params), params)[0])(), gradient


@pytest.fixture(scope="module")
def head():
    return jax.jit(HEAD.init_params)(jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "rows"), [("fc", 32), ("qkv", 16), ("out", 24), ("sampling_down", 20), ("gate", 16), ("down", 20)]
)
def test_a_matrix_moves_by_an_orthogonal_matrix_of_adamws_size(head, name: str, rows: int):
    update, gradient = first_step(head, kind="muon")
    moved = np.asarray(update[name]).reshape(rows, -1)
    size = 0.2 * RATE * max(moved.shape) ** 0.5
    singular = np.linalg.svd(moved / size, compute_uv=False)
    assert singular.min() > 0.5 and singular.max() < 1.3  # five Newton-Schulz steps leave them about 1
    assert np.vdot(moved, np.asarray(gradient[name]).reshape(rows, -1)) < 0  # downhill


def test_stacked_matrices_move_as_each_alone():
    heads = jax.jit(Medusa(MedusaConfig(8, 3)).init_params)(jax.random.key(0))
    update, gradient = first_step(heads, kind="muon")
    optimizer = make_optimizer(lambda count: jnp.asarray(RATE), kind="muon")
    for i in range(3):
        one = {"block": heads["block"][i]}
        alone: Any = optimizer.update({"block": gradient["block"][i]}, optimizer.init(one), one)[0]
        np.testing.assert_allclose(update["block"][i], alone["block"], atol=1e-6)


def test_norms_biases_and_tables_move_by_adam(head):
    params = {**head, "mask_tokens": jnp.ones((3, 16)), "embed": jnp.ones((9, 16))}
    update, gradient = first_step(params, kind="muon", weight_decay=0.1)
    adam = optax.adamw(RATE, 0.9, 0.95, nesterov=True, weight_decay=0.0)
    expected: Any = adam.update(gradient, adam.init(params), params)[0]
    for name in ("fc_bias", "mlp_norm", "sampling_norm", "mask_tokens", "embed"):
        np.testing.assert_allclose(update[name], expected[name], rtol=1e-5, err_msg=name)


def test_norms_and_biases_do_not_decay(head):
    grown = jax.tree.map(lambda w: w + 100.0, head)
    for kind in ("muon", "adamw"):
        decayed, kept = (first_step(grown, kind=kind, weight_decay=decay)[0] for decay in (0.1, 0.0))
        for name, moved in decayed.items():
            whole = name.endswith(("norm", "bias"))
            assert bool(jnp.all(moved == kept[name])) == whole, name


def test_muon_takes_the_epsilon_that_it_is_given(head):
    update, usual = (first_step(head, kind="muon", eps=eps)[0] for eps in (1.0, 1e-8))
    assert not np.allclose(update["mlp_norm"], usual["mlp_norm"])
