"""Exported models as Orbax checkpoints, which load without knowing their shape."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from jaxspec import __version__
from jaxspec.base import Params
from jaxspec.checkpoints.folders import (
    behind_link,
    format_mark,
    is_first,
    load_arrays,
    reason_of,
    refuse_to_replace,
    remove_draft,
    replace_folder,
    stored_shapes,
)
from jaxspec.checkpoints.manifest import conventions, describe, read_manifest, refuse_run, verify, write_manifest
from jaxspec.drafters import DRAFTERS
from jaxspec.nn.rope import RopeScaling


def save_model(
    path: str | Path,
    params: Params,
    config: dict[str, Any],
    *,
    kind: str,
    about: Mapping[str, Any] | None = None,
    files: Sequence[Path] = (),
) -> None:
    """Writes `params` (a nested dict of arrays) and `config` (JSON) as one folder; replaces an earlier model there.

    `kind` is such as "drafter"; `load_model` checks it. `about` (JSON) is merged into the manifest, and `files` are
    copied into the folder. The folder appears whole or not at all. Raises ValueError if `path` holds something else,
    and OSError, in one sentence, if it cannot be written.
    """
    path = behind_link(path)
    draft = path.with_name(f".{path.name}.tmp")
    manifest = model_manifest(params, config, kind=kind, about=about)
    if is_first():
        refuse_to_replace(path)
        remove_draft(draft)
    context = ocp.Context()
    # Otherwise each process checks by itself whether the folder exists, and one that checks late finds the others'.
    context.file.skip_sync_file_validations = True
    context.array.saving.scoped_storage_options_creator = lambda key, value: _stored_by_layer(key)
    try:
        with context:
            ocp.save_checkpointables(str(draft), {"params": params}, custom_metadata=format_mark(kind))
        if is_first():
            for file in files:
                shutil.copyfile(file, draft / file.name)
            write_manifest(draft, manifest)
            replace_folder(draft, path)
    except (OSError, ValueError, RuntimeError) as error:
        raise OSError(f"{path}: could not be written ({reason_of(error)})") from error
    finally:
        if is_first():
            remove_draft(draft)


def _stored_by_layer(path: Any) -> Any:
    """Returns how Orbax stores an array: stacked layers one by one, so that a reader of one layer reads no other."""
    names = [getattr(key, "key", None) for key in path]
    stacked = len(names) > 1 and names[0] == "layers" and isinstance(names[1], str)
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,)) if stacked else None


def model_manifest(
    params: Params, config: Mapping[str, Any], *, kind: str, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the manifest of a model whose `params` are arrays or their shapes; see `save_model`."""
    manifest = {"kind": kind, "config": config, "metrics": {}, "provenance": {}, **(about or {})}
    manifest["provenance"] = {"jaxspec": __version__, **manifest["provenance"]}
    return manifest | {"conventions": conventions(), "arrays": describe(params)}


def load_model(
    path: str | Path, *, kind: str | None = None, sharding: jax.sharding.Sharding | None = None
) -> tuple[Params, dict[str, Any]]:
    """Returns `(params, config)` of a folder that `save_model` wrote, all arrays on `sharding` (default: one device).

    Raises ValueError if the folder is missing, incomplete, damaged, written by something else, or not of `kind`.
    """
    path = Path(path).absolute()
    refuse_run(path)
    manifest = read_manifest(path)
    if kind is not None and manifest["kind"] != kind:
        raise ValueError(f"{path}: holds a {manifest['kind']}, not a {kind}")
    verify(path, manifest)
    return load_arrays(path, "params", None, sharding), manifest["config"]


def model_shapes(path: str | Path) -> Params:
    """Returns shapes and dtypes of the weights that `load_model` reads; ValueError if the folder is incomplete."""
    return stored_shapes(Path(path).absolute(), "params")


def model_kind(path: str | Path) -> str:
    """Returns the kind of the model at `path`; raises ValueError if `save_model` wrote none there."""
    return str(read_manifest(Path(path).absolute())["kind"])


class LoadedDrafter(NamedTuple):
    """A drafter read from a folder."""

    name: str
    """In the `DRAFTERS` table."""
    module: Any
    params: Params
    about: dict[str, Any]
    """Notes of the time it was saved, such as the `tree` it is fastest with."""
    draft_vocab: tuple[int, ...] | None
    """Ids of the tokens it scores, ascending; None for all."""


def save_drafter(
    path: str | Path,
    name: str,
    module: Any,
    params: Params,
    about: dict[str, Any] | None = None,
    *,
    draft_vocab: Sequence[int] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights of `module`, the drafter `name` of the `DRAFTERS` table, for `load_drafter`.

    `about` (JSON) travels with it; its `tree`, a tree spec, is what decoding uses unless told otherwise. So do the ids
    of the tokens it scores, if not all. `manifest` is `save_model`'s `about`.
    """
    manifest = {"family": name, **(manifest or {})}
    save_model(path, params, drafter_config(name, module, about, draft_vocab), kind="drafter", about=manifest)


def drafter_config(
    name: str, module: Any, about: dict[str, Any] | None = None, draft_vocab: Sequence[int] | None = None
) -> dict[str, Any]:
    """Returns the config in the manifest of a drafter's folder: all that `load_drafter` needs besides the weights."""
    config = {"drafter": name, "shape": dataclasses.asdict(module.config), "about": about or {}}
    if draft_vocab is not None:
        config["draft_vocab"] = [int(i) for i in draft_vocab]
    return config


def drafter_shape(name: str, values: Mapping[str, Any]) -> Any:
    """The configuration of drafter `name` from the JSON that a manifest holds; TypeError where it has other fields."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if fields.get("rope_scaling"):
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return DRAFTERS[name].config(**fields)


def load_drafter(path: str | Path, *, dtype: Any = jax.numpy.float32) -> LoadedDrafter:
    """The drafter in a folder that `save_drafter` wrote, weights and activations in `dtype`.

    Raises ValueError as `load_model`, and where this version has no such drafter, or none of such a shape.
    """
    params, config = load_model(path, kind="drafter")
    name = config.get("drafter")
    if name not in DRAFTERS:
        raise ValueError(f"{path}: drafter {name!r} is not one of {', '.join(DRAFTERS)}")
    try:
        module = DRAFTERS[name].module(drafter_shape(name, config["shape"]), dtype=dtype)
    except TypeError as error:
        raise ValueError(f"{path}: the shape of drafter {name!r} is not this version's ({error})") from error
    expected = jax.eval_shape(module.init_params, jax.random.key(0))
    if jax.tree.map(jax.numpy.shape, params) != jax.tree.map(lambda a: a.shape, expected):
        raise ValueError(f"{path}: the weights do not have the shapes that the drafter's config says")
    scored = config.get("draft_vocab")
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    return LoadedDrafter(name, module, params, config["about"], None if scored is None else tuple(scored))
