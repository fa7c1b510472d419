"""Arrays that stand in for weights, caches and decode states, filled at once: no model, prompt or prefill is needed."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Cache, Tree, TreePolicy
from jaxspec.decoding.requests import NO_STOP, blank_requests
from jaxspec.decoding.rounds import DecodeState
from jaxspec.planning.decode_program import abstract_state
from jaxspec.serving.loading import Models, random_models
from jaxspec.trees.shape import ancestor_mask

WEIGHT_SCALE, CACHE_SCALE = 0.07, 1.0
"""Widths of the uniform values of weights and of keys and values."""
BRANCHES = 3
"""Children of each node of `stand_in_tree`."""


def fill(shapes: Any, scale: float) -> Any:
    """Returns arrays of the shapes of a tree of `ShapeDtypeStruct`s: ones in vectors, else `scale` wide around 0.

    Numbers are made from their places, so that a small program a shape fills any number of weights in no time.
    """
    return jax.tree.map(lambda s: _filled(jnp.float32(scale), s.shape, s.dtype), shapes)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _filled(scale: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    if len(shape) < 2:
        return jnp.ones(shape, dtype)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - axis) for axis in (2, 1))
    # Values differ in most bits: products of equal numbers draw less power, and are faster for it.
    return (((row * 7919 + column * 104729) % 2039 / 2038.0 - 0.5) * scale).astype(dtype)


def stand_in_models(shape: str, tree: TreePolicy, *, dtype: Any) -> Models:
    """Returns `loading.random_models` with weights that stand in: those would take longer to draw than to measure."""
    made: list[Models] = []

    def weights() -> Any:
        models = random_models(shape, tree, dtype=dtype)
        made.append(models)
        return models.weights

    shapes = jax.eval_shape(weights)
    return made[0]._replace(weights=fill(shapes, WEIGHT_SCALE))


def stand_in_state(models: Models, *, batch: int, capacity: int, slots: int) -> DecodeState:
    """Returns a state that rounds can go on from: a cache of `capacity` tokens a row, an output of `slots`.

    Rows have no committed token yet, see `at_prefix`, and never end.
    """
    shapes = abstract_state(models.engine, models.weights, batch=batch, capacity=capacity, slots=slots)
    requests = blank_requests(batch, 1, width=0)
    requests = requests._replace(
        sampling=requests.sampling._replace(top_p_B=jnp.ones(batch)),
        stop_BR=jnp.full((batch, 1), NO_STOP, jnp.int32),
        budget_B=jnp.full(batch, 2**30, jnp.int32),
    )
    state = fill(shapes, CACHE_SCALE)
    return state._replace(requests=requests, root_B=jnp.arange(1, batch + 1, dtype=jnp.int32) % models.config.vocab)


def at_prefix(state: DecodeState, prefix: int) -> DecodeState:
    """Returns a state whose rows have `prefix` committed tokens, and have written none.

    It shares large arrays with `state` and no small one, so that `state` keeps those where it is donated.
    """
    length_B, drafted_B = (jnp.full_like(state.length_B, prefix) for _ in range(2))
    draft = None if state.draft is None else state.draft._replace(length_B=drafted_B)
    return state._replace(
        requests=jax.tree.map(jnp.copy, state.requests),
        length_B=length_B,
        root_B=jnp.copy(state.root_B),
        draft=draft,
        output_BO=jnp.zeros_like(state.output_BO),
        call_BO=jnp.zeros_like(state.call_BO),
        produced_B=jnp.zeros_like(state.produced_B),
        finish_B=jnp.zeros_like(state.finish_B),
        calls_B=jnp.zeros_like(state.calls_B),
        accepted_BP=jnp.zeros_like(state.accepted_BP),
        drafted_BO2=jnp.zeros_like(state.drafted_BO2),
    )


def plain_view(state: DecodeState) -> DecodeState:
    """Returns the state as plain decoding has it; the cache is the same array."""
    accepted_BP = jnp.zeros_like(state.accepted_BP[:, :1])
    return state._replace(draft=None, root_logits_BV=None, accepted_BP=accepted_BP)


def cache_bytes(models: Models, *, batch: int, capacity: int) -> int:
    """Returns the bytes of all caches of a state."""
    shapes = abstract_state(models.engine, models.weights, batch=batch, capacity=capacity, slots=64)
    caches = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, Cache))
    return sum(a.size * a.dtype.itemsize for c in caches if isinstance(c, Cache) for a in c)


def stand_in_tree(batch: int, nodes: int, vocab: int) -> Tree:
    """Returns a tree of `nodes` nodes, every one with the next `BRANCHES` that are left as its children."""
    parents = [-1, *((i - 1) // BRANCHES for i in range(1, nodes))]
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    token_BN, parent_BN, depth_BN = (
        jnp.broadcast_to(jnp.asarray(row, jnp.int32), (batch, nodes))
        for row in ([(7 * i + 3) % vocab for i in range(nodes)], parents, depths)
    )
    ancestors_BNN = ancestor_mask(parent_BN, max(depths))
    score_BN, valid_BN = jnp.zeros((batch, nodes)), jnp.ones((batch, nodes), bool)
    return Tree(token_BN, parent_BN, depth_BN, score_BN, valid_BN, ancestors_BNN)
