"""One decoder layer: projections, attention in between, MLP or experts. `layer_weights` declares its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp

from jaxspec.base import Array, Params
from jaxspec.nn.mlp import constrain_rows, expert_mlp, gated_mlp
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.options import PLAIN, Options
from jaxspec.nn.quantization import rescale
from jaxspec.nn.rope import rotate
from jaxspec.parallel.mesh import constrain


def add_bias(layer: Params, name: str, product: Array) -> Array:
    """What a matmul with the matrix `name` gave, and its bias where it has one."""
    bias = layer.get(f"{name}_bias")
    return product if bias is None else product + bias.astype(product.dtype)


def project_qkv(
    layer: Params, x_BLD: Array, cos: Array, sin: Array, norm: Callable[[Array, Array], Array] | None = None
) -> tuple[Array, Array, Array]:
    """Rotated queries `[B, L, K, G, C]`, rotated keys `[B, K, C, L]` and values `[B, K, L, C]`.

    With `norm(x, weight)`, queries and keys are normed by the layer's `q_norm` and `k_norm` before.

    One fused weight `qkv [D, K, G + 2, C]` (queries of the group, its key, its value): one matmul, and it shards over
    the key-value heads as it stands.
    """
    qkv_BLKJC = rescale(layer, "qkv", jnp.einsum("BLD,DKJC->BLKJC", x_BLD, layer["qkv"].astype(x_BLD.dtype)))
    qkv_BLKJC = constrain(add_bias(layer, "qkv", qkv_BLKJC), "batch", None, "kv_heads", None, None)
    qk_BLKJC = qkv_BLKJC[..., :-1, :]
    if norm is not None:
        each = [layer["q_norm"]] * (qk_BLKJC.shape[-2] - 1) + [layer["k_norm"]]
        qk_BLKJC = norm(qk_BLKJC, jnp.stack(each))
    turned = rotate(qk_BLKJC, cos, sin)
    k_BKCL = jnp.transpose(turned[..., -1, :], (0, 2, 3, 1))
    v_BKLC = jnp.transpose(qkv_BLKJC[..., -1, :], (0, 2, 1, 3))
    return turned[..., :-1, :], k_BKCL, v_BKLC


def merge_heads(layer: Params, mixed_BLKGC: Array) -> Array:
    """The attention output projection, `[B, L, D]`."""
    out = layer["out"].astype(mixed_BLKGC.dtype)
    # As one contracted axis: of three, XLA:CPU makes one by copying the weight, each call.
    mixed_BLE = mixed_BLKGC.reshape(*mixed_BLKGC.shape[:2], -1)
    out_BLD = rescale(layer, "out", jnp.einsum("BLE,ED->BLD", mixed_BLE, out.reshape(-1, out.shape[-1])))
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
    """A Llama's layer: `x += out(mix(qkv(norm(x))))`, then `x += mlp(norm(x))`; `turn` is what `rope` gave.

    With `options` another family's: norms behind attention and MLP, norms of queries and keys, experts.

    `mix` is the attention: from queries, keys and values as `project_qkv` puts them out to `[B, L, K, G, C]` and
    whatever else the caller wants of them, which is returned beside the stream.
    """

    def norm(x: Array, weight: Array) -> Array:
        return rms_norm(x, weight, eps, centred=options.centred_norms)

    def behind(x: Array, name: str) -> Array:
        return norm(x, layer[name]) if options.norms_behind else x

    heads = project_qkv(layer, norm(x_BLD, layer["attention_norm"]), *turn, norm if options.qk_norm else None)
    mixed, kept = mix(*heads)
    x_BLD = x_BLD + behind(merge_heads(layer, mixed), "attention_out_norm")
    inner_BLD = norm(x_BLD, layer["mlp_norm"])
    if options.experts:
        made_BLD = expert_mlp(layer, inner_BLD, options)
    else:
        made_BLD = gated_mlp(layer, inner_BLD, options.activation)
    return x_BLD + behind(made_BLD, "mlp_out_norm"), kept
