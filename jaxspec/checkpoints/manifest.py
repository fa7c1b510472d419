"""The manifest of a checkpoint: a JSON file with the kind and format of the folder and the checksum of every file.

It is written last, so a folder without one is incomplete. Orbax loads damaged data without an error; the checksums show
the damage. A manifest of an older format is converted when it is read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxspec.base import Params
from jaxspec.console.disk import writing
from jaxspec.nn import weights
from jaxspec.parallel.mesh import axes_of

FORMAT = "jaxspec/2"
MANIFEST = "jaxspec.json"
RUN = "run.json"
"""The record of a run, in its folder."""
_ORBAX, _CHECKSUMS_1 = "_CHECKPOINT_METADATA", "jaxspec.sha256.json"

GENERAL = {
    "axes": "arrays/*/axes names each axis to shard by (vocab, width, kv_heads, mlp, experts); null is an axis "
    "that stays whole",
    "layers": "arrays below layers have one more axis in front, over the layers, unless each layer has its own number",
    "weights": "a weight reads its first axis, y = x @ w; embed and head are [vocab, width], logits = x @ head.T",
}
"""How all arrays are to be read, for those who do so without this library; `conventions` adds what weights declare."""

Manifest = dict[str, Any]
"""`format`, `kind`, `checksums` by file, `sha256` of the manifest itself, and fields of the kind."""


COMMITTED = "commit_success.txt"
"""Orbax's mark of a whole checkpoint. It names the folder where that was written, which no reader is to know."""


def is_checkpoint(folder: Path) -> bool:
    """Returns whether a folder holds files of a checkpoint, whole or not."""
    return any((folder / name).exists() for name in (MANIFEST, _ORBAX, _CHECKSUMS_1))


def write_manifest(folder: Path, manifest: Mapping[str, Any], *, known: Mapping[str, str] | None = None) -> None:
    """Completes `folder` with its manifest, which holds the checksums of all its files.

    The manifest is on disk when this returns. Files whose checksums are `known` are not read.
    """
    known = known or {}
    files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
    for name in files:
        if Path(name).name == COMMITTED:
            (folder / name).write_text("Checkpoint commit was successful\n", encoding="utf-8")
    found = {**known, **checksums(folder, [name for name in files if name not in known])}
    _write(folder, {"format": FORMAT, **manifest, "checksums": {name: found[name] for name in files}})


def amend_manifest(folder: Path, changes: Mapping[str, Any]) -> None:
    """Changes fields of the manifest of a complete checkpoint; the other files stay as they are."""
    _write(folder, read_manifest(folder) | dict(changes))


def _write(folder: Path, manifest: Manifest) -> None:
    written = json.loads(json.dumps(manifest, allow_nan=False))  # as it will be read
    written["sha256"] = _digest(written)
    draft = folder / f"{MANIFEST}.draft"
    with writing(folder / MANIFEST), draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps(written, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / MANIFEST)
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """Returns the manifest of a complete checkpoint, in the present format.

    Raises ValueError if the folder or its manifest is missing, or the manifest is damaged or of an unknown format.
    """
    manifest = _stored(folder)
    while manifest.get("format") != FORMAT:
        if manifest.get("format") not in MIGRATIONS:
            raise ValueError(
                f"{folder}: a checkpoint of format {manifest.get('format')!r}, and this version reads "
                f"{', '.join([*MIGRATIONS, FORMAT])}; a newer jaxspec made it, or something else"
            )
        manifest = MIGRATIONS[manifest["format"]](manifest)
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Raises ValueError naming the first file that changed or vanished since the manifest was written."""
    _compare(
        folder, manifest, checksums, "; the checkpoint is incomplete", " since it was saved; the checkpoint is damaged"
    )


def verify_layout(folder: Path, *, without: Collection[Path] = ()) -> None:
    """Holds a folder in another program's layout to the manifest that jaxspec wrote beside its files.

    A folder without a manifest is another project's, and passes. Files that were there before are hashed once a
    process, and those of `without`, which the caller does not read, never. Raises ValueError naming the first file that
    changed or vanished.
    """
    if (folder / MANIFEST).is_file():
        meant = f" since jaxspec wrote it: write it again, or remove {MANIFEST} if you meant it"
        manifest = read_manifest(folder)
        read = {name: digest for name, digest in manifest["checksums"].items() if folder / name not in without}
        _compare(folder, {**manifest, "checksums": read}, _known_checksums, meant, meant)


def _compare(
    folder: Path, manifest: Manifest, hashed: Callable[[Path, list[str]], dict[str, str]], gone: str, changed: str
) -> None:
    """Raises ValueError naming the first file that vanished or changed; the ends of the sentences are given."""
    for name in manifest["checksums"]:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing{gone}")
    found = hashed(folder, list(manifest["checksums"]))
    for name, expected in manifest["checksums"].items():
        if found[name] != expected:
            raise ValueError(f"{folder / name}: its contents changed{changed}")


def _known_checksums(folder: Path, files: list[str]) -> dict[str, str]:
    """Returns the SHA-256 of each file; one that has the size and time it was hashed with is not read again."""
    stats = [(folder / name).stat() for name in files]
    keys = [(folder / name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(files, stats, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(files, pool.map(lambda key: _sha256_at(*key), keys), strict=True))


@functools.lru_cache(maxsize=4096)
def _sha256_at(path: Path, size: int, time_ns: int) -> str:
    return file_sha256(path)


def checksums(folder: Path, files: list[str]) -> dict[str, str]:
    """Returns the SHA-256 of each file; several files are read at once."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(files, pool.map(file_sha256, [folder / name for name in files]), strict=True))


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hex."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def conventions() -> dict[str, str]:
    """Returns how the arrays of a checkpoint are to be read: key -> sentence, for all weights that are declared."""
    return {**GENERAL, **weights.conventions()}


def describe(params: Params) -> dict[str, dict[str, Any]]:
    """Returns shape, dtype and logical axes (as declared; None for one that is never split) of every array."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = axes_of(name.rpartition("/")[2], leaf.ndim)
        found[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "axes": list(axes)}
    return found


def models_below(folder: Path, *, depth: int = 2) -> list[Path]:
    """Returns the nearest folders below one that hold a run, a model of jaxspec or a HuggingFace folder, sorted.

    The steps of a run are not listed.
    """
    found = []
    for path in sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")):
        if any((path / name).is_file() for name in (RUN, MANIFEST, "config.json")):
            found += [] if path.name.isdecimal() else [path]
        elif depth > 1:
            found += models_below(path, depth=depth - 1)
    return found


def whereabouts(folder: Path) -> str:
    """Returns the end of a sentence about a folder without a model: where models are instead; empty if not known."""
    near = [str(path) for path in models_below(folder)]
    names = ", ".join(near[:4]) + (" ..." if len(near) > 4 else "")
    return f"; found below it: {names}" if near else ""


def refuse_run(folder: Path) -> None:
    """Raises ValueError, saying where its model is, if a folder is that of a run, or of a step in it."""
    run = folder if (folder / RUN).is_file() else folder.parent
    if not (run / RUN).is_file() or (run != folder and not folder.name.isdecimal()):
        return
    exported = _read_object(run / RUN).get("config", {}).get("export_folder")
    if exported and (Path(exported) / MANIFEST).is_file():
        where = f"its finished model is in {exported}"
    elif any(path.name.isdecimal() and (path / MANIFEST).is_file() for path in run.iterdir()):
        where = f"`jaxspec export {run} OUT` writes its best checkpoint as one"
    else:
        where = "it has no checkpoint yet, and the command that began it goes on"
    raise ValueError(f"{run}: the folder of a run, not a model: {where}")


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _stored(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not (folder / MANIFEST).is_file():
        return _stored_1(folder)
    manifest = _read_object(folder / MANIFEST)
    if manifest.pop("sha256", None) != _digest(manifest):
        raise ValueError(f"{folder / MANIFEST}: its contents changed since it was saved; the checkpoint is damaged")
    return manifest


def _stored_1(folder: Path) -> Manifest:
    """Returns the manifest of a folder of format 1.

    That format kept its fields in Orbax's metadata and the checksums, which were written last, in a second file.
    """
    half = f"{folder}: not a checkpoint of jaxspec, or half of one"
    if not (folder / _ORBAX).is_file():
        raise ValueError(f"{half} ({MANIFEST} is missing){whereabouts(folder)}")
    manifest = _read_object(folder / _ORBAX).get("custom_metadata") or {}
    if manifest.get("format") != "jaxspec/1":
        raise ValueError(f"{half} (Orbax wrote it, and {MANIFEST} is missing)")
    if not (folder / _CHECKSUMS_1).is_file():
        raise ValueError(f"{half} ({_CHECKSUMS_1} is missing)")
    return {**manifest, "checksums": _read_object(folder / _CHECKSUMS_1)}


def _from_1(manifest: Manifest) -> Manifest:
    """Returns a manifest of format 1 in format 2, which adds `metrics` and `provenance`."""
    return {**manifest, "format": "jaxspec/2", "metrics": manifest.get("metrics", {}), "provenance": {}}


MIGRATIONS: dict[str, Callable[[Manifest], Manifest]] = {"jaxspec/1": _from_1}
"""Format -> converts a manifest of it to the next format."""


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the checkpoint is damaged") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object; the checkpoint is damaged")
    return found
