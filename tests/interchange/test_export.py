"""`jaxspec export`: Orbax checkpoints with a manifest that load without jaxspec, whole or in part, on any mesh."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp
from random_models import SIZE, random_weights, write_drafter, write_target
from safetensors.numpy import load_file, save_file

from jaxspec.__main__ import main
from jaxspec.checkpoints import models, runs
from jaxspec.checkpoints.manifest import COMMITTED, MANIFEST, conventions
from jaxspec.checkpoints.models import drafter_config, load_drafter, load_model
from jaxspec.checkpoints.runs import RunCheckpoints
from jaxspec.checkpoints.tracking import export_of, session
from jaxspec.distillation.task import TrainState
from jaxspec.drafters import Eagle, EagleConfig
from jaxspec.interchange import exported, hf, tensors
from jaxspec.interchange.hf import read_llama, stored_dtype, write_llama
from jaxspec.interchange.hf_config import read_config
from jaxspec.interchange.hf_layout import tensor_shapes
from jaxspec.nn.layer_weights import layer_shapes
from jaxspec.parallel.mesh import AXIS_RULES, make_mesh
from jaxspec.targets.decoder import DecoderConfig

FORMATS = (Path(__file__).resolve().parents[2] / "docs/formats.md").read_text(encoding="utf-8")
HEAD = Eagle(EagleConfig(width=32, heads=4, kv_heads=2, head_dim=8, mlp=64))


def printed_lines(out: Path) -> list[str]:
    """The two pieces of code about Orbax in docs/formats.md, for the folder `out`."""
    blocks = [b for b in re.findall(r"```python\n(.*?)```", FORMATS, re.DOTALL) if "ocp." in b]
    assert len(blocks) == 2 and len([line for line in blocks[0].splitlines() if line]) == 7
    return [block.replace('"OUT"', repr(str(out))) for block in blocks]


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported drafter."""
    folder = tmp_path_factory.mktemp("drafter")
    write_drafter(folder / "drafter")
    assert main(["export", str(folder / "drafter"), "--to", "orbax", str(folder / "out")]) == 0
    return folder / "out"


def test_the_printed_lines_load_it_on_eight_devices(drafter: Path):
    assert jax.device_count() == 8
    names: dict[str, Any] = {}
    for block in printed_lines(drafter):
        exec(block, names)
    expected = load_drafter(drafter).params
    assert_same(names["params"], expected)
    assert all(len(a.sharding.device_set) == 8 for a in jax.tree.leaves(names["params"]))
    np.testing.assert_array_equal(names["fc"], expected["fc"])


def test_the_printed_lines_load_it_on_one_device_without_jaxspec(drafter: Path, tmp_path: Path):
    write = "import sys, numpy; numpy.savez(sys.argv[1], fc_alone=fc, **params); assert 'jaxspec' not in sys.modules"
    code = "\n".join([*printed_lines(drafter), write])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.npz"], env=environment, check=True, cwd=tmp_path)
    found = dict(np.load(tmp_path / "a.npz"))
    expected = load_drafter(drafter).params
    np.testing.assert_array_equal(found.pop("fc_alone"), expected["fc"])
    assert_same(found, jax.device_get(expected))


def test_the_axes_of_the_manifest_split_it_over_a_mesh(drafter: Path):
    mesh = make_mesh(2, 2, 2)
    manifest = json.loads((drafter / MANIFEST).read_text())

    def home(path: Any, a: Any) -> jax.ShapeDtypeStruct:
        axes = manifest["arrays"][jax.tree_util.keystr(path, simple=True, separator="/")]["axes"]
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P(*(AXIS_RULES[x] for x in axes))))

    like = jax.tree_util.tree_map_with_path(home, ocp.metadata(str(drafter), "params").metadata)
    found = ocp.load(str(drafter), like, checkpointable_name="params")
    assert found["qkv"].sharding.spec == P("fsdp", "tensor", None, None)
    assert_same(found, load_drafter(drafter).params)


def test_the_older_interface_of_orbax_loads_it_too(drafter: Path):
    expected = load_drafter(drafter).params
    found = orbax.checkpoint.StandardCheckpointer().restore(drafter / "params", jax.eval_shape(lambda: expected))
    assert_same(found, expected)


def test_no_file_of_it_names_the_place_where_it_was_made(drafter: Path):
    files = [path for path in drafter.rglob("*") if path.is_file()]
    assert any(path.name == COMMITTED for path in files)  # Orbax still writes one, which named the place
    assert not [path.name for path in files if str(drafter.parent).encode() in path.read_bytes()]


def test_its_manifest_says_what_a_drafter_is(drafter: Path):
    manifest = json.loads((drafter / MANIFEST).read_text())
    assert (manifest["kind"], manifest["family"], manifest["config"]["drafter"]) == ("drafter", "eagle", "eagle")
    assert manifest["arrays"]["fc"] == {"shape": [64, 32], "dtype": "float32", "axes": [None, "width"]}
    assert manifest["conventions"] == conventions() and manifest["checksums"]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_target(tmp_path / "target")


def test_a_target_is_exported_with_its_tokenizer(target: Path, tmp_path: Path):
    assert main(["export", str(target), str(tmp_path / "out"), "--json", str(tmp_path / "x.json")]) == 0
    params, config = load_model(tmp_path / "out", kind="target")
    assert_same(params, read_llama(target, dtype=jnp.float32, stacked=True)[1])
    assert config["vocab"] == SIZE and config["eos_ids"]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (target / name).read_bytes()
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["tokenizer"]["vocab"] == SIZE and manifest["arrays"]["layers/qkv"]["axes"] == [
        None,
        "width",
        "kv_heads",
        None,
        None,
    ]
    told = json.loads((tmp_path / "x.json").read_text())
    assert told["parameters"] == sum(a.size for a in jax.tree.leaves(params)) and told["exportable_to"] == [
        "orbax",
        "hf",
    ]
    assert (told["kind"], told["family"], told["dtype"], told["format"]) == ("target", "llama", "float32", "orbax")


def test_weights_keep_their_dtype_unless_told_otherwise(target: Path, tmp_path: Path):
    module, params = read_llama(target, dtype=jnp.float32)
    write_llama(target, params, module.config, dtype="bfloat16")
    assert stored_dtype(target) == "bfloat16"
    for flags, dtype in (([], jnp.bfloat16), (["--dtype", "fp32"], jnp.float32)):
        assert main(["export", str(target), str(tmp_path / "out"), "--overwrite", *flags]) == 0
        assert load_model(tmp_path / "out")[0]["embed"].dtype == dtype


SHAPE = {
    "vocab_size": 33, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "head_dim": 6,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "norm_topk_prob": True,
}
FAMILIES = {"phi3": {}, "qwen3_moe": EXPERTS, "gemma2": {"head_dim": 6, "sliding_window": 4}}


def random_folder(folder: Path, family: str) -> Path:
    """A HuggingFace folder of this family, norms in fp32 and the rest in bf16."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": family, **SHAPE, **FAMILIES[family]}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5], "temperature": 0.6}')
    draw = np.random.default_rng(0)
    stored = {
        name: draw.normal(size=shape).astype(np.float32 if "norm" in name else ml_dtypes.bfloat16)
        for name, shape in tensor_shapes(read_config(folder)).items()
    }
    save_file(stored, folder / "model.safetensors")
    return folder


def written(folder: Path) -> dict[str, Any]:
    return dict(load_file(folder / "model.safetensors"))


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes restoring a whole array fail."""
    monkeypatch.setattr(ocp, "load", Mock(side_effect=AssertionError("a whole array is restored")))


class CountedArray:
    """A stored array that appends the size of every block that is read to `blocks`."""

    def __init__(self, array: Any, blocks: list[int]):
        self.array, self.blocks, self.chunk_layout, self.dtype = array, blocks, array.chunk_layout, array.dtype

    def __getitem__(self, block: Any) -> Any:
        self.blocks.append(self.array[block].size)
        return self.array[block]


def test_a_target_that_would_not_be_read_is_refused(drafter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(drafter), str(tmp_path / "out"), "--target", "nope"]) == 1
    told = capsys.readouterr().err
    assert (
        "--target is for hf, eagle, sglang" in told and "orbax needs none" in told and not (tmp_path / "out").exists()
    )
    assert main(["inspect", str(drafter), "--target", "nope"]) == 1
    assert "--target is for published heads" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["import target", "export"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_that_came_in_goes_out_as_it_was_a_layer_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, how: str
):
    folder = random_folder(tmp_path / "hf", family)
    assert main([*how.split(), str(folder), str(tmp_path / "in")]) == 0
    refuse_to_load(monkeypatch)
    opened, blocks = exported._open, []
    monkeypatch.setattr(exported, "_open", lambda *where: CountedArray(opened(*where), blocks))
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert_same(written(tmp_path / "out"), written(folder))
    assert read_config(tmp_path / "out") == read_config(folder)
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"eos_token_id": [2, 5], "temperature": 0.6}'
    whole = {name: math.prod(array.shape) for name, array in written(folder).items()}
    assert sum(blocks) == sum(whole.values())  # each number is read once
    assert max(blocks) <= max(math.prod(s) for s in layer_blocks(folder))


def layer_blocks(folder: Path) -> list[tuple[int, ...]]:
    """Shapes of the weights of one layer, and of those beside the layers."""
    config = read_config(folder)
    return [*layer_shapes(config, config.options).values(), (config.vocab, config.width)]


def test_an_export_of_a_target_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = random_folder(tmp_path / "hf", "phi3")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(hf, "_fill", Mock(wraps=hf._fill, side_effect=[DEFAULT, DEFAULT, DEFAULT, KeyboardInterrupt]))
    assert main(["export", str(folder), str(tmp_path / "out"), "--to", "hf"]) == 130
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_family_cannot_say_is_refused_before_anything_is_written(tmp_path: Path):
    config = read_config(random_folder(tmp_path / "hf", "phi3"))
    assert isinstance(config, DecoderConfig)
    params = read_llama(tmp_path / "hf", dtype=jnp.float32)[1]
    normed = dataclasses.replace(config, options=dataclasses.replace(config.options, qk_norm=True))
    for layer in params["layers"]:
        layer |= {"q_norm": jnp.ones(4), "k_norm": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"a phi3 cannot say in its config\.json that qk_norm=True"):
        write_llama(tmp_path / "out", params, normed)
    assert not (tmp_path / "out").exists()


def inspected(folder: Path, result: Path) -> dict[str, Any]:
    assert main(["inspect", str(folder), "--json", str(result)]) == 0
    return json.loads(result.read_text())


def test_inspecting_a_target_restores_no_weight(
    target: Path, drafter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert main(["export", str(target), str(tmp_path / "out")]) == 0
    expected = load_model(tmp_path / "out")[0]
    refuse_to_load(monkeypatch)
    monkeypatch.setattr(exported, "_open", None)
    monkeypatch.setattr(tensors.FileTensor, "__getitem__", None)
    of_folder, of_export = (inspected(folder, tmp_path / "x.json") for folder in (target, tmp_path / "out"))
    assert of_export["shapes"] == of_folder["shapes"]
    assert of_export["parameters"] == sum(a.size for a in jax.tree.leaves(expected))
    assert (of_export["dtype"], of_export["exportable_to"]) == ("float32", ["orbax", "hf"])
    monkeypatch.undo()  # of a drafter, whether vLLM serves it depends on a bias
    assert inspected(drafter, tmp_path / "x.json")["shapes"]["fc"] == [64, 32]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three steps, the second of which is the best."""
    folder, best_metric = tmp_path / "run", runs.BestMetric("simulated_tau", rising=True)
    facts = {
        "name": "toy",
        "kind": "train",
        "steps": 9,
        "config": {"seed": 1, "export_folder": "runs/toy/drafter"},
        "best_metric": best_metric._asdict(),
        "model": {"kind": "drafter", "config": drafter_config("eagle", HEAD, {"target": "tiny"}), "tokenizer": None},
    }
    with session(folder, facts), RunCheckpoints(folder, keep=9, best_metric=best_metric) as checkpoints:
        for step, tau in ((3, 2.0), (6, 4.0), (9, 3.0)):
            state = TrainState(
                random_weights(HEAD, 0.2, step), {"mu": jnp.zeros(5)}, jnp.int32(step), jax.random.key(0)
            )
            checkpoints.save(step, state, {}, {}, metrics={"simulated_tau": tau})
    return folder


@pytest.mark.parametrize(("flags", "step"), [([], 6), (["--step", "last"], 9), (["--step", "3"], 3)])
def test_a_run_gives_its_best_step_or_the_one_that_is_named(run: Path, tmp_path: Path, flags: list[str], step: int):
    assert main(["export", str(run), str(tmp_path / "out"), *flags]) == 0
    found = load_drafter(tmp_path / "out")
    assert_same(found.params, random_weights(HEAD, 0.2, step))
    assert found.module == HEAD and found.about == {"target": "tiny"}
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert (manifest["provenance"]["run"], manifest["provenance"]["step"]) == ("toy", step)
    assert manifest["metrics"] == {"simulated_tau": {3: 2.0, 6: 4.0, 9: 3.0}[step]}


def test_what_cannot_be_exported_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    for name, flags, sentence in (
        (run, ["--step", "4"], "has no step '4'; give best, last or one of 3, 6, 9"),
        (run / "3", [], "holds a run; name the folder of the run that it belongs to"),
        (tmp_path / "absent", [], "absent: there is no such folder; give that of a run, a drafter or a target"),
        (tmp_path / "empty", [], "neither a run (run.json), nor a drafter of jaxspec (jaxspec.json), nor a target"),
    ):
        assert main(["export", str(name), str(tmp_path / "out"), *flags]) == 1
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_above_models_names_those_below_it(
    run: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    above = tmp_path / "above"
    shutil.copytree(run, above / "deeper" / "run")
    write_drafter(above / "drafter")
    assert main(["inspect", str(above)]) == 1
    assert capsys.readouterr().err.endswith(f"; found below it: {above}/deeper/run, {above}/drafter\n")
    assert main(["generate", "x", "--target", str(target), "--drafter", str(above)]) == 1
    assert f"found below it: {above}/deeper/run, {above}/drafter" in capsys.readouterr().err
    assert main(["generate", "x", "--target", str(target), "--drafter", str(above / "deeper" / "run")]) == 1
    assert f"{above}/deeper/run: the folder of a run, not a model: `jaxspec export" in capsys.readouterr().err


def test_what_is_there_is_replaced_only_when_asked_and_only_if_it_is_an_export(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["export", str(run), str(tmp_path / "out")]
    assert main([*words, "--step", "3"]) == 0
    assert main(words) == 1
    assert "out: is there already; give another folder, or --overwrite to replace it" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert_same(load_drafter(tmp_path / "out").params, random_weights(HEAD, 0.2, 6))
    assert main(["export", str(run), str(run), "--overwrite"]) == 1
    assert "holds something that jaxspec did not export, so it is left alone" in capsys.readouterr().err


def test_an_export_that_is_interrupted_leaves_nothing_half(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(models, "write_manifest", Mock(side_effect=KeyboardInterrupt))
    assert main(["export", str(run), str(tmp_path / "out")]) == 130
    assert sorted(tmp_path.iterdir()) == before


def test_a_target_keeps_the_name_of_its_weights_while_it_keeps_their_bits(target: Path, tmp_path: Path):
    marks = hf.fingerprint(target), hf.table_fingerprint(target)
    source = target
    for name in ("once", "twice"):
        assert main(["export", str(source), str(tmp_path / name)]) == 0
        source = tmp_path / name
        assert (hf.fingerprint(source), hf.table_fingerprint(source)) == marks
    assert main(["export", str(source), str(tmp_path / "cast"), "--dtype", "bf16"]) == 0
    assert hf.fingerprint(tmp_path / "cast") != marks[0]


def test_a_target_is_not_written_with_anothers_ids(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = write_target(tmp_path / "other")
    assert main(["export", str(target), str(tmp_path / "out"), "--to", "hf", "--target", str(other)]) == 1
    assert "is a target itself: leave it out" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_export_behind_a_link_is_replaced_where_the_link_leads(drafter: Path, tmp_path: Path):
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large")
    for flags in ([], ["--overwrite"], ["--overwrite"]):
        assert main(["export", str(drafter), str(tmp_path / "out"), *flags]) == 0
        assert (tmp_path / "out").is_symlink() and (tmp_path / "large" / MANIFEST).is_file()
    load_drafter(tmp_path / "out")


def test_the_export_of_a_run_is_found_from_anywhere(tmp_path: Path):
    run = tmp_path / "home" / "runs" / "toy"
    record = {"config": {"export_folder": "runs/toy/export", "checkpoint": {"folder": "runs/toy"}}}
    with pytest.raises(ValueError, match="runs/toy/export, is not here, and it holds the tokenizer"):
        export_of(run, record)
    (run / "export").mkdir(parents=True)
    assert export_of(run, record) == run / "export"
    moved = {"config": {"export_folder": "exports/toy", "checkpoint": {"folder": "runs/toy"}}}
    (tmp_path / "home" / "exports" / "toy").mkdir(parents=True)
    assert export_of(run, moved) == tmp_path / "home" / "exports" / "toy"
