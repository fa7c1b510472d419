"""Phi-3 and Phi-4: Llama with fused projections, and with a part of each head rotated where that is set."""

from typing import Any

from jaxspec.targets.decoder import LlamaConfig
from jaxspec.targets.family import DEFAULTS, Family
from jaxspec.targets.fields import longrope_amplitude
from jaxspec.targets.stored import (
    DOWN,
    GATE,
    KEY,
    OUT,
    QUERY,
    UP,
    VALUE,
    StoredTensor,
    TensorPart,
    Tensors,
    norm_tensors,
)
from jaxspec.targets.traits import ACTIVATION, ROTATED_PART, WINDOW, Trait


def _write_stretch(c: LlamaConfig) -> dict[str, Any]:
    """Writes the rotary scaling as Phi-3's own reader expects it."""
    # It reads the original length beside the scaling, and no more than three fields of the scaling.
    scaling = c.rope_scaling
    if scaling is None:
        return {}
    original = scaling.original_positions
    fields: dict[str, Any] = {"original_max_position_embeddings": original}
    factor = c.max_positions / original
    if (scaling.factor, scaling.amplitude) == (factor, longrope_amplitude(factor, original)):
        short, long = list(scaling.factors), list(scaling.long_factors)
        fields["rope_scaling"] = {"type": "longrope", "short_factor": short, "long_factor": long}
    return fields


def _fused(width: int, *parts: tuple[TensorPart, int]) -> StoredTensor:
    """Returns a tensor that has the rows of several parts, one after another."""
    placed, end = [], 0
    for part, rows in parts:
        placed.append(part._replace(rows=(end, end + rows)))
        end += rows
    return StoredTensor((end, width), tuple(placed))


def _layer(c: LlamaConfig) -> Tensors:
    """Returns the tensors of one layer, with fused projections."""
    query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return {
        "self_attn.qkv_proj.weight": _fused(c.width, (QUERY, query), (KEY, key), (VALUE, key)),
        "self_attn.o_proj.weight": StoredTensor((c.width, query), (OUT,)),
        "mlp.gate_up_proj.weight": _fused(c.width, (GATE, c.mlp), (UP, c.mlp)),
        "mlp.down_proj.weight": StoredTensor((c.width, c.mlp), (DOWN,)),
        **norm_tensors(c),
    }


_TRAITS = (WINDOW, ROTATED_PART, Trait(lambda _: {}, _write_stretch), ACTIVATION)
_DEFAULTS = {
    **DEFAULTS,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 1.0,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
PHI3 = Family("phi3", "Phi3ForCausalLM", _TRAITS, _layer, _DEFAULTS)
