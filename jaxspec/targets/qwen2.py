"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values, and windows in the upper layers if asked for."""

from jaxspec.layers import Options
from jaxspec.targets.family import DEFAULTS, Family, decoder, window_above
from jaxspec.targets.fields import Fields
from jaxspec.targets.llama import DecoderConfig


def _config(fields: Fields) -> DecoderConfig:
    options = Options(windows=window_above(fields), qkv_bias=True, activation=fields.activation())
    return decoder(fields, "qwen2", options)


QWEN_DEFAULTS = {
    **DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _config, defaults=QWEN_DEFAULTS)
