"""Files of weights in a folder: safetensors or PyTorch's, one file or the shards of an index, opened by tensor name."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxspec.interchange.pickled import open_pickled
from jaxspec.interchange.tensors import INDEX, open_file, read_headers, read_json

BIN_INDEX = "pytorch_model.bin.index.json"
NAMES = (("model.safetensors", INDEX), ("pytorch_model.bin", BIN_INDEX))
"""The file of weights and the index of shards, in safetensors and in PyTorch's format. The former are preferred."""
BUFFERS = (".inv_freq", ".masked_bias", ".position_ids")
"""Ends of names of constants that a model computes from its config: they are not weights, wherever they are listed."""


class WeightFiles(NamedTuple):
    """The files of weights of a folder."""

    paths: list[Path]
    listed: Mapping[str, str]
    """The file of each tensor by the index; empty where there is none."""
    index: Path | None


def is_buffer(name: str) -> bool:
    """Returns whether a tensor of this name is a constant that old folders store, such as rotary frequencies."""
    return "rotary_emb." in name or name.endswith(BUFFERS)


def has_weights(folder: Path) -> bool:
    """Returns whether a folder has a file of weights, or an index of some, by one of `NAMES`."""
    return any((folder / name).is_file() for names in NAMES for name in names)


def weight_files(folder: Path) -> WeightFiles:
    """Returns the files of weights of a folder, which all exist, safetensors rather than PyTorch's.

    Raises ValueError or FileNotFoundError naming the file that is missing or wrong.
    """
    files = _listed_files(folder)
    for path in files.paths:
        if files.index is not None and not path.is_file():
            raise FileNotFoundError(f"{path} is listed in {files.index.name} but missing: download it again")
    return files


def _listed_files(folder: Path) -> WeightFiles:
    """Returns the files of weights of a folder; those that an index lists may be missing. Raises as `weight_files`."""
    for whole, index in NAMES:
        if (folder / whole).is_file():
            return WeightFiles([folder / whole], {}, None)
        if (folder / index).is_file():
            listed = _weight_map(folder / index)
            return WeightFiles([folder / name for name in sorted(set(listed.values()))], listed, folder / index)
    near = sorted(path.name for pattern in ("*-of-*.safetensors", "*-of-*.bin") for path in folder.glob(pattern))
    found = f"{near[0]} is one of several files, and the index that lists them is missing; " if near else ""
    known = ", ".join(name for names in NAMES for name in names)
    raise FileNotFoundError(f"{folder} holds no weights: {found}none of {known} is there")


def tensor_names(folder: Path) -> dict[str, Path]:
    """Returns the file of every tensor of a folder by the tensor's name; files that an index lists may be missing.

    Raises as `open_tensors`, but for missing files.
    """
    files = _listed_files(folder)
    if files.index is not None:
        return {name: folder / file for name, file in files.listed.items()}
    with contextlib.ExitStack() as stack:
        return dict.fromkeys(open_weights_file(files.paths[0], stack), files.paths[0])


def shards(folder: Path) -> list[Path]:
    """Returns the files of weights of a folder, which all exist; raises as `weight_files`."""
    return weight_files(folder).paths


def open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Returns a handle (`get_shape`, `get_dtype`, slicing) of every tensor in a folder, by name.

    Only headers are read; `stack` closes the files. Raises as `weight_files`, and ValueError if a file is corrupt, or a
    weight is not in the file that the index names.
    """
    files = weight_files(folder)
    return _together(files, {path: open_weights_file(path, stack) for path in files.paths})


def open_weights_file(path: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Returns a handle of every tensor in one file by name, in safetensors or PyTorch's format; `stack` closes it."""
    return open_file(path, stack) if path.suffix == ".safetensors" else dict(open_pickled(path))


def file_tensors(folder: Path) -> dict[str, Any]:
    """Returns a handle of every tensor in a folder by name, for reading more than fits in memory.

    Raises as `open_tensors`.
    """
    files = weight_files(folder)
    each = {p: read_headers(p) if p.suffix == ".safetensors" else dict(open_pickled(p)) for p in files.paths}
    return _together(files, each)


def _together(files: WeightFiles, each: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the tensors of all files; raises ValueError if the index is wrong about a weight."""
    by_name = {path.name: tensors for path, tensors in each.items()}
    for name, file in files.listed.items():
        # Indexes may list what was not saved: constants, and the copy of an embedding that is the LM head too. A head
        # that the config does call for is missed by name when it is read.
        if name not in by_name[file] and not is_buffer(name) and name != "lm_head.weight":
            raise ValueError(f"{files.index} says that {file} holds {name}, and it does not: download both again")
    found = {name: tensor for tensors in each.values() for name, tensor in tensors.items()}
    # Of a tensor that two files hold, the index says which one counts.
    return found | {name: by_name[file][name] for name, file in files.listed.items() if name in by_name[file]}


def _weight_map(index: Path) -> dict[str, str]:
    """Returns the file of each tensor by an index."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        raise ValueError(f"{index} has no field weight_map, which says which file holds which tensor")
    if not all(isinstance(shard, str) and Path(shard).name == shard for shard in listed.values()):
        raise ValueError(f"{index}: weight_map must name files of this folder, without any path")
    return listed
