"""Folders of safetensors files: opened by tensor name, placed on devices slice by slice, written atomically."""

from __future__ import annotations

import contextlib
import gc
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from jaxspec.console.disk import writing

INDEX = "model.safetensors.index.json"
DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
CHUNK_BYTES = 16 * 2**20
"""A stored tensor is copied in pieces of about this size, so that the whole tensor is never held beside its copy."""

SHARD_BYTES = 5 * 10**9
"""Greatest size of a file, unless one of its tensors is larger."""
NARROW = 16
"""Steps of its densest axis in which a transposed piece is copied; this is five times as fast as numpy's own order."""

Bounds = tuple[tuple[int, int], ...]
"""`(start, stop)` of every axis of a block of an array."""


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; raises ValueError or FileNotFoundError, one sentence naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a folder in HuggingFace layout that holds {path.name}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as failure:
        raise ValueError(f"{path} is not valid JSON ({failure}): it may be truncated; download it again") from failure
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__} where an object is expected")
    return found


def write_atomically(path: Path, chunks: Iterable[Any]) -> None:
    """Writes the byte chunks to a draft, and then renames it to `path`: a reader sees the old file or the new one."""
    draft = path.with_name(f".{path.name}.partial")
    try:
        with writing(path), draft.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def open_file(path: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Returns a handle of every tensor in one safetensors file, by name."""
    try:
        file = stack.enter_context(safe_open(path, framework="numpy"))
        return {name: file.get_slice(name) for name in file.keys()}
    except SafetensorError as failure:
        raise ValueError(f"{path} is truncated or corrupt ({failure}): download it again") from failure


class FileTensor(NamedTuple):
    """A tensor of a safetensors file that is read, not mapped: mapped pages would count as the process's memory."""

    path: Path
    code: str
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""

    def get_shape(self) -> tuple[int, ...]:
        """Returns its shape as it is stored."""
        return self.shape

    def get_dtype(self) -> str:
        """Returns safetensors' name of its dtype."""
        return self.code

    def __getitem__(self, region: slice | tuple[slice, ...]) -> np.ndarray:
        """Reads a region of a tensor of one of `DTYPE_CODES`, by whole rows; several threads may read at once."""
        dtype = jnp.dtype(next(name for name, code in DTYPE_CODES.items() if code == self.code))
        rows, *columns = region if isinstance(region, tuple) else (region,)
        first, last, _ = rows.indices(self.shape[0])
        row, bits = math.prod(self.shape[1:]), np.dtype(f"u{dtype.itemsize}")
        read = np.fromfile(self.path, bits, (last - first) * row, offset=self.start + first * row * dtype.itemsize)
        return read.reshape(-1, *self.shape[1:])[(slice(None), *columns)].view(dtype)


def read_headers(path: Path) -> dict[str, FileTensor]:
    """Returns a handle of every tensor in one safetensors file by name, for reading more than fits in memory."""
    with contextlib.ExitStack() as stack:
        open_file(path, stack)  # safetensors checks the file's length against its header
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        name: FileTensor(path, about["dtype"], tuple(about["shape"]), 8 + size + about["data_offsets"][0])
        for name, about in header.items()
        if name != "__metadata__"
    }


def check_tensors(tensors: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raises ValueError naming the first tensor that is missing, or has another shape or an unsupported dtype."""
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{folder} has no tensor {name}, which its config.json calls for")
        if tuple(tensors[name].get_shape()) != shape:
            found = tuple(tensors[name].get_shape())
            raise ValueError(f"{folder}: tensor {name} has shape {found}, but config.json calls for {shape}")
        if tensors[name].get_dtype() not in DTYPE_CODES.values():
            known = ", ".join(DTYPE_CODES.values())
            raise ValueError(f"{folder}: tensor {name} has dtype {tensors[name].get_dtype()}; supported: {known}")


def copy_region(view: np.ndarray, tensor: Any, region: Bounds) -> None:
    """Fills `view` with a region of a stored tensor; the view's axes are the stored ones in order, some split."""
    (start, stop), columns = region[0], tuple(slice(*bounds) for bounds in region[1:])
    rows = (stop - start) // view.shape[0]
    width = math.prod(bounds[1] - bounds[0] for bounds in region[1:])
    step = max(1, CHUNK_BYTES // (4 * rows * width))
    for i in range(0, view.shape[0], step):
        into = view[i : i + step]
        first = start + i * rows
        _copy(into, tensor[(slice(first, first + len(into) * rows), *columns)].reshape(into.shape))


def _copy(into: np.ndarray, piece: np.ndarray) -> None:
    """Does `into[...] = piece` for a transposed view of a buffer, in an order that suits the caches."""
    densest = int(np.argmin(into.strides))
    if into.dtype == piece.dtype and into.dtype.itemsize == 2:
        into, piece = into.view(np.uint16), piece.view(np.uint16)  # numpy keeps the GIL for dtypes that are not its own
    step = NARROW if densest < into.ndim - 1 else into.shape[densest]
    for i in range(0, into.shape[densest], step):
        some = (slice(None),) * densest + (slice(i, i + step),)
        into[some] = piece[some]


def place(shape: tuple[int, ...], home: Sharding | None, assemble: Callable[[Bounds], np.ndarray]) -> jax.Array:
    """Returns the array whose blocks `assemble(bounds)` returns; one block at a time is on the host.

    Without `home` the whole array goes to the default device. Replicas are assembled once, and a process asks only for
    blocks of its own devices. On a CPU device a block may itself become the array's memory.
    """
    if home is None:
        return _move(assemble(tuple((0, n) for n in shape)), [None])[0]
    owners: dict[Bounds, list[Any]] = {}
    for device, index in home.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index or (), shape, strict=True))
        owners.setdefault(bounds, []).append(device)
    blocks = [block for bounds, devices in owners.items() for block in _move(assemble(bounds), devices)]
    return jax.make_array_from_single_device_arrays(shape, home, blocks)


def _move(block: np.ndarray, devices: list[Any]) -> list[jax.Array]:
    """Returns copies of the block on these devices, and frees the block."""
    copies = jax.block_until_ready([jax.device_put(block, device) for device in devices])
    del block
    gc.collect(0)  # JAX drops its reference to the block only at its next call or at a garbage collection
    return copies


class StoredWeight(NamedTuple):
    """A weight of a target, layers stacked, that can be read block by block from wherever it is stored."""

    path: tuple[str, ...]
    """In the tree of weights."""
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int
    """The axis that is cheapest to cut: that of its tensors' rows, or of the layer's experts."""
    read: Callable[[Bounds], np.ndarray]
    """Reads a block of it, of one or more layers; several threads may read at once."""
    together: int = 1
    """Number of layers that are stored as one piece; reading fewer takes as long."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole weight."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def inner(self) -> bool:
        """Returns whether its first axis is over layers."""
        return self.path[0] == "layers"


Fill = Callable[[str, int, np.ndarray], None]
"""Writes whole rows of the named tensor, from the given row on, cast to its dtype."""


@contextlib.contextmanager
def filled_tensors(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> Iterator[Fill]:
    """Yields the `Fill` of a safetensors file of tensors of these shapes and dtypes, which may be filled in any order.

    The file is at `path` when the block ends, and nothing of it is left if the block fails.
    """
    draft = path.with_name(f".{path.name}.partial")
    try:
        with writing(path), draft.open("wb") as file:
            writer = _TensorWriter(file, tensors)
            yield writer.fill
        assert not writer.left, f"{writer.left} bytes of {path} were not filled"
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class _TensorWriter:
    """Writes a safetensors file: 8 bytes of header length, JSON header padded to 8 bytes, row-major data."""

    def __init__(self, file: IO[bytes], tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        self._file, self._tensors = file, tensors
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._starts: dict[str, int] = {}
        end = 0
        for name, (shape, dtype) in tensors.items():
            start, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
            header[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._starts[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._data_start = 8 + len(text)
        self.left = end
        """Bytes that are not filled yet."""

    def fill(self, name: str, row: int, array: np.ndarray) -> None:
        """See `Fill`."""
        shape, dtype = self._tensors[name]
        width = math.prod(shape[1:]) * jnp.dtype(dtype).itemsize
        data = np.array(array, jnp.dtype(dtype), order="C").reshape(-1).view(np.uint8)
        self._file.seek(self._data_start + self._starts[name] + row * width)
        self._file.write(data.data)
        self.left -= data.size


@contextlib.contextmanager
def filled_folder(folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> Iterator[Fill]:
    """Yields the `Fill` of a folder: one file, or shards of `SHARD_BYTES` and their index; removes older weights."""
    sizes = {name: math.prod(shape) * jnp.dtype(dtype).itemsize for name, (shape, dtype) in tensors.items()}
    file_of = _shared_out(sizes)
    files = dict.fromkeys(file_of.values())
    with contextlib.ExitStack() as stack:
        fills = {}
        for file in files:
            part = {name: tensor for name, tensor in tensors.items() if file_of[name] == file}
            fills[file] = stack.enter_context(filled_tensors(folder / file, part))
        yield lambda name, row, array: fills[file_of[name]](name, row, array)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        write_atomically(folder / INDEX, [json.dumps(index, indent=2).encode() + b"\n"])
    for old in (folder / "model.safetensors", *folder.glob("model-*-of-*.safetensors"), folder / INDEX):
        if old.name not in files and not (old.name == INDEX and len(files) > 1):
            old.unlink(missing_ok=True)


def _shared_out(sizes: Mapping[str, int]) -> dict[str, str]:
    """Returns the file of each tensor, in their order."""
    shard_of, shard, room = {}, 1, SHARD_BYTES
    for name, size in sizes.items():
        if size > room and room < SHARD_BYTES:
            shard, room = shard + 1, SHARD_BYTES
        shard_of[name], room = shard, room - size
    if shard == 1:
        return dict.fromkeys(sizes, "model.safetensors")
    return {name: f"model-{i:05}-of-{shard:05}.safetensors" for name, i in shard_of.items()}
