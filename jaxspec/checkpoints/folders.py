"""Orbax folders: whole or absent, checked when read, written by the first process."""

import contextlib
import glob
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxspec.checkpoints.manifest import (
    FORMAT,
    read_manifest,
    sync_folder,
)

PATIENCE = 3
"""Saves in a row that may fail in the background before the run is stopped."""


def refuse_to_replace(path: str | Path) -> None:
    """ValueError if `path` holds anything but a model that `save_model` wrote."""
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        known = read_manifest(path)["kind"] != "run"
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"{path}: holds something that jaxspec did not export, so it is left alone; name another folder"
        )


@contextlib.contextmanager
def whole_folder(path: str | Path, *, resumable: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes the place of `path` when the block ends, and vanishes if it fails.

    A `resumable` one stays, under its other name, and is there again the next time. What is in `path` must be something
    that jaxspec exported; its manifest is to be written last. Raises ValueError where it is not, and OSError, in one
    sentence, where it cannot be written.
    """
    path = Path(path).absolute()
    refuse_to_replace(path)
    draft = path.with_name(f".{path.name}.{'partial' if resumable else 'tmp'}")
    try:
        if not resumable:
            _remove(draft)
        draft.mkdir(parents=True, exist_ok=resumable)
        yield draft
        _replace(draft, path)
    except OSError as error:
        raise OSError(f"{path}: could not be written ({_reason(error)})") from error
    finally:
        if not resumable:
            _remove(draft)


def abstract_like(tree: Any, shardings: Any) -> Any:
    """`ShapeDtypeStruct`s of `tree` (arrays or structs) with the tree `shardings`: what `restore` takes."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def _load_arrays(path: Path, name: str, part: str | None, sharding: jax.sharding.Sharding | None) -> Any:
    """What Orbax stored as `name`, or a part of it alone; ValueError where something is missing."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    context = ocp.Context()
    context.pytree.loading.partial_load = part is not None
    shapes = _stored_shapes(path, name, part)
    abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), shapes)
    abstract = abstract if part is None else {part: abstract}
    try:
        with context:
            found: Any = ocp.load(str(path), abstract, checkpointable_name=name)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"{path}: the checkpoint is incomplete ({error})") from error
    return found if part is None else found[part]


def _stored_shapes(path: Path, name: str, part: str | None = None) -> Any:
    """Shapes and dtypes of what Orbax stored as `name`, or of a part of it; ValueError where something is missing."""
    try:
        stored: Any = ocp.metadata(str(path), checkpointable_name=name).metadata
        wanted = stored if part is None else stored[part]
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"{path}: the checkpoint is incomplete ({error})") from error
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), wanted)


def _replace(draft: Path, path: Path) -> None:
    """Put `draft` in the place of `path`, which vanishes only when the other is whole."""
    before = path.with_name(f".{path.name}.old")
    shutil.rmtree(before, ignore_errors=True)
    if path.exists():
        path.rename(before)
    draft.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(before, ignore_errors=True)


def _remove(draft: Path) -> None:
    """Remove a draft, and what Orbax had not finished of it."""
    for path in draft.parent.glob(f"{glob.escape(draft.name)}*"):
        shutil.rmtree(path)


def _mark(kind: str) -> Any:
    return {"format": FORMAT, "kind": kind}


def _is_first() -> bool:
    return jax.process_index() == 0


def _reason(error: Exception) -> str:
    """What the system says is wrong, else what the exception says."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _told_otherwise(record: logging.LogRecord) -> bool:
    """Leaves out the tracebacks that Orbax logs from its threads: their errors are raised where the save is awaited."""
    return "_SignalingThread.run() raised" not in record.getMessage()
