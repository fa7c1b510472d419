"""Trainable drafters, one a file, and the table that names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxspec.drafters.draft_lm import DraftLM, DraftLMConfig, DraftLMOptions
from jaxspec.drafters.eagle import Eagle, EagleConfig, EagleOptions
from jaxspec.drafters.eagle3 import Eagle3, Eagle3Config, Eagle3Options
from jaxspec.drafters.fspad import Fspad, FspadConfig, FspadOptions
from jaxspec.drafters.medusa import Medusa, MedusaConfig, MedusaOptions
from jaxspec.drafters.module import DrafterModule, DrafterOptions, TargetShape
from jaxspec.drafters.parallelspec import ParallelSpec, ParallelSpecConfig, ParallelSpecOptions
from jaxspec.drafters.peagle import PEagle, PEagleConfig, PEagleOptions


class DrafterKind(NamedTuple):
    """A line of the table: the three classes of a drafter's file."""

    module: type[DrafterModule]
    """Drafts and learns, as pure functions of its weights."""
    config: type
    """The whole shape of it, which a checkpoint keeps."""
    options: type[DrafterOptions]
    """Options of that shape, an experiment's `head`; what is None there follows the target."""


DRAFTERS: dict[str, DrafterKind] = {
    "eagle": DrafterKind(Eagle, EagleConfig, EagleOptions),
    "fspad": DrafterKind(Fspad, FspadConfig, FspadOptions),
    "eagle3": DrafterKind(Eagle3, Eagle3Config, Eagle3Options),
    "medusa": DrafterKind(Medusa, MedusaConfig, MedusaOptions),
    "parallelspec": DrafterKind(ParallelSpec, ParallelSpecConfig, ParallelSpecOptions),
    "peagle": DrafterKind(PEagle, PEagleConfig, PEagleOptions),
    "draft_lm": DrafterKind(DraftLM, DraftLMConfig, DraftLMOptions),
}
"""Table of drafters: name -> classes. A new drafter is one file and one line here."""


def kind_named(name: Any) -> DrafterKind:
    """The line of the table called `name`; ValueError where there is none."""
    if name not in DRAFTERS:
        raise ValueError(f"drafter {name!r} is not one of {', '.join(DRAFTERS)}")
    return DRAFTERS[name]


def options_of(name: str, options: DrafterOptions | None = None) -> DrafterOptions:
    """`options` as those of drafter `name`: what is set in the options of another drafter is taken over.

    Raises ValueError naming an option that this drafter does not have.
    """
    kind = kind_named(name).options
    if options is None:
        return kind()
    if type(options) is kind:
        return options
    refuse_unknown(name, options.given)
    return kind(**options.given)


def refuse_unknown(name: str, fields: Iterable[str]) -> None:
    """ValueError naming the first of `fields` that drafter `name` does not have, and those that it has."""
    known = [field.name for field in dataclasses.fields(kind_named(name).options)]
    for field in fields:
        if field not in known:
            raise ValueError(f"head.{field} is nothing that drafter {name!r} has; it has {', '.join(known)}")


def config_of(name: str, target: TargetShape, options: DrafterOptions) -> Any:
    """The whole shape of drafter `name` for a target: as `options` say, and where they say nothing as the target.

    Raises ValueError naming an option that this drafter does not have, or one that it needs.
    """
    kind, options = kind_named(name).config, options_of(name, options)
    values = options.follow(target) | options.given
    fields = dataclasses.fields(kind)
    missing = [f.name for f in fields if f.name not in values and f.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"drafter {name!r} needs head.{', head.'.join(missing)}, or init_from a folder that has them")
    return kind(**values)


__all__ = [
    "DRAFTERS",
    "DraftLM",
    "DraftLMConfig",
    "DraftLMOptions",
    "DrafterKind",
    "DrafterOptions",
    "Eagle",
    "Eagle3",
    "Eagle3Config",
    "Eagle3Options",
    "EagleConfig",
    "EagleOptions",
    "Fspad",
    "FspadConfig",
    "FspadOptions",
    "Medusa",
    "MedusaConfig",
    "MedusaOptions",
    "PEagle",
    "PEagleConfig",
    "PEagleOptions",
    "ParallelSpec",
    "ParallelSpecConfig",
    "ParallelSpecOptions",
    "TargetShape",
    "config_of",
    "kind_named",
    "options_of",
    "refuse_unknown",
]
