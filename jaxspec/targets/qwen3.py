"""Qwen3, dense: Llama with norms of queries and keys, and biases and windows where they are set."""

from jaxspec.targets.family import Family
from jaxspec.targets.qwen2 import QWEN_DEFAULTS
from jaxspec.targets.traits import ACTIVATION, BIAS, WINDOW_ABOVE, always

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    (always(qk_norm=True), BIAS, WINDOW_ABOVE, ACTIVATION),
    defaults={**QWEN_DEFAULTS, "head_dim": 128},
)
