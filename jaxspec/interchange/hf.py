"""HuggingFace folders: weights read one at a time into (sharded) arrays, and written back.

All readers also take a target that jaxspec wrote as an Orbax checkpoint (`interchange.exported`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
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
from jaxspec.interchange.hf_config import HEAD_NAMES, config_fields, read_config, read_table_config, write_config
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
from jaxspec.interchange.weight_files import file_tensors, open_tensors, open_weights_file, tensor_names
from jaxspec.nn.quantization import CONTRACTED, quantize
from jaxspec.parallel.mesh import leaf_name, shardings
from jaxspec.targets.decoder import Decoder, DecoderConfig, LlamaConfig
from jaxspec.targets.stored import top_tensors
from jaxspec.targets.tables import Tables

TABLE_NAMES = {
    "model.embed_tokens.weight": ("embed_tokens.weight", "word_embeddings.weight", "embeddings.weight", "wte.weight"),
    "model.norm.weight": ("model.norm.weight", "norm_f.weight", "final_layernorm.weight", "language_model.norm.weight"),
    "lm_head.weight": HEAD_NAMES,
}
"""Llama's name of a table -> ends of its names in other families."""
_INSIDE = re.compile(r"(^|\.)(layers|h|blocks|mtp\w*|vision\w*|visual|audio\w*|eagle\w*)\.")
"""Parts of a name that belong to a layer, another modality or a drafter."""


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
    """Returns embedding and LM head alone of the model in a folder, in `dtype`; raises as `read_llama`.

    The model may be of a family that is not run here, and the files of its layers may be missing.
    """
    config = read_table_config(folder)
    return Tables(config), read_tables(folder, config, ("embed", "head"), jnp.dtype(dtype))


def read_tables(folder: str | Path, config: LlamaConfig, names: Sequence[str], dtype: Any) -> Params:
    """Returns some of the weights `embed [V, D]`, `norm [D]` and `head [V, D]` of the model in a folder, in `dtype`.

    `config` is its `read_table_config`. A tied model has no `head`. Raises ValueError or FileNotFoundError naming the
    tensor or file that is missing or wrong.
    """
    folder, shapes = Path(folder), weight_shapes(config, False)
    plan = {name: shapes[name] for name in names if name in shapes}
    if exported.is_exported(folder):
        return exported.read(
            folder, weight_shapes(config, True), plan, None, jnp.dtype(dtype), lambda _, placed: placed
        )
    with contextlib.ExitStack() as stack:
        tensors = _open_tables(folder, config, stack)
        found = {}
        for name, weight in plan.items():
            sources = sources_of(config, (name,))
            read = functools.partial(assemble, tensors, sources, weight.shape, dtype=jnp.dtype(dtype))
            found[name] = place(weight.shape, None, read)
    return found


def _open_tables(folder: Path, config: LlamaConfig, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Returns a handle of embedding, final norm and LM head, by Llama's names; only their files are opened.

    They are held to the manifest where jaxspec wrote one, and files of other weights are not.
    """
    expected = {name: stored.shape for name, stored in top_tensors(config).items()}
    places = table_names(folder, list(expected))
    files = {file for _, file in places.values()}
    for name, file in places.values():
        if not file.is_file():
            raise FileNotFoundError(f"{file} holds {name} by the folder's index and is missing: download it")
    verify_layout(folder, without=set(tensor_names(folder).values()) - files)
    opened, found = {file: open_weights_file(file, stack) for file in files}, {}
    for known, (name, file) in places.items():
        if name not in opened[file]:
            raise ValueError(f"{file} holds {name} by the folder's index, and it does not: download both again")
        found[known] = opened[file][name]
    check_tensors(found, expected, folder)
    return found


def table_names(folder: Path, wanted: Sequence[str]) -> dict[str, tuple[str, Path]]:
    """Returns name and file of those `wanted` tables (Llama's names) that a folder has under any family's names."""
    names, found = tensor_names(folder), {}
    for known in wanted:
        if known in names:
            found[known] = known, names[known]
            continue
        # A model inside another (of images and text) has its tables behind a prefix.
        fits = [name for name in names if name.endswith(TABLE_NAMES[known]) and not _INSIDE.search(name)]
        if len(fits) == 1:
            found[known] = fits[0], names[fits[0]]
    return found


def table_fingerprint(folder: str | Path) -> str:
    """Returns a short hash of the tables of the model in a folder: its shape, and rows of embedding, norm and LM head.

    It is the same whether the folder holds the files of the layers or not; raises as `load_tables`.
    """
    folder, config = Path(folder), read_table_config(folder)
    if exported.is_exported(folder):
        return exported.table_fingerprint(folder)
    shape = [getattr(config, name) for name in ("vocab", "width", "layers", "norm_eps", "tied")]
    digest = hashlib.sha256(repr(shape).encode())
    with contextlib.ExitStack() as stack:
        tensors = _open_tables(folder, config, stack)
        for name in sorted(tensors):
            _digest_tensor(digest, name, tensors[name])
    return digest.hexdigest()[:16]


def _digest_tensor(digest: Any, name: str, tensor: Any) -> None:
    """Adds the name, dtype and shape of a tensor to a hash, and its first and middle row."""
    digest.update(f"{name} {tensor.get_dtype()} {tensor.get_shape()}".encode())
    for row in (0, tensor.get_shape()[0] // 2):
        digest.update(np.ascontiguousarray(tensor[row : row + 1]).tobytes())


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
            _digest_tensor(digest, name, tensors[name])
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
        tables = _open_tables(Path(folder), read_table_config(folder), stack)
        code = tables["model.embed_tokens.weight"].get_dtype()
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
