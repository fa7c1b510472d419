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
"""Number of saves in a row that fail in the background before the run is stopped."""


def refuse_to_replace(path: str | Path) -> None:
    """Raises ValueError if `path` holds anything but a model that jaxspec wrote."""
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


def refuse_to_overwrite(path: Path, overwrite: bool) -> None:
    """Raises ValueError as `refuse_to_replace`, and if `path` holds a model that is not to be overwritten."""
    refuse_to_replace(path)
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path}: is there already; give another folder, or --overwrite to replace it")


@contextlib.contextmanager
def whole_folder(path: str | Path, *, resumable: bool = False) -> Iterator[Path]:
    """Yields a draft folder, which replaces `path` when the block ends, and is removed if the block fails.

    A `resumable` draft is kept if the block fails, and yielded again the next time. The block writes the manifest last.
    Raises ValueError if `path` holds something that jaxspec did not export, and OSError, in one sentence, if the folder
    cannot be written.
    """
    path = behind_link(path)
    refuse_to_replace(path)
    draft = path.with_name(f".{path.name}.{'partial' if resumable else 'tmp'}")
    try:
        if not resumable:
            remove_draft(draft)
        draft.mkdir(parents=True, exist_ok=resumable)
        yield draft
        replace_folder(draft, path)
    except OSError as error:
        raise OSError(f"{path}: could not be written ({reason_of(error)})") from error
    finally:
        if not resumable:
            remove_draft(draft)


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Returns `ShapeDtypeStruct`s of `tree` (arrays or structs) with the tree `shardings`, as `restore` takes them."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def load_arrays(path: Path, name: str, part: str | None, sharding: jax.sharding.Sharding | None) -> Any:
    """Loads the tree that Orbax stored as `name`, or one `part` of it. Raises ValueError if something is missing."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    context = ocp.Context()
    context.pytree.loading.partial_load = part is not None
    shapes = stored_shapes(path, name, part)
    abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), shapes)
    abstract = abstract if part is None else {part: abstract}
    try:
        with context:
            found: Any = ocp.load(str(path), abstract, checkpointable_name=name)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"{path}: the checkpoint is incomplete ({error})") from error
    return found if part is None else found[part]


def stored_shapes(path: Path, name: str, part: str | None = None) -> Any:
    """Returns shapes and dtypes of the tree that Orbax stored as `name`, or of one `part` of it; raises ValueError."""
    try:
        stored: Any = ocp.metadata(str(path), checkpointable_name=name).metadata
        wanted = stored if part is None else stored[part]
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"{path}: the checkpoint is incomplete ({error})") from error
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), wanted)


def behind_link(path: str | Path) -> Path:
    """Returns the absolute path of a folder that is written; of a symlink, the folder that it leads to."""
    path = Path(path).absolute()
    return path.resolve() if path.is_symlink() else path


def replace_folder(draft: Path, path: Path) -> None:
    """Puts the finished `draft` in the place of `path`."""
    before = path.with_name(f".{path.name}.old")
    shutil.rmtree(before, ignore_errors=True)
    if path.exists():
        path.rename(before)
    draft.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(before, ignore_errors=True)


def remove_draft(draft: Path) -> None:
    """Removes a draft and Orbax's unfinished files of it."""
    for path in draft.parent.glob(f"{glob.escape(draft.name)}*"):
        shutil.rmtree(path)


def format_mark(kind: str) -> Any:
    """Returns the custom metadata of Orbax's that marks a folder as jaxspec's."""
    return {"format": FORMAT, "kind": kind}


def is_first() -> bool:
    """Returns whether this is process 0."""
    return jax.process_index() == 0


def reason_of(error: Exception) -> str:
    """Returns the operating system's reason for a failure, or else the exception's message."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    return (isinstance(error, OSError) and error.strerror) or str(error)


def keep_log_record(record: logging.LogRecord) -> bool:
    """Returns False for tracebacks that Orbax logs from its threads: waiting for the save raises their errors."""
    return "_SignalingThread.run() raised" not in record.getMessage()
