"""An Orbax checkpoint of a tree of arrays larger than memory: written in pieces, and resumed where it stopped.

Orbax's layout without OCDBT is one folder for each array and one file for each chunk (Zarr 2). A chunk that is not
compressed holds its numbers in row-major order, so threads write and hash it as the numbers are read. The rest of the
layout comes from Orbax itself: it saves the same tree with one number an array, whose descriptions then get the true
shapes.
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
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxspec.checkpoints.manifest import FORMAT, file_sha256

PIECE_BYTES = 64 * 2**20
"""Greatest size of a chunk, if its array can be cut so finely: small enough for a thread to hold."""
THREADS = 4
JOURNAL = "pieces.jsonl"
"""File that lists the finished pieces of an unfinished checkpoint."""

Bounds = tuple[tuple[int, int], ...]


class Pieces(NamedTuple):
    """An array to write."""

    path: tuple[str, ...]
    """Its path in the tree."""
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    """Shape of a piece; the last one along an axis may reach past the end of the array."""
    read: Callable[[Bounds], np.ndarray]
    """Returns a block of the array, in its dtype; called from several threads."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"params/{'.'.join(self.path)}"


class Piece(NamedTuple):
    """One chunk of an array, which is one file."""

    file: str
    of: Pieces
    number: tuple[int, ...]
    """Number of the chunk along every axis."""

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return math.prod(self.of.chunk) * self.of.dtype.itemsize


class Written(NamedTuple):
    """A piece that is on disk."""

    piece: Piece
    sha256: str
    kept: bool
    """Whether an earlier call wrote it."""


def chunk_of(shape: tuple[int, ...], itemsize: int, axis: int, *, stacked: bool) -> tuple[int, ...]:
    """Returns the chunk of an array: one layer if it is `stacked` on its first axis, and as much of `axis` as fits."""
    chunk = [1, *shape[1:]] if stacked else list(shape)
    parts = -(-math.prod(chunk) * itemsize // PIECE_BYTES)
    chunk[axis] = -(-chunk[axis] // min(parts, chunk[axis]))
    return tuple(chunk)


def pieces_of(arrays: Sequence[Pieces]) -> list[Piece]:
    """Returns every piece of the arrays, in the order of their files."""
    found = []
    for a in arrays:
        counts = [-(-size // step) for size, step in zip(a.shape, a.chunk, strict=True)]
        for number in itertools.product(*map(range, counts)):
            found.append(Piece(f"{a.name}/{'.'.join(map(str, number))}", a, number))
    return found


@contextlib.contextmanager
def written(folder: Path, arrays: Sequence[Pieces], source: str) -> Iterator[Iterator[Written]]:
    """Writes the arrays into `folder`; yields an iterator over the pieces, which writes as it is consumed.

    Pieces that an earlier call wrote of the same `source` are kept if their checksums still match. If the source
    differs, all pieces are written again. The threads stop when the block ends.
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
        done = pool.map(lambda piece: _write(folder, piece, known.get(piece.file)), pieces_of(arrays))
        with contextlib.closing(_noted(done, notes)) as pieces:
            yield pieces


def _noted(done: Iterator[Written], notes: IO[str]) -> Generator[Written, None, None]:
    """Yields the pieces, each after it is noted in the journal."""
    for written_piece in done:
        if not written_piece.kept:
            notes.write(json.dumps({"file": written_piece.piece.file, "sha256": written_piece.sha256}) + "\n")
            notes.flush()
        yield written_piece


def describe(folder: Path, arrays: Sequence[Pieces], mark: Mapping[str, Any]) -> None:
    """Makes `folder`, which holds all pieces, an Orbax checkpoint of the tree `params` with this custom metadata."""
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
    """Lets Orbax write plain Zarr files, and filters out its warning about that."""
    context, log = ocp.Context(), logging.getLogger("absl")
    saving = context.array.saving
    saving.use_ocdbt = saving.use_zarr3 = saving.use_compression = False
    # These would store the shapes a second time; without them Orbax reads the shapes of the arrays.
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
        if file_sha256(path) == known:
            return Written(piece, known, True)
    of = piece.of
    starts = [i * step for i, step in zip(piece.number, of.chunk, strict=True)]
    stops = [min(at + step, n) for at, step, n in zip(starts, of.chunk, of.shape, strict=True)]
    block = of.read(tuple(zip(starts, stops, strict=True)))
    if block.shape != of.chunk:  # the last chunk along an axis is padded to the size of the others
        block = np.pad(block, [(0, step - n) for step, n in zip(of.chunk, block.shape, strict=True)])
    numbers = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(numbers)
    draft.replace(path)
    return Written(piece, hashlib.sha256(numbers).hexdigest(), False)


def _first_line(journal: Path) -> str | None:
    """Returns the source that a journal was begun with; None if there is no journal."""
    if not journal.is_file():
        return None
    with journal.open(encoding="utf-8") as lines:
        try:
            return json.loads(lines.readline())
        except ValueError:  # a kill cut the line short
            return None


def _journaled(journal: Path) -> dict[str, str]:
    """Returns the checksums by file; a line that a kill cut short is skipped."""
    found = {}
    for line in journal.read_text(encoding="utf-8").splitlines()[1:]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            note = json.loads(line)
            found[note["file"]] = note["sha256"]
    return found
