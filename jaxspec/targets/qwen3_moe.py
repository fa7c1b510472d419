"""Qwen3-MoE: Qwen3 whose MLPs are many small experts."""

from jaxspec.layers import Options
from jaxspec.targets.family import Family, decoder, window_everywhere
from jaxspec.targets.fields import Fields
from jaxspec.targets.llama import DecoderConfig, LlamaConfig
from jaxspec.targets.qwen2 import QWEN_DEFAULTS
from jaxspec.targets.stored import Tensors, attention_tensors, expert_tensors, norm_tensors


def _config(fields: Fields) -> DecoderConfig:
    """ValueError where some layers have no experts; with `use_sliding_window` every layer has a window."""
    if fields.raw.get("mlp_only_layers") or fields.integer("decoder_sparse_step") != 1:
        raise ValueError(
            f"{fields.path}: layers without experts (mlp_only_layers={fields.raw.get('mlp_only_layers')!r}, "
            f"decoder_sparse_step={fields.find('decoder_sparse_step')!r}) are not supported; every layer must have them"
        )
    bias = fields.flag("attention_bias")
    options = Options(
        windows=window_everywhere(fields) if fields.flag("use_sliding_window") else (),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        activation=fields.activation(),
        experts=fields.integer("num_local_experts", fields.find("num_experts")),  # transformers 5 writes Mixtral's name
        chosen=fields.integer("num_experts_per_tok"),
        expert_mlp=fields.integer("moe_intermediate_size"),
        renormalize=fields.flag("norm_topk_prob"),
    )
    return decoder(fields, "qwen3_moe", options)


def _layer(c: LlamaConfig) -> Tensors:
    experts = expert_tensors(c, "mlp", "gate_proj", "up_proj", "down_proj")
    return {**norm_tensors(c), **attention_tensors(c), **experts}


_DEFAULTS = {
    **QWEN_DEFAULTS,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
}
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _config, _layer, _DEFAULTS)
