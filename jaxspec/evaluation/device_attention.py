"""Attention alone on a device: this project's and others' implementations, over a cache and over training rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Packed
from jaxspec.evaluation import stand_ins
from jaxspec.evaluation.device_plan import DevicePlan
from jaxspec.evaluation.loops import compile_loop, repeating, time_loop
from jaxspec.evaluation.measurements import Figures, Measurement
from jaxspec.nn import cache as kv
from jaxspec.nn.attention import AttentionOptions, Prefix, attend, attend_text
from jaxspec.serving.loading import DTYPES
from jaxspec.targets.decoder import SHAPES

QUERY_BLOCK = 512
"""Queries that XLA attends at a time over training rows, as in the recipes for 8B targets."""
MOST_ITERATIONS = 4096


class AttentionBench:
    """Measures the attention of one layer."""

    def __init__(self, plan: DevicePlan) -> None:
        self.plan, self.config = plan, SHAPES[plan.shape]

    def measure(self, m: Measurement) -> Figures:
        """Returns the figures of one measurement. Raises whatever an implementation refuses."""
        step, given, moved, flops = (self._cached if m.kind == "attention" else self._text)(m.settings)
        loop = compile_loop(step, given, jnp.int32(0))
        timed, _ = time_loop(loop, given, jnp.int32(0), at_least=self.plan.repeat_seconds, most=MOST_ITERATIONS)
        return {
            "seconds": timed.seconds,
            "bytes_per_second": moved / timed.seconds,
            "flops_per_second": flops / timed.seconds,
            "bytes": moved,
            "flops": flops,
            "compile_seconds": timed.compile_seconds,
            "iterations": timed.iterations,
        }

    def _filled(self, *shape: int) -> Array:
        return stand_ins.fill(jax.ShapeDtypeStruct(shape, DTYPES[self.plan.dtype]), 1.0)

    def _cached(self, s: dict[str, Any]) -> tuple[Callable[..., Any], Any, float, float]:
        """Returns the attention of a tree's nodes to each other and to a prefix."""
        c, batch, nodes, prefix = self.config, s["batch"], s["nodes"], s["prefix"]
        mask_BNN = stand_ins.stand_in_tree(batch, nodes, c.vocab).ancestors_BNN
        if s["implementation"] == "jaxspec":
            empty = jax.eval_shape(lambda: kv.empty(1, batch, c.kv_heads, c.head_dim, prefix, DTYPES[self.plan.dtype]))
            given = (
                self._filled(batch, nodes, c.kv_heads, c.group, c.head_dim),
                self._filled(batch, c.kv_heads, c.head_dim, nodes),
                self._filled(batch, c.kv_heads, nodes, c.head_dim),
                mask_BNN,
                stand_ins.fill(empty, 1.0),
            )
            compute = functools.partial(_attend_ours, prefix)
        else:
            seen = jnp.ones((batch, nodes, prefix), bool)
            given = (
                self._filled(batch, nodes, c.heads, c.head_dim),
                self._filled(batch, prefix + nodes, c.kv_heads, c.head_dim),
                self._filled(batch, prefix + nodes, c.kv_heads, c.head_dim),
                jnp.concatenate([seen, mask_BNN], axis=2)[:, None],
            )
            compute = functools.partial(_attend_jax, s["implementation"])
        size = jnp.dtype(DTYPES[self.plan.dtype]).itemsize
        moved = 2.0 * batch * (prefix + nodes) * c.kv_heads * c.head_dim * size
        return repeating(compute), given, moved, 4.0 * batch * nodes * (prefix + nodes) * c.heads * c.head_dim

    def _text(self, s: dict[str, Any]) -> tuple[Callable[..., Any], Any, float, float]:
        """Returns the attention within training rows, forward and back."""
        c, rows, length = self.config, s["rows"], s["length"]
        given = (
            self._filled(rows, length, c.kv_heads, c.group, c.head_dim),
            self._filled(rows, c.kv_heads, c.head_dim, length),
            self._filled(rows, c.kv_heads, length, c.head_dim),
            jnp.ones((rows, length), jnp.int32),
        )
        options = AttentionOptions(query_block=min(QUERY_BLOCK, length), kernel=s["implementation"])
        size = jnp.dtype(DTYPES[self.plan.dtype]).itemsize
        # Read and written forward, read again and their gradients written back.
        moved = 4.0 * rows * length * (c.heads + c.kv_heads) * c.head_dim * size
        # Two matmuls forward and four back, half of them hidden by the mask.
        flops = 6.0 * rows * length * length * c.heads * c.head_dim
        return repeating(functools.partial(_attend_text_and_back, options)), given, moved, flops


def _attend_ours(prefix: int, given: Any, zero: Array) -> Array:
    q, k, v, mask, cache = given
    past = Prefix(cache, 0, jnp.full(q.shape[0], prefix, jnp.int32))
    return attend(q + zero.astype(q.dtype), k, v, mask, past)


def _attend_jax(implementation: Any, given: Any, zero: Array) -> Array:
    q, k, v, mask = given
    q = q + zero.astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)


def _attend_text_and_back(options: AttentionOptions, given: Any, zero: Array) -> Any:
    q, k, v, segments_BL = given

    def total(q: Array, k: Array, v: Array) -> Array:
        return jnp.sum(attend_text(q, k, v, Packed(segments_BL), options=options).astype(jnp.float32))

    return jax.grad(total, (0, 1, 2))(q + zero.astype(q.dtype), k, v)
