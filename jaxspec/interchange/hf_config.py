"""`config.json` and `generation_config.json` of HuggingFace folders, read and written for every family of targets."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from jaxspec.interchange import exported
from jaxspec.interchange.tensors import read_json, write_atomically
from jaxspec.interchange.weight_files import tensor_names
from jaxspec.nn.options import Options
from jaxspec.targets.decoder import DecoderConfig, LlamaConfig
from jaxspec.targets.families import FAMILIES, family_of, find_family
from jaxspec.targets.family import DEFAULTS
from jaxspec.targets.fields import Fields
from jaxspec.targets.fields import rope_fields as rope_fields  # of heads too

SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "dim_model_base")
"""Fields of other families by which logits are scaled."""
HEAD_NAMES = ("lm_head.weight", "output.weight")
"""Ends of the names under which families store an LM head."""


def read_config(folder: str | Path) -> LlamaConfig:
    """Returns the shape of the model in a HuggingFace folder of a known family, or of an exported target.

    Optional fields that are absent have transformers' defaults. Stop ids come from `generation_config.json`, or from
    `config.json` if the former lists none. Raises ValueError, naming file, field and value, for everything that changes
    the computation and is not supported: other families, activations and rotary scalings, and quantized weights.
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


def read_table_config(folder: str | Path) -> LlamaConfig:
    """Returns what a target's embedding, final norm and LM head tell of it, also where its layers cannot be run.

    A family that is known and supported is read as by `read_config`, however its layers' weights are stored. Of any
    other the fields that families share are read, and `family` is its `model_type`. Raises ValueError naming file and
    field for a shape that is not there, and for logits that are scaled in a way that is not read.
    """
    if exported.is_exported(Path(folder)):
        return exported.read_config(Path(folder))
    path, generation_path = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    raw = read_json(path)
    generation = read_json(generation_path) if generation_path.is_file() else {}
    text = raw["text_config"] if isinstance(raw.get("text_config"), dict) else {}
    for described in filter(None, (raw, text)):
        # Rotary positions, experts and the like concern the layers, which are not run.
        with contextlib.suppress(ValueError):
            family = find_family(path, described)
            return family.config(Fields(path, described, generation, family.defaults))
    tied = not any(name.endswith(HEAD_NAMES) for name in tensor_names(Path(folder)))
    return _shared_shape(Fields(path, {**raw, **text}, generation, {**DEFAULTS, "tie_word_embeddings": tied}))


def target_classes(folder: str | Path) -> list[str]:
    """Returns the `architectures` of the target in a folder, as its `config.json` or else its family names them.

    A target of a family that is not known, whose `config.json` names none, has none.
    """
    if not exported.is_exported(Path(folder)) and (
        named := read_json(Path(folder) / "config.json").get("architectures")
    ):
        return list(named)
    config = read_table_config(folder)
    known = not isinstance(config, DecoderConfig) or config.family in FAMILIES
    return [family_of(config).architecture] if known else []


def _shared_shape(fields: Fields) -> DecoderConfig:
    """Returns the shape of a target of another family from the fields that families share."""
    raw, rope = fields.raw, fields.raw.get("rope_parameters")
    if scale := next((name for name in SCALES if raw.get(name) not in (None, 1)), None):
        raise ValueError(f"{fields.path}: {scale}={raw[scale]!r} scales the logits, which is not supported")
    theta = (rope.get("rope_theta") if isinstance(rope, dict) else None) or fields.find("rope_theta")
    scale = raw.get("embedding_multiplier") or raw.get("scale_emb") or 1.0
    return DecoderConfig(
        **fields.layer_shape(),
        vocab=fields.integer("vocab_size"),
        layers=fields.integer("num_hidden_layers"),
        rope_theta=fields.positive("rope_theta", theta),
        tied=fields.flag("tie_word_embeddings"),
        max_positions=fields.integer("max_position_embeddings"),
        bos_id=fields.token("bos_token_id"),
        eos_ids=fields.stop_ids(),
        pad_id=fields.pad_id(),
        family=str(raw.get("model_type") or "unknown"),
        options=Options(
            logit_cap=fields.optional_number("final_logit_softcapping"),
            embed_scale=fields.positive("embedding_multiplier", scale),
        ),
    )


def config_fields(config: LlamaConfig) -> dict[str, Any]:
    """Returns the fields of a model's `config.json`, for transformers 5 and for readers of older files.

    The fields are read back before they are returned. Raises ValueError naming the first field that would be read as
    something else, because the model's family cannot express it.
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
                f"{heard.get(name)!r}; if an older version imported this target, import it again"
            )
    return fields


def write_config(folder: str | Path, config: LlamaConfig, dtype: str) -> None:
    """Writes `generation_config.json` and, last, `config.json`; raises as `config_fields`."""
    # transformers 5 reads dtype; version 4 and most other readers use the older name.
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
