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

DRAFTERS = {
    "eagle": (Eagle, EagleConfig),
    "fspad": (Fspad, FspadConfig),
    "eagle3": (Eagle3, Eagle3Config),
    "medusa": (Medusa, MedusaConfig),
    "parallelspec": (ParallelSpec, ParallelSpecConfig),
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
    if kind is DraftLMConfig:
        values = {key: like[key] for key in ("vocab", "rope_theta", "rope_scaling", "norm_eps")}
    if kind is Eagle3Config and "taps" not in options:
        values["taps"] = default_taps(target_layers)
    values |= options
    missing = [key for key, f in fields.items() if key not in values and f.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"drafter {name!r} needs head.{', head.'.join(missing)}, or init_from a folder that has them")
    return kind(**values)


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
    "ParallelSpec",
    "ParallelSpecConfig",
    "shape_of",
]
