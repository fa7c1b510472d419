"""`config.json` and `generation_config.json` of HuggingFace folders: of every family read, of Llamas written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxspec.interchange import exported
from jaxspec.interchange.tensors import read_json, write_atomically
from jaxspec.layers import RopeScaling
from jaxspec.targets.families import find_family
from jaxspec.targets.family import LLAMA
from jaxspec.targets.fields import Fields
from jaxspec.targets.llama import DecoderConfig, LlamaConfig


def read_config(folder: str | Path) -> LlamaConfig:
    """The shape of the model in a HuggingFace folder of one of `targets.families.FAMILIES`, or of an exported target.

    Absent optional fields mean what they mean to transformers. Stop ids come from `generation_config.json` where it
    lists them, else from `config.json`. Raises ValueError, naming file, field and value, for whatever would change the
    computation and is not supported: other families and activations, quantized weights, other rotary scalings.
    """
    if exported.is_exported(Path(folder)):
        return exported.read_config(Path(folder))
    path, generation_path = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    raw = read_json(path)
    family = find_family(path, raw)
    if raw.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config is set, but only float32, bfloat16 and float16 weights are read")
    generation = read_json(generation_path) if generation_path.is_file() else {}
    return family.config(Fields(path, raw, generation, family.defaults))


def write_config(folder: str | Path, config: LlamaConfig, dtype: str) -> None:
    """Write `generation_config.json` and, last, `config.json`, for transformers 5 and for readers of older files.

    ValueError for another family than Llama.
    """
    check_writable(config)
    stop, scaling = list(config.eos_ids) or None, rope_fields(config.rope_scaling)
    special = {"bos_token_id": config.bos_id, "eos_token_id": stop, "pad_token_id": config.pad_id}
    fields = {
        "architectures": [LLAMA.architecture],
        "model_type": LLAMA.model_type,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied,
        **special,
        "eos_token_id": stop[0] if stop and len(stop) == 1 else stop,
        # transformers 5 reads rope_parameters and dtype; version 4, and most others, the three older fields.
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    write_atomically(Path(folder) / "generation_config.json", _text(special))
    write_atomically(Path(folder) / "config.json", _text(fields))


def _text(fields: dict[str, Any]) -> list[bytes]:
    return [json.dumps(fields, indent=2).encode() + b"\n"]


def check_writable(config: LlamaConfig) -> None:
    """ValueError for a model of another family than Llama."""
    if isinstance(config, DecoderConfig):
        raise ValueError(
            f"a target of family {config.family!r} cannot be written as a HuggingFace folder, only Llamas can; copy "
            "the folder that it was read from"
        )


def rope_fields(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """A rotary scaling that drafters have too as config.json says it."""
    if scaling is None:
        return None
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        fields["low_freq_factor"] = scaling.low_freq_factor
        fields["high_freq_factor"] = scaling.high_freq_factor
        fields["original_max_position_embeddings"] = scaling.original_positions
    return fields
