"""`jaxspec import target`: what is written loads with plain Orbax and as any target, in pieces, resumable, checked."""

import dataclasses
import hashlib
import json
import shutil
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp
from random_models import write_drafter, write_target
from safetensors.numpy import load_file, save_file

from jaxspec.__main__ import main
from jaxspec.checkpoints import piecewise
from jaxspec.checkpoints.folders import abstract_like
from jaxspec.checkpoints.manifest import MANIFEST
from jaxspec.checkpoints.models import load_model
from jaxspec.interchange import export, import_target
from jaxspec.interchange.export import TOKENIZER_FILES
from jaxspec.interchange.exported import target_config
from jaxspec.interchange.hf import fingerprint, load_tables, load_target, read_llama, stored_dtype, table_fingerprint
from jaxspec.interchange.hf_config import read_config
from jaxspec.interchange.hf_layout import tensor_shapes
from jaxspec.nn.options import Options
from jaxspec.nn.rope import RopeScaling
from jaxspec.parallel.mesh import make_mesh
from jaxspec.targets.decoder import DecoderConfig

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def split(folder: Path) -> Path:
    """The folder with its weights in three shards and an index."""
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: SHARDS[i % 3] for i, name in enumerate(sorted(stored))}
    for shard in SHARDS:
        save_file({name: stored[name] for name in names if names[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split(write_target(tmp_path_factory.mktemp("source"), layers=2))


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piecewise, "PIECE_BYTES", 3000)  # several a weight, the last of the embedding longer than is left
        assert main(["import", "target", str(source), str(out)]) == 0
    return out


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "source"))


def run(source: object, out: Path, code: int = 0, *flags: str) -> dict[str, Any]:
    """The JSON of an import."""
    path = out.with_name("result.json")
    assert main(["import", "target", str(source), str(out), "--json", str(path), *flags]) == code
    return json.loads(path.read_text()) if code == 0 else {}


def refused(capsys: pytest.CaptureFixture[str], source: object, out: Path, *flags: str) -> str:
    """The sentence with which an import is refused, nothing being written."""
    run(source, out, 1, *flags)
    assert not out.exists()
    return capsys.readouterr().err


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---- what is written


@pytest.mark.parametrize("axes", [(None,), ("layers",)], ids=["copied", "split"])
def test_plain_orbax_loads_it_on_any_mesh(source: Path, imported: Path, axes: Any):
    mesh = jax.make_mesh((2,), ("layers",))

    like = ocp.metadata(str(imported), "params").metadata
    specs = {name: jax.P(*axes) if name == "layers" else jax.P() for name in like}
    homes = {name: jax.tree.map(lambda _, s=specs[name]: NamedSharding(mesh, s), part) for name, part in like.items()}
    like = abstract_like(like, homes)
    found = ocp.load(str(imported), like, checkpointable_name="params")
    assert_same(found, read_llama(source, dtype=jnp.float32, stacked=True)[1])


def test_the_older_interface_of_orbax_loads_it_too(source: Path, imported: Path):
    expected = read_llama(source, dtype=jnp.float32, stacked=True)[1]
    like = jax.eval_shape(lambda: expected)
    assert_same(orbax.checkpoint.StandardCheckpointer().restore(imported / "params", like), expected)


def test_it_has_the_manifest_and_the_files_of_an_export(source: Path, imported: Path, tmp_path: Path):
    assert main(["export", str(source), str(tmp_path / "export")]) == 0
    ours, theirs = (json.loads((folder / MANIFEST).read_text()) for folder in (imported, tmp_path / "export"))
    for key in ("kind", "family", "config", "conventions", "tokenizer", "arrays", "format"):
        assert ours[key] == theirs[key], key
    there = {str(p.relative_to(imported)) for p in imported.rglob("*") if p.is_file()}
    assert set(ours["checksums"]) == there - {MANIFEST}
    assert {name for name in TOKENIZER_FILES if (source / name).is_file()} | {"params/embed/1.0"} < there


def test_every_number_keeps_its_dtype(copy: Path, tmp_path: Path):
    shard = copy / SHARDS[0]
    stored = load_file(shard)
    mixed = {n: a.astype(ml_dtypes.bfloat16 if "norm" not in n else np.float32) for n, a in stored.items()}
    save_file(mixed, shard)
    result = run(copy, tmp_path / "out")
    assert result["dtype"] == "bfloat16/float32"
    assert_same(read_llama(tmp_path / "out", dtype=jnp.float32)[1], read_llama(copy, dtype=jnp.float32)[1])


QWEN = {
    "model_type": "qwen3_moe", "vocab_size": 33, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 6, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def test_families_with_experts_and_norms_are_imported_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, draw = tmp_path / "hf", np.random.default_rng(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN))
    shapes = tensor_shapes(read_config(folder))
    save_file({n: draw.normal(size=s).astype(np.float16) for n, s in shapes.items()}, folder / "model.safetensors")
    monkeypatch.setattr(piecewise, "PIECE_BYTES", 400)
    run(folder, tmp_path / "out")
    assert read_config(tmp_path / "out") == read_config(folder)
    assert_same(read_llama(tmp_path / "out", dtype=jnp.float32)[1], read_llama(folder, dtype=jnp.float32)[1])


def test_a_config_survives_its_manifest():
    options = Options(windows=(4, None), local_theta=1e4, qk_norm=True, activation="gelu")
    scaling = RopeScaling("longrope", 4.0, factors=(1.0, 2.0))
    config = DecoderConfig(9, 8, 2, 2, 1, 4, 8, 5e5, scaling, eos_ids=(3, 4), family="gemma3_text", options=options)
    assert target_config(json.loads(json.dumps(dataclasses.asdict(config)))) == config


# ---- as a target


@pytest.mark.parametrize(
    ("written", "how"),
    [
        ("imported", {"stacked": True}),
        ("imported", {"quantized": True}),
        ("imported", {"mesh": (2, 2, 2)}),
        ("imported", {"mesh": (2, 2, 2), "stacked": True}),
        ("exported", {}),
    ],
    ids=str,
)
def test_it_is_read_as_its_source_is(source: Path, imported: Path, tmp_path: Path, written: str, how: Any):
    if written == "exported":
        assert main(["export", str(source), str(tmp_path / "out")]) == 0
    how = {**how, "mesh": make_mesh(*how["mesh"])} if "mesh" in how else how
    ours, found = read_llama(imported if written == "imported" else tmp_path / "out", dtype=jnp.bfloat16, **how)
    module, expected = read_llama(source, dtype=jnp.bfloat16, **how)
    assert ours == module
    assert_same(found, expected)
    assert jax.tree.map(lambda a: a.sharding, found) == jax.tree.map(lambda a: a.sharding, expected)


def texts(result: Path, target: Path, *flags: str) -> list[Any]:
    head = ("--target", str(target), "--max-new-tokens", "16", "--json", str(result))
    assert main(["generate", "how much is 2 and 3?", *head, *flags]) == 0
    return [row["token_ids"] for row in json.loads(result.read_text())["rows"]]


def test_its_texts_are_those_of_its_source(source: Path, imported: Path, tmp_path: Path):
    drafter, result = str(write_drafter(tmp_path / "head")), tmp_path / "x.json"
    plain = texts(result, source)
    assert texts(result, imported) == plain == texts(result, imported, "--drafter", drafter, "--tree", "chain:2")


def test_tables_dtype_and_fingerprint_are_those_of_its_source(source: Path, imported: Path):
    assert_same(load_tables(imported, dtype=jnp.float32)[1], load_tables(source, dtype=jnp.float32)[1])
    assert stored_dtype(imported) == stored_dtype(source) == "float32"
    assert fingerprint(imported) == fingerprint(source)
    assert table_fingerprint(imported) == table_fingerprint(source) != fingerprint(source)


def test_a_damaged_piece_is_named_where_it_is_read(imported: Path, tmp_path: Path):
    out = Path(shutil.copytree(imported, tmp_path / "out"))
    (out / "params" / "layers.gate" / "1.0.0").write_bytes(b"\0" * 2)
    load_tables(out, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"layers\.gate/1\.0\.0: its contents changed"):
        load_target(out, dtype=jnp.float32)


def test_a_drafter_is_no_target(tmp_path: Path):
    with pytest.raises(ValueError, match="holds a drafter, not a target"):
        load_target(write_drafter(tmp_path / "head"), dtype=jnp.float32)


# ---- memory and interruptions


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_no_more_than_a_few_pieces_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any):
    """By an import, and by an export of a target, which casts if it is told to."""
    folder = tmp_path / "hf"
    folder.mkdir()
    fields = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 8, **fields}))
    shapes = tensor_shapes(read_config(folder))
    save_file({n: np.ones(s, ml_dtypes.bfloat16) for n, s in shapes.items()}, folder / "model.safetensors")
    monkeypatch.setattr(piecewise, "PIECE_BYTES", 2**18)
    tracemalloc.start()
    if dtype is None:
        assert import_target.import_target(folder, tmp_path / "out", name="x").bytes > 24e6
    export.write("orbax", tmp_path / "exported", export.find_model(str(folder), dtype=dtype))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6
    assert load_model(tmp_path / "exported")[0]["embed"].dtype == (dtype or jnp.bfloat16)


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Makes the disk full after so many pieces."""
    write, left = Path.write_bytes, [count]

    def full(self: Path, data: Any) -> int:
        if self.name.endswith(".draft"):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)


def test_an_interrupted_import_goes_on_where_it_stopped(
    copy: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(piecewise, "PIECE_BYTES", 3000)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 12)
        assert "No space left" in refused(capsys, copy, out)
    left = tmp_path / ".out.partial"
    files = [json.loads(line)["file"] for line in (left / piecewise.JOURNAL).read_text().splitlines()[1:]]
    assert 0 < len(files) <= 12
    damaged = left / files[0]
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    result = run(copy, out)
    kept = sum((out / file).stat().st_size for file in files[1:])
    assert result["kept_bytes"] == kept > 0 and not left.exists()
    ours, theirs = (json.loads((folder / MANIFEST).read_text())["checksums"] for folder in (out, imported))
    assert {n: s for n, s in ours.items() if n.startswith("params/")} == {
        n: s for n, s in theirs.items() if n.startswith("params/")
    }
    assert_same(read_llama(out, dtype=jnp.float32)[1], read_llama(copy, dtype=jnp.float32)[1])


def test_nothing_is_kept_of_another_source(
    copy: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        refused(capsys, source, tmp_path / "out")
    stored = load_file(copy / SHARDS[1])
    save_file({name: array * 2 for name, array in stored.items()}, copy / SHARDS[1])
    assert run(copy, tmp_path / "out")["kept_bytes"] == 0
    assert_same(read_llama(tmp_path / "out", dtype=jnp.float32)[1], read_llama(copy, dtype=jnp.float32)[1])


# ---- what is refused


def test_an_index_that_is_wrong_about_a_file_is_refused(copy: Path, tmp_path: Path, capsys: Any):
    index = copy / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    index.write_text(
        json.dumps({"weight_map": {**listed, "model.norm.weight": SHARDS[0], "lm_head.weight": SHARDS[1]}})
    )
    assert "download both again" in refused(capsys, copy, tmp_path / "out")


def test_a_shard_of_another_length_than_its_header_says_is_refused(copy: Path, tmp_path: Path, capsys: Any):
    with (copy / SHARDS[2]).open("ab") as file:
        file.write(b"\0")
    assert "truncated or corrupt" in refused(capsys, copy, tmp_path / "out")


def note(path: Path, digest: str) -> None:
    notes = path.parent / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / f"{path.name}.metadata").write_text(f"{'c' * 40}\n{digest}\n1700000000.0\n")


def name_by(path: Path, digest: str) -> None:
    path.rename(path.with_name(digest))
    path.symlink_to(digest)


@pytest.mark.parametrize(
    "give",
    [
        lambda path, digest: path.with_name(f"{path.name}.sha256").write_text(digest),
        lambda path, digest: path.with_name("SHA256SUMS").write_text(f"{'0' * 64}  other\n{digest} *{path.name}\n"),
        note,
        name_by,
    ],
    ids=["beside the file", "of the folder", "notes of the hub", "name in the hub's cache"],
)
def test_a_digest_that_is_given_is_held_to(copy: Path, tmp_path: Path, capsys: Any, give: Any):
    path = copy / SHARDS[1]
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    give(path, right)
    assert run(copy, tmp_path / "out")["checked_files"] == 1
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert "download it again" in refused(capsys, copy, tmp_path / "again")


def test_a_disk_that_is_too_small_is_told_of_at_once(copy: Path, tmp_path: Path, monkeypatch: Any, capsys: Any):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "1,000 are free" in refused(capsys, copy, tmp_path / "out")


def test_an_import_is_not_imported_again(imported: Path, tmp_path: Path, capsys: Any):
    assert "copy its folder" in refused(capsys, imported, tmp_path / "out")


# ---- repositories


def test_a_repository_is_downloaded_without_what_is_not_needed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = tmp_path / "snapshots" / ("c" * 40)
    download = Mock(side_effect=lambda name, **how: str(shutil.copytree(source, copy)))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    run("someone/model", tmp_path / "out", 0, "--revision", "v1")
    (name,), how = download.call_args
    assert (name, how["revision"]) == ("someone/model", "v1")
    assert {"config.json", "tokenizer.json", "model-*.safetensors"} < set(how["allow_patterns"])
    provenance = json.loads((tmp_path / "out" / MANIFEST).read_text())["provenance"]
    assert (provenance["from"], provenance["revision"]) == ("someone/model", "c" * 40)


def test_what_is_no_folder_and_no_repository_is_said(tmp_path: Path, monkeypatch: Any, capsys: Any):
    fail = Mock(side_effect=FileNotFoundError("404 Client Error.\n\nRepository Not Found"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fail))
    assert "(404 Client Error.)" in refused(capsys, "someone/model", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused(capsys, "someone/model", tmp_path / "out")
    assert "no such folder" in refused(capsys, tmp_path / "absent", tmp_path / "out")
    assert "leave --revision out" in refused(capsys, "tiny", tmp_path / "out", "--revision", "v1")
