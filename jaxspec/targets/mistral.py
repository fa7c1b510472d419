"""Mistral: Llama with a sliding window in every layer, where it is set."""

from jaxspec.targets.family import DEFAULTS, Family
from jaxspec.targets.traits import ACTIVATION, WINDOW

_DEFAULTS = {
    **DEFAULTS,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL = Family("mistral", "MistralForCausalLM", (WINDOW, ACTIVATION), defaults=_DEFAULTS)
