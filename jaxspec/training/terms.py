"""The terms of a comparison: what all recipes share, and how the config of each is brought to them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxspec.config import DistillConfig, PretrainConfig, load
from jaxspec.data.draft_vocab import load_maps
from jaxspec.interchange.hf_config import read_config
from jaxspec.interchange.target_folders import target_folder
from jaxspec.targets.decoder import LlamaConfig
from jaxspec.training.recipes import usable_features
from jaxspec.training.resolve import takes_vocab

SHARED = {
    "target": "--target",
    "data.train": "--train",
    "data.eval": "--eval",
    "data.limit": "--tokens",
    "data.eval_limit": "--limit",
    "data.features": "--features",
    "data.template": "--template",
    "optimizer.steps": "--tokens",
    "optimizer.epochs": "--tokens",
    "checkpoint.folder": "--out",
    "export_folder": "--out",
    "seed": "--seeds",
}
"""Fields that are the same in all recipes, or follow from the comparison -> the flag that says them."""
FOLDERS = ("name", "checkpoint.folder", "export_folder")
"""Fields that say where a pretrained model is."""


class NamedRecipe(NamedTuple):
    """A recipe as a comparison names it."""

    name: str
    file: DistillConfig | PretrainConfig
    """As its file has it."""
    given: DistillConfig | PretrainConfig
    """With the changes."""
    changes: tuple[str, ...]
    """The `key=value` that were made to it."""
    config: DistillConfig | PretrainConfig
    """With what the terms say of it, once it is settled."""

    @property
    def changed(self) -> set[str]:
        """The fields that were changed."""
        return {change.partition("=")[0] for change in self.changes}


@dataclasses.dataclass(frozen=True)
class Terms:
    """The settings that a comparison gives to all its recipes."""

    target: str
    train: str
    eval: str
    features: str | None = None
    template: str | None = None
    draft_vocab: str | None = None
    """File of the tokens that every drafter scores that can; None: that of each recipe."""
    draft_lm: str | None = None
    """Folder of the pretrained draft LM; None: that of each recipe."""


def load_recipe(name: str, given: str, shared: Sequence[str], own: Sequence[str]) -> NamedRecipe:
    """Returns a recipe with the changes of all recipes and then its own; a pretrained one takes its own alone.

    Raises ValueError where it is neither, or a change does not fit.
    """
    config = load(given)
    changes = (*shared, *own) if isinstance(config, DistillConfig) else tuple(own)
    if not isinstance(config, DistillConfig | PretrainConfig):
        raise ValueError(f"{name}: holds a {type(config).__name__}, not a DistillConfig or PretrainConfig")
    changed = load(given, changes) if changes else config
    return NamedRecipe(name, config, changed, changes, changed)


def settle(terms: Terms, recipe: NamedRecipe) -> NamedRecipe:
    """Returns a recipe with the terms' draft LM and draft vocabulary, where it takes one.

    A change of the recipe goes before the terms, and a drafter whose own LM head scores other tokens keeps them.
    """
    config = recipe.config
    if isinstance(config, PretrainConfig):
        if terms.draft_lm is None or recipe.changed.intersection(FOLDERS):
            return recipe
        return recipe._replace(config=dataclasses.replace(config, export_folder=terms.draft_lm))
    config = dataclasses.replace(config, target=terms.target)
    if terms.draft_lm is not None and takes_draft_lm(recipe) and "init_from" not in recipe.changed:
        config = dataclasses.replace(config, init_from=terms.draft_lm)
    if terms.draft_vocab is not None and "draft_vocab" not in recipe.changed:
        shape = read_config(target_folder(terms.target))
        scored = len(load_maps(terms.draft_vocab, shape.vocab))
        if _may_score(config, shape, scored):
            config = dataclasses.replace(config, draft_vocab=terms.draft_vocab)
    return recipe._replace(config=config)


def takes_draft_lm(recipe: NamedRecipe) -> bool:
    """Returns whether a recipe is of a pretrained model, or trains one further."""
    config = recipe.config
    if isinstance(config, PretrainConfig):
        return True
    return config.drafter == "draft_lm" and config.init_from is not None


def _may_score(config: DistillConfig, shape: LlamaConfig, scored: int) -> bool:
    """Returns whether the drafter takes the vocabulary; True too where it cannot be made."""
    try:
        return takes_vocab(config, shape, scored)
    except (ValueError, OSError):  # its training says what is wrong, and fails alone
        return True


def without_vocab(terms: Terms, recipes: Sequence[NamedRecipe]) -> list[str]:
    """Returns the names of settled recipes that cannot take the terms' draft vocabulary."""
    trained = [r for r in recipes if isinstance(r.config, DistillConfig) and "draft_vocab" not in r.changed]
    return [r.name for r in trained if terms.draft_vocab not in (None, getattr(r.config, "draft_vocab", None))]


def config_on(terms: Terms, recipe: NamedRecipe, folder: Path, seed: int) -> DistillConfig | PretrainConfig:
    """Returns the config of a settled recipe as it is run: the terms' files, the seed and the folders; else its own.

    Raises ValueError for a change of what all recipes share.
    """
    config = recipe.config
    if isinstance(config, PretrainConfig):
        return config
    found = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            train=terms.train,
            eval=terms.eval,
            limit=None,
            eval_limit=None,
            features=usable_features(config, terms.target, terms.features),
            template=terms.template or config.data.template,
        ),
        optimizer=dataclasses.replace(config.optimizer, steps=1, epochs=None),
        checkpoint=dataclasses.replace(config.checkpoint, folder=str(folder / "run")),
        export_folder=str(folder / "drafter"),
        seed=seed,
    )
    for path in sorted(SHARED.keys() & recipe.changed):
        read = operator.attrgetter(path)
        if read(found) != read(recipe.given):
            raise ValueError(f"--set {path} of {recipe.name}: all recipes share it; say it by {SHARED[path]}")
    return found
