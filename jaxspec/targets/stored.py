"""The tensors that a HuggingFace folder stores for a decoder, and their places inside this library's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxspec.targets.decoder import LlamaConfig


class TensorPart(NamedTuple):
    """The place of a stored `[out, in]` tensor, or of some of its rows, inside a weight of this library."""

    weight: str
    axes: tuple[int, ...]
    """The weight's axes that the stored rows and columns become; no other axis may be sharded."""
    view: Callable[[Any], Any]
    """Returns the piece of the weight that the tensor fills, its axes in stored order: the rows', then the columns'."""
    rows: tuple[int, int] | None = None
    """The stored rows of this part, from and to; None: all."""
    expert: int | None = None
    """The entry of the weight's leading axis that the tensor fills; `axes` and `view` are of that entry."""


class StoredTensor(NamedTuple):
    """A tensor of a folder, and its places."""

    shape: tuple[int, ...]
    parts: tuple[TensorPart, ...]


Tensors = dict[str, StoredTensor]
"""Name -> tensor; a layer's names lack the prefix `model.layers.N.`"""


def whole(weight: Any) -> Any:
    """Returns the weight as it is stored."""
    return weight


def turned(weight: Any) -> Any:
    """Returns the weight transposed."""
    return weight.transpose(1, 0)


def vector(weight: str, size: int) -> StoredTensor:
    """Returns a tensor of one axis that is stored as it is."""
    return StoredTensor((size,), (TensorPart(weight, (0,), whole),))


# StoredTensor query head h is (k, g) = divmod(h, G), so its rows split into [K, G, C] without reordering.
QUERY = TensorPart("qkv", (1, 0), lambda w_DKJC: w_DKJC[:, :, :-2].transpose(1, 2, 3, 0))
KEY = TensorPart("qkv", (1, 0), lambda w_DKJC: w_DKJC[:, :, -2].transpose(1, 2, 0))
VALUE = TensorPart("qkv", (1, 0), lambda w_DKJC: w_DKJC[:, :, -1].transpose(1, 2, 0))
OUT = TensorPart("out", (3, 0), lambda w_KGCD: w_KGCD.transpose(3, 0, 1, 2))
GATE, UP, DOWN = (TensorPart(name, (1, 0), turned) for name in ("gate", "up", "down"))
QUERY_BIAS = TensorPart("qkv_bias", (0,), lambda b_KJC: b_KJC[:, :-2])
KEY_BIAS = TensorPart("qkv_bias", (0,), lambda b_KJC: b_KJC[:, -2])
VALUE_BIAS = TensorPart("qkv_bias", (0,), lambda b_KJC: b_KJC[:, -1])


def top_tensors(c: LlamaConfig) -> Tensors:
    """Returns the tensors beside the layers: embedding, final norm, and LM head unless tied."""
    table = (c.vocab, c.width)
    tensors = {
        "model.embed_tokens.weight": StoredTensor(table, (TensorPart("embed", (0, 1), whole),)),
        "model.norm.weight": vector("norm", c.width),
    }
    return (
        tensors if c.tied else {**tensors, "lm_head.weight": StoredTensor(table, (TensorPart("head", (0, 1), whole),))}
    )


def attention_tensors(c: LlamaConfig) -> Tensors:
    """Returns the tensors of a layer's attention by Llama's names, with the biases and norms that the config has."""
    query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
    tensors = {
        "self_attn.q_proj.weight": StoredTensor((query, c.width), (QUERY,)),
        "self_attn.k_proj.weight": StoredTensor((key, c.width), (KEY,)),
        "self_attn.v_proj.weight": StoredTensor((key, c.width), (VALUE,)),
        "self_attn.o_proj.weight": StoredTensor((c.width, query), (OUT,)),
    }
    if c.options.qkv_bias:
        tensors["self_attn.q_proj.bias"] = StoredTensor((query,), (QUERY_BIAS,))
        tensors["self_attn.k_proj.bias"] = StoredTensor((key,), (KEY_BIAS,))
        tensors["self_attn.v_proj.bias"] = StoredTensor((key,), (VALUE_BIAS,))
    if c.options.out_bias:
        tensors["self_attn.o_proj.bias"] = vector("out_bias", c.width)
    if c.options.qk_norm:
        tensors["self_attn.q_norm.weight"] = vector("q_norm", c.head_dim)
        tensors["self_attn.k_norm.weight"] = vector("k_norm", c.head_dim)
    return tensors


def mlp_tensors(c: LlamaConfig) -> Tensors:
    """Returns the tensors of a layer's MLP, by Llama's names."""
    return {
        "mlp.gate_proj.weight": StoredTensor((c.mlp, c.width), (GATE,)),
        "mlp.up_proj.weight": StoredTensor((c.mlp, c.width), (UP,)),
        "mlp.down_proj.weight": StoredTensor((c.width, c.mlp), (DOWN,)),
    }


def expert_tensors(c: LlamaConfig, block: str, gate: str, up: str, down: str) -> Tensors:
    """Returns the tensors of a layer's router and experts, stored one by one in `block` under these names."""
    o = c.options
    tensors = {f"{block}.gate.weight": StoredTensor((o.experts, c.width), (TensorPart("router", (1, 0), turned),))}
    for e in range(o.experts):
        for name, weight, shape in (
            (gate, "expert_gate", (o.expert_mlp, c.width)),
            (up, "expert_up", (o.expert_mlp, c.width)),
            (down, "expert_down", (c.width, o.expert_mlp)),
        ):
            tensors[f"{block}.experts.{e}.{name}.weight"] = StoredTensor(
                shape, (TensorPart(weight, (1, 0), turned, expert=e),)
            )
    return tensors


def norm_tensors(c: LlamaConfig) -> Tensors:
    """Returns the norms before a layer's attention and MLP, by Llama's names."""
    return {
        "input_layernorm.weight": vector("attention_norm", c.width),
        "post_attention_layernorm.weight": vector("mlp_norm", c.width),
    }


def llama_layer(c: LlamaConfig) -> Tensors:
    """Returns the tensors of a layer, by Llama's names."""
    norms = norm_tensors(c)
    first = norms.pop("input_layernorm.weight")
    return {"input_layernorm.weight": first, **attention_tensors(c), **norms, **mlp_tensors(c)}
