"""GGUF files of llama.cpp as folders in HuggingFace layout: the model's shape, its tensors, one at a time.

Files are read by the `gguf` package. Quantized tensors are dequantized to float32, as transformers does it; float16 and
bfloat16 stay as they are stored. `gguf_tokenizer` writes the tokenizer.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxspec.checkpoints.folders import remove_draft, whole_folder
from jaxspec.checkpoints.manifest import write_manifest
from jaxspec.console.progress import progress
from jaxspec.interchange.gguf_tokenizer import write_tokenizer
from jaxspec.interchange.hf_config import write_config
from jaxspec.interchange.hf_layout import tensor_shapes
from jaxspec.interchange.tensors import CHUNK_BYTES, filled_folder
from jaxspec.nn.rope import RopeScaling, rope_frequencies
from jaxspec.targets.decoder import LlamaConfig
from jaxspec.targets.families import find_family
from jaxspec.targets.fields import Fields, rope_fields

CACHE = "JAXSPEC_CACHE"
"""Environment variable with the folder of converted files; by default `jaxspec` in the user's cache folder."""
CONVERTER = 1
"""Version of what `convert` writes: raise it with every change of tensors, stop ids or tokenizers, and all files are
converted again."""
MAGIC = b"GGUF"
NEEDED = "reading a GGUF file needs the package gguf: pip install gguf"


class Architecture(NamedTuple):
    """One value of `general.architecture`."""

    model_type: str
    architecture: str
    """Class of transformers."""
    turned_heads: bool
    """Whether rows of queries and keys alternate between the halves of a head, as llama.cpp's rotary positions want."""


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", False),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", False),
}
"""The architectures that are read; each is compared with transformers, tensor by tensor, in a test."""

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of a layer's tensors: `blk.N.X.weight` is `model.layers.N.Y.weight`."""

ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3.1's division of each frequency, which its files store as a tensor."""


class GGUFFile(NamedTuple):
    """A GGUF file whose header has been read."""

    path: Path
    fields: Mapping[str, Any]
    """Metadata by key."""
    tensors: Mapping[str, Any]
    """`gguf.ReaderTensor` by name: shape fastest axis first, data as stored bytes."""

    @property
    def kind(self) -> Architecture:
        """The architecture; raises ValueError for one that is not read."""
        name = self.fields.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(
                f"{self.path}: general.architecture={name!r} is not read from GGUF; supported: {known}; import the "
                "HuggingFace folder of this model instead"
            )
        return ARCHITECTURES[name]

    def find(self, name: str, default: Any = None) -> Any:
        """Returns the value of `ARCHITECTURE.name`; raises ValueError where it is missing and has no default."""
        key = f"{self.fields['general.architecture']}.{name}"
        found = self.fields.get(key, default)
        if found is None:
            raise ValueError(f"{self.path}: has no key {key}, so the model's shape is unknown: convert the model again")
        return found

    def count(self, name: str, default: int | None = None) -> int:
        """Returns `find` of a number of something; raises ValueError where it is not a positive integer."""
        found = self.find(name, default)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise ValueError(
                f"{self.path}: {self.fields['general.architecture']}.{name}={found!r} is not a positive integer"
            )
        return found

    def number(self, name: str, default: float | None = None) -> float:
        """Returns `find` of a positive number as a person wrote it; raises ValueError where it is none."""
        found = self.find(name, default)
        if not isinstance(found, int | float) or isinstance(found, bool) or not 0 < found < math.inf:
            raise ValueError(
                f"{self.path}: {self.fields['general.architecture']}.{name}={found!r} is not a positive number"
            )
        return shortest(found)


def is_gguf(path: Path) -> bool:
    """Returns whether a path names a GGUF file: one that begins as such, whatever its name, or is named `.gguf`."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return True
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def open_gguf(path: Path) -> GGUFFile:
    """Returns the header of a GGUF file; its tensors are mapped, not read.

    Raises ValueError or OSError, in one sentence, if the file is missing, damaged, or one of several parts.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"{path}: {NEEDED}") from error
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a GGUF file")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path}: does not begin as a GGUF file does: download it again, or give another")
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    # The reader checks little: damaged numbers end in exceptions of numpy, of enumerations, or of memory.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: is truncated or damaged ({reason}): download it again") from error
    if (parts := fields.get("split.count", 1)) not in (0, 1):
        raise ValueError(f"{path}: is one of {parts!r} parts of a model: join them (llama-gguf-split --merge) first")
    return GGUFFile(path, fields, tensors)


def folder_of(path: Path) -> Path:
    """Returns the folder in HuggingFace layout of a GGUF file: converted at the first call, then found in the cache.

    The folder stays while this process runs; those of what the file was before are removed where no process has asked
    for them. The cache is named by `JAXSPEC_CACHE`. Raises ValueError or OSError as `convert`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a GGUF file")
    place = _place(path)
    folder = place.with_name(f"{place.name}-{_mark(path)}")
    while not _hold(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Of several processes that begin together one converts, and the others wait for it.
        with _lock_file(folder).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "config.json").is_file():
                _remove_older(place, folder)
                convert(path, folder)
    return folder


def _place(path: Path) -> Path:
    """Returns the beginning of the cached folders' names that all states of one file share."""
    cache = os.environ.get(CACHE)
    root = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxspec"
    source = path.resolve()
    return root / "gguf" / f"{source.stem[:80]}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:8]}"


def _mark(path: Path) -> str:
    """Returns a short hash that differs for a file that was replaced, in milliseconds for any size, or converter."""
    about = path.stat()
    with path.open("rb") as file:
        head = file.read(CHUNK_BYTES)
    return hashlib.sha256(head + f"{about.st_size} {about.st_mtime_ns} {CONVERTER}".encode()).hexdigest()[:12]


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


_held: dict[Path, int] = {}
"""Folders that this process has asked for -> open descriptors, which hold a shared lock until the process ends."""


def _hold(folder: Path) -> bool:
    """Returns whether a folder is there and whole; no process removes it then as long as this one runs."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    # A file system without locks has none for those that remove, either.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    whole = False
    # What was removed meanwhile is not behind its name any more.
    with contextlib.suppress(FileNotFoundError):
        same = os.path.samestat(folder.stat(), os.fstat(descriptor))
        whole = same and (folder / "config.json").is_file()
    before = _held.pop(folder, None)
    if whole:
        _held[folder] = descriptor
    for done in (before, None if whole else descriptor):
        if done is not None:
            os.close(done)
    return whole


def _remove_older(place: Path, folder: Path) -> None:
    """Removes what the cache has of a file's other states, but for what a process uses or is converting."""
    for lock_file in place.parent.glob(f"{glob.escape(place.name)}-*.lock"):
        older = lock_file.with_name(lock_file.name.removesuffix(".lock"))
        if older == folder:
            continue
        # Locks of others raise, and so does a folder that is not there; the next conversion tries again. Lock files
        # stay, for a removed one would let two processes convert together.
        with contextlib.suppress(OSError), lock_file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_draft(older.with_name(f".{older.name}."))
            descriptor = os.open(older, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Under another name first: nobody sees half a folder.
                gone = older.rename(older.with_name(f".{older.name}.gone"))
                shutil.rmtree(gone, ignore_errors=True)
            finally:
                os.close(descriptor)


def convert(path: Path, out: Path) -> None:
    """Writes the model and tokenizer of a GGUF file as a folder that transformers and `read_llama` load.

    One tensor at a time is in memory. The folder appears whole or not at all. Raises ValueError or OSError, in one
    sentence, for a file that is damaged, of another architecture or tokenizer, or does not fit on the disk.
    """
    file = open_gguf(path)
    config = config_fields(file)
    stored = _stored_tensors(file, config)
    size = sum(np.dtype(tensor.dtype).itemsize * int(np.prod(tensor.shape)) for tensor in stored.values())
    free = shutil.disk_usage(next(p for p in out.absolute().parents if p.is_dir())).free
    if size > free:
        raise ValueError(f"{out}: needs {size:,} bytes, and {free:,} are free on its disk: make room, or set {CACHE}")
    with whole_folder(out) as folder:
        special = write_tokenizer(folder, path, file.fields, config["vocab_size"])
        shapes = {name: (tensor.shape, str(np.dtype(tensor.dtype))) for name, tensor in stored.items()}
        with (
            progress(f"convert {path.name}", size, "bytes") as bar,
            filled_folder(folder, shapes) as fill,
        ):
            for name, tensor in stored.items():
                weight = tensor.read()
                fill(name, 0, weight)
                bar.advance(weight.nbytes)
        write_config(folder, _shape(file, config, special), shapes["model.embed_tokens.weight"][1])
        write_manifest(folder, {"kind": "export", "family": config["model_type"], "provenance": {"from": path.name}})


def _shape(file: GGUFFile, fields: Mapping[str, Any], special: Mapping[str, Any]) -> LlamaConfig:
    """Returns the model's shape; raises ValueError, naming the file, where its family cannot have it."""
    family = find_family(file.path, fields)
    return family.config(Fields(file.path, {**fields, **special}, special, family.defaults))


def hf_name(file: GGUFFile, name: str) -> str:
    """Returns the name in a HuggingFace folder of a tensor; raises ValueError for one that is not known."""
    stem, _, kind = name.rpartition(".")
    block, _, inner = stem.removeprefix("blk.").partition(".")
    if kind in ("weight", "bias"):
        if stem in TOP:
            return f"{TOP[stem]}.{kind}"
        if stem.startswith("blk.") and block.isdecimal() and inner in INNER:
            return f"model.layers.{block}.{INNER[inner]}.{kind}"
    raise ValueError(
        f"{file.path}: has the tensor {name!r}, which a {file.kind.model_type} does not have: import the HuggingFace "
        "folder of this model instead"
    )


def _stored_tensors(file: GGUFFile, fields: Mapping[str, Any]) -> dict[str, _StoredTensor]:
    """Returns the tensors by their names in a HuggingFace folder; raises ValueError where one lacks or is misshapen."""
    stored = {hf_name(file, name): _stored(file, name) for name in file.tensors if name != ROPE_FACTORS}
    expected = tensor_shapes(_shape(file, fields, {}))
    found = {name: tensor.shape for name, tensor in stored.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{file.path}: {name} has shape {found.get(name, 'absent')}, and the metadata call for "
                f"{expected.get(name, 'none')}: download the file again"
            )
    return stored


class _StoredTensor(NamedTuple):
    """A tensor of the file."""

    shape: tuple[int, ...]
    """Slowest axis first."""
    dtype: Any
    read: Callable[[], np.ndarray]


def _stored(file: GGUFFile, name: str) -> _StoredTensor:
    import gguf

    tensor = file.tensors[name]
    shape = tuple(int(n) for n in reversed(tensor.shape))
    kept = {gguf.GGMLQuantizationType.F16: np.float16, gguf.GGMLQuantizationType.BF16: ml_dtypes.bfloat16}
    dtype = kept.get(tensor.tensor_type, np.float32)
    heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}.get(name.split(".")[-2])
    count = file.count(heads, file.count("attention.head_count")) if heads and file.kind.turned_heads else None
    if count is not None and (not shape or shape[0] % (2 * count)):
        raise ValueError(f"{file.path}: tensor {name} of shape {shape} is not divided evenly by {count} heads")

    def read() -> np.ndarray:
        try:
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError, IndexError) as error:
            raise ValueError(
                f"{file.path}: tensor {name} is of type {tensor.tensor_type.name}, which gguf does not dequantize "
                f"({error}): take a file of another type"
            ) from error
        weight = np.asarray(weight).reshape(shape)
        return (weight if count is None else turn_heads(weight, count)).astype(dtype, copy=False)

    return _StoredTensor(shape, dtype, read)


def turn_heads(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of queries or keys with each head's halves one behind the other, from alternating ones."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


USED = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "vocab_size",
}  # fmt: skip
"""Keys of an architecture that `config_fields` uses."""
EMPTY = {
    "expert_count", "expert_used_count", "attention.sliding_window", "attn_logit_softcapping",
    "final_logit_softcapping", "rope.scaling.original_context_length", "rope.scaling.finetuned",
}  # fmt: skip
"""Keys that are fine where they are 0 or False."""


def config_fields(file: GGUFFile) -> dict[str, Any]:
    """Returns the fields of `config.json` that a file's metadata and tensors say; raises ValueError as `GGUFFile`."""
    kind, prefix = file.kind, f"{file.fields['general.architecture']}."
    for key in file.fields:
        inner = key.removeprefix(prefix)
        if key.startswith(prefix) and inner not in USED and not (inner in EMPTY and not file.fields[key]):
            raise ValueError(
                f"{file.path}: {key!r}={file.fields[key]!r} is not supported for GGUF: import the HuggingFace folder "
                "of this model instead"
            )
    if "token_embd.weight" not in file.tensors or len(file.tensors["token_embd.weight"].shape) != 2:
        raise ValueError(f"{file.path}: has no matrix token_embd.weight: download it again")
    # Damaged counts would be walked through for minutes.
    if file.count("block_count") > len(file.tensors):
        raise ValueError(
            f"{file.path}: {prefix}block_count={file.count('block_count')} is more than its {len(file.tensors)} "
            "tensors: download it again"
        )
    heads, width = file.count("attention.head_count"), file.count("embedding_length")
    channels = file.count("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if file.count(name, channels) != channels:
            raise ValueError(f"{file.path}: {prefix}{name}={file.find(name)} differs from the head's {channels}")
    fields = {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "intermediate_size": file.count("feed_forward_length"),
        "num_hidden_layers": file.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.count("attention.head_count_kv", heads),
        "head_dim": channels,
        "hidden_act": "silu",
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number("rope.freq_base", 10000.0),
        "max_position_embeddings": file.count("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if kind.model_type == "llama":
        fields["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    scaling = _rope_scaling(file, channels, fields["rope_theta"])
    return fields if scaling is None else fields | {"rope_scaling": scaling}


def shortest(value: float) -> float:
    """Returns the number with the fewest digits that is the same float32: 1e-05 for the nearest float32 to it."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GGUFFile, channels: int, theta: float) -> dict[str, Any] | None:
    """Returns `rope_scaling` of config.json: a linear factor, or Llama 3.1's, which the file stores as a tensor."""
    kind = file.find("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.number("rope.scaling.factor")}
    if kind != "none":
        raise ValueError(f"{file.path}: rope.scaling.type={kind!r} is not supported for GGUF; only 'linear' is")
    if ROPE_FACTORS not in file.tensors:
        return None
    factors = _stored(file, ROPE_FACTORS).read()
    scaling = RopeScaling("llama3", shortest(factors.max()))
    plain, scaled = rope_frequencies(channels, theta), rope_frequencies(channels, theta, scaling)
    # What else Llama 3.1's scaling has is the same in all its models, and not in the file.
    if factors.shape != plain.shape or not np.allclose(plain / scaled, factors, rtol=1e-4):
        raise ValueError(
            f"{file.path}: {ROPE_FACTORS} holds other factors than Llama 3.1's: import the HuggingFace folder instead"
        )
    return rope_fields(scaling)
