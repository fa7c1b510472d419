"""`jaxspec train`: a drafter from a config, resumed where it stopped, that `jaxspec generate` loads."""

import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import finish, start, stop_at
from random_models import POSITIONS, SIZE, write_target

from jaxspec.__main__ import main
from jaxspec.checkpoints.manifest import read_manifest
from jaxspec.checkpoints.models import load_drafter
from jaxspec.data.draft_vocab import load_maps
from jaxspec.parallel.mesh import make_mesh

CONFIG = """
from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig

config = DistillConfig(
    name="toy",
    target="target",
    data=DataConfig("chats.jsonl", "chats.jsonl", length=64, batch=8, loss_on="assistant"),
    optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2, steps=6, clip_value=0.5),
    checkpoint=CheckpointConfig("run", save_every=3),
    export_folder="drafter",
)
"""
KEYS = {"steps", "tokens", "loss", "eval", "tokens_per_second", "checkpoint", "resumed_from"}


SMALL = (
    "target=target", "data.train=chats.jsonl", "data.eval=chats.jsonl", "data.length=64", "data.batch=4",
    "objective.steps=2", "optimizer.epochs=none", "optimizer.steps=3",
)  # fmt: skip
"""A shipped recipe on the toy target."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, its conversations and a config."""
    path = tmp_path_factory.mktemp("made")
    write_target(path / "target")
    lines = []
    for i in range(40):
        turns = [{"role": "user", "content": f"{i} and 2 make"}, {"role": "assistant", "content": f"{i + 2}, they say"}]
        lines.append(json.dumps({"id": str(i), "source": "toy", "messages": turns}))
    (path / "chats.jsonl").write_text("\n".join(lines))
    (path / "toy.py").write_text(CONFIG)
    return path


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test, with copies of what is `made`."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on one device, evaluated with no more draft steps than are trained, to compile less."""
    monkeypatch.setattr("jaxspec.training.resolve.make_mesh", lambda *_, **__: make_mesh(1, devices=jax.devices()[:1]))
    monkeypatch.setattr("jaxspec.training.distill.EVAL_STEPS", 1)


@pytest.mark.parametrize("part", ["train", "eval"])
def test_conversations_without_answers_are_refused_and_leave_no_drafter(
    folder: Path, part: str, capsys: pytest.CaptureFixture[str]
):
    Path("asked.jsonl").write_text(json.dumps({"id": "1", "messages": [{"role": "user", "content": "Who?"}]}))
    assert main(["train", "toy.py", f"data.{part}=asked.jsonl"]) == 1
    assert f"data.{part} holds no assistant turn" in capsys.readouterr().err
    assert not Path("drafter").exists()


@pytest.mark.usefixtures("little")
def test_a_finished_run_reports_its_keys_is_not_trained_again_and_its_drafter_decodes(folder: Path):
    assert main(["train", "toy.py", "--json", "first.json"]) == 0
    first = json.loads((folder / "first.json").read_text())
    assert first.keys() >= KEYS and first["steps"] == 6 and first["resumed_from"] is None
    assert first["eval"].keys() >= {"loss", "top1_agreement", "expected_acceptance", "simulated_tau"}
    assert main(["train", "toy.py", "--json", "again.json"]) == 0
    again = json.loads((folder / "again.json").read_text())
    assert again["resumed_from"] == 6
    assert again["eval"] == first["eval"]
    assert main(["export", "run", "exported"]) == 0
    drafter, exported = (load_drafter(folder / name) for name in ("drafter", "exported"))
    assert drafter._replace(params=0) == exported._replace(params=0)
    jax.tree.map(np.testing.assert_array_equal, drafter.params, exported.params)
    saved, written = (read_manifest(folder / name) for name in ("drafter", "exported"))
    assert saved | {"checksums": 0} == written | {"checksums": 0}
    assert saved["metrics"] == first["eval"] and saved["provenance"]["step"] == 6
    words = ["generate", "1 and 2 make", "--target", "target", "--drafter", "drafter", "--tree", "chain:2"]
    assert main([*words, "--max-new-tokens", "8"]) == 0


@pytest.mark.usefixtures("little")
def test_changed_settings_and_wrong_configs_are_refused_in_a_sentence(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["train", "toy.py"]) == 0
    assert main(["train", "toy.py", "optimizer.peak_lr=1e-2"]) == 1
    assert "belongs to a run with other settings (optimizer.peak_lr was 0.003, is 0.01)" in capfd.readouterr().err
    assert main(["train", "tiny"]) == 1
    assert "holds a PretrainConfig, not a DistillConfig" in capfd.readouterr().err
    # Other contents under the same name are another run; the same under another name, or a longer run, is this one.
    before = Path("chats.jsonl").read_text().splitlines(keepends=True)
    Path("chats.jsonl").write_text("".join(before[: len(before) * 3 // 4][::-1]))
    assert main(["train", "toy.py"]) == 1
    assert "the contents of data.train are not those of before" in capfd.readouterr().err
    Path("moved.jsonl").write_text("".join(before))
    assert main(["train", "toy.py", "data.train=moved.jsonl", "data.eval=moved.jsonl", "optimizer.steps=7"]) == 0
    shown = capfd.readouterr().err
    assert "resumed from step 6" in shown and "the run is now 7 steps long" in shown


def test_a_run_that_is_killed_ends_with_the_bits_of_one_that_is_not(folder: Path):
    data = ("data.train=chats.jsonl,chats.jsonl", "data.mix=chats.jsonl")
    longer = ("train", "--json", "result.json", "toy.py", "optimizer.steps=30", "checkpoint.save_every=4", *data)
    finish(start(folder, *longer, "checkpoint.folder=whole", "export_folder=whole_drafter"))
    for step in (8, 16):
        code, errors = stop_at(start(folder, *longer), (folder / "run" / str(step)).is_dir, signal.SIGKILL)
        assert code == -signal.SIGKILL, errors
    finish(start(folder, *longer))
    assert json.loads((folder / "result.json").read_text())["resumed_from"] >= 16
    torn, undisturbed = (load_drafter(folder / name, dtype=jnp.float32).params for name in ("drafter", "whole_drafter"))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), torn, undisturbed)))


@pytest.mark.usefixtures("little")
def test_a_base_model_is_answered_learned_and_decoded_without_a_template(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    lines = [json.dumps({"prompt": f"{i} and 2 make"}) for i in range(8)]
    Path("texts.jsonl").write_text("\n".join(lines))
    words = ["--target", "target", "--template", "none", "--max-new-tokens", "12"]
    assert main(["regenerate", *words, "--prompts", "texts.jsonl", "--keep-unfinished", "--out", "base.jsonl"]) == 0
    written = [json.loads(line) for line in Path("base.jsonl").read_text().splitlines()]
    assert all(len(record["answers"][0]["prompt_ids"]) < 12 for record in written)
    data = ["data.train=base.jsonl", "data.eval=base.jsonl", "data.template=none", "data.loss_on=assistant"]
    assert main(["train", "toy.py", *data, "checkpoint.folder=base_run", "export_folder=base_drafter"]) == 0
    assert main(["generate", "3 and 2 make", *words, "--drafter", "base_drafter", "--tree", "chain:2"]) == 0
    capsys.readouterr()
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    Path("chat.jsonl").write_text(json.dumps({"messages": turns}))
    assert main(["generate", "--prompts", "chat.jsonl", *words]) == 1
    assert "without a chat template a conversation is one user turn" in capsys.readouterr().err


@pytest.mark.usefixtures("little")
def test_an_eagle3_head_with_a_draft_vocabulary_goes_from_the_targets_answers_to_its_text(folder: Path):
    words = ["--target", "target", "--prompts", "chats.jsonl", "--limit", "8", "--max-new-tokens", "12"]
    assert main(["regenerate", *words, "--keep-unfinished", "--out", "answers.jsonl"]) == 0
    words = ["answers.jsonl", "--size", "20", "--target", "target", "--out", "vocab.safetensors"]
    assert main(["draft-vocab", *words]) == 0
    words = ["head.taps=0", "draft_vocab=vocab.safetensors", "data.train=answers.jsonl", "data.eval=answers.jsonl"]
    words += ["target_weights=int8", "scan_layers=true", "remat=dots"]
    assert main(["train", "eagle3", *SMALL, *words, "export_folder=head", "--json", "result.json"]) == 0
    figures = json.loads((folder / "result.json").read_text())["eval"]
    assert figures["soft_cross_entropy"] > 0 and figures["expected_acceptance"] > 0
    found = load_drafter("head")
    assert list(found.draft_vocab or ()) == load_maps("vocab.safetensors", SIZE).tolist()
    assert found.module.vocab == 20 == len(found.params["head"])
    words = ["generate", "1 and 2 make", "--target", "target", "--max-new-tokens", "12", "--json", "text.json"]
    texts = []
    for flags in ([], ["--drafter", "head", "--tree", "chain:2"]):
        assert main([*words, *flags]) == 0
        texts.append(json.loads((folder / "text.json").read_text())["rows"][0]["token_ids"])
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("little")
def test_the_two_stages_of_hass_are_one_training_that_changes_its_loss(folder: Path):
    """The second begins with the weights of the first: at no learning rate to speak of it ends with them."""
    assert main(["train", "hass_stage1", *SMALL, "--json", "first.json"]) == 0
    assert main(["train", "hass_stage2", *SMALL, "optimizer.peak_lr=1e-20", "--json", "second.json"]) == 0
    first, second = (json.loads((folder / name).read_text()) for name in ("first.json", "second.json"))
    assert "top_k:10" not in first["eval"] and second["eval"]["top_k:10"] > 0
    assert second["eval"]["smooth_l1"] == pytest.approx(first["eval"]["smooth_l1"])
    one, two = (load_drafter(result["drafter"]).params for result in (first, second))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("verb", ["train", "features", "plan"])
def test_rows_longer_than_the_target_has_positions_are_refused(folder: Path, verb: str, capsys):
    flags = {"features": ["--out", "store"], "plan": ["--topology", "v6e:2x2"]}.get(verb, [])
    assert main([verb, "toy.py", "data.length=257", *flags]) == 1
    told = f"data.length is 257, and target target has {POSITIONS} positions: give data.length={POSITIONS} or less"
    assert told in capsys.readouterr().err


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize(
    ("plain", "late", "joins"),
    [
        ("objective.weights=smooth_l1:1,soft_cross_entropy:0.1",
         ("objective.weights=smooth_l1:1,soft_cross_entropy:0.1,top_k:2:1", "objective.late=top_k:2:0.6"),
         "top_k:2 (weight 1) joins"),
        ("objective.steps=1",
         ("objective.steps=3", "objective.late=steps:0.6"),
         "draft step 2 and draft step 3 join"),
    ],
    ids=["loss", "steps"],
)  # fmt: skip
def test_what_is_late_is_not_there_before_its_share_of_the_run(
    plain: str, late: tuple[str, ...], joins: str, folder: Path, capfd: pytest.CaptureFixture[str]
):
    """Without it for two of three updates, then with it: the losses of both runs, and a resumed run goes on late."""
    losses = {}
    for name, changes in (("plain", [plain]), ("late", late)):
        run = (f"checkpoint.folder={name}", "checkpoint.save_every=2", f"export_folder={name}/drafter")
        command = ["train", "eagle2", *SMALL, "log_every=1", *changes, *run]
        assert main(command) == 0
        if name == "late":
            shutil.rmtree(folder / name / "3")
            assert main(command) == 0
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses["late"][1] == losses["plain"][1]
    assert losses["late"][2] == losses["plain"][2]
    assert losses["late"][3] > losses["plain"][3] + 0.1
    told = [line for line in capfd.readouterr().err.splitlines() if "objective.late" in line]
    note = f"step 3: {joins} the loss (objective.late), which jumps by it; the new step is compiled"
    assert told == 2 * [note]


@pytest.mark.usefixtures("little")
def test_a_run_of_muon_goes_on_as_muon_alone(folder: Path, capfd: pytest.CaptureFixture[str]):
    run = ("checkpoint.folder=m", "checkpoint.save_every=2", "export_folder=m/drafter", "optimizer.kind=muon")
    assert main(["train", "eagle2", *SMALL, *run]) == 0
    whole = load_drafter(folder / "m/drafter").params
    shutil.rmtree(folder / "m/3")
    assert main(["train", "eagle2", *SMALL, *run, "optimizer.kind=adamw"]) == 1
    assert "(optimizer.kind was muon, is adamw); choose another checkpoint.folder\n" in capfd.readouterr().err
    assert main(["train", "eagle2", *SMALL, *run]) == 0
    jax.tree.map(np.testing.assert_array_equal, load_drafter(folder / "m/drafter").params, whole)
