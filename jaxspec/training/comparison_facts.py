"""The making of a comparison of recipes, for its result: target, files, and the changes of every recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxspec.config import PretrainConfig, to_dict
from jaxspec.console.results import file_facts
from jaxspec.data.conversations import read_records
from jaxspec.data.draft_vocab import load_maps
from jaxspec.data.prompts import read_prompts
from jaxspec.interchange import hf
from jaxspec.interchange.hf_config import read_config
from jaxspec.interchange.target_folders import target_folder
from jaxspec.training.recipes import Arm, compared
from jaxspec.training.terms import SHARED, NamedRecipe, Terms

TOLD_APART = {*SHARED, "draft_vocab"}
"""Fields of a config that a result tells otherwise."""


def comparison_facts(
    terms: Terms, recipes: Sequence[NamedRecipe], arms: Sequence[Arm], prompts: str, asked: int
) -> dict[str, Any]:
    """Returns what decides a comparison's figures besides its budget: keys of its result.

    `prompts` is the file of the prompts, of which `asked` were taken.
    """
    folder, configs = target_folder(terms.target), {arm.recipe: arm.config for arm in arms}
    shape = read_config(folder)
    return {
        "target": terms.target,
        "target_weights": hf.fingerprint(folder),
        "files": {
            "train": conversations_facts(terms.train),
            "eval": conversations_facts(terms.eval),
            "prompts": {**file_facts(prompts), "count": len(read_prompts(prompts)), "asked": asked},
        },
        "settings": {
            recipe.name: {
                "changed": changed_settings(recipe, configs[recipe.name]),
                "draft_vocab": vocab_facts(configs[recipe.name], shape.vocab),
                "features": getattr(configs[recipe.name].data, "features", None) is not None,
            }
            for recipe in recipes
        },
    }


def conversations_facts(path: str) -> dict[str, Any]:
    """Returns name, hash and number of conversations of a file."""
    return {**file_facts(path), "count": sum(1 for _ in read_records(path))}


def vocab_facts(config: Any, vocab: int) -> dict[str, Any] | None:
    """Returns name, hash and size of a config's draft vocabulary; None where its drafter scores all tokens."""
    path = getattr(config, "draft_vocab", None)
    if path is None:
        return None
    try:
        return {**file_facts(path), "tokens": len(load_maps(path, vocab))}
    except (ValueError, OSError):  # the recipe's training says what is wrong, and fails alone
        return {"name": Path(path).name}


def changed_settings(recipe: NamedRecipe, config: Any) -> dict[str, Any]:
    """Returns the fields of a config as it is run that are not as in the recipe's file, `a.b` -> value.

    What the result tells otherwise, and what does not touch a drafter's weights, are left out.
    """
    if isinstance(config, PretrainConfig):
        before, now = flat(to_dict(recipe.file)), flat(to_dict(config))
        return {path: value for path, value in now.items() if before.get(path) != value}
    before, now = (flat(compared(to_dict(each))) for each in (recipe.file, config))
    return {path: value for path, value in now.items() if path not in TOLD_APART and before.get(path) != value}


def flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns nested settings as `a.b` -> value."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {f"{path}{name}": value}
    return found
