"""Weights as people have them: shards and indexes of safetensors and of PyTorch's files, prefixes, constants."""

import json
import shutil
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_weights, write_target
from safetensors.numpy import load_file, save_file

from jaxspec.__main__ import main
from jaxspec.checkpoints.models import drafter_config
from jaxspec.drafters import Eagle, EagleConfig, FspadConfig
from jaxspec.drafters.fspad import Fspad
from jaxspec.interchange.export import Exportable, write
from jaxspec.interchange.hf import fingerprint, load_tables, load_target, read_llama, stored_dtype, table_fingerprint
from jaxspec.interchange.pickled import PickledTensor, open_pickled
from jaxspec.interchange.published import published_family, read_drafter
from jaxspec.interchange.weight_files import open_weights_file

torch = pytest.importorskip("torch")

SHAPE = (32, 4, 2, 8, 64)
SHARDS = [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]


def tensor(array: np.ndarray) -> Any:
    return torch.from_numpy(np.array(array, order="C"))


def save_bins(folder: Path, listed: dict[str, str] | None = None, *, places: dict[str, int] | None = None) -> Path:
    """Moves a folder's safetensors into three PyTorch files with an index, which also lists `listed`.

    Tensors lie in the files of `places`, others in the last; without it, in turn.
    """
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: SHARDS[places.get(name, 2) if places else i % 3] for i, name in enumerate(sorted(stored))}
    for shard in SHARDS:
        torch.save({name: tensor(stored[name]) for name in names if names[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {**names, **(listed or {})}}))
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_target(tmp_path / "target", layers=2)


def write_head(folder: Path, target: Path, drafter: Any = None) -> Any:
    """A head as the papers' code reads it, with nothing of ours beside it; returns its weights."""
    module = drafter or Eagle(EagleConfig(*SHAPE))
    name = "fspad" if isinstance(module, Fspad) else "eagle"
    params = random_weights(module, 0.2, 3)
    write("eagle", folder, Exportable("drafter", params, drafter_config(name, module), {}), str(target))
    (folder / "jaxspec.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["jaxspec"]
    (folder / "config.json").write_text(json.dumps(config))
    return params


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


BUFFERS = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": SHARDS[i] for i in (0, 1)}


def test_a_target_in_shards_of_pytorchs_format_is_a_target(target: Path, tmp_path: Path):
    expected, mark = read_llama(target, dtype=jnp.float32)[1], fingerprint(target)
    save_bins(target, BUFFERS)  # the index lists constants that no file holds
    assert_same(load_target(target, dtype=jnp.float32).params, expected)
    assert fingerprint(target) == mark
    assert main(["import", "target", str(target), str(tmp_path / "in")]) == 0
    assert_same(load_target(tmp_path / "in", dtype=jnp.float32).params, expected)
    assert main(["generate", "x", "--target", str(target), "--max-new-tokens", "2"]) == 0


def test_a_target_in_one_file_of_pytorchs_format_has_its_tied_head_once(tmp_path: Path):
    folder = write_target(tmp_path / "target")
    stored = load_file(folder / "model.safetensors")
    expected = {**read_llama(folder, dtype=jnp.float32)[1]}
    del expected["head"], stored["lm_head.weight"]
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    tensors = {name: tensor(array) for name, array in stored.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # PyTorch stores their numbers once
    tensors["model.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_same(read_llama(folder, dtype=jnp.float32)[1], expected)


@pytest.mark.parametrize("drafter", [None, Fspad(FspadConfig(*SHAPE))], ids=["eagle", "fspad"])
@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model.", "_orig_mod.", "draft_model."])
def test_a_head_with_a_prefix_and_in_shards_is_a_head(prefix: str, drafter: Any, target: Path, tmp_path: Path):
    folder = tmp_path / "head"
    expected = write_head(folder, target, drafter)
    stored = load_file(folder / "model.safetensors")
    save_file({prefix + name: array for name, array in stored.items()}, folder / "model.safetensors")
    assert_same(read_drafter(folder).params, expected)
    save_bins(folder, {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": SHARDS[0]})
    assert_same(read_drafter(folder).params, expected)
    assert published_family(target) == "lm"


def test_a_file_with_other_names_and_a_trainers_files_beside_it_is_read(target: Path, tmp_path: Path):
    folder = tmp_path / "head"
    expected = write_head(folder, target)
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: tensor(array) for name, array in stored.items()}, folder / "head.pt")
    for name in ("optimizer.bin", "scheduler.bin", "training_args.bin"):
        (folder / name).touch()
    assert_same(read_drafter(folder).params, expected)


@pytest.mark.parametrize("read", [lambda f: read_llama(f, dtype=jnp.float32), lambda f: main(["inspect", str(f)])])
def test_what_an_index_is_wrong_about_is_named(
    read: Callable[[Path], Any], target: Path, capsys: pytest.CaptureFixture[str]
):
    save_bins(target, {"model.layers.1.mlp.extra.weight": SHARDS[1]})
    for sentence, change in (
        (f"says that {SHARDS[1]} holds model.layers.1.mlp.extra.weight, and it does not", lambda: None),
        (f"{SHARDS[2]} is listed in pytorch_model.bin.index.json but missing", (target / SHARDS[2]).unlink),
        ("is one of several files, and the index that lists them is missing", (target / INDEX).unlink),
    ):
        change()
        try:
            assert read(target) == 1
            told = capsys.readouterr().err
        except (ValueError, OSError) as error:
            told = str(error)
        assert sentence in told or "shards and their index" in told  # which a reader of heads says
        assert "\n" not in told.strip()


INDEX = "pytorch_model.bin.index.json"


def test_tables_are_read_from_their_shards_alone(target: Path):
    safe, params = table_fingerprint(target), load_tables(target, dtype=jnp.float32)[1]
    embed, norm, head = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    index = json.loads((save_bins(target, places={embed: 0, norm: 1, head: 1}) / INDEX).read_text())["weight_map"]
    (target / SHARDS[2]).unlink()
    assert_same(load_tables(target, dtype=jnp.float32)[1], params)
    assert table_fingerprint(target) == safe and stored_dtype(target) == "float32"
    (target / INDEX).write_text(json.dumps({"weight_map": {**index, norm: SHARDS[0]}}))
    with pytest.raises(ValueError, match=rf"{SHARDS[0]} holds {norm} by the folder's index, and it does not"):
        load_tables(target, dtype=jnp.float32)
    (target / SHARDS[0]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{SHARDS[0]} holds {embed} by the folder's index and is missing"):
        load_tables(target, dtype=jnp.float32)


def test_a_listed_weight_that_the_model_needs_is_missed_by_name(target: Path):
    save_bins(target)
    index = json.loads((target / INDEX).read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    shard = target / index[name]
    kept = {key: tensor(handle[:]) for key, handle in open_pickled(shard).items() if key != name}
    torch.save(kept, shard)
    with pytest.raises(ValueError, match=rf"says that {shard.name} holds {name}, and it does not"):
        read_llama(target, dtype=jnp.float32)


def test_a_flipped_bit_is_told_when_its_tensor_is_read(target: Path):
    save_bins(target)
    where = open_pickled(target / SHARDS[0])
    handle = next(iter(where.values()))
    assert isinstance(handle, PickledTensor)
    data = bytearray((target / SHARDS[0]).read_bytes())
    start = handle._part.start
    assert np.frombuffer(data, np.float32, 1, start)[0] == np.asarray(handle[:]).ravel()[0]
    data[start] ^= 1
    (target / SHARDS[0]).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{SHARDS[0]} is truncated or corrupt .*Bad CRC"):
        read_llama(target, dtype=jnp.float32)


def test_rows_of_a_tensor_are_read_alone(tmp_path: Path):
    whole = torch.arange(2**22, dtype=torch.float32).reshape(2**14, 2**8)
    kinds = {
        "plain": whole,
        "turned": whole.T,
        "part": whole[5:100, 3:7],
        "half": whole[:100].bfloat16(),
        "one": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "every other": whole[::2],
    }
    torch.save(kinds, tmp_path / "a.bin")
    handles = open_pickled(tmp_path / "a.bin")
    for name, expected in kinds.items():
        assert tuple(handles[name].get_shape()) == tuple(expected.shape)
        if expected.ndim:
            for index in (slice(None), slice(2, 5), (slice(1, 4), slice(0, 2)), (slice(None), slice(1, None))):
                found = np.asarray(handles[name][index]).astype(np.float32)
                np.testing.assert_array_equal(found, expected[index].float().numpy())
        else:
            assert np.asarray(handles[name][...]) == 3.5
    tracemalloc.start()
    _ = handles["plain"][100:110]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20  # of 16 MiB


def test_a_header_that_lies_about_its_place_is_refused(tmp_path: Path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as archive:
        entry = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    data = bytearray((tmp_path / "a.bin").read_bytes())
    data[entry.header_offset + 28 : entry.header_offset + 30] = b"\xff\xff"
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.bin"):
        open_weights_file(tmp_path / "a.bin", None)  # pyright: ignore[reportArgumentType]


def test_a_repository_without_safetensors_is_downloaded_in_pytorchs_format(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_bins(target)
    copy = tmp_path / "snapshots" / ("c" * 40)

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        shutil.copytree(
            target, copy, ignore=lambda _, names: {n for n in names if not any(map(Path(n).match, allow_patterns))},
            dirs_exist_ok=True,
        )  # fmt: skip
        return str(copy)

    fetched = Mock(side_effect=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fetched))
    assert main(["import", "target", "someone/model", str(tmp_path / "out")]) == 0
    first, second = (call.kwargs["allow_patterns"] for call in fetched.call_args_list)
    assert not any(".bin" in pattern for pattern in first) and "pytorch_model-*.bin" in second
