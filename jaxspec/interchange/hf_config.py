"""`config.json` and `generation_config.json` of HuggingFace folders, read and written for every family of targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxspec.interchange import exported
from jaxspec.interchange.tensors import read_json, write_atomically
from jaxspec.targets.decoder import LlamaConfig
from jaxspec.targets.families import family_of, find_family
from jaxspec.targets.fields import Fields
from jaxspec.targets.fields import rope_fields as rope_fields  # of heads too


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


def config_fields(config: LlamaConfig) -> dict[str, Any]:
    """What `config.json` says of a model, for transformers 5 and for readers of older files.

    It is read back before it is given out. Raises ValueError, naming the first field that would come back as something
    else, where the model's family has no way to say what it is.
    """
    family = family_of(config)
    fields = family.fields(config)
    path = Path("config.json")
    try:
        back = family.config(Fields(path, json.loads(json.dumps(fields)), {}, family.defaults))
    except ValueError as error:
        raise ValueError(f"a {family.model_type} cannot say in its config.json what this target is: {error}") from error
    said, heard = ({**vars(c), "options": None, **vars(c.options)} for c in (config, back))
    for name, value in said.items():
        if heard.get(name) != value:
            raise ValueError(
                f"a {family.model_type} cannot say in its config.json that {name}={value!r}, which would be read as "
                f"{heard.get(name)!r}; if an older version imported this target, import it anew"
            )
    return fields


def write_config(folder: str | Path, config: LlamaConfig, dtype: str) -> None:
    """Write `generation_config.json` and, last, `config.json`; raises as `config_fields`."""
    # transformers 5 reads dtype; version 4, and most others, the older name.
    fields = config_fields(config) | {"dtype": dtype, "torch_dtype": dtype}
    special = {
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
    }
    write_atomically(Path(folder) / "generation_config.json", _text(special))
    write_atomically(Path(folder) / "config.json", _text(fields))


def _text(fields: dict[str, Any]) -> list[bytes]:
    return [json.dumps(fields, indent=2).encode() + b"\n"]
