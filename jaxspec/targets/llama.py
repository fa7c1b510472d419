"""Llama (2, 3.x), Vicuna and every decoder of that shape: no departure from `decoder`."""

from jaxspec.targets.family import DEFAULTS, Family
from jaxspec.targets.traits import PLAIN_LLAMA

LLAMA = Family("llama", "LlamaForCausalLM", (PLAIN_LLAMA,), defaults={**DEFAULTS, "bos_token_id": 1, "eos_token_id": 2})
