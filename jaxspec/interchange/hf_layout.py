"""HuggingFace layout: the stored tensors that each weight of a target is made of, and the shapes of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import Params
from jaxspec.interchange.tensors import Bounds, copy_region
from jaxspec.interchange.weight_files import is_buffer
from jaxspec.nn.layer_weights import layer_shapes
from jaxspec.targets.decoder import LlamaConfig
from jaxspec.targets.families import family_of
from jaxspec.targets.stored import TensorPart, Tensors, top_tensors


def weight_shapes(config: LlamaConfig, stacked: bool) -> Params:
    """Returns the tree of weights that `Decoder(config, stacked)` takes, as shapes."""
    shapes = layer_shapes(config, config.options)
    layers: Any = [{name: _float32(*shape) for name, shape in shapes.items()} for _ in range(config.layers)]
    if stacked:
        layers = {name: _float32(config.layers, *shape) for name, shape in shapes.items()}
    plan = {"embed": _float32(config.vocab, config.width), "layers": layers, "norm": _float32(config.width)}
    return plan if config.tied else {**plan, "head": _float32(config.vocab, config.width)}


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor that a HuggingFace folder stores, by name."""
    layer = family_of(config).layer(config)
    shapes = {name: stored.shape for name, stored in top_tensors(config).items()}
    for i in range(config.layers):
        shapes |= {f"model.layers.{i}.{name}": stored.shape for name, stored in layer.items()}
    return shapes


def path_keys(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the plain keys of a path of JAX's, such as `("layers", 3, "qkv")`."""
    return tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)


class Source(NamedTuple):
    """A part of a weight that is stored in one tensor."""

    tensor: str
    layer: int | None
    """Its row of a stacked weight; None for a weight without an axis over layers."""
    part: TensorPart


def sources_of(config: LlamaConfig, keys: Sequence[Any]) -> list[Source]:
    """Returns the parts that the weight at a path of the tree is made of."""
    inside, layers = keys[0] == "layers", config.layers
    found: Tensors = family_of(config).layer(config) if inside else top_tensors(config)
    parts = [(name, part) for name, stored in found.items() for part in stored.parts if part.weight == keys[-1]]
    if not inside:
        return [Source(name, None, part) for name, part in parts]
    if len(keys) == 3:
        return [Source(f"model.layers.{keys[1]}.{name}", None, part) for name, part in parts]
    return [Source(f"model.layers.{i}.{name}", i, part) for i in range(layers) for name, part in parts]


def assemble(
    tensors: Mapping[str, Any], sources: Sequence[Source], shape: tuple[int, ...], block: Bounds, *, dtype: Any
) -> np.ndarray:
    """Returns one block of a weight of this shape; a block holds whole layers."""
    buffer = np.empty([stop - start for start, stop in block], dtype)
    for name, layer, part in sources:
        view, inner = (buffer if layer is None else buffer[layer]), slice(layer is not None, None)
        sizes, bounds = shape[inner], block[inner]
        if part.expert is not None:
            (start, stop), sizes, bounds = bounds[0], sizes[1:], bounds[1:]
            if not start <= part.expert < stop:
                continue
            view = view[part.expert - start]
        region, stored_shape = [], tensors[name].get_shape()
        taken = (part.rows or (0, stored_shape[0]), *((0, n) for n in stored_shape[1:]))
        for (first, last), axis in zip(taken, part.axes, strict=True):
            start, stop = bounds[axis]
            per = (last - first) // sizes[axis]  # stored rows (or columns) of one step along the weight's axis
            region.append((first + start * per, first + stop * per))
        copy_region(part.view(view), tensors[name], tuple(region))
    return buffer


def refuse_extra(tensors: Mapping[str, Any], config: LlamaConfig, folder: Path) -> None:
    """Raises ValueError naming the first tensor that the config does not call for."""
    # Old folders store rotary buffers, and some store a tied head a second time: both are ignored.
    known = tensor_shapes(config).keys() | ({"lm_head.weight"} if config.tied else set())
    extra = sorted(name for name in tensors if name not in known and not is_buffer(name))
    if extra:
        raise ValueError(
            f"{folder} has the tensor {extra[0]}, which its config.json does not call for ({len(extra)} such)"
        )
