"""The weights of a decoder layer: their shapes, where they lie on a mesh, their initial values, how they are read."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

from jaxspec.nn.options import PLAIN, Options
from jaxspec.nn.weights import BIAS, NORM, Shape, Weight, declare, normal, zeros


class LayerShape(Protocol):
    """The sizes of a decoder layer."""

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


def check_layer(c: LayerShape) -> None:
    """Raises ValueError naming the size that no layer can have."""
    for name in ("width", "heads", "kv_heads", "head_dim", "mlp"):
        if (size := getattr(c, name)) < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    if c.heads % c.kv_heads:
        raise ValueError(f"heads={c.heads} must be a multiple of kv_heads={c.kv_heads}")
    if c.head_dim % 2:
        raise ValueError(f"head_dim={c.head_dim} must be even for rotary positions")


def layer_shapes(c: LayerShape, options: Options = PLAIN) -> dict[str, Shape]:
    """Returns the shape of every weight of one decoder layer.

    The order is part of the result: initial values are drawn by a weight's number in it.
    """
    group = c.heads // c.kv_heads
    shapes: dict[str, Shape] = {
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


def layer_weights(layers: int, *, centred: bool = False) -> dict[str, Weight]:
    """Returns every weight that one of a model's `layers` may have, with GPT-2's initial values.

    Norms are ones (zeros where `centred`, for these multiply by `1 + weight`), biases zeros, all else normal(0.02);
    the matrices that write to the residual stream are smaller by `1 / sqrt(2 * layers)`.
    """
    norm = dataclasses.replace(NORM, init=zeros) if centred else NORM
    residual = normal(0.02 / math.sqrt(2 * layers))
    into = Weight(axes=("width", "mlp"), matrix=(-2,), multiplied=True)
    # Not matrices to Muon: Adam takes experts and router.
    expert = Weight(axes=("experts", "width", None))
    return {
        "attention_norm": norm,
        "qkv": Weight(axes=("width", "kv_heads", None, None), matrix=(-4,), multiplied=True),
        "out": Weight(residual, ("kv_heads", None, None, "width"), (-4, -3, -2), multiplied=True),
        "mlp_norm": norm,
        "gate": into,
        "up": into,
        "down": Weight(residual, ("mlp", "width"), (-2,), multiplied=True),
        "qkv_bias": dataclasses.replace(BIAS, axes=("kv_heads", None, None)),
        "out_bias": BIAS,
        "q_norm": norm,
        "k_norm": norm,
        "attention_out_norm": norm,
        "mlp_out_norm": norm,
        "router": Weight(),
        "expert_gate": expert,
        "expert_up": expert,
        "expert_down": Weight(residual, ("experts", None, "width")),
    }


LAYER = declare(
    layer_weights(1),
    {
        "qkv": "[width, kv_heads, group + 2, head_dim]: of each key-value head its group's queries, its key, its "
        "value; query head h is number h % group of key-value head h // group, where group = heads / kv_heads",
        "out": "[kv_heads, group, head_dim, width]",
        "mlp": "down(silu(x @ gate) * (x @ up))",
        "experts": "expert_gate and expert_up are [experts, width, inner], expert_down [experts, inner, width]; a "
        "token takes those likeliest by softmax(x @ router)",
        "norm": "weight * x / sqrt(mean(x^2) + norm_eps), statistics in float32",
        "rope": "channel i turns with channel i + head_dim / 2 by position * rope_theta^(-2 i / head_dim), before the "
        "config's rope_scaling",
    },
)
"""The weights of a decoder layer by name, with the initial values of a model of one layer."""
