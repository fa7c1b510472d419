"""Tables of stored tensors and the pieces of weights that they hold; one table serves reading and writing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxspec.base import Params
from jaxspec.interchange.weight_files import NAMES, has_weights, is_buffer, open_tensors, open_weights_file
from jaxspec.targets.decoder import DRAFTER_ROPES
from jaxspec.targets.fields import Fields
from jaxspec.targets.stored import (
    DOWN,
    GATE,
    KEY,
    KEY_BIAS,
    OUT,
    QUERY,
    QUERY_BIAS,
    UP,
    VALUE,
    VALUE_BIAS,
    turned,
    whole,
)

DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "max_position_embeddings": 2048}
"""Values of fields that a head's config.json leaves out."""
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
"""Tensors of the two tables, which heads may have or share with their target."""
PICKLES = (".bin", ".pt", ".pth")
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "rng_state.pth")
"""Files that trainers leave beside the weights."""
WRAPPERS = ("module.", "_orig_mod.", "draft_model.")
"""Prefixes that trainers' wrappers add to the names of tensors."""
FUSIONS = ("model.fc.weight", "model.fc.fc.weight")
"""Tensors by which a head whose names begin with `model.` is told from a whole LM."""
_NUMPY = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


class TensorEntry(NamedTuple):
    """One stored tensor."""

    weight: str
    view: Callable[[Any], Any]
    """Returns the piece of the weight that it holds, axes in stored order; a stored axis may merge several."""
    shape: tuple[int, ...]
    """Its shape as it is stored."""


Table = dict[str, TensorEntry]
Shapes = dict[str, tuple[int, ...]]


class Folder(NamedTuple):
    """A folder that is being read."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, Any]
    """Handles by name (`get_shape`, `get_dtype`, slicing), without the prefixes that wrappers add to the names."""

    @property
    def shapes(self) -> Shapes:
        """Shapes of the tensors by name."""
        return {name: tuple(tensor.get_shape()) for name, tensor in self.tensors.items()}


def matrix(weight: str, shapes: Shapes) -> TensorEntry:
    """Returns the entry of a linear layer's weight."""
    return TensorEntry(weight, turned, shapes[weight][::-1])


def vector(weight: str, shapes: Shapes) -> TensorEntry:
    """Returns the entry of a norm's weight, a bias, or a table, which both sides store alike."""
    return TensorEntry(weight, whole, shapes[weight])


def layer_table(prefix: str, c: Any, shapes: Shapes | None = None) -> Table:
    """Returns the tensors of a decoder layer of a head of shape `c`, without norms before its attention.

    `shapes` are those of the layer's weights, by default those of the head's only layer.
    """
    weights: Shapes = shapes or c.shapes()
    inputs, down = weights["qkv"][0], weights["down"][1]
    stored = {
        "self_attn.q_proj": (QUERY, (c.heads * c.head_dim, inputs)),
        "self_attn.k_proj": (KEY, (c.kv_heads * c.head_dim, inputs)),
        "self_attn.v_proj": (VALUE, (c.kv_heads * c.head_dim, inputs)),
        "self_attn.o_proj": (OUT, (c.width, c.heads * c.head_dim)),
        "mlp.gate_proj": (GATE, (c.mlp, c.width)),
        "mlp.up_proj": (UP, (c.mlp, c.width)),
        "mlp.down_proj": (DOWN, (down, c.mlp)),
    }
    table = {
        f"{prefix}{name}.weight": TensorEntry(part.weight, part.view, shape) for name, (part, shape) in stored.items()
    }
    if c.qkv_bias:
        for name, part, heads in (
            ("q", QUERY_BIAS, c.heads),
            ("k", KEY_BIAS, c.kv_heads),
            ("v", VALUE_BIAS, c.kv_heads),
        ):
            table[f"{prefix}self_attn.{name}_proj.bias"] = TensorEntry(part.weight, part.view, (heads * c.head_dim,))
    if c.out_bias:
        table[f"{prefix}self_attn.o_proj.bias"] = vector("out_bias", weights)
    if c.qk_norm:
        table |= {f"{prefix}self_attn.{name}.weight": vector(name, weights) for name in ("q_norm", "k_norm")}
    return {**table, f"{prefix}post_attention_layernorm.weight": vector("mlp_norm", weights)}


def read_weights(folder: Folder, table: Table, shapes: Shapes) -> Params:
    """Returns the weights of these shapes, assembled from the tensors of a table, in their stored dtype.

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
    """Returns the tensors of a table, made of weights; the inverse of `read_weights`."""
    return {
        name: np.ascontiguousarray(entry.view(np.asarray(params[entry.weight]))).reshape(entry.shape)
        for name, entry in table.items()
    }


def refuse_unknown(folder: Folder, table: Table, ignored: tuple[str, ...]) -> None:
    """Raises ValueError naming the first tensor that is neither in the table nor ignored."""
    extra = sorted(n for n in folder.tensors if n not in table and n not in ignored and not is_buffer(n))
    if extra:
        raise ValueError(
            f"{folder.path} has the tensor {extra[0]}, which jaxspec's drafter of this kind does not have "
            f"({len(extra)} such): reading it without would change what it drafts"
        )


def head_shape(folder: Folder) -> dict[str, Any]:
    """Returns the fields that all heads share, from config.json; fields that it leaves out have transformers' defaults.

    The tensors of the folder tell whether the head has biases of the attention and norms of queries and keys.
    """
    fields = Fields(folder.path / "config.json", folder.config, {}, DEFAULTS)
    if fields.find("hidden_act") != "silu":
        raise ValueError(f"{fields.path}: hidden_act={fields.find('hidden_act')!r} is not supported; only 'silu' is")
    kinds = fields.find("layer_types")
    if isinstance(kinds, list) and "sliding_attention" in kinds:
        raise ValueError(f"{fields.path}: layer_types={kinds!r} has sliding windows, which heads here do not")
    layer, rope = fields.layer_shape(), fields.rope()
    scaling = rope.scaling(layer["head_dim"], fields.integer("max_position_embeddings"))
    if scaling is not None and scaling.kind not in DRAFTER_ROPES:
        known = ", ".join(map(repr, ("default", *DRAFTER_ROPES)))
        raise ValueError(
            f"{fields.path}: rope_type={scaling.kind!r} of a head is not supported; supported: {known}. It drafts by "
            "the positions that it learned: take another head, or train one for the target (jaxspec train eagle3)"
        )
    return {
        **layer,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "qkv_bias": any(name.endswith("self_attn.q_proj.bias") for name in folder.tensors),
        "out_bias": any(name.endswith("self_attn.o_proj.bias") for name in folder.tensors),
        "qk_norm": any(name.endswith("self_attn.q_norm.weight") for name in folder.tensors),
    }


def open_weights(path: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Returns a handle of every tensor in a folder by name without prefixes, from one file of any name or from shards.

    A safetensors file is preferred to a pickled one. Raises ValueError or OSError where it is not clear which file it
    is, or an index is wrong.
    """
    safe = sorted(path.glob("*.safetensors"))
    standard = any((path / name).is_file() for name in NAMES[0])
    if standard or (not safe and has_weights(path)):
        return _unwrapped(path, open_tensors(path, stack))
    pickled = sorted(file for file in path.iterdir() if file.suffix in PICKLES and file.name not in NO_WEIGHTS)
    files = safe or pickled
    if len(files) != 1:
        seen = ", ".join(file.name for file in files) or "none of .safetensors, .bin, .pt"
        raise ValueError(f"{path} must hold one file of weights, or shards and their index, and there is {seen}")
    return _unwrapped(path, open_weights_file(files[0], stack))


def _unwrapped(path: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors by their names in the head; raises ValueError where two become one."""
    found = {}
    # A whole LM has the prefix too, and keeps it.
    prefixes = (*WRAPPERS, "model.") if any(name.endswith(FUSIONS) for name in tensors) else WRAPPERS
    for name, tensor in tensors.items():
        short = name
        while prefix := next((p for p in prefixes if short.startswith(p)), None):
            short = short.removeprefix(prefix)
        if short in found:
            raise ValueError(f"{path} has the tensor {short} twice, once with a prefix: remove one")
        found[short] = tensor
    return found
