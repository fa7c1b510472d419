"""Tables that say which stored tensor is which piece of a weight of ours; one table serves reading and writing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxspec.base import Params
from jaxspec.interchange.hf import LAYER_PARTS, whole
from jaxspec.interchange.hf_config import _integer, _number, _rope
from jaxspec.interchange.pickled import open_pickled
from jaxspec.interchange.tensors import open_file, open_tensors

PICKLES = (".bin", ".pt", ".pth")
_NUMPY = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


class Entry(NamedTuple):
    """One stored tensor."""

    weight: str
    view: Callable[[Any], Any]
    """The piece of the weight that it fills, axes in stored order; stored ones may merge several."""
    shape: tuple[int, ...]
    """As it is stored."""


Table = dict[str, Entry]
Shapes = dict[str, tuple[int, ...]]


class Folder(NamedTuple):
    """A folder that is being read."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, Any]
    """Handles by name (`get_shape`, `get_dtype`, slicing), as stored but for the prefixes that wrappers add."""

    @property
    def shapes(self) -> Shapes:
        """Of every tensor."""
        return {name: tuple(tensor.get_shape()) for name, tensor in self.tensors.items()}


def transposed(w: Any) -> Any:
    """`[out, in]` of a weight that reads its first axis."""
    return w.transpose(1, 0)


def matrix(weight: str, shapes: Shapes) -> Entry:
    """A linear layer's weight."""
    return Entry(weight, transposed, shapes[weight][::-1])


def vector(weight: str, shapes: Shapes) -> Entry:
    """A norm's weight, a bias, or a table that both sides store alike."""
    return Entry(weight, whole, shapes[weight])


def layer_table(prefix: str, c: Any) -> Table:
    """The tensors of the one decoder layer of a head of shape `c`, without norms before its attention."""
    shapes = c.shapes()
    inputs, down = shapes["qkv"][0], shapes["down"][1]
    stored = {
        "self_attn.q_proj": (c.heads * c.head_dim, inputs),
        "self_attn.k_proj": (c.kv_heads * c.head_dim, inputs),
        "self_attn.v_proj": (c.kv_heads * c.head_dim, inputs),
        "self_attn.o_proj": (c.width, c.heads * c.head_dim),
        "post_attention_layernorm": (c.width,),
        "mlp.gate_proj": (c.mlp, c.width),
        "mlp.up_proj": (c.mlp, c.width),
        "mlp.down_proj": (down, c.mlp),
    }
    return {
        f"{prefix}{name}.weight": Entry(LAYER_PARTS[name].weight, LAYER_PARTS[name].view, shape)
        for name, shape in stored.items()
    }


def read_weights(folder: Folder, table: Table, shapes: Shapes) -> Params:
    """The weights of these shapes, put together from the tensors of a table, in the dtype that they are stored in.

    Raises ValueError naming the first tensor that is missing, or of another shape or dtype than the table says.
    """
    for name, entry in table.items():
        if name not in folder.tensors:
            raise ValueError(f"{folder.path} has no tensor {name}, which such a drafter needs")
        found, code = tuple(folder.tensors[name].get_shape()), folder.tensors[name].get_dtype()
        if found != entry.shape:
            raise ValueError(f"{folder.path}: tensor {name} has shape {found} where {entry.shape} is needed")
        if code not in _NUMPY:
            raise ValueError(f"{folder.path}: tensor {name} has dtype {code}; supported: {', '.join(_NUMPY)}")
    params: Params = {}
    for weight, shape in shapes.items():
        pieces = [(name, entry) for name, entry in table.items() if entry.weight == weight]
        codes = {folder.tensors[name].get_dtype() for name, _ in pieces}
        if len(codes) > 1:
            raise ValueError(
                f"{folder.path}: the tensors of weight {weight} differ in dtype: {', '.join(sorted(codes))}"
            )
        params[weight] = buffer = np.empty(shape, _NUMPY[codes.pop()])
        for name, entry in pieces:
            view = entry.view(buffer)
            view[...] = folder.tensors[name][:].reshape(view.shape)
    return params


def stored_tensors(table: Table, params: Params) -> dict[str, np.ndarray]:
    """The tensors of a table, made of weights; the inverse of `read_weights`."""
    return {
        name: np.ascontiguousarray(entry.view(np.asarray(params[entry.weight]))).reshape(entry.shape)
        for name, entry in table.items()
    }


def refuse_unknown(folder: Folder, table: Table, ignored: tuple[str, ...]) -> None:
    """ValueError naming the first tensor that is neither in the table nor known to be of no consequence."""
    extra = sorted(n for n in folder.tensors if n not in table and n not in ignored and "rotary_emb." not in n)
    if extra:
        raise ValueError(
            f"{folder.path} has the tensor {extra[0]}, which jaxspec's drafter of this kind does not have "
            f"({len(extra)} such): reading it without would change what it drafts"
        )


def head_shape(folder: Folder) -> dict[str, Any]:
    """The fields that all heads of one layer share, from config.json: what it leaves out is as transformers has it."""
    path, raw = folder.path / "config.json", folder.config
    heads, width = _integer(path, raw, "num_attention_heads"), _integer(path, raw, "hidden_size")
    if raw.get("head_dim") is None and width % heads:
        raise ValueError(f"{path}: hidden_size={width} is not a multiple of num_attention_heads={heads}: set head_dim")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act={raw['hidden_act']!r} is not supported; only 'silu' is")
    theta, scaling = _rope(path, raw)
    return {
        "width": width,
        "heads": heads,
        "kv_heads": _integer(path, raw, "num_key_value_heads", heads),
        "head_dim": _integer(path, raw, "head_dim", width // heads),
        "mlp": _integer(path, raw, "intermediate_size"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": _number(path, "rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
    }


def open_weights(path: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Name -> handle of every tensor in a folder, whatever its one file of weights is called; prefixes removed.

    Safetensors are preferred where both are there. Raises ValueError or OSError where there is none, or more than one.
    """
    if (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file():
        return _unwrapped(path, open_tensors(path, stack))
    safe = sorted(path.glob("*.safetensors"))
    pickled = sorted(file for file in path.iterdir() if file.suffix in PICKLES and file.name != "training_args.bin")
    files = safe or pickled
    if len(files) != 1:
        seen = ", ".join(file.name for file in files) or "none of .safetensors, .bin, .pt"
        raise ValueError(f"{path} must hold one file of weights, and there is {seen}")
    return _unwrapped(path, open_file(files[0], stack) if safe else open_pickled(files[0], stack))


def _unwrapped(path: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("module.")
        if short in found:
            raise ValueError(f"{path} has the tensor {short} twice, once with a prefix: remove one")
        found[short] = tensor
    return found
