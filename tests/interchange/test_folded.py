"""Normed embeddings and biases travel in a table of the head's own; copies of the target's tables are told apart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import SIZE, random_weights, write_target
from safetensors.numpy import load_file, save_file

from jaxspec.__main__ import main
from jaxspec.base import SharedTables, UnrollInputs
from jaxspec.checkpoints.models import drafter_config, load_drafter, save_drafter
from jaxspec.drafters import DRAFTERS, Eagle3Config, EagleConfig, FspadConfig, MedusaConfig
from jaxspec.interchange.export import Exportable, write
from jaxspec.interchange.hf import load_tables
from jaxspec.interchange.published import Published, read_drafter
from jaxspec.nn.attention import causal_mask
from jaxspec.nn.norm import rms_norm

WIDTH = 32
SHAPE = (WIDTH, 4, 2, 8, 64)
HEADS = {
    "eagle": ("eagle", EagleConfig(*SHAPE, embedding_norm=True)),
    "eagle without bias": ("eagle", EagleConfig(*SHAPE, bias=False, embedding_norm=True)),
    "eagle with a bias alone": ("eagle", EagleConfig(*SHAPE)),
    "eagle with its own embedding": ("eagle", EagleConfig(*SHAPE, embed_vocab=SIZE)),
    "eagle with all of them": ("eagle", EagleConfig(*SHAPE, embedding_norm=True, embed_vocab=SIZE)),
    "fspad": ("fspad", FspadConfig(*SHAPE, embedding_norm=True)),
    "fspad without its parts": (
        "fspad",
        FspadConfig(*SHAPE, embedding_norm=True, feature_sampling=False, partial_alignment=False),
    ),
}
SERVED = [(kind, "eagle") for kind in HEADS] + [(kind, "vllm") for kind in HEADS if kind != "fspad"]


def head(kind: str, dtype: Any = np.float32) -> Exportable:
    """A head with random weights, norms and biases included."""
    name, config = HEADS[kind]
    module, draw = DRAFTERS[name].module(config), np.random.default_rng(5)
    params = jax.tree.map(lambda a: (a + 0.1 * draw.normal(size=a.shape)).astype(dtype), random_weights(module, 0.2, 3))
    return Exportable("drafter", params, drafter_config(name, module), {})


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_target(tmp_path_factory.mktemp("target") / "target", layers=7))


def tables_of(target: str) -> SharedTables:
    tables, params = load_tables(target, dtype=jnp.float32)
    return tables.shared_tables(params)


def logits(name: str, config: Any, params: Any, target: str) -> np.ndarray:
    """Logits of three draft steps from every position of random texts."""
    draw, tables = np.random.default_rng(0), tables_of(target)
    module = DRAFTERS[name].module(config)
    length = 12
    inputs = UnrollInputs(
        jnp.asarray(draw.integers(0, SIZE, (2, length))),
        jnp.asarray(draw.normal(size=(2, length, WIDTH)), jnp.float32),
        jnp.broadcast_to(jnp.arange(length), (2, length)),
        causal_mask(length),
    )
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    unrolled = module.unroll(params, tables, inputs, 3)
    return np.stack([module.logits(params, tables, hidden, step) for step, hidden in enumerate(unrolled.hidden_TBLD)])


@pytest.mark.parametrize(("kind", "server"), SERVED)
def test_the_exported_head_drafts_the_same(kind: str, server: str, target: str, tmp_path: Path):
    model = head(kind)
    name, config = HEADS[kind]
    write(server, tmp_path / "out", model, target)
    found = read_drafter(tmp_path / "out")
    assert not found.config.embedding_norm and not found.notes
    ours, theirs = logits(name, config, model.params, target), logits(found.name, found.config, found.params, target)
    np.testing.assert_allclose(theirs, ours, atol=3e-5 * np.abs(ours).max(), rtol=0)  # of 32 bits
    assert np.ptp(ours, axis=-1).min() > 0.1
    assert not found.config.bias or server == "eagle"


@pytest.mark.parametrize("server", ["eagle", "vllm"])
def test_a_norm_alone_is_folded_bit_for_bit(server: str, target: str, tmp_path: Path):
    model = head("eagle without bias")
    write(server, tmp_path / "out", model, target)
    stored, params = load_file(tmp_path / "out" / "model.safetensors"), model.params
    normed = rms_norm(tables_of(target).embed_VD, jnp.asarray(params["embedding_norm"]), 1e-5)
    np.testing.assert_array_equal(stored["embed_tokens.weight"], normed)
    np.testing.assert_array_equal(stored["fc.weight"].T, params["fc"])
    found = read_drafter(tmp_path / "out")
    assert found.config == EagleConfig(*SHAPE, bias=False, embed_vocab=SIZE)
    ours = logits("eagle", HEADS["eagle without bias"][1], params, target)
    theirs = logits("eagle", found.config, found.params, target)  # whose program fuses other sums
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max(), rtol=0)


def test_narrow_weights_are_folded_in_full_precision(target: str, tmp_path: Path):
    model = head("eagle", jnp.bfloat16)
    write("vllm", tmp_path / "out", model, target)
    found = read_drafter(tmp_path / "out")
    assert {str(a.dtype) for a in found.params.values()} == {"bfloat16"}
    w = {name: np.asarray(array, np.float32) for name, array in model.params.items()}
    normed = rms_norm(tables_of(target).embed_VD, jnp.asarray(w["embedding_norm"]), 1e-5)
    expected = np.asarray(normed) @ w["fc"][:WIDTH] + w["fc_bias"]
    rounding = 2**-8 * np.abs(expected) + 1e-6
    assert (np.abs(np.asarray(found.params["embed"], np.float32) - expected) <= rounding).all()


def test_generate_drafts_the_same_with_what_was_exported(target: str, tmp_path: Path):
    module = DRAFTERS["eagle"].module(HEADS["eagle"][1])
    params = head("eagle").params
    save_drafter(tmp_path / "own", "eagle", module, params, {"tree": "dynamic:8x3x3"})
    made = {}
    for name in ("own", "vllm", "eagle"):
        if name != "own":
            words = ["export", str(tmp_path / "own"), str(tmp_path / name), "--to", name, "--target", target]
            assert main(words) == 0
        flags = ["--drafter", str(tmp_path / name), "--tree", "dynamic:8x3x3", "--max-new-tokens", "12"]
        told = tmp_path / f"{name}.json"
        assert main(["generate", "one and two", "--target", target, *flags, "--json", str(told)]) == 0
        made[name] = json.loads(told.read_text())
    for key in ("tau", "target_calls"):
        assert len({str(found.get(key)) for found in made.values()}) == 1


def test_what_the_layout_does_not_hold_is_said(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    module = DRAFTERS["eagle"].module(HEADS["eagle"][1])
    save_drafter(tmp_path / "a", "eagle", module, head("eagle").params, {"tree": "chain:3"}, draft_vocab=range(9, 40))
    words = ["export", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "vllm", "--target", target]
    assert main([*words, "--json", str(tmp_path / "x.json")]) == 0
    told = capsys.readouterr().err
    assert "its draft vocabulary of 31 tokens" in told and "its tree chain:3" in told
    assert len(json.loads((tmp_path / "x.json").read_text())["notes"]) == 2


def test_an_imported_table_of_its_own_goes_out_again_and_into_orbax(target: str, tmp_path: Path):
    write("vllm", tmp_path / "a", head("eagle"), target)
    assert main(["import", "drafter", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    loaded = load_drafter(tmp_path / "b")
    assert loaded.module.config.embed_vocab == SIZE
    assert main(["export", str(tmp_path / "b"), str(tmp_path / "c"), "--to", "vllm", "--target", target]) == 0
    for name, tensor in load_file(tmp_path / "a" / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(tmp_path / "c" / "model.safetensors")[name], tensor)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("eagle", ["normed embeddings", "vllm or eagle", "head.embedding_norm=false"]),
        ("fspad without its parts", ["normed embeddings", "vllm or eagle", "head.embedding_norm=false"]),
        ("eagle with its own embedding", ["an embedding of its own", "vllm or eagle"]),
    ],
)
def test_where_the_table_cannot_travel_the_sentence_says_what_to_do(
    kind: str, words: list[str], target: str, tmp_path: Path
):
    with pytest.raises(ValueError) as caught:
        write("sglang", tmp_path / "out", head(kind), target)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_norm_before_the_lm_head_names_its_setting(target: str, tmp_path: Path):
    module = DRAFTERS["eagle"].module(EagleConfig(*SHAPE, head_norm=True))
    model = Exportable("drafter", random_weights(module, 0.2, 3), drafter_config("eagle", module), {})
    with pytest.raises(ValueError, match=r"only orbax holds it; train with head\.head_norm=false"):
        write("vllm", tmp_path / "out", model, target)


# ---- files of others


def published(kind: str, target: str, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A head in the papers' layout with nothing of ours beside it, and its tensors changed."""
    name, config = HEADS.get(kind, (kind, MORE.get(kind)))
    module = DRAFTERS[name].module(config)
    model = Exportable("drafter", random_weights(module, 0.2, 3), drafter_config(name, module), {})
    write("vllm" if kind == "medusa" else "eagle", folder, model, target)
    (folder / "jaxspec.json").unlink()
    told = json.loads((folder / "config.json").read_text())
    for field in ("jaxspec", "embed_requires_grad"):
        told.pop(field, None)
    (folder / "config.json").write_text(json.dumps(told))
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")
    return folder


MORE = {
    "eagle3": Eagle3Config(*SHAPE, vocab=SIZE, taps=(2, 3, 4)),
    "medusa": MedusaConfig(WIDTH, 3),
    "plain fspad": None,
}
PLAIN = "eagle with a bias alone"


def read(folder: Path, target: str | None) -> Published:
    return read_drafter(folder, target_layers=7, tables=None if target is None else lambda: tables_of(target))


STRETCHED = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": 512, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4
    },
}  # fmt: skip


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", STRETCHED)
@pytest.mark.parametrize("head", [PLAIN, "eagle3"])
def test_a_head_whose_positions_are_stretched_is_refused_with_the_remedy(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str, kind: str, field: str
):
    folder = published(head, target, tmp_path / "head", lambda stored: None)
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("rope_scaling", "rope_parameters")}
    told = {"rope_type": kind, **STRETCHED[kind]}
    config |= {
        field: told | ({"rope_theta": 1e4} if field == "rope_parameters" else {}),
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for words in (
        ["import", "drafter", str(folder), str(tmp_path / "out"), "--target", target],
        ["inspect", str(folder)],
    ):
        assert main(words) == 1
        said = capsys.readouterr().err
        assert f"config.json: rope_type='{kind}' of a head is not supported; supported: 'default', " in said
        assert said.count("\n") == 1 and "train one for the target (jaxspec train eagle3)" in said
    assert not (tmp_path / "out").exists()


def test_a_copy_of_the_embedding_is_left_out_and_said(target: str, tmp_path: Path):
    folder = published(PLAIN, target, tmp_path / "a", lambda stored: None)
    found = read(folder, target)
    assert found.config.embed_vocab == 0 and "equals the target's embedding" in found.notes[0]
    found = read(folder, None)
    assert found.config.embed_vocab == 0 and "--target TARGET compares them" in found.notes[0]
    half = published(PLAIN, target, tmp_path / "b", lambda s: s.update({EMBED: s[EMBED].astype(jnp.bfloat16)}))
    assert read(half, target).config.embed_vocab == 0  # the same table, rounded


EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("kind", [PLAIN, "eagle3"])
def test_another_embedding_is_the_heads_own_and_said(kind: str, target: str, tmp_path: Path):
    def change(stored: dict[str, Any]) -> None:
        stored[EMBED] = np.array(tables_of(target).embed_VD)
        stored[EMBED][7] += 1

    found = read(published(kind, target, tmp_path / "a", change), target)
    assert found.config.embed_vocab == SIZE and f"differs in 1 of {SIZE} rows" in found.notes[0]
    np.testing.assert_array_equal(found.params["embed"][7], np.asarray(tables_of(target).embed_VD)[7] + 1)


def test_an_embedding_of_fewer_tokens_is_for_another_target(target: str, tmp_path: Path):
    folder = published(PLAIN, target, tmp_path / "a", lambda stored: stored.update({EMBED: stored[EMBED][:5].copy()}))
    with pytest.raises(ValueError, match=rf"embed_tokens\.weight has 5 rows, and the target has {SIZE} tokens"):
        read(folder, target)


@pytest.mark.parametrize("kind", [PLAIN, "medusa"])
def test_a_copied_lm_head_is_compared_with_the_targets(
    kind: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = np.array(tables_of(target).head_VD)
    folder = published(kind, target, tmp_path / "a", lambda stored: stored.update({HEAD: copy}))
    words = ["import", "drafter", str(folder), str(tmp_path / "out"), "--json", str(tmp_path / "x.json")]
    assert main([*words, "--target", target]) == 0
    assert any("equals the target's LM head" in note for note in json.loads((tmp_path / "x.json").read_text())["notes"])
    assert f"note: {folder}: lm_head.weight equals the target's LM head" in capsys.readouterr().err
    words[3] = str(tmp_path / "more")
    if kind == "medusa":
        assert main(words) == 0
        assert "taken for a copy of the target's LM head" in capsys.readouterr().err
    else:
        assert main(words) == 1
        assert "name the target with --target, so that the two are compared" in capsys.readouterr().err
    copy[:2] += 1
    other = published(kind, target, tmp_path / "b", lambda stored: stored.update({HEAD: copy}))
    with pytest.raises(ValueError, match=rf"is not the target's LM head \(differs in 2 of {SIZE} rows\)"):
        read(other, target)


def test_generate_compares_what_it_is_given(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = np.array(tables_of(target).head_VD)
    folder = published(PLAIN, target, tmp_path / "a", lambda stored: stored.update({HEAD: copy}))
    words = ["generate", "x", "--target", target, "--drafter", str(folder), "--max-new-tokens", "2"]
    assert main(words) == 0
    told = capsys.readouterr().err
    assert f"note: {folder}: lm_head.weight equals" in told and f"note: {folder}: embed_tokens.weight equals" in told
