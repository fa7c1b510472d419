"""Damaged and hostile PyTorch files are refused in a sentence, and nothing in them runs."""

import gzip
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dump_toys import torch_bytes

from jaxspec.interchange.pickled import open_pickled
from jaxspec.interchange.published import read_drafter


def torch_file(path: Path, program: bytes, parts: dict[str, bytes] | None = None, **how: Any) -> Path:
    with zipfile.ZipFile(path, "w", **how) as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in (parts or {}).items():
            archive.writestr(f"archive/data/{name}", data)
    return path


class Hostile:
    """An object whose unpickling creates the file `mark`."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for protocol in (2, 3, 4, 5):
        program = pickle.dumps({"fc.weight": Hostile(tmp_path / "ran")}, protocol=protocol)
        torch_file(folder / "pytorch_model.bin", program)
        with pytest.raises(ValueError, match=r"only tensors and plain containers are admitted|pickle uses"):
            read_drafter(folder)
        (folder / "pytorch_model.bin").write_bytes(program)
        with pytest.raises(ValueError, match="is no zip archive"):
            read_drafter(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (b"\x80\x02}", "exhausted"),
        (b"\x80\x02}q\x00h\x07.", "is not read"),
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "builtins.eval"),
        (b"\x80\x02cos\nsystem\n.", "os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"\x80\x02]q\x00h\x00a.", "no table of named tensors"),
        (b"\x80\x02}X\x01\x00\x00\x00ah\x00s.", "is not read"),
        (b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "is not read"),
        (b"garbage", "is not read"),
    ],
)
def test_broken_pickles_are_refused_in_a_sentence(program: bytes, sentence: str, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    torch_file(tmp_path / "pytorch_model.bin", program)
    with pytest.raises(ValueError, match=sentence):
        read_drafter(tmp_path)


def test_a_compressed_archive_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    parts = {"0": bytes(10**7)}
    torch_file(tmp_path / "pytorch_model.bin", b"\x80\x02}.", parts, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed or encrypted"):
        read_drafter(tmp_path)


def test_a_file_that_gzip_packed_holds_the_same_tensors(tmp_path: Path):
    tensors = {"a": np.arange(600, dtype=np.float32).reshape(100, 6), "b": np.arange(7)}
    whole, packed = tmp_path / "a.ckpt", tmp_path / "a.ckpt.gz"
    whole.write_bytes(torch_bytes(tensors))
    packed.write_bytes(gzip.compress(whole.read_bytes()))
    for path in (whole, packed):
        handles = open_pickled(path)
        for name, expected in tensors.items():
            np.testing.assert_array_equal(handles[name][:], expected)
        np.testing.assert_array_equal(handles["a"][40:50, 1:3], tensors["a"][40:50, 1:3])


@pytest.mark.parametrize("damage", ["cut", "a bit of the packed file", "a bit of a tensor"])
def test_a_damaged_file_that_gzip_packed_is_refused_in_a_sentence(damage: str, tmp_path: Path):
    data = bytearray(torch_bytes({"a": np.full((50, 6), 1.5, np.float32)}))
    if damage == "a bit of a tensor":
        data[data.index(np.full(9, 1.5, np.float32).tobytes())] ^= 1
    packed = bytearray(gzip.compress(bytes(data)))
    if damage == "a bit of the packed file":
        packed[-6] ^= 1
    (tmp_path / "a.ckpt.gz").write_bytes(packed[: len(packed) // 2] if damage == "cut" else packed)
    with pytest.raises(ValueError, match=r"a\.ckpt\.gz is truncated or corrupt .*: download it again"):
        open_pickled(tmp_path / "a.ckpt.gz")
