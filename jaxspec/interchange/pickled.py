"""PyTorch's `.bin` and `.pt` files, read without PyTorch and without running the code in them.

A pickle is a program, and Python's unpickler runs it. This module interprets its opcodes one by one; it knows only
those that build tensors and plain containers, and refuses others.
"""

from __future__ import annotations

import functools
import gzip
import io
import pickletools
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

STORAGES = {
    "FloatStorage": ("F32", np.float32),
    "HalfStorage": ("F16", np.float16),
    "BFloat16Storage": ("BF16", ml_dtypes.bfloat16),
    "DoubleStorage": ("F64", np.float64),
    "LongStorage": ("I64", np.int64),
    "IntStorage": ("I32", np.int32),
    "ShortStorage": ("I16", np.int16),
    "CharStorage": ("I8", np.int8),
    "ByteStorage": ("U8", np.uint8),
    "BoolStorage": ("BOOL", np.bool_),
}
"""PyTorch's name of a dtype -> safetensors' and numpy's."""
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_CONTAINER = "collections OrderedDict"
_NAMES = {_TENSOR, _PARAMETER, _CONTAINER, *(f"torch {name}" for name in STORAGES)}
_PICKLE_LIMIT = 64 * 2**20
_PIECE = 16 * 2**20


class _Global(str):
    """A name that a pickle refers to; nothing is looked up by it."""


class _Mark:
    """Marks the beginning of a run of items on the stack."""


class _Storage(NamedTuple):
    kind: str
    key: str
    count: int


class _Part(NamedTuple):
    """A storage: the uncompressed part of an archive that holds its numbers."""

    path: Path
    name: str
    start: int
    """Offset of its first byte in the file."""
    unpacked: bytes | None = None
    """The whole file, if gzip packed it; then its checksums were compared when it was opened."""


class PickledTensor:
    """A handle of one tensor of a file, which is read when it is sliced; it has the methods of a safetensors handle.

    Only the rows that are asked for are read, after the storage's checksum was compared once. Raises ValueError, one
    sentence naming the file, where it differs.
    """

    def __init__(self, part: _Part, code: str, dtype: Any, where: _Where):
        self._part, self._code, self._dtype, self._where = part, code, np.dtype(dtype), where

    def get_shape(self) -> list[int]:
        """Returns its shape."""
        return list(self._where.shape)

    def get_dtype(self) -> str:
        """Returns safetensors' name of its dtype."""
        return self._code

    def __getitem__(self, index: Any) -> np.ndarray:
        offset, shape, strides = self._where
        if self._part.unpacked is None:
            _check_part(self._part.path, self._part.name, self._part.path.stat().st_mtime_ns)
        rows, *columns = index if isinstance(index, tuple) else (index,)
        if not shape or not isinstance(rows, slice) or rows.step not in (None, 1):
            return self._read(offset, shape)[index]
        first, last, _ = rows.indices(shape[0])
        read = self._read(offset + first * strides[0], (max(0, last - first), *shape[1:]))
        return read[(slice(None), *columns)]

    def _read(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        """Reads so many elements from an offset of the storage on, by the tensor's strides."""
        size, strides = self._dtype.itemsize, self._where.strides
        if 0 in shape:
            return np.empty(shape, self._dtype)
        count = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        start, unpacked = self._part.start + offset * size, self._part.unpacked
        # numpy reads no dtypes that are not its own.
        if unpacked is None:
            flat = np.fromfile(self._part.path, np.uint8, count * size, offset=start)
        else:
            flat = np.frombuffer(unpacked, np.uint8, count * size, offset=start)
        steps = [step * size for step in strides]
        return np.lib.stride_tricks.as_strided(flat.view(self._dtype), shape, steps, writeable=False)


@functools.lru_cache(maxsize=65536)
def _check_part(path: Path, name: str, time_ns: int) -> None:
    """Compares the checksum of a part once, in pieces; raises ValueError if it differs."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as file:
            while file.read(_PIECE):
                pass
    except (zipfile.BadZipFile, EOFError) as failure:
        raise ValueError(f"{path} is truncated or corrupt ({failure}): download it again") from failure


class _Where(NamedTuple):
    """A tensor's place in its storage, in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_pickled(path: Path) -> dict[str, PickledTensor]:
    """Returns a handle of every tensor in a PyTorch file in zip format by name; no data is read yet.

    A file that gzip packed is unpacked in memory. The tensors may be inside a wrapping dict such as
    `{"state_dict": ...}`. Raises ValueError, one sentence naming the file, if it is of PyTorch's format before 1.6,
    corrupt, compressed, or holds other things than tensors and plain containers.
    """
    with _opened(path) as file:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError(
                f"{path} is no zip archive: a PyTorch file of before version 1.6, or truncated; only files of "
                "torch.save since then are read, so load and save it again with a newer PyTorch, as safetensors if you "
                "can"
            )
        return _read_archive(path, file)


def _read_archive(path: Path, file: BinaryIO) -> dict[str, PickledTensor]:
    """Returns the tensors of a zip archive; raises as `open_pickled`."""
    unpacked = file.getvalue() if isinstance(file, io.BytesIO) else None
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            program = [name for name in entries if name.endswith("data.pkl")]
            if len(program) != 1:
                raise ValueError("it does not hold one data.pkl")
            _check_entries(entries, file.seek(0, io.SEEK_END))
            if entries[program[0]].file_size > _PICKLE_LIMIT:
                raise ValueError(f"its data.pkl is larger than {_PICKLE_LIMIT:,} bytes")
            with archive.open(program[0]) as opened:
                found = _interpret(opened)  # pyright: ignore[reportArgumentType]
            if unpacked is not None and (wrong := archive.testzip()):
                raise zipfile.BadZipFile(f"Bad CRC-32 for file {wrong!r}")
            return _tensors(found, _Archive(path, file, unpacked, entries, program[0].removesuffix("data.pkl")))
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as failure:
        raise ValueError(f"{path} is not read: {failure}") from failure
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as failure:
        raise ValueError(f"{path} is truncated or corrupt ({failure}): download it again") from failure


def _opened(path: Path) -> BinaryIO:
    """Opens a file; one that gzip packed is read whole. Raises ValueError if that one is damaged."""
    file = path.open("rb")
    if file.read(2) != b"\x1f\x8b":
        file.seek(0)
        return file
    with file:
        file.seek(0)
        try:
            return io.BytesIO(gzip.GzipFile(fileobj=file).read())
        except (OSError, EOFError, zlib.error) as failure:
            raise ValueError(f"{path} is truncated or corrupt ({failure}): download it again") from failure


def _check_entries(entries: dict[str, zipfile.ZipInfo], size: int) -> None:
    """Raises ValueError for a compressed or encrypted part, or one that claims to be larger than the archive."""
    for name, info in entries.items():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"its part {name} is compressed or encrypted, which torch.save never does")
        if info.file_size > size or info.header_offset + info.file_size > size:
            raise ValueError(f"its part {name} claims {info.file_size:,} bytes of a file of {size:,}")


class _Archive(NamedTuple):
    path: Path
    file: BinaryIO
    unpacked: bytes | None
    """See `_Part`."""
    entries: dict[str, zipfile.ZipInfo]
    root: str

    def part(self, entry: zipfile.ZipInfo) -> _Part:
        """Returns the place of an entry's bytes, behind its header and the padding that torch.save adds."""
        self.file.seek(entry.header_offset)
        header = self.file.read(30)
        start = entry.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        if header[:4] != b"PK\x03\x04" or start + entry.file_size > self.file.seek(0, io.SEEK_END):
            raise ValueError(f"the header of its part {entry.filename} makes no sense")
        return _Part(self.path, entry.filename, start, self.unpacked)


def _tensors(found: Any, archive: _Archive) -> dict[str, PickledTensor]:
    for _ in range(3):  # a table may be wrapped, and a hostile one contain itself
        if isinstance(found, dict) and not any(isinstance(value, tuple) for value in found.values()):
            inner = [value for value in found.values() if isinstance(value, dict) and value]
            found = inner[0] if len(inner) == 1 else None
    if not isinstance(found, dict):
        raise ValueError("it holds no table of named tensors")
    tensors = {}
    for name, value in found.items():
        if not (isinstance(name, str) and isinstance(value, tuple) and len(value) == 2):
            continue
        storage, where = value
        code, dtype = STORAGES[storage.kind]
        entry = archive.entries.get(f"{archive.root}data/{storage.key}")
        if entry is None:
            raise ValueError(f"the data of tensor {name} is missing")
        _check_place(name, where, min(storage.count, entry.file_size // np.dtype(dtype).itemsize))
        tensors[name] = PickledTensor(archive.part(entry), code, dtype, where)
    return tensors


def _check_place(name: str, where: _Where, count: int) -> None:
    """Raises ValueError if a tensor reaches beyond its storage, or counts an element of it twice."""
    numbers = (where.offset, *where.shape, *where.strides)
    if len(where.shape) != len(where.strides) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise ValueError(f"the shape of tensor {name} makes no sense")
    total = 1
    for size in where.shape:
        total *= size
    last = where.offset + sum(max(0, n - 1) * step for n, step in zip(where.shape, where.strides, strict=True))
    if total > count or (total and last >= count):
        raise ValueError(f"tensor {name} of shape {where.shape} is larger than its data ({count:,} elements)")


_NEW = {
    "MARK": _Mark,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
"""Opcode -> makes the constant or empty container that it pushes."""
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
"""Opcodes that push their argument."""


def _interpret(file: BinaryIO | Any) -> Any:
    """Returns the value of a pickle: dicts, lists, tuples, numbers, strings, and `(_Storage, _Where)` for tensors."""
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.step(opcode.name, argument)
    raise ValueError("its pickle does not end")


class _Machine:
    """The stack machine that a pickle is a program of, with the opcodes that files of tensors need."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memo: dict[Any, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Executes one opcode; raises ValueError for one that files of tensors do not need."""
        stack, memo = self.stack, self._memo
        match name:
            case "PROTO" | "FRAME":
                pass
            case "GLOBAL":
                stack.append(_known(str(argument)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_known(f"{module} {attribute}"))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                stack.append(_build(called, arguments))
            case "BUILD":  # the version numbers that a module's state_dict carries as an attribute
                stack.pop()
            case _ if name in _NEW:
                stack.append(_NEW[name]())
            case _ if name in _LITERALS:
                stack.append(argument)
            case _:
                self._collect(name)

    def _collect(self, name: str) -> None:
        """Executes an opcode that makes a tuple of items of the stack, or adds them to a container."""
        stack = self.stack
        match name:
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                items = tuple(stack[-count:])
                del stack[-count:]
                stack.append(items)
            case "APPEND":
                item = stack.pop()
                _expect(stack[-1], list).append(item)
            case "APPENDS":
                items = self._pop_to_mark()
                _expect(stack[-1], list).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _expect(stack[-1], dict)[key] = value
            case "SETITEMS":
                items = self._pop_to_mark()
                _expect(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
            case _:
                raise ValueError(f"its pickle uses {name}, which no file of tensors needs")

    def _pop_to_mark(self) -> list[Any]:
        """Removes and returns the items above the last mark, and removes the mark."""
        at = max(i for i, item in enumerate(self.stack) if isinstance(item, _Mark))
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items


def _known(name: str) -> _Global:
    if name not in _NAMES:
        raise ValueError(
            f"its pickle refers to {'.'.join(name.split())[:100]!r}; only tensors and plain containers are admitted, "
            "for anything else could run code"
        )
    return _Global(name)


def _expect(item: Any, kind: type) -> Any:
    if type(item) is not kind:
        raise ValueError(f"its pickle takes a {type(item).__name__} for a {kind.__name__}")
    return item


def _storage(told: Any) -> _Storage:
    match told:
        case ("storage", _Global() as kind, str(key), str(), int(count)) if kind.removeprefix("torch ") in STORAGES:
            return _Storage(kind.removeprefix("torch "), key, count)
    raise ValueError("its pickle refers to something outside that is no tensor's data")


def _build(called: Any, arguments: Any) -> Any:
    """Returns the result of one of the three known calls."""
    match called, arguments:
        case _Global(), () if called == _CONTAINER:
            return {}
        case _Global(), (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_) if called == _TENSOR:
            return storage, _Where(offset, shape, strides)
        case _Global(), ((_Storage(), _Where()) as tensor, *_) if called == _PARAMETER:
            return tensor
    raise ValueError(f"its pickle calls {str(called)[:100]!r} in a way that makes no tensor")
