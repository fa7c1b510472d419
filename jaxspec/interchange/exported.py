"""Targets that jaxspec wrote as Orbax checkpoints, read weight by weight like HuggingFace folders."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from jaxspec.base import Params
from jaxspec.checkpoints.manifest import MANIFEST, Manifest, read_manifest, verify
from jaxspec.interchange.tensors import Bounds, StoredWeight
from jaxspec.nn.options import Options
from jaxspec.nn.rope import RopeScaling
from jaxspec.targets.decoder import DecoderConfig, LlamaConfig

Finish = Callable[[tuple[Any, ...], jax.Array], Any]
"""Turns the weight at a path of the tree, as it was read, into the one that is kept."""


def is_exported(folder: Path) -> bool:
    """Returns whether a folder holds a model that jaxspec exported, instead of one in HuggingFace layout."""
    # jaxspec also writes a manifest into folders in HuggingFace layout, so the manifest alone does not tell.
    return (folder / MANIFEST).is_file() and not (folder / "config.json").is_file()


def read_config(folder: Path) -> LlamaConfig:
    """Returns the shape of the target in a folder; raises ValueError if it holds no target of this version."""
    try:
        return target_config(_target_manifest(folder)["config"])
    except TypeError as error:
        raise ValueError(f"{folder}: the shape of its target is not this version's ({error})") from error


def target_config(values: Mapping[str, Any]) -> LlamaConfig:
    """Returns the configuration of a target from the JSON of a manifest; raises TypeError for unknown fields."""
    fields = _with_tuples(values)
    if isinstance(fields.get("rope_scaling"), Mapping):
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    if "options" not in fields:
        return LlamaConfig(**fields)
    return DecoderConfig(**{**fields, "options": Options(**_with_tuples(fields["options"]))})


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values with JSON's lists as tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def stored_dtype(folder: Path) -> str:
    """Returns the dtype of the embedding."""
    return _target_manifest(folder)["arrays"]["embed"]["dtype"]


def fingerprint(folder: Path) -> str:
    """Returns the fingerprint of the folder that the target was imported from, or else a hash of its checksums."""
    manifest = _target_manifest(folder)
    if "fingerprint" in manifest:
        return manifest["fingerprint"]
    return hashlib.sha256(json.dumps([manifest["config"], manifest["checksums"]], sort_keys=True).encode()).hexdigest()[
        :16
    ]


def table_fingerprint(folder: Path) -> str:
    """Returns the fingerprint of the tables of the folder that the target was imported from, or that of all of it."""
    return _target_manifest(folder).get("table_fingerprint") or fingerprint(folder)


def read(folder: Path, stored: Params, plan: Params, homes: Any, dtype: Any, finish: Finish) -> Params:
    """Returns the weights of `plan`, a part of the tree `stored` (layers stacked), or of that with a list of layers.

    Each array is read in `dtype` onto its sharding in `homes` (a tree like `plan`; None: the first device), and
    replaced by what `finish` returns. One stored array is read at a time, so no more than that is held beside the
    weights. Raises ValueError if a file or an array is missing or damaged.
    """
    manifest, unstacked = _target_manifest(folder), isinstance(plan.get("layers"), list)
    flat, tree = jax.tree_util.tree_flatten_with_path(plan)
    places = [None] * len(flat) if homes is None else tree.flatten_up_to(homes)
    wanted = {path: home for (path, _), home in zip(flat, places, strict=True)}
    names = {_name(path, unstacked) for path in wanted}
    shapes = {_name(path, False): weight.shape for path, weight in jax.tree_util.tree_leaves_with_path(stored)}
    verify(folder, {**manifest, "checksums": _needed(manifest, names)})
    _check_shapes(folder, manifest, {name: shapes[name] for name in names})
    found: dict[tuple[Any, ...], Any] = {}
    for name in sorted(names):
        paths = [path for path in wanted if _name(path, unstacked) == name]
        split = unstacked and name.startswith("layers/")
        home: Any = wanted[paths[0]]
        if split and home is not None:
            home = NamedSharding(home.mesh, PartitionSpec(None, *home.spec))
        whole = _load(folder, name, shapes[name], home, dtype)
        for i, path in enumerate(paths):
            part = jax.device_put(whole[i], wanted[path]) if split else whole
            found[path] = jax.block_until_ready(finish(path, part))
        del whole
    return tree.unflatten([found[path] for path, _ in flat])


def stored_weights(folder: Path, stored: Params) -> list[StoredWeight]:
    """Returns the weights of the tree `stored` (layers stacked): files checked, no array read yet; raises as `read`."""
    manifest = _target_manifest(folder)
    verify(folder, manifest)
    flat = jax.tree_util.tree_leaves_with_path(stored)
    _check_shapes(folder, manifest, {_name(path, False): weight.shape for path, weight in flat})
    found = []
    for path, weight in flat:
        name = _name(path, False)
        array = _open(folder, name)
        together = array.chunk_layout.read_chunk.shape[0] or 1
        read, dtype = functools.partial(_read_block, array), array.dtype.numpy_dtype
        found.append(StoredWeight(tuple(name.split("/")), weight.shape, dtype, 0, read, together))
    return found


def _read_block(array: Any, block: Bounds) -> np.ndarray:
    return array[tuple(slice(*bounds) for bounds in block)].read().result()


def _open(folder: Path, name: str) -> Any:
    """Opens one stored array, so that parts of it can be read."""
    # Orbax restores only whole arrays. It stores them as Zarr, in files or in OCDBT, which TensorStore reads in part.
    files: dict[str, Any] = {"driver": "file", "path": f"{folder.absolute() / 'params'}/"}
    inside = f"{name.replace('/', '.')}/"
    if (folder / "params" / "manifest.ocdbt").is_file():
        where = {"driver": "ocdbt", "base": files, "path": inside}
    else:
        where = files | {"path": files["path"] + inside}
    try:
        return tensorstore.open({"driver": "auto", "kvstore": where}, open=True, read=True).result()
    except ValueError as error:
        raise ValueError(f"{folder}: array {name} could not be read ({error}); the checkpoint is damaged") from error


def _check_shapes(folder: Path, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if manifest["arrays"].get(name, {}).get("shape") != list(shape):
            raise ValueError(f"{folder}: its manifest has no array {name} of shape {shape}, which its config calls for")


def _name(path: tuple[Any, ...], unstacked: bool) -> str:
    """Returns the name that the manifest gives to the stored array of a path."""
    keys = [str(getattr(key, "key", getattr(key, "idx", None))) for key in path]
    return "/".join([keys[0], *keys[2:]] if unstacked and keys[0] == "layers" else keys)


def _needed(manifest: Manifest, names: set[str]) -> dict[str, str]:
    """Returns the checksums of all files except those in the folders of other arrays."""
    others = {f"params/{name.replace('/', '.')}" for name in manifest["arrays"] if name not in names}
    return {file: digest for file, digest in manifest["checksums"].items() if file.rpartition("/")[0] not in others}


def _load(folder: Path, name: str, shape: tuple[int, ...], home: Any, dtype: Any) -> jax.Array:
    """Reads one stored array."""
    home = home or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    keys, like = name.split("/"), jax.ShapeDtypeStruct(shape, dtype, sharding=home)
    for key in reversed(keys):
        like = {key: like}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            found: Any = ocp.load(str(folder.absolute()), like, checkpointable_name="params")
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"{folder}: array {name} could not be read ({error}); the checkpoint is damaged") from error
    for key in keys:
        found = found[key]
    return found


def _target_manifest(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest["kind"] != "target":
        raise ValueError(f"{folder}: holds a {manifest['kind']}, not a target")
    return manifest
