"""Gemma 2 and 3, text: centred norms before and behind, scaled embeddings, windows in most layers, caps."""

from typing import Any

from jaxspec.layers import Options
from jaxspec.targets.family import DEFAULTS, Family, decoder
from jaxspec.targets.fields import Fields
from jaxspec.targets.llama import DecoderConfig, LlamaConfig
from jaxspec.targets.stored import Tensors, attention_tensors, mlp_tensors, vector


def _options(fields: Fields, every: int, **more: Any) -> Options:
    """What both have; all layers but each `every`-th have a window."""
    if fields.flag("use_bidirectional_attention"):
        raise ValueError(f"{fields.path}: use_bidirectional_attention is set, but a target attends causally")
    bias = fields.flag("attention_bias")
    local = [bool((i + 1) % every) for i in range(fields.integer("num_hidden_layers"))]
    return Options(
        windows=fields.windows(fields.integer("sliding_window"), local),
        qkv_bias=bias,
        out_bias=bias,
        norms_behind=True,
        centred_norms=True,
        activation=fields.activation("hidden_activation"),
        score_scale=fields.number("query_pre_attn_scalar") ** -0.5,
        embed_scale=fields.integer("hidden_size") ** 0.5,
        **more,
    )


def _gemma2(fields: Fields) -> DecoderConfig:
    caps = {
        "score_cap": fields.optional_number("attn_logit_softcapping"),
        "logit_cap": fields.optional_number("final_logit_softcapping"),
    }
    return decoder(fields, "gemma2", _options(fields, 2, **caps))


def _gemma3(fields: Fields) -> DecoderConfig:
    if fields.find("attn_logit_softcapping") is not None:
        raise ValueError(f"{fields.path}: attn_logit_softcapping is set, which Gemma 3 does not use; set it to null")
    newer = isinstance(fields.raw.get("rope_parameters"), dict) and not fields.raw.get("rope_scaling")
    local_theta = fields.number("rope_local_base_freq")
    if newer and "sliding_attention" in fields.raw["rope_parameters"]:
        local = fields.rope(layers="sliding_attention")
        if local.kind != "default":
            raise ValueError(
                f"{fields.path}: rope_type={local.kind!r} in {local.field} is not supported; only 'default' is there"
            )
        local_theta = local.theta if local.values.get("rope_theta") else local_theta
    more = {"logit_cap": fields.optional_number("final_logit_softcapping"), "qk_norm": True}
    options = _options(fields, fields.integer("sliding_window_pattern"), local_theta=local_theta, **more)
    return decoder(fields, "gemma3_text", options, rope_of="full_attention")


def _layer(c: LlamaConfig) -> Tensors:
    norms = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_out_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_out_norm",
    }
    named = {f"{stored}.weight": vector(weight, c.width) for stored, weight in norms.items()}
    return {**named, **attention_tensors(c), **mlp_tensors(c)}


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
    "sliding_window_pattern": 6,
}
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", _gemma2, _layer, _GEMMA2)
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", _gemma3, _layer, _GEMMA3)
