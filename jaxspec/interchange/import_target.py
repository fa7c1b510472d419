"""Import of HuggingFace targets of any size as exported ones of jaxspec: downloaded, checked, written in pieces."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import NamedTuple

from jaxspec.checkpoints.manifest import file_sha256
from jaxspec.checkpoints.models import load_model
from jaxspec.console import progress, results
from jaxspec.data.tokenizer_training import TOKENIZER_FILES
from jaxspec.interchange.export import GENERATION, Exportable, check_room, files_of, save_target
from jaxspec.interchange.exported import is_exported
from jaxspec.interchange.hf import fingerprint, stored_weights, table_fingerprint, tree_of
from jaxspec.interchange.target_folders import target_folder, tokenizer_manifest
from jaxspec.interchange.tensors import INDEX
from jaxspec.interchange.weight_files import BIN_INDEX, has_weights, shards

FETCHED = ("config.json", GENERATION, *TOKENIZER_FILES, "model.safetensors", INDEX, "model-*.safetensors")
"""Files of a repository that are downloaded; the same weights in other formats are not."""
FETCHED_BIN = ("pytorch_model.bin", BIN_INDEX, "pytorch_model-*.bin")
"""Files that are downloaded where a repository has no safetensors."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Imported(NamedTuple):
    """The result of `import_target`."""

    model: Exportable
    bytes: int
    """Bytes of the weights."""
    kept_bytes: int
    """Bytes of these that an interrupted import had written."""
    checked_files: int
    """Number of files of weights whose SHA-256 was given, and is right."""


def find_source(name: str, revision: str | None = None) -> Path:
    """Returns the HuggingFace folder of `name`: one of `target_folder`, or a repository, downloaded to the hub's cache.

    A download that was stopped continues. Raises ValueError if the name is none of these, and OSError, in one sentence,
    if a repository cannot be downloaded.
    """
    folder = target_folder(name)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{name}: is a folder, which has no revisions; leave --revision out")
        return folder
    if not _REPOSITORY.fullmatch(name):
        raise ValueError(f"{name}: there is no such folder, and it is not the name of a repository (OWNER/NAME)")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"{name}: there is no such folder, and downloading a repository needs huggingface_hub: pip install "
            "huggingface_hub, or give the folder of a copy"
        ) from error
    try:
        found = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(FETCHED)))
        if not has_weights(found):
            more = [*FETCHED, *FETCHED_BIN]
            found = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=more))
        return found
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{name}: could not be downloaded ({reason}); the same command continues where it stopped"
        ) from error


def import_target(folder: Path, out: Path, *, name: str) -> Imported:
    """Writes the target in a HuggingFace folder, called `name`, as `save_model` would, a piece of a weight at a time.

    Weights keep their stored dtype, and layers are stacked. A call that is interrupted leaves `out` as it was, and the
    next one continues where it stopped. Raises ValueError or OSError, in one sentence, if the source is incomplete,
    damaged or not supported, or does not fit on the disk.
    """
    if is_exported(folder):
        raise ValueError(f"{name}: is a model of jaxspec's already; copy its folder")
    config, weights = stored_weights(folder)
    check_room(out, weights)
    given, mark = check_digests(folder), fingerprint(folder)
    files = files_of(folder)
    about = {
        "family": getattr(config, "family", "llama"),
        "tokenizer": tokenizer_manifest(folder),
        "provenance": {"from": name, "revision": _revision(folder), "files": given, "git_sha": results.git_sha()},
        "fingerprint": mark,
        "table_fingerprint": table_fingerprint(folder),
    }
    values, source = dataclasses.asdict(config), _identity(folder, mark)
    kept = save_target(out, weights, values, about=about, files=files, label=f"import {name}", source=source)
    model = Exportable("target", tree_of(weights), values, about, files, "hf", lambda: load_model(out)[0])
    return Imported(model, sum(w.nbytes for w in weights), kept, len(given))


def check_digests(folder: Path) -> dict[str, str]:
    """Checks every file of weights whose SHA-256 is given, and returns these; raises ValueError if a file differs.

    It is given by the hub's cache, which names files by it, by the hub's notes on a local download, by `FILE.sha256`
    or by `SHA256SUMS`.
    """
    given = {path: digest for path in shards(folder) if (digest := given_digest(path))}
    if not given:
        return {}
    with progress.progress("checking SHA-256", sum(path.stat().st_size for path in given), "bytes") as bar:
        for path, digest in given.items():
            if file_sha256(path) != digest:
                raise ValueError(f"{path}: its SHA-256 is not the one it was published with: download it again")
            bar.advance(path.stat().st_size)
    return {path.name: digest for path, digest in given.items()}


def given_digest(path: Path) -> str | None:
    """Returns the SHA-256 that the files beside a file give for it; None if none does."""
    blob = path.resolve().name if path.is_symlink() else ""
    if _SHA256.fullmatch(blob):
        return blob
    notes = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if notes.is_file():
        etag = [*notes.read_text(encoding="utf-8").split(), "", ""][1]
        if _SHA256.fullmatch(etag):
            return etag
    for sums in (path.with_name(f"{path.name}.sha256"), path.with_name("SHA256SUMS")):
        for line in sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else ():
            digest, _, of = line.strip().partition(" ")
            if _SHA256.fullmatch(digest) and of.strip().lstrip("*").removeprefix("./") in ("", path.name):
                return digest
    return None


def _identity(folder: Path, mark: str) -> str:
    """Returns the `source` of `save_target`: pieces of an interrupted import are kept if it is the same."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards(folder)]
    return json.dumps([mark, files])


def _revision(folder: Path) -> str | None:
    """Returns the commit of a folder in the hub's cache; None for other folders."""
    return folder.name if folder.absolute().parent.name == "snapshots" else None
