"""An Orbax checkpoint of a tree of arrays larger than memory: written in pieces, and resumed where it stopped.

Orbax's layout without OCDBT is a folder an array, a file a chunk (Zarr 2). A chunk that is not compressed is its
numbers in row-major order, so it is written as they are made, by several threads, and hashed on the way. What else the
layout has, Orbax writes itself: for the same tree with one number an array, whose descriptions then get the true shape.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxspec.checkpoints.manifest import FORMAT

PIECE_BYTES = 64 * 2**20
"""Of a chunk, at most where its array can be cut so finely: little for a thread to hold, or for one device to read."""
THREADS = 4
JOURNAL = "pieces.jsonl"
"""What is there already, while not all is."""

Bounds = tuple[tuple[int, int], ...]


class Pieces(NamedTuple):
    """An array to write."""

    path: tuple[str, ...]
    """In the tree."""
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    """The shape of a piece; the last along an axis may reach past its end."""
    read: Callable[[Bounds], np.ndarray]
    """A block of the array, in its dtype; called from several threads."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"params/{'.'.join(self.path)}"


class Piece(NamedTuple):
    """One file."""

    file: str
    of: Pieces
    number: tuple[int, ...]
    """Along every axis."""

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return math.prod(self.of.chunk) * self.of.dtype.itemsize


class Written(NamedTuple):
    """A piece that is on disk."""

    piece: Piece
    sha256: str
    kept: bool
    """Whether an earlier run wrote it."""


def chunk_of(shape: tuple[int, ...], itemsize: int, axis: int, *, stacked: bool) -> tuple[int, ...]:
    """The chunk of an array: one of the layers that are `stacked` on its first axis, and of `axis` as much as fits."""
    chunk = [1, *shape[1:]] if stacked else list(shape)
    parts = -(-math.prod(chunk) * itemsize // PIECE_BYTES)
    chunk[axis] = -(-chunk[axis] // min(parts, chunk[axis]))
    return tuple(chunk)


def pieces_of(arrays: Sequence[Pieces]) -> list[Piece]:
    """Every piece of the arrays, in the order of their files."""
    found = []
    for a in arrays:
        counts = [-(-size // step) for size, step in zip(a.shape, a.chunk, strict=True)]
        for number in itertools.product(*map(range, counts)):
            found.append(Piece(f"{a.name}/{'.'.join(map(str, number))}", a, number))
    return found


@contextlib.contextmanager
def written(folder: Path, arrays: Sequence[Pieces], source: str) -> Iterator[Iterator[Written]]:
    """Write the arrays into `folder`; yields an iterator over the pieces, which writes as it is consumed.

    Pieces that an earlier call wrote of the same `source` and whose checksums still hold are kept; of another one
    everything is written anew. Threads stop when the block ends.
    """
    journal = folder / JOURNAL
    if _first_line(journal) != source:
        for name in (journal, folder / "params"):
            shutil.rmtree(name, ignore_errors=True) if name.is_dir() else name.unlink(missing_ok=True)
        journal.write_text(json.dumps(source) + "\n", encoding="utf-8")
    for a in arrays:
        (folder / a.name).mkdir(parents=True, exist_ok=True)
    known = _journaled(journal)
    with ThreadPoolExecutor(THREADS) as pool, journal.open("a", encoding="utf-8") as notes:

        def run() -> Generator[Written, None, None]:
            for done in pool.map(lambda piece: _write(folder, piece, known.get(piece.file)), pieces_of(arrays)):
                if not done.kept:
                    notes.write(json.dumps({"file": done.piece.file, "sha256": done.sha256}) + "\n")
                    notes.flush()
                yield done

        with contextlib.closing(run()) as going:
            yield going


def describe(folder: Path, arrays: Sequence[Pieces], mark: Mapping[str, Any]) -> None:
    """Make `folder`, where all pieces are, an Orbax checkpoint of the tree `params`; `mark` is its custom metadata."""
    tree: dict[str, Any] = {}
    for a in arrays:
        *parents, leaf = a.path
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[leaf] = jnp.zeros((1,) * len(a.shape), a.dtype)
    small = folder / "described"
    shutil.rmtree(small, ignore_errors=True)
    with _as_files():
        ocp.save_checkpointables(str(small.absolute()), {"params": tree}, custom_metadata={"format": FORMAT, **mark})
    for a in arrays:
        about = json.loads((small / a.name / ".zarray").read_text(encoding="utf-8"))
        about |= {"shape": list(a.shape), "chunks": list(a.chunk)}
        (folder / a.name / ".zarray").write_text(json.dumps(about), encoding="utf-8")
    for path in small.rglob("*"):
        if path.is_file() and path.parent.parent != small / "params":
            path.replace(folder / path.relative_to(small))
    shutil.rmtree(small)
    (folder / JOURNAL).unlink(missing_ok=True)


@contextlib.contextmanager
def _as_files() -> Iterator[None]:
    """Orbax writes plain Zarr files, and does not wonder at it."""
    context, log = ocp.Context(), logging.getLogger("absl")
    saving = context.array.saving
    saving.use_ocdbt = saving.use_zarr3 = saving.use_compression = False
    # These would hold shapes a second time; without them Orbax takes those of the arrays.
    saving.array_metadata_store, saving.enable_write_sharding_file = None, False
    log.addFilter(_wanted)
    try:
        with context:
            yield
    finally:
        log.removeFilter(_wanted)


def _wanted(record: logging.LogRecord) -> bool:
    return "merge of OCDBT" not in record.getMessage()


def _write(folder: Path, piece: Piece, known: str | None) -> Written:
    path = folder / piece.file
    if known is not None and path.is_file() and path.stat().st_size == piece.nbytes:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == known:
                return Written(piece, known, True)
    of = piece.of
    starts = [i * step for i, step in zip(piece.number, of.chunk, strict=True)]
    stops = [min(at + step, n) for at, step, n in zip(starts, of.chunk, of.shape, strict=True)]
    block = of.read(tuple(zip(starts, stops, strict=True)))
    if block.shape != of.chunk:  # the last along an axis is as long as the others
        block = np.pad(block, [(0, step - n) for step, n in zip(of.chunk, block.shape, strict=True)])
    numbers = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(numbers)
    draft.replace(path)
    return Written(piece, hashlib.sha256(numbers).hexdigest(), False)


def _first_line(journal: Path) -> str | None:
    """The source that a journal is of."""
    if not journal.is_file():
        return None
    with journal.open(encoding="utf-8") as lines:
        try:
            return json.loads(lines.readline())
        except ValueError:  # killed while it was begun
            return None


def _journaled(journal: Path) -> dict[str, str]:
    """The checksums by file; a line that was cut short by a kill is passed over."""
    found = {}
    for line in journal.read_text(encoding="utf-8").splitlines()[1:]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            note = json.loads(line)
            found[note["file"]] = note["sha256"]
    return found
