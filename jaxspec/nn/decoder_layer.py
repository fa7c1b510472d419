"""One decoder layer: projections, attention in between, MLP or experts; and the shapes of its weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Params
from jaxspec.nn.mlp import constrain_rows, expert_mlp, gated_mlp
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.options import PLAIN, Options
from jaxspec.nn.quantization import rescale
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
    qkv_BLKJC = rescale(layer, "qkv", jnp.einsum("BLD,DKJC->BLKJC", x_BLD, layer["qkv"].astype(x_BLD.dtype)))
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
    out = layer["out"].astype(mixed_BLKGC.dtype)
    # One contracted axis: to contract three, XLA:CPU would copy the weight on every call.
    mixed_BLE = mixed_BLKGC.reshape(*mixed_BLKGC.shape[:2], -1)
    out_BLD = rescale(layer, "out", jnp.einsum("BLE,ED->BLD", mixed_BLE, out.reshape(-1, out.shape[-1])))
    return constrain_rows(add_bias(layer, "out", out_BLD))


class LayerShape(Protocol):
    """What shapes a decoder layer."""

    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mlp(self) -> int: ...


def layer_shapes(c: LayerShape, options: Options = PLAIN) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of one decoder layer."""
    group = c.heads // c.kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (c.width,),
        "qkv": (c.width, c.kv_heads, group + 2, c.head_dim),
        "out": (c.kv_heads, group, c.head_dim, c.width),
        "mlp_norm": (c.width,),
        "gate": (c.width, c.mlp),
        "up": (c.width, c.mlp),
        "down": (c.mlp, c.width),
    }
    if options.qkv_bias:
        shapes["qkv_bias"] = shapes["qkv"][1:]
    if options.out_bias:
        shapes["out_bias"] = (c.width,)
    if options.qk_norm:
        shapes |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    if options.norms_behind:
        shapes |= {"attention_out_norm": (c.width,), "mlp_out_norm": (c.width,)}
    if options.experts:
        for name in ("gate", "up", "down"):
            del shapes[name]
        into = (options.experts, c.width, options.expert_mlp)
        shapes |= {"router": (c.width, options.experts), "expert_gate": into, "expert_up": into}
        shapes["expert_down"] = (options.experts, options.expert_mlp, c.width)
    return shapes


def init_weight(
    key: Array, name: str, shape: tuple[int, ...], layers: int, dtype: Any, *, centred: bool = False
) -> Array:
    """Ones for norms (zeros where `centred`), zeros for biases, else normal(0.02), residual outputs scaled by
    `1 / sqrt(2 * layers)` (GPT-2's rule)."""
    if name.endswith("bias") or (centred and name.endswith("norm")):
        return jnp.zeros(shape, dtype)
    if name.endswith("norm"):
        return jnp.ones(shape, dtype)
    scale = 0.02 / math.sqrt(2 * layers) if name in ("out", "down", "expert_down") else 0.02
    return scale * jax.random.normal(key, shape, dtype)


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
