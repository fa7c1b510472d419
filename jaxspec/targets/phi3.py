"""Phi-3 and Phi-4: Llama with fused projections, and with a part of each head rotated if asked for."""

from jaxspec.layers import Options
from jaxspec.targets.family import DEFAULTS, Family, decoder, window_everywhere
from jaxspec.targets.fields import Fields
from jaxspec.targets.llama import DecoderConfig, LlamaConfig
from jaxspec.targets.stored import DOWN, GATE, KEY, OUT, QUERY, UP, VALUE, Part, Stored, Tensors, norm_tensors


def _config(fields: Fields) -> DecoderConfig:
    """Up to the original length; see `Rope.scaling` for models that stretch it by `longrope`."""
    head_dim = fields.integer("hidden_size") // fields.integer("num_attention_heads")
    rotary = int(fields.integer("head_dim", head_dim) * fields.rope().part)
    options = Options(
        windows=window_everywhere(fields),
        rotary=None if rotary == head_dim else rotary,
        activation=fields.activation(),
    )
    return decoder(fields, "phi3", options)


def _fused(width: int, *parts: tuple[Part, int]) -> Stored:
    """A tensor whose rows are those of several parts, one after another."""
    placed, end = [], 0
    for part, rows in parts:
        placed.append(part._replace(rows=(end, end + rows)))
        end += rows
    return Stored((end, width), tuple(placed))


def _layer(c: LlamaConfig) -> Tensors:
    query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return {
        "self_attn.qkv_proj.weight": _fused(c.width, (QUERY, query), (KEY, key), (VALUE, key)),
        "self_attn.o_proj.weight": Stored((c.width, query), (OUT,)),
        "mlp.gate_up_proj.weight": _fused(c.width, (GATE, c.mlp), (UP, c.mlp)),
        "mlp.down_proj.weight": Stored((c.width, c.mlp), (DOWN,)),
        **norm_tensors(c),
    }


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
PHI3 = Family("phi3", "Phi3ForCausalLM", _config, _layer, _DEFAULTS)
