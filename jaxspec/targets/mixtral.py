"""Mixtral: Mistral whose MLPs are mixtures of experts; the weights of a token's experts sum to 1."""

from jaxspec.targets.decoder import LlamaConfig
from jaxspec.targets.family import DEFAULTS, Family
from jaxspec.targets.fields import Fields
from jaxspec.targets.stored import Tensors, attention_tensors, expert_tensors, norm_tensors
from jaxspec.targets.traits import ACTIVATION, WINDOW, named


def _layer(c: LlamaConfig) -> Tensors:
    """Returns the tensors of one layer, with experts in place of the MLP."""
    return {**norm_tensors(c), **attention_tensors(c), **expert_tensors(c, "block_sparse_moe", "w1", "w3", "w2")}


_TRAITS = (
    WINDOW,
    ACTIVATION,
    named("num_local_experts", "experts", Fields.integer),
    named("num_experts_per_tok", "chosen", Fields.integer),
    named("intermediate_size", "expert_mlp", Fields.integer),
)
_DEFAULTS = {
    **DEFAULTS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTRAL = Family("mixtral", "MixtralForCausalLM", _TRAITS, _layer, _DEFAULTS)
