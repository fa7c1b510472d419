"""Mistral: Llama with a window of attention in every layer."""

from jaxspec.layers import Options
from jaxspec.targets.family import DEFAULTS, Family, decoder, window_everywhere
from jaxspec.targets.fields import Fields
from jaxspec.targets.llama import DecoderConfig


def _config(fields: Fields) -> DecoderConfig:
    options = Options(windows=window_everywhere(fields), activation=fields.activation())
    return decoder(fields, "mistral", options)


_DEFAULTS = {
    **DEFAULTS,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL = Family("mistral", "MistralForCausalLM", _config, defaults=_DEFAULTS)
