"""HuggingFace folders: weights read straight into (sharded) arrays one at a time, and written back.

Whatever reads such a folder also takes a target that jaxspec wrote as an Orbax checkpoint (`interchange.exported`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxspec.base import Params
from jaxspec.interchange import exported
from jaxspec.interchange.hf_config import config_fields, read_config, write_config
from jaxspec.interchange.tensors import (
    CHUNK_BYTES,
    DTYPE_CODES,
    Bounds,
    Fill,
    StoredWeight,
    check_tensors,
    copy_region,
    file_tensors,
    filled_folder,
    open_tensors,
    place,
)
from jaxspec.nn.layer_weights import layer_shapes
from jaxspec.nn.quantization import CONTRACTED, quantize
from jaxspec.parallel.mesh import leaf_name, shardings
from jaxspec.targets.decoder import Decoder, DecoderConfig, LlamaConfig
from jaxspec.targets.families import family_of
from jaxspec.targets.stored import Part, Tensors, top_tensors
from jaxspec.targets.tables import Tables


class LoadedTarget(NamedTuple):
    """A target read from a folder."""

    module: Decoder
    params: Params
    config: LlamaConfig


def load_target(
    folder: str | Path,
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    stacked: bool = False,
    weights: Literal["same", "int8"] = "same",
) -> LoadedTarget:
    """The model in a HuggingFace folder, weights and activations in `dtype`; see `read_llama`.

    With `weights="int8"` the matrices of its layers are quantized as they are read, one after another.
    """
    module, params = read_llama(folder, dtype=dtype, mesh=mesh, stacked=stacked, quantized=weights == "int8")
    return LoadedTarget(module, params, module.config)


def load_tables(folder: str | Path, *, dtype: Any) -> tuple[Tables, Params]:
    """Embedding and LM head alone of the model in a HuggingFace folder, in `dtype`; errors as `read_llama`."""
    folder, config = Path(folder), read_config(folder)
    plan = {name: shape for name, shape in weight_shapes(config, False).items() if name in ("embed", "head")}
    return Tables(config), _read(folder, config, plan, None, jnp.dtype(dtype))


def fingerprint(folder: str | Path) -> str:
    """A short hash of the model in a HuggingFace folder: of its shape, and of the first and middle row of every
    tensor, so that a model trained further has another, and one of 140 GB takes a second. An imported target has that
    of the folder it was made from, one exported otherwise a hash of its checksums."""
    folder, config = Path(folder), read_config(folder)
    if exported.is_exported(folder):
        return exported.fingerprint(folder)
    shape = [
        getattr(config, name) for name in ("heads", "kv_heads", "head_dim", "rope_theta", "rope_scaling", "norm_eps")
    ]
    if isinstance(config, DecoderConfig):
        shape += [config.family, config.options]
    digest = hashlib.sha256(repr(shape).encode())
    with contextlib.ExitStack() as stack:
        tensors = open_tensors(folder, stack)
        check_tensors(tensors, tensor_shapes(config), folder)
        for name in sorted(tensor_shapes(config)):
            rows = tensors[name].get_shape()[0]
            digest.update(f"{name} {tensors[name].get_dtype()} {tensors[name].get_shape()}".encode())
            for row in (0, rows // 2):
                digest.update(np.ascontiguousarray(tensors[name][row : row + 1]).tobytes())
    return digest.hexdigest()[:16]


def read_llama(
    folder: str | Path,
    *,
    dtype: Any,
    param_dtype: Any = None,
    mesh: Mesh | None = None,
    stacked: bool = False,
    quantized: bool = False,
) -> tuple[Decoder, Params]:
    """The module and weights in a HuggingFace folder: `model.safetensors`, or the shards its index lists.

    Weights are cast to `param_dtype` (by default `dtype`). The host holds about one weight beside those already
    placed: it is assembled in one buffer from pieces of 16 MiB and moved before the next is begun; with
    `stacked=True` one weight spans all layers. With a mesh a buffer holds one device's block, and only that block is
    read; with `quantized` a layer's matrix becomes int8 where it lies before the next is read. Raises ValueError or
    OSError, one sentence naming the file or tensor, where one is missing, unexpected, of a wrong shape, of a dtype that
    is not supported, or corrupt.
    """
    folder, config = Path(folder), read_config(folder)
    if quantized and config.options.experts:
        raise ValueError(f"{folder}: a mixture of experts is not read as int8; leave target_weights=same")
    param_dtype = jnp.dtype(dtype if param_dtype is None else param_dtype)
    params = _read(folder, config, weight_shapes(config, stacked), mesh, param_dtype, quantized)
    return Decoder(config, stacked=stacked, dtype=dtype, param_dtype=param_dtype), params


def _read(
    folder: Path, config: LlamaConfig, plan: Params, mesh: Mesh | None, dtype: Any, quantized: bool = False
) -> Params:
    """The weights of `plan`, a part of `weight_shapes`."""
    homes = jax.tree.map(lambda _: None, plan) if mesh is None else shardings(mesh, plan)

    def made(path: tuple[Any, ...], placed: jax.Array) -> Any:
        name = leaf_name(path)
        return _quantizer(name, mesh, placed.shape, dtype)(placed) if quantized and name in CONTRACTED else placed

    if exported.is_exported(folder):
        stored = weight_shapes(config, True)
        return _settled(
            exported.read(folder, stored, plan, homes if mesh is not None else None, jnp.dtype(dtype), made)
        )
    with contextlib.ExitStack() as stack:
        tensors = open_tensors(folder, stack)
        check_tensors(tensors, tensor_shapes(config), folder)
        _refuse_extra(tensors, config, folder)
        top, layer = top_tensors(config), family_of(config).layer(config)

        def read(path: tuple[Any, ...], weight: jax.ShapeDtypeStruct, home: Any) -> Any:
            sources, shape = _sources(_keys(path), top, layer, config.layers), weight.shape
            return made(path, place(shape, home, lambda block: _assemble(tensors, sources, shape, block, dtype)))

        flat, tree = jax.tree_util.tree_flatten_with_path(plan)
        arrays = [
            read(path, weight, home) for (path, weight), home in zip(flat, tree.flatten_up_to(homes), strict=True)
        ]
    return _settled(tree.unflatten(arrays))


def _settled(params: Params) -> Params:
    """Weights whose layers hold what `quantize` made beside the others."""
    layers = params.get("layers")
    if isinstance(layers, list):
        return {**params, "layers": [_flat(layer) for layer in layers]}
    return params if layers is None else {**params, "layers": _flat(layers)}


def _flat(layer: Params) -> Params:
    """A layer whose matrices may be what `quantize` made of them."""
    each = (made if isinstance(made, dict) else {name: made} for name, made in layer.items())
    return {name: array for made in each for name, array in made.items()}


@functools.cache
def _quantizer(
    name: str, mesh: Mesh | None, shape: tuple[int, ...], dtype: Any
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """`quantize` of one matrix, of every layer alike; what it makes lies on the mesh by its names."""
    made = functools.partial(quantize, name)
    homes = None if mesh is None else shardings(mesh, jax.eval_shape(made, jax.ShapeDtypeStruct(shape, dtype)))
    return jax.jit(made, out_shardings=homes)


def stored_dtype(folder: str | Path) -> str:
    """The dtype of the embedding in a HuggingFace folder, such as "bfloat16"; raises as `read_llama` does."""
    if exported.is_exported(Path(folder)):
        return exported.stored_dtype(Path(folder))
    with contextlib.ExitStack() as stack:
        tensors = open_tensors(Path(folder), stack)
        name = "model.embed_tokens.weight"
        check_tensors(tensors, {name: tensor_shapes(read_config(folder))[name]}, Path(folder))
        code = tensors[name].get_dtype()
    return next(dtype for dtype, named in DTYPE_CODES.items() if named == code)


def stored_weights(folder: str | Path) -> tuple[LlamaConfig, list[StoredWeight]]:
    """The shape of the model in a HuggingFace folder and its weights, of which nothing is read yet.

    Of an exported target all files are held to their checksums first. Raises ValueError or OSError as `read_llama`, and
    where an index is wrong about a file.
    """
    folder, config = Path(folder), read_config(folder)
    if exported.is_exported(folder):
        return config, exported.stored_weights(folder, weight_shapes(config, True))
    tensors = file_tensors(folder)
    check_tensors(tensors, tensor_shapes(config), folder)
    _refuse_extra(tensors, config, folder)
    top, layer = top_tensors(config), family_of(config).layer(config)

    def one(path: tuple[Any, ...], weight: jax.ShapeDtypeStruct) -> StoredWeight:
        keys = _keys(path)
        sources = _sources(keys, top, layer, config.layers)
        codes = {tensors[source.tensor].get_dtype() for source in sources}
        dtype = functools.reduce(jnp.promote_types, (name for name, code in DTYPE_CODES.items() if code in codes))
        part, inner = sources[0].part, sources[0].layer is not None
        rows = inner + (part.axes[0] if part.expert is None else 0)

        def read(block: Bounds) -> np.ndarray:
            (first, last), some, shape = block[0], sources, weight.shape
            if inner:
                some = [
                    s._replace(layer=s.layer - first)
                    for s in sources
                    if s.layer is not None and first <= s.layer < last
                ]
                shape = (last - first, *shape[1:])
            return _assemble(tensors, some, shape, block, dtype)

        return StoredWeight(keys, weight.shape, jnp.dtype(dtype), rows, read)

    flat, _ = jax.tree_util.tree_flatten_with_path(weight_shapes(config, True))
    return config, [one(path, weight) for path, weight in flat]


def held_weights(params: Params, config: LlamaConfig) -> list[StoredWeight]:
    """Weights in memory, stacked or a list of layers, as those of a folder are read; ValueError as `write_llama`."""
    _check_params(params, config)
    layers = params["layers"]

    def one(path: tuple[Any, ...], weight: jax.ShapeDtypeStruct) -> StoredWeight:
        keys = _keys(path)
        name, inside = keys[-1], keys[0] == "layers"
        of = params if not inside else layers[0] if isinstance(layers, list) else layers

        def read(block: Bounds) -> np.ndarray:
            inner = tuple(slice(*bounds) for bounds in block[1:])
            if not inside:
                return np.asarray(params[name])[(slice(*block[0]), *inner)]
            some = [layers[i][name] if isinstance(layers, list) else layers[name][i] for i in range(*block[0])]
            held = [np.asarray(array)[inner] for array in some]
            return held[0][None] if len(held) == 1 else np.stack(held)

        return StoredWeight(keys, weight.shape, jnp.dtype(of[name].dtype), 0, read)

    flat, _ = jax.tree_util.tree_flatten_with_path(weight_shapes(config, True))
    return [one(path, weight) for path, weight in flat]


def tree_of(weights: Sequence[StoredWeight]) -> Params:
    """Shapes and dtypes of weights, in the tree that they stand in."""
    shapes = {weight.path: jax.ShapeDtypeStruct(weight.shape, weight.dtype) for weight in weights}
    top = {path[0]: shape for path, shape in shapes.items() if len(path) == 1}
    return {**top, "layers": {path[1]: shape for path, shape in shapes.items() if len(path) == 2}}


def read_weights(weights: Sequence[StoredWeight]) -> Params:
    """The weights themselves, one after another brought to the first device, in their dtypes."""
    read = {w.path: jnp.asarray(w.read(tuple((0, n) for n in w.shape)), w.dtype) for w in weights}
    return jax.tree_util.tree_map_with_path(lambda path, _: read[_keys(path)], tree_of(weights))


def write_llama(folder: str | Path, params: Params, config: LlamaConfig, *, dtype: str | None = "bfloat16") -> None:
    """Write a folder that transformers and `read_llama` load, as `write_weights` does.

    `params` are stacked or a list of layers, jax or numpy; one weight of one layer at a time is brought to the host and
    cast to `dtype` (float32, bfloat16, float16; None: as it is). Raises ValueError naming the weight whose shape is not
    the config's.
    """
    weights = held_weights(params, config)
    write_weights(folder, weights if dtype is None else [w._replace(dtype=jnp.dtype(dtype)) for w in weights], config)


def write_weights(
    folder: str | Path,
    weights: Sequence[StoredWeight],
    config: LlamaConfig,
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Write a target of any family as a HuggingFace folder: weights, `generation_config.json`, last `config.json`.

    Each weight is cast to the dtype that it is said to have; about one weight of one layer is held at a time.
    `advance` is told of the bytes written. Each file appears whole or not at all. Raises ValueError as
    `hf_config.config_fields`, before anything is written.
    """
    config_fields(config)
    if wrong := next((str(w.dtype) for w in weights if str(w.dtype) not in DTYPE_CODES), None):
        raise ValueError(f"dtype={wrong!r} cannot be written: choose one of {', '.join(DTYPE_CODES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    top, layer = top_tensors(config), family_of(config).layer(config)
    places = {w.path: _sources(w.path, top, layer, config.layers) for w in weights}
    dtypes: dict[str, Any] = {}
    for w in weights:
        for source in places[w.path]:
            dtypes[source.tensor] = jnp.promote_types(dtypes.get(source.tensor, w.dtype), w.dtype)
    shapes = tensor_shapes(config)
    with filled_folder(folder, {name: (shape, str(dtypes[name])) for name, shape in shapes.items()}) as fill:
        for w in weights:
            for first in range(0, w.shape[0], w.together if w.inner else w.shape[0]):
                last = min(first + w.together, w.shape[0]) if w.inner else w.shape[0]
                block = w.read(((first, last), *((0, n) for n in w.shape[1:])))
                for source in places[w.path]:
                    if source.layer is None or first <= source.layer < last:
                        weight = block if source.layer is None else block[source.layer - first]
                        _fill(fill, source, shapes[source.tensor], weight)
                advance(block.size * w.dtype.itemsize)
    write_config(folder, config, str(dtypes["model.embed_tokens.weight"]))


def _fill(fill: Fill, source: Source, shape: tuple[int, ...], weight: np.ndarray) -> None:
    """Write what a tensor of this shape stores of a weight, or of one layer of it, in pieces of `CHUNK_BYTES`."""
    part = source.part
    view = part.view(weight if part.expert is None else weight[part.expert])
    first, last = part.rows or (0, shape[0])
    per = (last - first) // view.shape[0]  # stored rows of one step along the view's first axis
    step = max(1, CHUNK_BYTES * view.shape[0] // view.nbytes)
    for i in range(0, view.shape[0], step):
        fill(source.tensor, first + i * per, view[i : i + step])


def weight_shapes(config: LlamaConfig, stacked: bool) -> Params:
    """The tree of weights that `Decoder(config, stacked)` takes, as shapes."""

    def one(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    shapes = layer_shapes(config, config.options)
    layers: Any = [{name: one(*shape) for name, shape in shapes.items()} for _ in range(config.layers)]
    if stacked:
        layers = {name: one(config.layers, *shape) for name, shape in shapes.items()}
    plan = {"embed": one(config.vocab, config.width), "layers": layers, "norm": one(config.width)}
    return plan if config.tied else {**plan, "head": one(config.vocab, config.width)}


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a HuggingFace folder stores."""
    layer = family_of(config).layer(config)
    shapes = {name: stored.shape for name, stored in top_tensors(config).items()}
    for i in range(config.layers):
        shapes |= {f"model.layers.{i}.{name}": stored.shape for name, stored in layer.items()}
    return shapes


def _keys(path: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)


class Source(NamedTuple):
    tensor: str
    layer: int | None  # its row of a stacked weight
    part: Part


def _sources(keys: Sequence[Any], top: Tensors, layer: Tensors, layers: int) -> list[Source]:
    """The stored tensors that the weight at a path of the tree is made of; `layer` are those of one layer."""
    inside = keys[0] == "layers"
    found = layer if inside else top
    parts = [(name, part) for name, stored in found.items() for part in stored.parts if part.weight == keys[-1]]
    if not inside:
        return [Source(name, None, part) for name, part in parts]
    if len(keys) == 3:
        return [Source(f"model.layers.{keys[1]}.{name}", None, part) for name, part in parts]
    return [Source(f"model.layers.{i}.{name}", i, part) for i in range(layers) for name, part in parts]


def _assemble(
    tensors: dict[str, Any], sources: list[Source], shape: tuple[int, ...], block: Bounds, dtype: Any
) -> np.ndarray:
    """One block of a weight of this shape; layers are never split."""
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


def _refuse_extra(tensors: dict[str, Any], config: LlamaConfig, folder: Path) -> None:
    """Old folders store rotary buffers, and some a tied head a second time: both are ignored."""
    known = tensor_shapes(config).keys() | ({"lm_head.weight"} if config.tied else set())
    extra = sorted(name for name in tensors if name not in known and "rotary_emb." not in name)
    if extra:
        raise ValueError(
            f"{folder} has the tensor {extra[0]}, which its config.json does not call for ({len(extra)} such)"
        )


def _check_params(params: Params, config: LlamaConfig) -> None:
    def named(tree: Params) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}

    found, expected = named(params), named(weight_shapes(config, isinstance(params.get("layers"), dict)))
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"weight {name} has shape {found.get(name, 'absent')}, but the config calls for "
                f"{expected.get(name, 'none')}: write the weights with the config they were made with"
            )
