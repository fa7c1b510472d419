"""One decoder layer: projections, attention in between, MLP or experts. `layer_weights` declares its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp

from jaxspec.base import Array, Params
from jaxspec.nn.matmul import multiply
from jaxspec.nn.mlp import constrain_rows, expert_mlp, gated_mlp
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.options import PLAIN, Options
from jaxspec.nn.rope import rotate
from jaxspec.parallel.mesh import constrain


def add_bias(layer: Params, name: str, product: Array) -> Array:
    """Returns a product with the matrix `name`, plus the matrix's bias where it has one."""
    bias = layer.get(f"{name}_bias")
    return product if bias is None else product + bias.astype(product.dtype)


def project_qkv(
    layer: Params, x_BLD: Array, cos: Array, sin: Array, norm: Callable[[Array, Array], Array] | None = None
) -> tuple[Array, Array, Array]:
    """Returns rotated queries `[B, L, K, G, C]`, rotated keys `[B, K, C, L]` and values `[B, K, L, C]`.

    With `norm(x, weight)`, queries and keys are normed by the layer's `q_norm` and `k_norm` before they are rotated.
    """
    # One weight `qkv [D, K, G + 2, C]` holds each group's queries, key and value: two matmuls fewer a layer in
    # decoding, and it shards over its key-value heads.
    qkv_BLKJC = multiply(layer, "qkv", x_BLD)
    qkv_BLKJC = constrain(add_bias(layer, "qkv", qkv_BLKJC), "batch", None, "kv_heads", None, None)
    qk_BLKJC = qkv_BLKJC[..., :-1, :]
    if norm is not None:
        each = [layer["q_norm"]] * (qk_BLKJC.shape[-2] - 1) + [layer["k_norm"]]
        qk_BLKJC = norm(qk_BLKJC, jnp.stack(each))
    # Queries and keys are rotated in one operation: the key is the last of its group.
    turned = rotate(qk_BLKJC, cos, sin)
    k_BKCL = jnp.transpose(turned[..., -1, :], (0, 2, 3, 1))
    v_BKLC = jnp.transpose(qkv_BLKJC[..., -1, :], (0, 2, 1, 3))
    return turned[..., :-1, :], k_BKCL, v_BKLC


def merge_heads(layer: Params, mixed_BLKGC: Array) -> Array:
    """Returns the output projection of attention, `[B, L, D]`."""
    out_BLD = multiply(layer, "out", mixed_BLKGC.reshape(*mixed_BLKGC.shape[:2], -1))
    return constrain_rows(add_bias(layer, "out", out_BLD))


Kept = TypeVar("Kept")


def decoder_layer(
    layer: Params,
    x_BLD: Array,
    turn: tuple[Array, Array],
    eps: float,
    mix: Callable[[Array, Array, Array], tuple[Array, Kept]],
    options: Options = PLAIN,
) -> tuple[Array, Kept]:
    """Returns `[B, L, D]` of a Llama's layer: `x += out(mix(qkv(norm(x))))`, then `x += mlp(norm(x))`.

    `turn` is cosine and sine from `rope`. With `options` the layer is another family's: norms behind attention and
    MLP, norms of queries and keys, experts. `mix` is the attention: from queries, keys and values, in the layout of
    `project_qkv`, to `[B, L, K, G, C]` and anything the caller wants to keep of them, which is returned too.
    """
    norm = functools.partial(rms_norm, eps=eps, centred=options.centred_norms)
    heads = project_qkv(layer, norm(x_BLD, layer["attention_norm"]), *turn, norm if options.qk_norm else None)
    mixed, kept = mix(*heads)
    out_BLD = merge_heads(layer, mixed)
    x_BLD = x_BLD + (norm(out_BLD, layer["attention_out_norm"]) if options.norms_behind else out_BLD)
    inner_BLD = norm(x_BLD, layer["mlp_norm"])
    if options.experts:
        made_BLD = expert_mlp(layer, inner_BLD, options)
    else:
        made_BLD = gated_mlp(layer, inner_BLD, options.activation)
    return x_BLD + (norm(made_BLD, layer["mlp_out_norm"]) if options.norms_behind else made_BLD), kept
