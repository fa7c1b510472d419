"""Qwen3-MoE: Qwen3 whose MLPs are mixtures of many small experts."""

from typing import Any

from jaxspec.targets.decoder import LlamaConfig
from jaxspec.targets.family import Family
from jaxspec.targets.fields import Fields
from jaxspec.targets.qwen2 import QWEN_DEFAULTS
from jaxspec.targets.stored import Tensors, attention_tensors, expert_tensors, norm_tensors
from jaxspec.targets.traits import ACTIVATION, BIAS, WINDOW_IF_ASKED, Trait, always, named


def _experts(fields: Fields) -> dict[str, Any]:
    """Reads the number of experts; raises ValueError where some layers have none."""
    if fields.raw.get("mlp_only_layers") or fields.integer("decoder_sparse_step") != 1:
        raise ValueError(
            f"{fields.path}: layers without experts (mlp_only_layers={fields.raw.get('mlp_only_layers')!r}, "
            f"decoder_sparse_step={fields.find('decoder_sparse_step')!r}) are not supported; every layer must have them"
        )
    return {"experts": fields.integer("num_local_experts", fields.find("num_experts"))}


def _write_experts(config: LlamaConfig) -> dict[str, Any]:
    """Writes the number of experts."""
    # transformers 5 writes it by Mixtral's name too.
    count = config.options.experts
    return {"num_experts": count, "num_local_experts": count, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _layer(c: LlamaConfig) -> Tensors:
    """Returns the tensors of one layer, with experts in place of the MLP."""
    experts = expert_tensors(c, "mlp", "gate_proj", "up_proj", "down_proj")
    return {**norm_tensors(c), **attention_tensors(c), **experts}


_TRAITS = (
    always(qk_norm=True),
    BIAS,
    WINDOW_IF_ASKED,
    ACTIVATION,
    Trait(_experts, _write_experts),
    named("num_experts_per_tok", "chosen", Fields.integer),
    named("moe_intermediate_size", "expert_mlp", Fields.integer),
    named("norm_topk_prob", "renormalize", Fields.flag),
)
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
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _TRAITS, _layer, _DEFAULTS)
