"""Gemma 2 and 3, text: centred norms before and behind, scaled embeddings, windows in most layers, soft caps."""

from collections.abc import Callable
from typing import Any

from jaxspec.targets.decoder import LlamaConfig
from jaxspec.targets.family import DEFAULTS, Family
from jaxspec.targets.fields import Fields, rope_fields
from jaxspec.targets.stored import Tensors, attention_tensors, mlp_tensors, vector
from jaxspec.targets.traits import BIAS, Trait, always, layer_types, named, score_scale, the_window


def _causal(fields: Fields) -> dict[str, Any]:
    """Reads the departures that both have; raises ValueError for bidirectional attention."""
    if fields.flag("use_bidirectional_attention"):
        raise ValueError(f"{fields.path}: use_bidirectional_attention is set, but a target attends causally")
    return {"norms_behind": True, "centred_norms": True, "embed_scale": fields.integer("hidden_size") ** 0.5}


def _windows(every: Callable[[Fields], int]) -> Trait:
    """Returns the trait of windows in the layers that `layer_types` names, by default in all but each `every`-th."""

    def read(fields: Fields) -> dict[str, Any]:
        local = [bool((i + 1) % every(fields)) for i in range(fields.integer("num_hidden_layers"))]
        return {"windows": fields.windows(fields.integer("sliding_window"), local)}

    def write(config: LlamaConfig) -> dict[str, Any]:
        return {"sliding_window": the_window(config) or config.max_positions, "layer_types": layer_types(config)}

    return Trait(read, write)


def _local_theta(fields: Fields) -> dict[str, Any]:
    """Reads the rotary base of layers with a window, from the newer field or the older one."""
    local = fields.rope(layers="sliding_attention", theta="rope_local_base_freq")
    if local.kind != "default":
        raise ValueError(
            f"{fields.path}: rope_type={local.kind!r} in {local.field} is not supported; only 'default' is there"
        )
    return {"local_theta": local.theta}


def _write_local_theta(config: LlamaConfig) -> dict[str, Any]:
    """Writes the rotary positions of both kinds of layers."""
    scaling, local = rope_fields(config.rope_scaling), config.options.local_theta
    full = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    kinds = {"full_attention": full, "sliding_attention": {"rope_theta": local, "rope_type": "default"}}
    return {"rope_parameters": kinds, "rope_local_base_freq": local}


def _uncapped(fields: Fields) -> dict[str, Any]:
    """Raises ValueError where attention scores are capped."""
    if fields.find("attn_logit_softcapping") is not None:
        raise ValueError(f"{fields.path}: attn_logit_softcapping is set, which Gemma 3 does not use; set it to null")
    return {}


def _layer(c: LlamaConfig) -> Tensors:
    """Returns the tensors of one layer, with norms before and behind attention and MLP."""
    norms = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_out_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_out_norm",
    }
    stored = {f"{name}.weight": vector(weight, c.width) for name, weight in norms.items()}
    return {**stored, **attention_tensors(c), **mlp_tensors(c)}


_BOTH = (
    Trait(_causal, lambda _: {}),
    BIAS,
    named("hidden_activation", "activation", Fields.activation),
    score_scale("query_pre_attn_scalar"),
    named("final_logit_softcapping", "logit_cap", Fields.optional_number),
)
_CAPS = named("attn_logit_softcapping", "score_cap", Fields.optional_number)
_DEFAULTS = {
    **DEFAULTS,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GEMMA2 = {
    **_DEFAULTS,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = {
    **_DEFAULTS,
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", (*_BOTH, _windows(lambda _: 2), _CAPS), _layer, _GEMMA2)
_LOCAL = Trait(_local_theta, _write_local_theta)
_PATTERN = _windows(lambda fields: fields.integer("sliding_window_pattern", 6))
_GEMMA3_TRAITS = (*_BOTH, always(qk_norm=True), _PATTERN, _LOCAL, Trait(_uncapped, lambda _: {}))
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", _GEMMA3_TRAITS, _layer, _GEMMA3, "full_attention")
