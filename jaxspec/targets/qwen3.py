"""Qwen3, dense: Llama with norms of queries and keys, biases and windows if asked for."""

from jaxspec.layers import Options
from jaxspec.targets.family import Family, decoder, window_above
from jaxspec.targets.fields import Fields
from jaxspec.targets.llama import DecoderConfig
from jaxspec.targets.qwen2 import QWEN_DEFAULTS


def _config(fields: Fields) -> DecoderConfig:
    bias = fields.flag("attention_bias")
    options = Options(
        windows=window_above(fields), qkv_bias=bias, out_bias=bias, qk_norm=True, activation=fields.activation()
    )
    return decoder(fields, "qwen3", options)


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _config, defaults={**QWEN_DEFAULTS, "head_dim": 128})
