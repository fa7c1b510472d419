"""Pretraining: the loss, and runs that are killed and go on as if they had not been."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from pretrain_toy import STEPS, prepare
from processes import finish, stop_at
from random_models import SIZE, write_target

from jaxspec.__main__ import main
from jaxspec.checkpoints.folders import abstract_like
from jaxspec.checkpoints.runs import RunCheckpoints
from jaxspec.config import PretrainConfig, load
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import read_conversations
from jaxspec.data.templates import TEMPLATES
from jaxspec.distillation.task import TrainState
from jaxspec.nn.attention import segment_mask
from jaxspec.parallel.mesh import make_mesh
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.training.next_token import TokenBatch, next_token_loss, target_weights
from jaxspec.training.pretrain import find_tokenizer, train_tokenizer
from jaxspec.training.resolve import optimizer_of


def test_a_token_is_a_target_only_within_its_document_and_where_the_mask_allows():
    batch = TokenBatch(
        tokens_BL=jnp.arange(8)[None],
        segments_BL=jnp.asarray([[1, 1, 1, 2, 2, 2, 0, 0]]),
        positions_BL=jnp.asarray([[0, 1, 2, 0, 1, 2, 0, 0]]),
        loss_mask_BL=jnp.asarray([[False, True, True, True, False, True, True, True]]),
    )
    assert target_weights(batch).tolist() == [[1, 1, 0, 0, 1, 0, 0, 0]]


def test_the_loss_in_blocks_is_the_dense_one():
    model = Decoder(LlamaConfig(vocab=50, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=32))
    params = jax.jit(model.init_params)(jax.random.key(0))
    segments = jnp.asarray([[1] * 9 + [2] * 7, [1] * 5 + [2] * 8 + [0] * 3])
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 50)
    batch = TokenBatch(tokens, segments, jnp.arange(16)[None].repeat(2, 0), jnp.ones((2, 16), bool))

    def dense(params: Any) -> jax.Array:
        out = model.forward(params, tokens, batch.positions_BL, segment_mask(segments))
        log_p = jax.nn.log_softmax(model.logits(params, out.features_BLD))
        chosen = jnp.take_along_axis(log_p, jnp.roll(tokens, -1, 1)[..., None], -1)[..., 0]
        return jnp.sum(-chosen * target_weights(batch))

    def blocked(params: Any) -> jax.Array:
        return jnp.sum(next_token_loss(model, params, batch, block=4))

    value, gradient = jax.jit(jax.value_and_grad(blocked))(params)
    wanted, wanted_gradient = jax.jit(jax.value_and_grad(dense))(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, wanted_gradient)


def test_a_block_that_does_not_divide_the_row_is_named():
    model = Decoder(LlamaConfig(vocab=50, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=32))
    zeros = jnp.zeros((1, 10), jnp.int32)
    with pytest.raises(ValueError, match="loss_block is 4, which does not divide the row length 10"):
        next_token_loss(model, {}, TokenBatch(zeros, zeros, zeros, zeros == 0), block=4)


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return processes.start(folder, "pretrain", "toy.py", *overrides, "--json", "result.json")


def final_state(folder: Path) -> TrainState:
    config = load(str(folder / "toy.py"))
    model, optimizer = Decoder(config.model), optimizer_of(config.optimizer, STEPS)

    def init() -> TrainState:
        params = model.init_params(jax.random.key(0))
        return TrainState(params, optimizer.init(params), jnp.int32(0), jax.random.key(0))

    abstract = jax.eval_shape(init)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with RunCheckpoints(folder / "run") as run:
        assert run.latest_step() == STEPS
        return run.restore(None, abstract_like(abstract, jax.tree.map(lambda _: device, abstract))).state


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    prepare(folder)
    finish(start(folder))
    return folder


def test_a_run_killed_and_preempted_ends_with_the_same_bits(uninterrupted: Path, tmp_path: Path):
    folder = tmp_path / "torn"
    prepare(folder)

    def saving() -> bool:
        return (folder / "run" / "30").is_dir() or any((folder / "run").glob("20.*tmp*"))

    for moment in (saving, (folder / "run" / "40").is_dir):
        code, errors = stop_at(start(folder), moment, signal.SIGKILL)
        assert code == -signal.SIGKILL, errors
    code, errors = stop_at(start(folder), (folder / "run" / "60").is_dir, signal.SIGTERM)
    assert code == 75 and "resumed from step" in errors and "resume with the same command" in errors
    finish(start(folder))
    assert json.loads((folder / "result.json").read_text())["resumed_from"] >= 60
    torn, whole = final_state(folder), final_state(uninterrupted)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), torn, whole)
    assert all(jax.tree.leaves(same))
    export = "export/model.safetensors"
    assert (folder / export).read_bytes() == (uninterrupted / export).read_bytes()


def test_the_result_says_what_happened(uninterrupted: Path):
    result = json.loads((uninterrupted / "result.json").read_text())
    assert result["steps"] == STEPS and result["resumed_from"] is None and result["checkpoint"].endswith(f"/{STEPS}")
    assert result["tokens"] > 0 and result["tokens_per_second"] > 0
    assert set(result["eval"]["by_source"]) == {"a", "b"}
    assert result["eval"]["loss"] < 0.7 * np.log(270)


def test_the_export_has_what_transformers_reads(uninterrupted: Path):
    names = {p.name for p in (uninterrupted / "export").iterdir()}
    wanted = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert wanted <= names
    settings = json.loads((uninterrupted / "export" / "config.json").read_text())
    chat = ChatTokenizer.load(uninterrupted / "export")
    assert settings["bos_token_id"] == chat.bos_id and settings["vocab_size"] == chat.vocab_size


def test_other_settings_are_refused_on_resume(uninterrupted: Path):
    run = start(uninterrupted, "optimizer.peak_lr=1e-3")
    errors = run.communicate()[1]
    assert run.returncode == 1
    assert "belongs to a run with other settings (optimizer.peak_lr was 0.01, is 0.001)" in errors


@pytest.fixture(scope="module")
def draft_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft LM with the tokenizer of the folder `target`, from two files and a mix."""
    folder = tmp_path_factory.mktemp("draft") / "run"
    prepare(folder)
    write_target(folder / "target")
    finish(start(folder, *DRAFT_LM, "data.train=train.jsonl,train.jsonl"))
    return folder


DRAFT_LM = (
    "tokenizer=target",
    f"model.vocab={SIZE}",
    "optimizer.steps=6",
    "data.mix=train.jsonl",
    "data.mix_share=0.4",
)


def test_a_draft_lm_takes_the_targets_tokenizer_as_it_is(draft_lm: Path):
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert all((draft_lm / "target" / n).read_bytes() == (draft_lm / "export" / n).read_bytes() for n in names)
    mix = json.loads((draft_lm / "result.json").read_text())["mix"]
    assert mix["held"] == 200 < mix["documents"] and mix["share"] == pytest.approx(0.4, abs=0.01)


def test_a_template_that_the_config_names_goes_with_the_model(draft_lm: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(draft_lm)
    named = load("toy.py", ["tokenizer=target", f"model.vocab={SIZE}", "data.template=vicuna", "export_folder=named"])
    assert isinstance(named, PretrainConfig)
    found, again = find_tokenizer(named), ChatTokenizer.load("named")
    assert found.template.text == again.template.text == TEMPLATES["vicuna"].text
    assert ChatTokenizer.load("target").template.text != found.template.text


def test_the_draft_lms_folder_is_one_to_regenerate_from(draft_lm: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(draft_lm)
    flags = ["--target", "export", "--prompts", "train.jsonl", "--limit", "4", "--max-new-tokens", "8"]
    assert main(["regenerate", *flags, "--temperatures", "0,1", "--keep-unfinished", "--out", "answers.jsonl"]) == 0
    assert len(read_conversations("answers.jsonl")) == 4


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(draft_lm: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(draft_lm)
    assert main(["pretrain", "toy.py", "tokenizer=target", "model.vocab=280", "export_folder=none_here"]) == 1
    assert f"target: its tokenizer has {SIZE} ids, but model.vocab is 280" in capsys.readouterr().err
    assert not Path("none_here").exists()


def test_another_tokenizer_or_mix_is_refused_on_resume(draft_lm: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.chdir(draft_lm)
    monkeypatch.setattr("jaxspec.training.resolve.make_mesh", lambda *_, **__: make_mesh(1, devices=jax.devices()[:1]))
    changed = ("tokenizer=export", "data.train=train.jsonl,train.jsonl", "data.mix_share=0.45")
    assert main(["pretrain", "toy.py", *DRAFT_LM, *changed]) == 1
    errors = capfd.readouterr().err
    assert "tokenizer was target, is export" in errors and "data.mix_share was 0.4, is 0.45" in errors
    assert "too few documents, so the 200 are repeated" in errors


def test_bad_lines_may_be_left_out_of_the_tokenizers_training_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    good = [{"messages": [{"role": "user", "content": f"{i} and 2 make"}]} for i in range(40)]
    Path("train.jsonl").write_text("".join(json.dumps(g) + "\n" for g in good) + "{\n")
    words = ["data.train=train.jsonl", "model.vocab=262"]
    with pytest.raises(ValueError, match=r"data\.skip_bad=true"):
        train_tokenizer(load("tiny", words), tmp_path / "refused")
    train_tokenizer(load("tiny", [*words, "data.skip_bad=true"]), tmp_path / "made")
    assert (tmp_path / "made" / "tokenizer.json").is_file()
