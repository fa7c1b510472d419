"""Drafters in and out: every kind through every layout that holds it, and what is refused before a byte is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from random_models import SIZE, random_weights, write_target
from safetensors.numpy import load_file, save_file

from jaxspec.__main__ import main
from jaxspec.checkpoints.models import drafter_config, load_drafter
from jaxspec.drafters import (
    DRAFTERS,
    Eagle3Config,
    EagleConfig,
    FspadConfig,
    MedusaConfig,
    ParallelSpecConfig,
    PEagleConfig,
)
from jaxspec.interchange import export, medusa
from jaxspec.interchange.export import Exportable, write
from jaxspec.interchange.layout import stored_tensors
from jaxspec.interchange.published import published_family, read_drafter
from jaxspec.interchange.servers import SERVERS
from jaxspec.serving.loading import open_drafter

WIDTH, LAYERS = 32, 7
SHAPE = (WIDTH, 4, 2, 6, 20)
SOME = tuple(range(3, 120, 3))
HEADS: dict[str, tuple[str, Any, tuple[int, ...] | None]] = {
    "eagle": ("eagle", EagleConfig(*SHAPE), None),
    "eagle without bias": ("eagle", EagleConfig(*SHAPE, rope_theta=5e5, bias=False), None),
    "eagle with biases": ("eagle", EagleConfig(*SHAPE, bias=False, qkv_bias=True), None),
    "hass norms": ("eagle", EagleConfig(*SHAPE, embedding_norm=True, head_norm=True), None),
    "fspad": ("fspad", FspadConfig(*SHAPE), None),
    "fspad without sampling": ("fspad", FspadConfig(*SHAPE, feature_sampling=False), None),
    "fspad without alignment": ("fspad", FspadConfig(*SHAPE, partial_alignment=False, bias=False), None),
    "eagle3": ("eagle3", Eagle3Config(*SHAPE, vocab=len(SOME), taps=(2, 3, 4)), SOME),
    "eagle3 norm first": (
        "eagle3",
        Eagle3Config(*SHAPE, vocab=len(SOME), taps=(2, 3, 4), norm_before_residual=True),
        SOME,
    ),
    "eagle3 of all tokens": ("eagle3", Eagle3Config(*SHAPE, vocab=SIZE, taps=(2, 3, 4)), None),
    "eagle3 of other layers": ("eagle3", Eagle3Config(*SHAPE, vocab=len(SOME), taps=(1, 3, 5)), SOME),
    "eagle3.1": (
        "eagle3",
        Eagle3Config(
            *SHAPE, vocab=len(SOME), taps=(2, 3, 4), input_norm=True, tap_norms=True, normed_feature=True, qkv_bias=True
        ),
        SOME,
    ),
    "eagle3.1 of two norms": (
        "eagle3",
        Eagle3Config(*SHAPE, vocab=len(SOME), taps=(2, 3, 4), tap_norms=True, normed_feature=True),
        SOME,
    ),
    "eagle3 norm before fc": ("eagle3", Eagle3Config(*SHAPE, vocab=SIZE, taps=(2, 3, 4), input_norm=True), None),
    "eagle3 normed queries": (
        "eagle3",
        Eagle3Config(*SHAPE, vocab=SIZE, taps=(2, 3, 4), qk_norm=True, norm_before_residual=True),
        None,
    ),
    "eagle3 narrow": (
        "eagle3",
        Eagle3Config(24, 4, 2, 6, 20, vocab=len(SOME), taps=(2, 3, 4), target_width=WIDTH, embed_vocab=SIZE),
        SOME,
    ),
    "eagle3 own embedding": ("eagle3", Eagle3Config(*SHAPE, vocab=SIZE, taps=(2, 3, 4), embed_vocab=SIZE), None),
    "peagle": (
        "peagle",
        PEagleConfig(*SHAPE, vocab=len(SOME), taps=(2, 3, 4), tokens=5, layers=3, mask_token=7, embed_vocab=SIZE),
        SOME,
    ),
    "peagle of one layer": (
        "peagle",
        PEagleConfig(*SHAPE, vocab=SIZE, taps=(1, 3, 5), layers=1, mask_token=7, norm_before_residual=True),
        None,
    ),
    "peagle with biases": (
        "peagle",
        PEagleConfig(*SHAPE, vocab=SIZE, taps=(2, 3, 4), layers=2, mask_token=7, qkv_bias=True, out_bias=True),
        None,
    ),
    "peagle with norms": (
        "peagle",
        PEagleConfig(*SHAPE, vocab=SIZE, taps=(2, 3, 4), layers=2, mask_token=7, tap_norms=True, qk_norm=True),
        None,
    ),
    "medusa": ("medusa", MedusaConfig(WIDTH, 3, vocab=SIZE), None),
    "medusa of two blocks": ("medusa", MedusaConfig(WIDTH, 3, layers=2), None),
    "parallelspec": ("parallelspec", ParallelSpecConfig(*SHAPE), None),
}
SERVED = {
    "eagle": ["orbax", "eagle", "sglang", "vllm"],
    "eagle without bias": ["orbax", "eagle", "sglang", "vllm"],
    "eagle with biases": ["orbax", "eagle"],
    "fspad": ["orbax", "eagle"],
    "fspad without sampling": ["orbax", "eagle"],
    "fspad without alignment": ["orbax", "eagle"],
    "eagle3": ["orbax", "eagle", "sglang", "vllm", "speculators", "sglang-jax", "tpu-inference"],
    "eagle3 norm first": ["orbax", "vllm", "speculators", "tpu-inference"],
    "eagle3 of all tokens": ["orbax", "eagle", "sglang", "vllm", "speculators", "sglang-jax", "tpu-inference"],
    "eagle3 of other layers": ["orbax", "sglang", "vllm", "speculators"],
    "eagle3.1": ["orbax"],
    "eagle3.1 of two norms": ["orbax", "vllm", "speculators"],
    "eagle3 norm before fc": ["orbax", "vllm", "speculators"],
    "eagle3 normed queries": ["orbax", "speculators"],
    "eagle3 narrow": ["orbax", "eagle", "sglang", "vllm"],
    "eagle3 own embedding": ["orbax", "vllm", "speculators"],
    "peagle": ["orbax", "vllm", "speculators"],
    "peagle of one layer": ["orbax", "vllm", "speculators"],
    "peagle with biases": ["orbax", "vllm", "speculators"],
    "peagle with norms": ["orbax", "speculators"],
    "medusa": ["orbax", "vllm"],
    "medusa of two blocks": ["orbax", "vllm"],
    "hass norms": ["orbax"],
    "parallelspec": ["orbax"],
}


def head(kind: str, dtype: Any = np.float32) -> Exportable:
    """A head with random weights, norms included."""
    name, config, tokens = HEADS[kind]
    module = DRAFTERS[name].module(config)
    draw = np.random.default_rng(5)
    params = jax.tree.map(lambda a: (a + 0.1 * draw.normal(size=a.shape)).astype(dtype), random_weights(module, 0.2, 3))
    return Exportable("drafter", params, drafter_config(name, module, draft_vocab=tokens), {})


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, array), other in zip(leaves, jax.tree.leaves(found), strict=True):
        assert other.dtype == array.dtype
        np.testing.assert_array_equal(other, array, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_target(tmp_path_factory.mktemp("target") / "target", layers=LAYERS))


MOVED = {("eagle", "vllm")}
"""Exports that hold the same head in other weights: see test_folded.py."""


@pytest.mark.parametrize(
    ("kind", "server"),
    [(k, s) for k, servers in SERVED.items() for s in servers if s != "orbax" and (k, s) not in MOVED],
)
def test_what_is_exported_is_imported_bit_for_bit(kind: str, server: str, target: str, tmp_path: Path):
    model = head(kind)
    write(server, tmp_path / "out", model, target)
    found = read_drafter(tmp_path / "out")
    name, config, tokens = HEADS[kind]
    assert (found.name, found.config, found.draft_vocab) == (name, config, tokens)
    assert_same(found.params, model.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_keep_their_dtype(dtype: str, target: str, tmp_path: Path):
    model = head("eagle3", jax.numpy.dtype(dtype))
    write("vllm", tmp_path / "out", model, target)
    assert_same(read_drafter(tmp_path / "out").params, model.params)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_goes_exactly_where_it_can_be_served(kind: str, target: str, tmp_path: Path):
    model = head(kind)
    assert export.facts(model)["exportable_to"] == [to for to in export.FORMATS if to in SERVED[kind]]
    for server in set(export.FORMATS) - set(SERVED[kind]):
        with pytest.raises(ValueError):
            write(server, tmp_path / "out", model, target)
        assert not list(tmp_path.iterdir())


def exported(server: str, kind: str, target: str, out: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    write(server, out, head(kind), target)
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


def test_sglang_gets_a_bias_of_zeros_and_vllm_none(target: str, tmp_path: Path):
    tensors, config = exported("sglang", "eagle without bias", target, tmp_path / "a")
    assert not tensors["fc.bias"].any() and config["architectures"] == ["LlamaForCausalLMEagle"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    tensors, config = exported("vllm", "eagle without bias", target, tmp_path / "b")
    assert "fc.bias" not in tensors and config["architectures"] == ["LlamaForCausalLM"]
    model = head("eagle")
    write("vllm", tmp_path / "c", model._replace(params=model.params | {"fc_bias": np.zeros(WIDTH, "f")}), target)
    assert not {"fc.bias", "embed_tokens.weight"} & load_file(tmp_path / "c" / "model.safetensors").keys()


def test_vocabularies_are_written_as_offsets_once(target: str, tmp_path: Path):
    for server in ("sglang", "vllm", "speculators", "sglang-jax", "tpu-inference", "eagle"):
        tensors, config = exported(server, "eagle3", target, tmp_path / server)
        assert tuple(tensors["d2t"] + np.arange(len(SOME))) == SOME
        assert tuple(np.flatnonzero(tensors["t2d"])) == SOME
        assert config["draft_vocab_size"] == len(SOME) and config["jaxspec"]["assumes"] == SERVERS[server].version


def test_layers_are_counted_as_each_server_counts_them(target: str, tmp_path: Path):
    ids = "eagle_aux_hidden_state_layer_ids"
    config = exported("sglang", "eagle3 of other layers", target, tmp_path / "a")[1]
    assert config["eagle_config"][ids] == [0, 2, 4] and config["eagle_config"]["layer_id_convention"] == "output"
    for server in ("vllm", "speculators"):
        config = exported(server, "eagle3 of other layers", target, tmp_path / server)[1]
        assert config[ids] == [1, 3, 5] and config["layer_id_convention"] == "input"
    with pytest.raises(ValueError, match="sglang-jax always reads the inputs of layers"):
        write("sglang-jax", tmp_path / "b", head("eagle3 of other layers"), target)
    model = head("eagle3")
    deeper = {**model.config, "shape": {**model.config["shape"], "taps": (2, 4, 5)}}  # the default ones of 8 layers
    with pytest.raises(ValueError, match=r"would read the inputs of layers \(2, 3, 4\) of this target"):
        write("sglang-jax", tmp_path / "b", model._replace(config=deeper), target)


def test_speculators_calls_the_layer_otherwise_and_has_the_embedding(target: str, tmp_path: Path):
    tensors, config = exported("speculators", "eagle3 of all tokens", target, tmp_path / "a")
    assert "layers.0.hidden_norm.weight" in tensors and "embed_tokens.weight" in tensors
    assert not tensors["d2t"].any() and tensors["t2d"].all()
    assert config["speculators_config"]["verifier"]["name_or_path"] == target
    assert "architectures" not in config["transformer_layer_config"]


def test_speculators_wants_a_name_that_its_server_can_load(target: str, tmp_path: Path):
    model = head("eagle3 of all tokens")
    assert main(["export", target, str(tmp_path / "orbax")]) == 0
    for name in ("tiny", str(tmp_path / "orbax")):
        with pytest.raises(ValueError, match=rf"{name} is no HuggingFace folder .* say its name with --target-name"):
            write("speculators", tmp_path / "out", model, name)
    write("speculators", tmp_path / "out", model, str(tmp_path / "orbax"), target_name="we/tiny")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "we/tiny"
    with pytest.raises(ValueError, match="--target-name is for speculators"):
        write("sglang", tmp_path / "more", model, target, target_name="we/tiny")


def test_the_layer_of_speculators_names_no_class_of_models(target: str, tmp_path: Path):
    config = exported("speculators", "eagle3 of all tokens", target, tmp_path / "a")[1]
    assert "architectures" not in config["transformer_layer_config"]


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (
            {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"},
            ["LlavaForConditionalGeneration"],
        ),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, ["Qwen3ForCausalLM"]),
        ({"architectures": None, "model_type": "mistral"}, ["MistralForCausalLM"]),
        ({"architectures": None, "model_type": "llava"}, []),
    ],
)
def test_speculators_names_the_class_of_its_target(target: str, tmp_path: Path, said: dict[str, Any], named: list[str]):
    other = tmp_path / "other"
    shutil.copytree(target, other)
    (other / "config.json").write_text(json.dumps({**json.loads((other / "config.json").read_text()), **said}))
    config = exported("speculators", "eagle3 of all tokens", str(other), tmp_path / "a")[1]
    assert config["speculators_config"]["verifier"]["architectures"] == named


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray], dict[str, Any]], Any]) -> Path:
    """Change the tensors and the config of a folder in place, and leave nothing of ours in it."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    config.pop("jaxspec", None)
    change(tensors, config)
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "jaxspec.json").unlink(missing_ok=True)
    return folder


def test_layer_ids_that_could_mean_two_things_must_be_said(target: str, tmp_path: Path):
    write("sglang", tmp_path / "a", head("eagle3"), target)

    ids = {"eagle_aux_hidden_state_layer_ids": [2, 3, 4]}
    rewrite(tmp_path / "a", lambda tensors, config: config.update(eagle_config=ids))
    with pytest.raises(ValueError, match="say which with --layer-ids"):
        read_drafter(tmp_path / "a", target_layers=LAYERS)
    assert read_drafter(tmp_path / "a", layer_ids="input").config.taps == (2, 3, 4)
    assert read_drafter(tmp_path / "a", layer_ids="output").config.taps == (3, 4, 5)
    rewrite(tmp_path / "a", lambda tensors, config: config.pop("eagle_config"))
    assert read_drafter(tmp_path / "a", target_layers=LAYERS).config.taps == (2, 3, 4)
    with pytest.raises(ValueError, match="names no layers to be counted: leave out --layer-ids"):
        read_drafter(tmp_path / "a", target_layers=LAYERS, layer_ids="output")
    with pytest.raises(ValueError, match="does not say which 3 layers"):
        read_drafter(tmp_path / "a")


@pytest.mark.parametrize("case", ["eagle", "fspad", "medusa", "eagle3"])
def test_flags_that_a_kind_of_head_does_not_read_are_refused(case: str, target: str, tmp_path: Path):
    write({"fspad": "eagle"}.get(case, "vllm"), tmp_path / "a", head(case), target)
    with pytest.raises(ValueError, match="leave out --tokens"):
        read_drafter(tmp_path / "a", target_layers=LAYERS, tokens=4)
    if case != "eagle3":
        with pytest.raises(ValueError, match="leave out --layer-ids"):
            read_drafter(tmp_path / "a", target_layers=LAYERS, layer_ids="input")


def rename_as_vllm(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """Uses vLLM's other names, and SafeAILab's of the first layer, and removes the number of tokens."""
    config["pard_token"] = config.pop("mask_token_id")
    del config["ptd_token_id"], config["num_lookahead_tokens"]
    tensors["mask_hidden"] = tensors["mask_hidden"][0]
    for name in [name for name in tensors if name.startswith("layers.0.")]:
        tensors[name.replace("layers.0.", "midlayer.")] = tensors.pop(name)


def test_what_the_layouts_of_peagle_heads_leave_open_is_read_or_asked_for(target: str, tmp_path: Path):
    folder, model = tmp_path / "a", head("peagle")
    write("vllm", folder, model, target)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3
    rewrite(folder, rename_as_vllm)
    with pytest.raises(ValueError, match="does not say how many tokens the head drafts in a pass"):
        read_drafter(folder)
    assert main(["import", "drafter", str(folder), str(tmp_path / "b"), "--tokens", "5"]) == 0
    found = load_drafter(tmp_path / "b")
    assert found.module.config == HEADS["peagle"][1]
    assert_same(found.params, model.params)
    rewrite(folder, lambda tensors, config: config.update(num_hidden_layers=4))
    with pytest.raises(ValueError, match="num_hidden_layers=4, and the weights are of 3 layers"):
        read_drafter(folder, tokens=5)
    rewrite(folder, lambda tensors, config: [config.pop("pard_token"), config.update(num_hidden_layers=3)])
    with pytest.raises(ValueError, match="mask_token_id=None must be the id, below vocab_size=300, of the mask token"):
        read_drafter(folder, tokens=5)
    write("speculators", tmp_path / "c", model, target)
    rewrite(tmp_path / "c", lambda tensors, config: tensors.pop("mask_hidden"))
    with pytest.raises(ValueError, match=r"is a P-EAGLE head by its config\.json, and has no tensor mask_hidden"):
        read_drafter(tmp_path / "c")


def test_a_head_of_another_width_needs_its_target_and_its_own_embedding(target: str, tmp_path: Path):
    write("vllm", tmp_path / "a", head("eagle3 narrow"), target)
    assert export.published_drafter(tmp_path / "a", "a", target=target).config["shape"]["target_width"] == WIDTH
    rewrite(tmp_path / "a", lambda tensors, config: tensors.pop("embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"is not as wide as its target, and has no tensor embed_tokens\.weight"):
        read_drafter(tmp_path / "a")
    rewrite(tmp_path / "a", lambda tensors, config: config.pop("target_hidden_size"))
    with pytest.raises(ValueError, match=r"must be 4 layers' numbers, for fc\.weight reads as many"):
        read_drafter(tmp_path / "a")


def reverse_rows(tensors: dict[str, np.ndarray], config: Any) -> None:
    tensors["d2t"] = np.array(SOME)[::-1] - np.arange(len(SOME))
    tensors["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head.weight"][::-1])


def test_rows_out_of_order_are_sorted_and_tokens_for_offsets_refused(target: str, tmp_path: Path):
    write("vllm", tmp_path / "a", head("eagle3"), target)

    found = read_drafter(rewrite(tmp_path / "a", reverse_rows))
    assert found.draft_vocab == SOME
    assert_same(found.params, head("eagle3").params)
    rewrite(tmp_path / "a", lambda tensors, config: tensors.update(d2t=np.array(SOME)))
    with pytest.raises(ValueError, match="d2t holds the tokens themselves"):
        read_drafter(tmp_path / "a")


def test_the_kind_is_told_by_tensors_and_doubt_is_an_error(target: str, tmp_path: Path):
    write("sglang", tmp_path / "a", head("eagle"), target)
    (tmp_path / "a" / "jaxspec.json").unlink()
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "anything.safetensors")
    assert published_family(tmp_path / "a") == "eagle" and published_family(target) == "lm"
    (tmp_path / "a" / "anything.safetensors").rename(tmp_path / "a" / "model.safetensors")
    both = {"0.0.linear.weight": np.zeros((4, 4), np.float32)}
    rewrite(tmp_path / "a", lambda tensors, config: tensors.update(both))
    with pytest.raises(ValueError, match=r"is eagle and medusa by its tensors.*fc.bias \[32\]"):
        read_drafter(tmp_path / "a")


@pytest.mark.parametrize("layers", [1, 2])
def test_medusa_heads_in_the_authors_layout_are_read(layers: int, tmp_path: Path):
    config = MedusaConfig(WIDTH, 3, layers, SIZE)
    params = random_weights(DRAFTERS["medusa"].module(config), 0.2, 3)
    tensors = {}
    for block in range(layers):
        tensors |= stored_tensors(medusa.medusa_table(config, block), params)
    assert tensors[f"2.{layers}.weight"].shape == (SIZE, WIDTH)
    save_file(tensors, str(tmp_path / "medusa_lm_head.safetensors"))
    (tmp_path / "config.json").write_text("{}")
    found = read_drafter(tmp_path)
    assert found.config == config
    assert_same(found.params, params)


def test_import_inspect_and_export_tell_the_same(target: str, tmp_path: Path):
    write("sglang", tmp_path / "a", head("eagle3"), target)
    told = [tmp_path / f"{i}.json" for i in range(2)]
    assert main(["import", "drafter", str(tmp_path / "a"), str(tmp_path / "b"), "--json", str(told[0])]) == 0
    assert main(["inspect", str(tmp_path / "a"), "--json", str(told[1])]) == 0
    imported, seen = (json.loads(path.read_text()) for path in told)
    assert (seen["kind"], seen["family"], seen["format"]) == ("drafter", "eagle3", "published")
    assert seen["parameters"] == imported["parameters"] and seen["exportable_to"] == imported["exportable_to"]
    assert seen["shapes"]["fc"] == [3 * WIDTH, WIDTH] and seen["convention"]["taps"].startswith("inputs of layers 2, 3")
    a, b = load_drafter(tmp_path / "b"), open_drafter(tmp_path / "a")
    assert (a.module, a.draft_vocab) == (b.module, b.draft_vocab)
    assert_same(a.params, b.params)


def test_an_export_that_is_interrupted_leaves_nothing(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "write_manifest", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write("sglang", tmp_path / "out", head("eagle"), target)
    assert not list(tmp_path.iterdir())


def test_a_bin_is_read_as_safetensors_are(target: str, tmp_path: Path):
    torch = pytest.importorskip("torch")
    write("eagle", tmp_path / "a", head("eagle"), target)
    tensors = {name: torch.from_numpy(a) for name, a in load_file(tmp_path / "a" / "model.safetensors").items()}
    tensors["fc.weight"] = tensors["fc.weight"].T.contiguous().T  # other strides
    tensors["fc.bias"] = torch.nn.Parameter(torch.cat([torch.zeros(5), tensors["fc.bias"]]))[5:].detach()
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / "jaxspec.json").unlink()
    torch.save(tensors, tmp_path / "a" / "pytorch_model.bin")
    assert_same(read_drafter(tmp_path / "a").params, head("eagle").params)
    torch.save({"state_dict": tensors}, tmp_path / "a" / "pytorch_model.bin")
    assert_same(read_drafter(tmp_path / "a").params, head("eagle").params)
    torch.save(tensors, tmp_path / "a" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"is no zip archive: a PyTorch file of before version 1.6"):
        read_drafter(tmp_path / "a")
