"""Three hundred damaged and hostile folders: each is refused in one sentence, writes nothing and allocates nothing."""

import json
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import write_target
from safetensors.numpy import load_file, save_file
from test_pickled import Hostile, torch_file
from test_published import LAYERS, head

from jaxspec.__main__ import main
from jaxspec.interchange.export import write

SOURCES = {"eagle": "sglang", "fspad": "eagle", "eagle3": "vllm", "peagle": "vllm", "medusa": "vllm"}
SLACK = 4 * 2**20
"""Bytes that reading flags, JSON and headers may take beside the folder's own."""
Draw = np.random.Generator


def header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of a safetensors file, its data as it is."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    told = json.loads(data[8 : 8 + size])
    change(told)
    text = json.dumps(told).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def some(told: dict[str, Any], draw: Draw, axes: int = 1) -> dict[str, Any]:
    """A tensor of a header, of at least so many axes, and not square."""
    names = [
        name
        for name, tensor in told.items()
        if name != "__metadata__" and name != "embed_tokens.weight" and tensor["dtype"] == "F32"
        and len(tensor["shape"]) >= axes and (axes < 2 or len(set(tensor["shape"])) > 1)
    ]  # fmt: skip
    return told[names[draw.integers(len(names))]]


def config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    told = json.loads((folder / "config.json").read_text())
    change(told)
    (folder / "config.json").write_text(json.dumps(told))


def tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, str(folder / "model.safetensors"))


def one_of(found: dict[str, np.ndarray], draw: Draw) -> str:
    names = sorted(name for name in found if name not in ("embed_tokens.weight", "t2d", "fc.bias", "lm_head.weight"))
    return names[draw.integers(len(names))]


def truncate(folder: Path, draw: Draw) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: draw.integers(path.stat().st_size)])


def truncate_config(folder: Path, draw: Draw) -> None:
    text = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(text[: draw.integers(len(text))])


def other_json(folder: Path, draw: Draw) -> None:
    texts = [b"[]", b"3", b"null", b"\xff\xfe", b'"x"', b"{" * 5000, b"[" * 100_000]
    (folder / "config.json").write_bytes(texts[draw.integers(len(texts))])


def absurd_header_length(folder: Path, draw: Draw) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2 ** int(draw.integers(34, 63))) + path.read_bytes()[8:])


def wrong_dtype(folder: Path, draw: Draw) -> None:
    header(folder, lambda told: some(told, draw).update(dtype=["I32", "U32", "F64", "F8_E4M3"][draw.integers(4)]))


def swapped_shape(folder: Path, draw: Draw) -> None:
    header(folder, lambda told: (t := some(told, draw, 2)).update(shape=t["shape"][::-1]))


def absurd_shape(folder: Path, draw: Draw) -> None:
    def change(told: dict[str, Any]) -> None:
        tensor = some(told, draw)
        tensor.update(shape=[2**40] * len(tensor["shape"]))
        if draw.integers(2):
            tensor["data_offsets"][1] = 2**60

    header(folder, change)


def no_tensor(folder: Path, draw: Draw) -> None:
    tensors(folder, lambda found: found.pop(one_of(found, draw)))


def renamed_tensor(folder: Path, draw: Draw) -> None:
    tensors(folder, lambda found: found.update(other=found.pop(one_of(found, draw))))


def extra_tensor(folder: Path, draw: Draw) -> None:
    names = ("layers.1.input_layernorm.weight", "layers.0.self_attn.q_proj.bias", "../x", "mask_hidden", "enorm.weight")
    tensors(folder, lambda found: found.update({names[draw.integers(len(names))]: np.ones(4, np.float32)}))


def cut_tensor(folder: Path, draw: Draw) -> None:
    def change(found: dict[str, np.ndarray]) -> None:
        name = one_of(found, draw)
        found[name] = found[name][:-1]

    tensors(folder, change)


def mixed_names(folder: Path, draw: Draw) -> None:
    tensors(folder, lambda found: found.update({"0.0.linear.weight": np.ones((3, 3), np.float32), "fc.weight": np.ones(
        (4, 8), np.float32), "layers.0.mlp.down_proj.weight": np.ones((4, 3), np.float32)}))  # fmt: skip


def traversal(folder: Path, draw: Draw) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    shard = ["../outside.safetensors", str(folder.parent / "outside.safetensors"), 3, None, "", ".."][draw.integers(6)]
    index = {"weight_map": {"fc.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bad_index(folder: Path, draw: Draw) -> None:
    (folder / "model.safetensors").unlink()
    texts = ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"fc.weight": "gone.safetensors"}}', '{"weight_map"']
    (folder / "model.safetensors.index.json").write_text(texts[draw.integers(len(texts))])


def other_files(folder: Path, draw: Draw) -> None:
    match draw.integers(4):
        case 0:
            (folder / "model.safetensors").unlink()
        case 1:
            (folder / "config.json").unlink()
        case 2:
            (folder / "model.safetensors").rename(folder / "a.safetensors")
            shutil.copyfile(folder / "a.safetensors", folder / "b.safetensors")
        case _:
            (folder / "model.safetensors").write_bytes(b"")


def hostile_pickle(folder: Path, draw: Draw) -> None:
    (folder / "model.safetensors").unlink()
    program = pickle.dumps({"fc.weight": Hostile(folder.parent / "ran")}, protocol=int(draw.integers(2, 6)))
    torch_file(folder / "pytorch_model.bin", program)


def absurd_storage(folder: Path, draw: Draw) -> None:
    """A tensor of 2^40 elements, on a storage that claims as many and holds four bytes; sometimes with strides 0."""
    (folder / "model.safetensors").unlink()
    count = 2**40
    where = [b"\x8a\x06" + count.to_bytes(6, "little"), b"K\x00" if draw.integers(2) else b"K\x01"]
    told = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + where[0] + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + told + b"K\x00" + where[0] + b"\x85" + where[1] + b"\x85"
    program = b"\x80\x02}X\x09\x00\x00\x00fc.weight" + call + b"\x89ccollections\nOrderedDict\n)RtRs."
    torch_file(folder / "pytorch_model.bin", program, {"0": bytes(4)})


def broken_zip(folder: Path, draw: Draw) -> None:
    torch_file(folder / "pytorch_model.bin", b"\x80\x02}X\x01\x00\x00\x00a}s.", {"0": bytes(100)})
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    if draw.integers(2):
        data = data[: draw.integers(len(data))]
    else:
        for at in draw.integers(0, len(data), 20):
            data[at] = draw.integers(256)
    path.write_bytes(data)


def zip_bomb(folder: Path, draw: Draw) -> None:
    (folder / "model.safetensors").unlink()
    parts = {"0": bytes(20 * 2**20)}
    torch_file(folder / "pytorch_model.bin", b"\x80\x02}.", parts, compression=zipfile.ZIP_DEFLATED)


MUTATIONS = [
    truncate, truncate_config, other_json, absurd_header_length, wrong_dtype, swapped_shape, absurd_shape, no_tensor,
    renamed_tensor, extra_tensor, cut_tensor, mixed_names, traversal, bad_index, other_files, hostile_pickle,
    absurd_storage, broken_zip, zip_bomb,
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    target = str(write_target(folder / "target", layers=LAYERS))
    for kind, server in SOURCES.items():
        write(server, folder / kind, head(kind), target)
        config(folder / kind, lambda told: told.pop("jaxspec"))
        (folder / kind / "jaxspec.json").unlink()
    return {kind: folder / kind for kind in SOURCES}


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which `jaxspec import drafter` refuses a folder."""
    room, size = folder.parent, sum(file.stat().st_size for file in folder.parent.rglob("*") if file.is_file())
    before = sorted(room.iterdir())
    tracemalloc.start()
    try:
        code = main(["import", "drafter", str(folder), str(room / "out")])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    told = capsys.readouterr().err
    assert code == 1 and told.count("\n") == 1 and "Traceback" not in told, told
    assert sorted(room.iterdir()) == before and peak < size + SLACK
    return told


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutated_folder_is_refused_in_a_sentence(
    mutation: Callable[[Path, Draw], None], sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for seed in range(16):
        kind = list(SOURCES)[seed % len(SOURCES)]
        room = tmp_path / str(seed)
        shutil.copytree(sources[kind], room / "folder")
        mutation(room / "folder", np.random.default_rng(seed))
        refused(room / "folder", capsys)


@pytest.mark.parametrize("mutation", [truncate, swapped_shape, traversal], ids=lambda mutation: mutation.__name__)
def test_some_of_them_always(
    mutation: Callable[[Path, Draw], None], sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(sources["eagle3"], tmp_path / "folder")
    mutation(tmp_path / "folder", np.random.default_rng(1))
    refused(tmp_path / "folder", capsys)
