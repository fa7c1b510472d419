"""The families of targets that are read from HuggingFace folders, by the `model_type` of their `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxspec.targets.decoder import DecoderConfig, LlamaConfig
from jaxspec.targets.family import Family
from jaxspec.targets.gemma import GEMMA2, GEMMA3
from jaxspec.targets.llama import LLAMA
from jaxspec.targets.mistral import MISTRAL
from jaxspec.targets.mixtral import MIXTRAL
from jaxspec.targets.phi3 import PHI3
from jaxspec.targets.qwen2 import QWEN2
from jaxspec.targets.qwen3 import QWEN3
from jaxspec.targets.qwen3_moe import QWEN3_MOE

FAMILIES = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, GEMMA3, MIXTRAL, QWEN3_MOE)
}
"""`model_type` -> family. A new family is one file and one entry here."""


def family_of(config: LlamaConfig) -> Family:
    """Returns the family of a config."""
    return FAMILIES[config.family] if isinstance(config, DecoderConfig) else LLAMA


def find_family(path: Path, raw: Mapping[str, Any]) -> Family:
    """Returns the family that a `config.json` names by `model_type`, by `architectures`, or by both.

    Raises ValueError, which lists the families, for any other.
    """
    architectures, kind = raw.get("architectures"), raw.get("model_type")
    known = ", ".join(f"{f.architecture} (model_type {f.model_type!r})" for f in FAMILIES.values())
    if not architectures and not kind:
        raise ValueError(f"{path} has no field architectures and no field model_type; supported: {known}")
    for family in FAMILIES.values():
        if kind in (None, "", family.model_type) and (architectures or [family.architecture]) == [family.architecture]:
            return family
    raise ValueError(
        f"{path}: architectures={architectures!r} with model_type={kind!r} is not supported; supported: {known}"
    )
