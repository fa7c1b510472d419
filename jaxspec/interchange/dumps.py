"""Hidden states that other projects dumped: the folders they lie in, read one document at a time.

Sources: vLLM's connector of hidden states (pull request 33736) and speculators 0.9.0, SpecForge's offline files of
EAGLE-3 and DSpark, and the `data_N.ckpt` of EAGLE's own code, which have the same fields.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.interchange.tensors import DTYPE_CODES
from jaxspec.interchange.weight_files import open_weights_file

CONVERSATIONS = "state.json"
"""File of a set that `datasets` saved; speculators keeps tokens and loss masks in one."""
FLOATS = tuple(DTYPE_CODES.values())
"""Dtypes of states that are read, by safetensors' names."""

INTEGERS = ("I64", "I32", "I16", "U64", "U32", "U16", "U8")
"""Dtypes of token ids that are read."""
_LOOKED_AT = 3
"""Files of which none is of a known layout before a folder is no dump."""


class BadDocument(ValueError):
    """A document of a dump that cannot be used; `kind` names the reason in two or three words."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


class DumpKind(NamedTuple):
    """A layout of dumped hidden states."""

    title: str
    refusal: str | None = None
    """The reason why no drafter is trained from it; None where one can be."""
    states: str = "hidden_states"
    """Name of the tensor of the states, or of those beside the last one."""
    last: str | None = None
    """Name of the tensor of the last state; None: it is among `states`."""


_NO_LAST = (
    "they hold no last hidden state of the target, so its distribution cannot be computed; dump it too (SpecForge's "
    "EAGLE-3 or DSpark files, or vLLM's with the id of the last layer)"
)
KINDS = {
    "vllm": DumpKind("hidden states of vLLM"),
    "speculators": DumpKind("hidden states of speculators"),
    "specforge": DumpKind("offline EAGLE-3 files of SpecForge", None, "aux_hidden_state", "hidden_state"),
    "eagle": DumpKind("training files of EAGLE's own code", None, "", "hidden_state"),
    "dspark": DumpKind("offline DSpark files of SpecForge", None, "hidden_states", "target_last_hidden_states"),
    "dflash": DumpKind("offline DFlash files of SpecForge", _NO_LAST),
    "nemo": DumpKind("shards of NeMo Automodel", _NO_LAST),
}
"""Name -> layout."""


class Dump(NamedTuple):
    """A folder of dumped hidden states."""

    kind: str
    """One of `KINDS`."""
    folder: Path
    files: tuple[Path, ...]
    """One a document, in the order of their numbers or names."""
    locked: int
    """Files that a writer is still writing, which are left out."""
    conversations: Path | None
    """Folder of speculators' set of tokens and loss masks, where there is one."""


class StoredStates(NamedTuple):
    """A document's file before its states are read."""

    tokens: int
    states: int
    """States of a token, the last one included."""
    width: int
    dtype: str
    """safetensors' name of the states' dtype."""


class DumpedDocument(NamedTuple):
    """A document of a dump."""

    tokens_L: np.ndarray
    """int32."""
    mask_L: np.ndarray | None
    """bool: the tokens of answers; None where the dump does not say."""
    states_LND: np.ndarray
    """The states of a token, the last one behind the others, as they were stored."""


def find_dump(folder: str | Path, conversations: Path | None = None) -> Dump | None:
    """Returns the dump in a folder: in it, in its folder `hidden_states`, or in SpecForge's folders `rows_*`.

    None if there is none. The kind is told by the tensors of the first files that no writer holds and that can be read.
    `conversations` is the folder of speculators' set, where that is neither the folder nor the one above. Raises
    ValueError where writers hold all files, none can be read, or the dump is of another kind than has a set.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    if _is_nemo(folder):
        return Dump("nemo", folder, tuple(sorted(folder.glob("shard-*.safetensors"))), 0, None)
    states, listed = _states_of(folder)
    free = [path for path in listed if not _is_locked(path)]
    if listed and not free:
        raise ValueError(f"{folder}: its {len(listed):,} files are all in use by a writer; wait until it is done")
    kind = _kind_of_first(free)
    if kind is None:
        return None
    if conversations is not None and kind != "speculators":
        raise ValueError(f"{folder}: holds {KINDS[kind].title}, whose files are of no set of conversations")
    sets = [conversations] if conversations is not None else [folder, states.parent]
    found = [place for place in sets if place == conversations or (place / CONVERSATIONS).is_file()]
    return Dump(
        kind, folder, tuple(free), len(listed) - len(free), found[0] if kind == "speculators" and found else None
    )


def _states_of(folder: Path) -> tuple[Path, list[Path]]:
    """Returns the folder in which a dump's files lie, and those that may be some, in their order."""
    inner = folder / "hidden_states"
    states = inner if (folder / CONVERSATIONS).is_file() and inner.is_dir() else folder
    listed = [p for p in states.glob("*.safetensors") if not p.name.startswith("model")]
    listed = listed or [p for pattern in ("data_*.ckpt*", "rows_*/data_*.ckpt*") for p in states.glob(pattern)]
    return states, sorted((p for p in listed if p.name.endswith((".safetensors", ".ckpt", ".ckpt.gz"))), key=_by_number)


def unknown(folder: Path) -> str:
    """Returns a sentence on a folder in which `find_dump` finds nothing: the tensors that it holds instead, if any."""
    known = (
        f"{folder}: holds no hidden states that are known: safetensors files of hidden_states and token_ids (vLLM, "
        "speculators), or data_N.ckpt files of SpecForge in it or in its folders rows_*"
    )
    if not folder.is_dir():
        return f"{folder}: no such folder; give that of a dump"
    for path in _states_of(folder)[1]:
        with contextlib.suppress(BadDocument), _opened(path) as tensors:
            names = ", ".join(sorted(tensors)[:5]) or "no tensors"
            return f"{known}; {path.name} holds {names}{', ...' if len(tensors) > 5 else ''}"
    return known


def _kind_of_first(files: Sequence[Path]) -> str | None:
    """Returns the layout of the first of a few files that has one. Raises ValueError where none can be read."""
    failures, others = [], 0
    for path in files:
        try:
            kind = _kind_of(path)
        except BadDocument as error:
            failures.append(error)
            continue
        others += 1
        if kind is not None or others == _LOOKED_AT:
            return kind
    if failures and not others:
        raise ValueError(f"none of {len(files):,} files can be read; the first: {failures[0]}")
    return None


def _is_nemo(folder: Path) -> bool:
    path = folder / "manifest.json"
    if not path.is_file() or not any(folder.glob("shard-*.safetensors")):
        return False
    with contextlib.suppress(ValueError):
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    return False


def _by_number(path: Path) -> list[tuple[int, int, str]]:
    """Returns the key by which files are in the order of the numbers in their names."""
    parts = re.split(r"(\d+)", "/".join(path.parts[-2:]))
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _is_locked(path: Path) -> bool:
    """Returns whether a writer holds the lock beside a file. A lock that nobody holds was left by a finished writer."""
    lock = path.with_name(f"{path.name}.lock")
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _kind_of(path: Path) -> str | None:
    """Returns the name of the layout that a file is of, None if it is of none; raises BadDocument if it is not read."""
    with _opened(path) as tensors:
        names = set(tensors)
    if path.suffix == ".safetensors":
        found = {"hidden_states", "token_ids"} <= names
        return ("speculators" if path.name.startswith("hs_") else "vllm") if found else None
    if "hidden_state" in names:
        return "specforge" if "aux_hidden_state" in names else "eagle"
    if "hidden_states" in names:
        return "dspark" if "target_last_hidden_states" in names else "dflash"
    return None


def measure(dump: Dump, path: Path, width: int) -> StoredStates:
    """Returns the sizes of a file of a dump of a target `width` wide; raises BadDocument if they make no sense."""
    with _opened(path) as tensors:
        return _measured(dump, path, tensors, width)


def _measured(dump: Dump, path: Path, tensors: dict[str, Any], width: int) -> StoredStates:
    kind, safe = KINDS[dump.kind], path.suffix == ".safetensors"
    names = [name for name in ("token_ids" if safe else "input_ids", kind.states, kind.last) if name]
    if missing := next((name for name in names if name not in tensors), None):
        raise BadDocument("lacks a tensor", f"{path}: has no tensor {missing}, which {kind.title} hold")
    if (found := tensors[names[0]].get_dtype()) not in INTEGERS:
        raise BadDocument("wrong dtype", f"{path}: {names[0]} is {found}; token ids are integers: store them as I64")
    tokens = int(np.prod(tensors[names[0]].get_shape()))
    dtype = tensors[names[-1]].get_dtype()
    if dtype not in FLOATS:
        raise BadDocument("wrong dtype", f"{path}: {names[-1]} is {dtype}; states in {', '.join(FLOATS)} are read")
    shapes = {name: list(tensors[name].get_shape()) for name in names[1:]}
    numbers = sum(int(np.prod(shape)) for shape in shapes.values())
    wide = all(shape and shape[-1] % width == 0 and shape[-1] for shape in shapes.values())
    # vLLM dumps no state of the last token of an answer.
    held = tokens - 1 if tokens > 1 and safe and tokens not in shapes["hidden_states"][:2] else tokens
    if not tokens or not wide or numbers % (held * width):
        said = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise BadDocument("wrong shape", f"{path}: {said} are no states of {tokens:,} tokens, {width:,} wide each")
    return StoredStates(held, numbers // (held * width), width, dtype)


@contextlib.contextmanager
def _opened(path: Path) -> Any:
    """Yields the tensors of a file; raises BadDocument if it cannot be read."""
    with contextlib.ExitStack() as stack:
        try:
            # A pickled tensor's checksum is compared when it is read, which may fail too.
            yield open_weights_file(path, stack)
        except BadDocument:
            raise
        except (ValueError, OSError) as error:
            raise BadDocument("unreadable", str(error)) from error


class DumpReader:
    """Reads the documents of a dump of a target of `vocab` tokens and states `width` wide.

    Raises ValueError where its set of conversations cannot be opened.
    """

    def __init__(self, dump: Dump, *, width: int, vocab: int) -> None:
        self.dump, self._width, self._vocab = dump, width, vocab
        self._rows = None if dump.conversations is None else _open_rows(dump.conversations)

    @property
    def without_states(self) -> int:
        """Conversations of speculators' set that no file has states of."""
        return 0 if self._rows is None else max(0, self._rows.count - len(self.dump.files) - self.dump.locked)

    def read(self, path: Path) -> DumpedDocument:
        """Returns the document of a file; raises BadDocument where it cannot be used, in a sentence with the file."""
        with _opened(path) as tensors:
            sizes = _measured(self.dump, path, tensors, self._width)
            safe = path.suffix == ".safetensors"
            tokens_L = np.asarray(tensors["token_ids" if safe else "input_ids"][:]).reshape(-1)
            states_LND = self._states(tensors, sizes)
            mask_L = None if "loss_mask" not in tensors else np.asarray(tensors["loss_mask"][:]).reshape(-1)
        if self._rows is not None:
            tokens_L, mask_L = self._row(path, tokens_L)
        if np.min(tokens_L) < 0 or np.max(tokens_L) >= self._vocab:
            worst = int(np.max(tokens_L)) if np.max(tokens_L) >= self._vocab else int(np.min(tokens_L))
            raise BadDocument("ids outside", f"{path}: holds the token {worst}, and the target has {self._vocab:,}")
        mask_L = None if mask_L is None else _flags(path, mask_L, len(tokens_L))
        # A sum is finite only if all numbers are, and takes no copy.
        if not np.isfinite(np.sum(states_LND, dtype=np.float64)):
            raise BadDocument("not finite", f"{path}: its hidden states hold NaN or infinity")
        held = sizes.tokens
        return DumpedDocument(tokens_L[:held].astype(np.int32), None if mask_L is None else mask_L[:held], states_LND)

    def _states(self, tensors: dict[str, Any], sizes: StoredStates) -> np.ndarray:
        kind, shape = KINDS[self.dump.kind], (sizes.tokens, -1, self._width)
        if kind.last is None:
            found = np.asarray(tensors[kind.states][:])
            # Some writers put the axis of states first.
            swapped = found.ndim == 3 and found.shape[0] != sizes.tokens and found.shape[1] == sizes.tokens
            return np.ascontiguousarray(found.swapaxes(0, 1) if swapped else found).reshape(shape)
        last = np.asarray(tensors[kind.last][:]).reshape(shape)
        others = [np.asarray(tensors[kind.states][:]).reshape(shape)] if kind.states else []
        return np.concatenate([*others, last], axis=1)

    def _row(self, path: Path, tokens_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and loss mask of the row of a file `hs_N`."""
        number, rows = re.search(r"\d+", path.stem), self._rows
        assert rows is not None
        if number is None or int(number[0]) >= rows.count:
            raise BadDocument("no such row", f"{path}: {self.dump.conversations} has {rows.count:,} rows, not this one")
        ids_L, mask_L = rows.read(int(number[0]))
        if not np.array_equal(ids_L, tokens_L):
            raise BadDocument(
                "other tokens", f"{path}: its token_ids are not the input_ids of row {number[0]} of the set beside it"
            )
        return tokens_L, mask_L


def _flags(path: Path, mask_L: np.ndarray, length: int) -> np.ndarray:
    """Returns a loss mask as bool; raises BadDocument where it is of another length, or holds other numbers."""
    if len(mask_L) != length:
        raise BadDocument("wrong mask", f"{path}: its loss mask is of {len(mask_L)} tokens, not {length}")
    flags_L = mask_L.astype(np.float64)
    if not np.all((flags_L == 0) | (flags_L == 1)):
        worst = flags_L[(flags_L != 0) & (flags_L != 1)][0]
        raise BadDocument("wrong mask", f"{path}: its loss mask holds {worst:g}; it must hold 0 and 1 alone")
    return flags_L == 1


class _Rows(NamedTuple):
    """The rows of a set that `datasets` saved."""

    count: int
    read: Callable[[int], tuple[np.ndarray, np.ndarray]]
    """Returns `input_ids` and `loss_mask` of a row."""


def _open_rows(folder: Path) -> _Rows:
    """Opens a set that `datasets` saved; raises ValueError if it is no such set, or pyarrow is not installed."""
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.ipc  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"{folder}: its tokens and loss masks are an Arrow table, and pyarrow is not installed: pip install pyarrow"
        ) from error
    try:
        files = [folder / f["filename"] for f in json.loads((folder / CONVERSATIONS).read_text())["_data_files"]]
        table = pyarrow.concat_tables([pyarrow.ipc.open_stream(pyarrow.memory_map(str(f))).read_all() for f in files])
        ids, masks = table["input_ids"], table["loss_mask"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{folder}: no set of input_ids and loss_mask that datasets saved ({error})") from error
    return _Rows(len(table), lambda row: (_numbers(ids[row]), _numbers(masks[row])))


def _numbers(cell: Any) -> np.ndarray:
    return np.asarray(cell.values.to_numpy(zero_copy_only=False)).reshape(-1)


def describe(dump: Dump) -> dict[str, Any]:
    """Returns the facts of a dump that `jaxspec inspect` shows, the shapes of its first file that holds states."""
    kind = KINDS[dump.kind]
    facts: dict[str, Any] = {"kind": "hidden states", "family": dump.kind, "format": kind.title}
    facts |= {"files": len(dump.files), "in_use": dump.locked, "importable": kind.refusal is None}
    facts |= {"refusal": kind.refusal, "dtype": None}
    if kind.refusal is not None:
        return facts
    for path in dump.files:
        with contextlib.suppress(BadDocument), _opened(path) as tensors:
            if (last := tensors.get(kind.last or kind.states)) is None:
                continue
            shapes = {name: list(handle.get_shape()) for name, handle in tensors.items()}
            about = {"dtype": last.get_dtype(), "shapes": shapes}
            return facts | about | {"loss_mask": "loss_mask" in shapes or dump.conversations is not None}
    return facts


def names_of(dump: Dump, files: Sequence[Path]) -> list[str]:
    """Returns the names of files inside the dump's folder."""
    return [str(path.relative_to(dump.folder)) for path in files]
