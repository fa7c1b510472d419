"""The int8 target: int8 weights of its layers, one scale per output channel, half of bf16's memory and traffic."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from jaxspec.base import Array, Params
from jaxspec.nn.layer_weights import LAYER
from jaxspec.nn.weights import Weight, declare, ones

CONTRACTED = {name: weight.matrix for name, weight in LAYER.items() if weight.matrix is not None}
"""The matrices of a layer -> their axes that a matmul sums over; the others are its output channels."""
LEVELS = 127
"""Greatest int8 that a weight becomes."""


def scale_name(name: str) -> str:
    """Returns the name of a matrix's scales."""
    return f"{name}_scale"


def _scale_axes(name: str) -> tuple[str | None, ...]:
    """Logical axes of a matrix's scales: those of its output channels; `width` alone splits none."""
    axes = LAYER[name].axes
    left = tuple(axis for i, axis in enumerate(axes) if i - len(axes) not in CONTRACTED[name])
    return left if set(left) - {None, "width"} else ()


declare({scale_name(name): Weight(ones, _scale_axes(name)) for name in CONTRACTED})


def quantize(name: str, weight: Array) -> dict[str, Array]:
    """Returns a layer's matrix `name`, stacked or not, as int8, and its fp32 scales under `scale_name`.

    With scale `s = max |w| / 127` of an output channel, `|w - s * int8(w)| <= s / 2`.
    """
    wide, axes = weight.astype(jnp.float32), CONTRACTED[name]
    top = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
    # A channel of zeros has any scale.
    scale = jnp.where(top > 0, top / LEVELS, 1.0)
    whole = jnp.clip(jnp.round(wide / scale), -LEVELS, LEVELS).astype(jnp.int8)
    return {name: whole, scale_name(name): jnp.squeeze(scale, axes)}


def quantize_layers(params: Params) -> Params:
    """Returns a target's weights with every matrix of its layers quantized, whether the layers are stacked or not."""
    # Norms, embedding and LM head stay exact, because drafters' losses are made of the head's logits.
    layers = params["layers"]
    made = _quantize_layer(layers) if isinstance(layers, dict) else [_quantize_layer(layer) for layer in layers]
    return {**params, "layers": made}


def _quantize_layer(layer: Params) -> Params:
    """Returns one layer's weights with every matrix quantized."""
    made = [quantize(name, w) if name in CONTRACTED else {name: w} for name, w in layer.items()]
    return {name: weight for part in made for name, weight in part.items()}


def rescale(layer: Mapping[str, Array], name: str, product: Array) -> Array:
    """Returns a product with the matrix `name`, times the matrix's scales where it is quantized."""
    # The product is scaled and not the matrix, so int8 is the matmul's operand, which XLA converts as it reads it.
    scale = layer.get(scale_name(name))
    return product if scale is None else (product.astype(jnp.float32) * scale).astype(product.dtype)
