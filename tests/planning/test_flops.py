"""The FLOP counter against hand formulas, and against XLA's own count where that has no loop to miss."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxspec.distillation.objective import Objective
from jaxspec.distillation.step import init_state, train_step
from jaxspec.distillation.task import Batch, Frozen, Task
from jaxspec.drafters import Eagle, EagleConfig
from jaxspec.planning.flops import Flops, count_flops
from jaxspec.targets.decoder import Decoder, LlamaConfig

pytestmark = pytest.mark.usefixtures("compile_afresh", "compile_fully")

X, W = jax.ShapeDtypeStruct((5, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 5 * 8 * 8  # of `x @ w`


def xla_flops(program: Callable, *arguments: Any) -> float:
    analysis = jax.jit(program).lower(*arguments).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def test_a_matmul_is_two_flops_for_every_product():
    assert count_flops(jnp.matmul, X, W) == Flops(ONE, 0)
    q, k = jax.ShapeDtypeStruct((2, 3, 7, 4), jnp.bfloat16), jax.ShapeDtypeStruct((2, 3, 9, 4), jnp.bfloat16)
    assert count_flops(lambda q, k: jnp.einsum("BKQC,BKMC->BKQM", q, k), q, k).total == 2 * (2 * 3) * 7 * 9 * 4


def test_a_convolution_is_two_flops_for_every_product():
    image, kernel = jax.ShapeDtypeStruct((2, 6, 10, 10), jnp.float32), jax.ShapeDtypeStruct((4, 3, 3, 3), jnp.float32)
    program = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID", feature_group_count=2
    )
    assert count_flops(program, image, kernel).total == 2 * (2 * 4 * 8 * 8) * (3 * 3 * 3)


def scan_of_map(x, w):
    return jax.lax.scan(lambda x, _: (jax.lax.map(lambda row: row @ w, x), None), x, None, length=7)[0]


def until_large(x, step):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, step, x)


def one_or_three_matmuls(x, w):
    return jax.lax.cond(jnp.sum(x) > 0, lambda x: x @ w @ w @ w, lambda x: x @ w, x)


def unused_matmuls(x, w):
    return jax.lax.scan(lambda x, _: (x, x @ w), x, None, length=4)[0] + 0 * jnp.sum(w)


def loss_of_blocks(w, x, wrap):
    block = wrap(lambda x: jnp.tanh(x @ w) @ w)
    return jnp.sum(jax.lax.scan(lambda x, _: (block(x), None), x, None, length=3)[0])


def loss_of_rows(w, x):
    matmul = jax.checkpoint(lambda row: jax.lax.cond(row[0] > 0, lambda r: jnp.sum(jnp.tanh(r @ w)), jnp.sum, row))
    return jnp.sum(jax.lax.map(matmul, x))


def test_a_loop_counts_its_body_once_a_trip():
    assert count_flops(jax.jit(scan_of_map), X, W).total == 7 * ONE
    assert count_flops(lambda x, w: jax.lax.fori_loop(0, 6, lambda _, x: x @ w, x), X, W).total == 6 * ONE


def test_a_loop_without_a_known_end_is_refused_only_if_it_multiplies():
    assert count_flops(lambda x: until_large(x, lambda x: x + 1), X).total == 0
    with pytest.raises(ValueError, match="trips are not known"):
        count_flops(lambda x, w: until_large(x, lambda x: x @ w), X, W)


def test_a_conditional_counts_its_most_expensive_branch():
    assert count_flops(one_or_three_matmuls, X, W).total == 3 * ONE


def test_what_no_result_needs_is_not_counted():
    assert count_flops(unused_matmuls, X, W).total == 0


def test_a_checkpointed_block_is_computed_again_on_the_way_back():
    """`tanh(x w) w`, thrice: forward 2 matmuls, again 1 (the second one's result is not needed), back 4."""
    kept = count_flops(jax.value_and_grad(functools.partial(loss_of_blocks, wrap=lambda f: f)), W, X)
    again = count_flops(jax.value_and_grad(functools.partial(loss_of_blocks, wrap=jax.checkpoint)), W, X)
    assert kept == Flops(3 * 6 * ONE, 0) and again == Flops(3 * 7 * ONE, 3 * ONE)
    assert again.model == kept.total


def test_a_checkpointed_conditional_in_a_loop_is_told_apart_too():
    assert count_flops(jax.value_and_grad(loss_of_rows), W, X) == Flops(3 * ONE, ONE)  # forward, again, gradient by `w`


def test_xla_counts_the_same_where_there_is_no_loop():
    counted = count_flops(lambda x, w: x @ w @ w, X, W).total
    assert xla_flops(lambda x, w: x @ w @ w, X, W) == counted


def test_xla_counts_the_same_for_a_training_step_of_one_layer_and_one_chunk():
    """Up to what is no matmul, such as the softmax: XLA counts that, too."""
    target = Decoder(LlamaConfig(512, 256, 1, 4, 2, 64, 512), stacked=False)
    drafter, optimizer, objective = Eagle(EagleConfig(256, 4, 2, 64, 512)), optax.sgd(0.1), Objective(steps=2)
    frozen = jax.eval_shape(target.init_params, jax.random.key(0))
    state = jax.eval_shape(lambda: init_state(drafter, optimizer, jax.random.key(0)))
    rows: Any = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    batch = Batch(rows, rows, rows, rows)
    step = functools.partial(train_step, Task(target, drafter, objective), optimizer)
    counted = count_flops(step, Frozen(frozen), state, batch).total
    theirs = xla_flops(step, Frozen(frozen), state, batch)
    assert counted < theirs < 1.15 * counted, theirs / counted


def test_each_row_of_experts_is_multiplied_by_one_of_them_and_so_are_its_gradients():
    rows, matrices = jnp.zeros((6, 5)), jnp.zeros((3, 5, 7))
    sizes = jnp.array([1, 2, 3])
    product = 2 * 6 * 5 * 7
    assert count_flops(jax.lax.ragged_dot, rows, matrices, sizes).total == product

    def loss(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.ragged_dot(rows, matrices, sizes) ** 2)

    assert count_flops(jax.grad(loss, argnums=(0, 1)), rows, matrices).total == 3 * product
