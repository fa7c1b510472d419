"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values, and windows in upper layers where they are set."""

from jaxspec.targets.family import DEFAULTS, Family
from jaxspec.targets.traits import ACTIVATION, WINDOW_ABOVE, always

QWEN_DEFAULTS = {
    **DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", (always(qkv_bias=True), WINDOW_ABOVE, ACTIVATION), defaults=QWEN_DEFAULTS)
