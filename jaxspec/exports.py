"""Models as products: found in a run, a drafter's folder or a target's, and written in formats that others read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Params
from jaxspec.card import CARD, read_card
from jaxspec.checkpoint import Merit, complete_steps, load_model, load_run_params, save_model
from jaxspec.interchange.hf import load_target, stored_dtype
from jaxspec.loading import target_folder, tokenizer_card
from jaxspec.report import git_sha
from jaxspec.tracking import RECORD, provenance, read_record

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Exportable(NamedTuple):
    """A model, wherever it was found."""

    kind: Literal["target", "drafter"]
    params: Params
    config: Mapping[str, Any]
    """Its shape, as its card says it."""
    card: Mapping[str, Any]
    """What else its card says: `tokenizer`, `metrics`, `provenance`."""
    files: Sequence[Path] = ()
    """Those of its tokenizer, if it is a target."""

    @property
    def family(self) -> str:
        """The drafter's name in the `DRAFTERS` table; `llama` for a target."""
        return self.config["drafter"] if self.kind == "drafter" else "llama"


class Format(NamedTuple):
    """A way to write a model."""

    write: Callable[[Path, Exportable], None]
    kinds: tuple[str, ...]
    """Of models that it can hold."""


def find_model(name: str, *, step: str = "best", dtype: Any = None) -> Exportable:
    """The model that `name` stands for, weights in `dtype` (None: as they are stored).

    `name` is a run's folder, of which `step` says which ("best", "last" or a number), a folder that `save_model` wrote,
    a HuggingFace folder of a target, or "tiny" for the bundled one. Raises ValueError where it is none of these.
    """
    folder = target_folder(name)
    if (folder / RECORD).is_file():
        found = _of_run(folder, step)
    elif (folder / "config.json").is_file():
        return _of_target(folder, name, dtype)
    elif (folder / CARD).is_file() or (folder / "_CHECKPOINT_METADATA").is_file():
        found = _of_model(folder)
    else:
        raise ValueError(
            f"{name}: neither a run ({RECORD}), nor a drafter of jaxspec ({CARD}), nor a target in HuggingFace layout "
            "(config.json)"
        )
    if dtype is None:
        return found
    return found._replace(params=jax.tree.map(lambda a: a.astype(dtype), found.params))


def write_orbax(out: Path, model: Exportable) -> None:
    """An Orbax checkpoint of `params` with its card beside it; see `checkpoint.save_model`."""
    about = {"family": model.family, **model.card}
    save_model(out, model.params, dict(model.config), kind=model.kind, about=about, files=model.files)


FORMATS: dict[str, Format] = {"orbax": Format(write_orbax, ("target", "drafter"))}
"""Name -> what `jaxspec export --to` writes."""


def formats_for(kind: str) -> list[str]:
    """Names of the formats that can hold a model of a kind."""
    return [name for name, format in FORMATS.items() if kind in format.kinds]


def _of_run(folder: Path, step: str) -> Exportable:
    record = read_record(folder) or {}
    model, chosen = record["model"], choose_step(folder, Merit(**record["merit"]), step)
    params, card = load_run_params(folder.absolute(), chosen)
    exported = Path(record["config"]["export_folder"]) if model["kind"] == "target" else None
    about = {
        "tokenizer": model["tokenizer"],
        "metrics": card["metrics"],
        "provenance": provenance(record, chosen),
    }
    return Exportable(model["kind"], params, model["config"], about, _tokenizer_files(exported))


def choose_step(folder: Path, merit: Merit, step: str) -> int:
    """The number of the step that is called "best" (the last where none was evaluated), "last" or a number.

    Raises ValueError if it is not a complete step of the run in `folder`.
    """
    steps = complete_steps(folder.absolute())
    if not steps:
        raise ValueError(f"{folder}: holds no complete checkpoint")
    if step not in ("best", "last"):
        if not step.isdecimal() or int(step) not in steps:
            kept = ", ".join(map(str, sorted(steps)))
            raise ValueError(f"{folder}: has no step {step!r}; give best, last or one of {kept}")
        return int(step)
    ranked = sorted((value, at) for at, metrics in steps.items() if (value := merit.of(metrics)) is not None)
    return ranked[-1][1] if step == "best" and ranked else max(steps)


def _of_target(folder: Path, name: str, dtype: Any) -> Exportable:
    loaded = load_target(folder, dtype=jnp.dtype(dtype or stored_dtype(folder)), stacked=True)
    about = {"tokenizer": tokenizer_card(folder), "provenance": {"from": name, "git_sha": git_sha()}}
    return Exportable("target", loaded.params, dataclasses.asdict(loaded.config), about, _tokenizer_files(folder))


def _of_model(folder: Path) -> Exportable:
    card = read_card(folder)
    if card["kind"] not in ("target", "drafter"):
        raise ValueError(f"{folder}: holds a {card['kind']}; name the folder of the run that it belongs to")
    params, config = load_model(folder)
    about = {key: card[key] for key in ("tokenizer", "metrics", "provenance") if key in card}
    return Exportable(card["kind"], params, config, about, _tokenizer_files(folder))


def _tokenizer_files(folder: Path | None) -> list[Path]:
    return [] if folder is None else [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
