"""HuggingFace folders: weights read one at a time into (sharded) arrays, and written back.

All readers also take a target that jaxspec wrote as an Orbax checkpoint (`interchange.exported`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxspec.base import Params
from jaxspec.checkpoints.manifest import verify_layout
from jaxspec.interchange import exported
from jaxspec.interchange.hf_config import config_fields, read_config, write_config
from jaxspec.interchange.hf_layout import (
    Source,
    assemble,
    path_keys,
    refuse_extra,
    sources_of,
    tensor_shapes,
    weight_shapes,
)
from jaxspec.interchange.tensors import (
    CHUNK_BYTES,
    DTYPE_CODES,
    Bounds,
    Fill,
    StoredWeight,
    check_tensors,
    filled_folder,
    place,
)
from jaxspec.interchange.weight_files import file_tensors, open_tensors
from jaxspec.nn.quantization import CONTRACTED, quantize
from jaxspec.parallel.mesh import leaf_name, shardings
from jaxspec.targets.decoder import Decoder, DecoderConfig, LlamaConfig
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
    """Returns the model in a HuggingFace folder, weights and activations in `dtype`; see `read_llama`.

    With `weights="int8"` each matrix of its layers is quantized before the next is read.
    """
    module, params = read_llama(folder, dtype=dtype, mesh=mesh, stacked=stacked, quantized=weights == "int8")
    return LoadedTarget(module, params, module.config)


def load_tables(folder: str | Path, *, dtype: Any) -> tuple[Tables, Params]:
    """Returns embedding and LM head alone of the model in a folder, in `dtype`; raises as `read_llama`."""
    folder, config = Path(folder), read_config(folder)
    plan = {name: shape for name, shape in weight_shapes(config, False).items() if name in ("embed", "head")}
    return Tables(config), _read(folder, config, plan, None, jnp.dtype(dtype))


def fingerprint(folder: str | Path) -> str:
    """Returns a short hash of the model in a folder, which differs for a model that was trained further.

    It is of the model's shape and of the first and middle row of every tensor, so 140 GB take a second. An imported
    target has the hash of the folder it was made from, and another exported one a hash of its checksums.
    """
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
    """Returns the module and weights in a HuggingFace folder (`model.safetensors`, or the shards of its index).

    Weights are cast to `param_dtype` (by default `dtype`). The host holds about one weight at a time: it is assembled
    in one buffer from pieces of 16 MiB and moved to its devices before the next one is read. With `stacked=True` one
    weight spans all layers. With a mesh a buffer holds one device's block, and only that block is read. With
    `quantized` a layer's matrix becomes int8 on its devices before the next is read. Raises ValueError or OSError, one
    sentence naming the file or tensor that is missing, unexpected, corrupt, or of a wrong shape or dtype.
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
    """Returns the weights of `plan`, a part of `weight_shapes`."""
    homes = jax.tree.map(lambda _: None, plan) if mesh is None else shardings(mesh, plan)
    finish = functools.partial(_quantized, mesh, dtype) if quantized else lambda path, placed: placed
    if exported.is_exported(folder):
        stored = weight_shapes(config, True)
        wanted = homes if mesh is not None else None
        return _flattened(exported.read(folder, stored, plan, wanted, jnp.dtype(dtype), finish))
    verify_layout(folder)
    with contextlib.ExitStack() as stack:
        tensors = open_tensors(folder, stack)
        check_tensors(tensors, tensor_shapes(config), folder)
        refuse_extra(tensors, config, folder)
        flat, tree = jax.tree_util.tree_flatten_with_path(plan)
        arrays = []
        for (path, weight), home in zip(flat, tree.flatten_up_to(homes), strict=True):
            sources = sources_of(config, path_keys(path))
            read = functools.partial(assemble, tensors, sources, weight.shape, dtype=dtype)
            arrays.append(finish(path, place(weight.shape, home, read)))
    return _flattened(tree.unflatten(arrays))


def _quantized(mesh: Mesh | None, dtype: Any, path: tuple[Any, ...], placed: jax.Array) -> Any:
    """Returns a weight as `quantize` makes it, if it is one of the matrices that are quantized."""
    name = leaf_name(path)
    return _quantizer(name, mesh, placed.shape, dtype)(placed) if name in CONTRACTED else placed


def _flattened(params: Params) -> Params:
    """Returns weights in which the dicts that `quantize` returned are merged into those of their layers."""
    layers = params.get("layers")
    if isinstance(layers, list):
        return {**params, "layers": [_flat(layer) for layer in layers]}
    return params if layers is None else {**params, "layers": _flat(layers)}


def _flat(layer: Params) -> Params:
    each = (made if isinstance(made, dict) else {name: made} for name, made in layer.items())
    return {name: array for made in each for name, array in made.items()}


@functools.cache
def _quantizer(
    name: str, mesh: Mesh | None, shape: tuple[int, ...], dtype: Any
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Returns the compiled `quantize` of a layer's matrix of this name; its results lie on the mesh by their names."""
    made = functools.partial(quantize, name)
    homes = None if mesh is None else shardings(mesh, jax.eval_shape(made, jax.ShapeDtypeStruct(shape, dtype)))
    return jax.jit(made, out_shardings=homes)


def stored_dtype(folder: str | Path) -> str:
    """Returns the dtype of the embedding in a HuggingFace folder, such as "bfloat16"; raises as `read_llama`."""
    if exported.is_exported(Path(folder)):
        return exported.stored_dtype(Path(folder))
    with contextlib.ExitStack() as stack:
        tensors = open_tensors(Path(folder), stack)
        name = "model.embed_tokens.weight"
        check_tensors(tensors, {name: tensor_shapes(read_config(folder))[name]}, Path(folder))
        code = tensors[name].get_dtype()
    return next(dtype for dtype, named in DTYPE_CODES.items() if named == code)


def stored_weights(folder: str | Path) -> tuple[LlamaConfig, list[StoredWeight]]:
    """Returns the shape of the model in a HuggingFace folder and its weights, which are not read yet.

    The files of a target that jaxspec wrote are compared with their checksums first. Raises ValueError or OSError as
    `read_llama`, and if an index is wrong about a file.
    """
    folder, config = Path(folder), read_config(folder)
    if exported.is_exported(folder):
        return config, exported.stored_weights(folder, weight_shapes(config, True))
    verify_layout(folder)
    tensors = file_tensors(folder)
    check_tensors(tensors, tensor_shapes(config), folder)
    refuse_extra(tensors, config, folder)
    flat, _ = jax.tree_util.tree_flatten_with_path(weight_shapes(config, True))
    return config, [_stored_weight(config, tensors, path_keys(path), weight.shape) for path, weight in flat]


def _stored_weight(
    config: LlamaConfig, tensors: Mapping[str, Any], keys: tuple[Any, ...], shape: tuple[int, ...]
) -> StoredWeight:
    sources = sources_of(config, keys)
    codes = {tensors[source.tensor].get_dtype() for source in sources}
    dtype = functools.reduce(jnp.promote_types, (name for name, code in DTYPE_CODES.items() if code in codes))
    part, inner = sources[0].part, sources[0].layer is not None
    rows = inner + (part.axes[0] if part.expert is None else 0)
    return StoredWeight(keys, shape, jnp.dtype(dtype), rows, _Stacked(tensors, sources, shape, dtype).read)


@dataclass(frozen=True, eq=False)
class _Stacked:
    """A weight in the tensors of a folder, its layers stacked."""

    tensors: Mapping[str, Any]
    sources: Sequence[Source]
    shape: tuple[int, ...]
    dtype: Any

    def read(self, block: Bounds) -> np.ndarray:
        """Returns a block of the weight; only the tensors of the block's layers are read."""
        (first, last), some, shape = block[0], self.sources, self.shape
        if some[0].layer is not None:
            some = [s._replace(layer=s.layer - first) for s in some if s.layer is not None and first <= s.layer < last]
            shape = (last - first, *shape[1:])
        return assemble(self.tensors, some, shape, block, dtype=self.dtype)


def held_weights(params: Params, config: LlamaConfig) -> list[StoredWeight]:
    """Returns weights in memory, stacked or a list of layers, as those of a folder; raises as `write_llama`."""
    _check_params(params, config)
    layers, found = params["layers"], []
    for path, weight in jax.tree_util.tree_flatten_with_path(weight_shapes(config, True))[0]:
        keys = path_keys(path)
        of = params if keys[0] != "layers" else layers[0] if isinstance(layers, list) else layers
        read = functools.partial(_read_held, params, keys)
        found.append(StoredWeight(keys, weight.shape, jnp.dtype(of[keys[-1]].dtype), 0, read))
    return found


def _read_held(params: Params, keys: tuple[Any, ...], block: Bounds) -> np.ndarray:
    """Returns a block of a weight in memory, as if its layers were stacked."""
    name, layers, inner = keys[-1], params["layers"], tuple(slice(*bounds) for bounds in block[1:])
    if keys[0] != "layers":
        return np.asarray(params[name])[(slice(*block[0]), *inner)]
    some = [layers[i][name] if isinstance(layers, list) else layers[name][i] for i in range(*block[0])]
    held = [np.asarray(array)[inner] for array in some]
    return held[0][None] if len(held) == 1 else np.stack(held)


def tree_of(weights: Sequence[StoredWeight]) -> Params:
    """Returns the shapes and dtypes of weights as a tree."""
    shapes = {weight.path: jax.ShapeDtypeStruct(weight.shape, weight.dtype) for weight in weights}
    top = {path[0]: shape for path, shape in shapes.items() if len(path) == 1}
    return {**top, "layers": {path[1]: shape for path, shape in shapes.items() if len(path) == 2}}


def read_weights(weights: Sequence[StoredWeight]) -> Params:
    """Reads weights onto the first device one after another, in their dtypes, and returns them as a tree."""
    read = {w.path: jnp.asarray(w.read(tuple((0, n) for n in w.shape)), w.dtype) for w in weights}
    return jax.tree_util.tree_map_with_path(lambda path, _: read[path_keys(path)], tree_of(weights))


def write_llama(folder: str | Path, params: Params, config: LlamaConfig, *, dtype: str | None = "bfloat16") -> None:
    """Writes a folder that transformers and `read_llama` load, as `write_weights` does.

    `params` are stacked or a list of layers, jax or numpy. One weight of one layer at a time is brought to the host and
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
    """Writes a target of any family as a HuggingFace folder: weights, `generation_config.json`, last `config.json`.

    Each weight is cast to the dtype of its `StoredWeight`; about one weight of one layer is held at a time. `advance`
    is called with the number of bytes written. Each file appears whole or not at all. Raises ValueError as
    `hf_config.config_fields`, before anything is written.
    """
    config_fields(config)
    if wrong := next((str(w.dtype) for w in weights if str(w.dtype) not in DTYPE_CODES), None):
        raise ValueError(f"dtype={wrong!r} cannot be written: choose one of {', '.join(DTYPE_CODES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    places = {w.path: sources_of(config, w.path) for w in weights}
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
    """Writes the part of a weight (or of one layer of it) that one tensor stores, in pieces of `CHUNK_BYTES`."""
    part = source.part
    view = part.view(weight if part.expert is None else weight[part.expert])
    first, last = part.rows or (0, shape[0])
    per = (last - first) // view.shape[0]  # stored rows of one step along the view's first axis
    step = max(1, CHUNK_BYTES * view.shape[0] // view.nbytes)
    for i in range(0, view.shape[0], step):
        fill(source.tensor, first + i * per, view[i : i + step])


def _check_params(params: Params, config: LlamaConfig) -> None:
    expected = _named_shapes(weight_shapes(config, isinstance(params.get("layers"), dict)))
    found = _named_shapes(params)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"weight {name} has shape {found.get(name, 'absent')}, but the config calls for "
                f"{expected.get(name, 'none')}: write the weights with the config they were made with"
            )


def _named_shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
