"""Trainable drafters, one a file, and the table that names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxspec.drafters.draft_lm import DraftLM, DraftLMConfig
from jaxspec.drafters.eagle import Eagle, EagleConfig
from jaxspec.drafters.eagle3 import Eagle3, Eagle3Config, default_taps
from jaxspec.drafters.fspad import Fspad, FspadConfig
from jaxspec.drafters.medusa import Medusa, MedusaConfig
from jaxspec.drafters.parallelspec import ParallelSpec, ParallelSpecConfig
from jaxspec.drafters.peagle import PEagle, PEagleConfig

DRAFTERS = {
    "eagle": (Eagle, EagleConfig),
    "fspad": (Fspad, FspadConfig),
    "eagle3": (Eagle3, Eagle3Config),
    "medusa": (Medusa, MedusaConfig),
    "parallelspec": (ParallelSpec, ParallelSpecConfig),
    "peagle": (PEagle, PEagleConfig),
    "draft_lm": (DraftLM, DraftLMConfig),
}
"""Name -> (module, its configuration). A new drafter is one file and one line here."""


def shape_of(name: str, like: Mapping[str, Any], target_layers: int, options: Mapping[str, Any]) -> Any:
    """The configuration of drafter `name`: one layer `like` the target's where `options` say nothing else.

    Raises ValueError naming an option that this drafter does not have, or one that it needs.
    """
    kind = DRAFTERS[name][1]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for option in options:
        if option not in fields:
            raise ValueError(f"head.{option} is nothing that drafter {name!r} has; it has {', '.join(fields)}")
    values = {key: value for key, value in like.items() if key in fields and kind is not DraftLMConfig}
    if issubclass(kind, Eagle3Config):
        values |= _of_target(kind, like, target_layers, options)
    if kind is DraftLMConfig:
        values = {key: like[key] for key in ("vocab", "rope_theta", "rope_scaling", "norm_eps")}
    values |= options
    missing = [key for key, f in fields.items() if key not in values and f.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"drafter {name!r} needs head.{', head.'.join(missing)}, or init_from a folder that has them")
    return kind(**values)


def _of_target(kind: type, like: Mapping[str, Any], target_layers: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """What an EAGLE-3 or P-EAGLE head reads of its target, and whether it has an embedding of its own: P-EAGLE heads,
    and those of another width."""
    narrow = options.get("width", like["width"]) != like["width"]
    own = narrow or kind is PEagleConfig
    return {
        "taps": () if "taps" in options else default_taps(target_layers),
        "target_width": like["width"] if narrow else None,
        "embed_vocab": like["embed_vocab"] if own else 0,
    }


__all__ = [
    "DRAFTERS",
    "DraftLM",
    "DraftLMConfig",
    "Eagle",
    "Eagle3",
    "Eagle3Config",
    "EagleConfig",
    "Fspad",
    "FspadConfig",
    "Medusa",
    "MedusaConfig",
    "PEagle",
    "PEagleConfig",
    "ParallelSpec",
    "ParallelSpecConfig",
    "shape_of",
]
