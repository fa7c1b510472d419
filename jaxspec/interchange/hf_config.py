"""`config.json` and `generation_config.json` of HuggingFace Llama folders, read and written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jaxspec.interchange.tensors import read_json, write_atomically
from jaxspec.layers import RopeScaling
from jaxspec.targets.llama import LlamaConfig

ARCHITECTURE, MODEL_TYPE = "LlamaForCausalLM", "llama"

# What transformers' LlamaConfig takes for an absent field; config.json may leave out whatever equals its default.
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def read_config(folder: str | Path) -> LlamaConfig:
    """The `LlamaConfig` of a HuggingFace Llama folder (Llama, Vicuna, any `LlamaForCausalLM`).

    Absent optional fields mean what they mean to transformers. Stop ids come from `generation_config.json` where it
    lists them, else from `config.json`. Raises ValueError, naming file, field and value, for whatever would change the
    computation and is not supported: other architectures, biases, other activations, quantized weights, other
    rotary scalings than `linear` and `llama3`.
    """
    path, generation_path = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    raw = read_json(path)
    _refuse_others(path, raw)
    generation = read_json(generation_path) if generation_path.is_file() else {}
    heads, width = _integer(path, raw, "num_attention_heads"), _integer(path, raw, "hidden_size")
    if raw.get("head_dim") is None and width % heads:
        raise ValueError(f"{path}: hidden_size={width} is not a multiple of num_attention_heads={heads}: set head_dim")
    theta, scaling = _rope(path, raw)
    stop = _ids(generation_path, generation.get("eos_token_id"))
    return LlamaConfig(
        vocab=_integer(path, raw, "vocab_size"),
        width=width,
        layers=_integer(path, raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=_integer(path, raw, "num_key_value_heads", heads),
        head_dim=_integer(path, raw, "head_dim", width // heads),
        mlp=_integer(path, raw, "intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(path, "rms_norm_eps", raw.get("rms_norm_eps", DEFAULTS["rms_norm_eps"])),
        tied=bool(raw.get("tie_word_embeddings", False)),
        max_positions=_integer(path, raw, "max_position_embeddings", DEFAULTS["max_position_embeddings"]),
        bos_id=_one_id(raw.get("bos_token_id", DEFAULTS["bos_token_id"])),
        eos_ids=stop or _ids(path, raw.get("eos_token_id", DEFAULTS["eos_token_id"])),
        pad_id=_one_id(generation.get("pad_token_id") if raw.get("pad_token_id") is None else raw["pad_token_id"]),
    )


def write_config(folder: str | Path, config: LlamaConfig, dtype: str) -> None:
    """Write `generation_config.json` and, last, `config.json`, for transformers 5 and for readers of older files."""
    stop, scaling = list(config.eos_ids) or None, _rope_fields(config.rope_scaling)
    special = {"bos_token_id": config.bos_id, "eos_token_id": stop, "pad_token_id": config.pad_id}
    fields = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
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


def _refuse_others(path: Path, raw: dict[str, Any]) -> None:
    architectures, kind = raw.get("architectures"), raw.get("model_type")
    if not architectures and not kind:
        raise ValueError(f"{path} has no field architectures and no field model_type; {ARCHITECTURE} is supported")
    if (architectures or [ARCHITECTURE]) != [ARCHITECTURE] or (kind or MODEL_TYPE) != MODEL_TYPE:
        raise ValueError(
            f"{path}: architectures={architectures!r} with model_type={kind!r} is not supported; "
            f"supported: {ARCHITECTURE} with model_type {MODEL_TYPE!r}, which covers Llama and Vicuna"
        )
    for name in ("attention_bias", "mlp_bias"):
        if raw.get(name):
            raise ValueError(f"{path}: {name}={raw[name]!r} is not supported; only projections without bias are")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act={raw['hidden_act']!r} is not supported; only 'silu' is")
    if raw.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config is set, but only float32, bfloat16 and float16 weights are read")


def _integer(path: Path, raw: dict[str, Any], name: str, default: Any = None) -> int:
    value = default if raw.get(name) is None else raw[name]
    if value is None:
        raise ValueError(f"{path} has no field {name}, which the model's shape needs")
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 1:
        raise ValueError(f"{path}: {name}={value!r} must be a positive whole number")
    return int(value)


def _number(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise ValueError(f"{path}: {name}={value!r} must be a positive number")
    return float(value)


def _ids(path: Path, value: Any) -> tuple[int, ...]:
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in listed):
        raise ValueError(f"{path}: eos_token_id={value!r} must be a token id or a list of them")
    return tuple(dict.fromkeys(listed))


def _one_id(value: Any) -> int | None:
    """A token id; early Llama files say -1 for none."""
    return value if isinstance(value, int) and value >= 0 else None


def _rope(path: Path, raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling; as in transformers the older field `rope_scaling`, where set, is read before the newer."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(field) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{path}: {field}={rope!r} is not supported; only one set of values for all layers is")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError(f"{path}: partial_rotary_factor={partial!r} is not supported; only 1 is")
    theta = _number(path, "rope_theta", rope.get("rope_theta") or raw.get("rope_theta", DEFAULTS["rope_theta"]))
    kind = rope.get("rope_type", rope.get("type", "default"))

    def number(name: str) -> float:
        if rope.get(name) is None:
            raise ValueError(f"{path}: {field} has no field {name}, which rope_type {kind!r} needs")
        return _number(path, f"{field}.{name}", rope[name])

    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", number("factor"))
    if kind == "llama3":
        original = int(number("original_max_position_embeddings"))
        scaling = RopeScaling(kind, number("factor"), number("low_freq_factor"), number("high_freq_factor"), original)
        return theta, scaling
    raise ValueError(
        f"{path}: rope_type={kind!r} in {field} is not supported; supported: 'default', 'linear' and 'llama3'"
    )


def _rope_fields(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        fields["low_freq_factor"] = scaling.low_freq_factor
        fields["high_freq_factor"] = scaling.high_freq_factor
        fields["original_max_position_embeddings"] = scaling.original_positions
    return fields
