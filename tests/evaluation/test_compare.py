"""`jaxspec compare`: recipes on one budget, resumed at every level, one failure apart from the others."""

import dataclasses
import importlib
import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from random_models import write_drafter, write_target

from jaxspec.__main__ import main
from jaxspec.config import DistillConfig
from jaxspec.console.cli import EXIT_INTERRUPTED, EXIT_PREEMPTED
from jaxspec.drafters import Eagle
from jaxspec.evaluation import acceptance
from jaxspec.parallel.mesh import make_mesh
from jaxspec.serving import queue
from jaxspec.training import recipes

compare: Any = importlib.import_module("jaxspec.train.compare")

RECIPE = """
from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig

config = DistillConfig(
    name="toy",
    target="target",
    data=DataConfig("elsewhere.jsonl", "elsewhere.jsonl", length=64, batch=8, loss_on="assistant", limit=3),
    optimizer=OptimizerConfig(peak_lr={rate}, warmup_steps=2, epochs=9, clip_value=0.5),
    checkpoint=CheckpointConfig("run", save_every=3),
    export_folder="drafter",
    drafter="{drafter}",
    log_every=1,
)
"""
PRETRAINED = """
from jaxspec.config import CheckpointConfig, DataConfig, OptimizerConfig, PretrainConfig
from jaxspec.targets.decoder import LlamaConfig

config = PretrainConfig(
    name="ready",
    model=LlamaConfig(vocab=300, width=32, layers=1, heads=4, kv_heads=2, head_dim=8, mlp=64),
    data=DataConfig("elsewhere.jsonl", "elsewhere.jsonl"),
    optimizer=OptimizerConfig(peak_lr=1e-3, steps=1),
    checkpoint=CheckpointConfig("pretrained_run"),
    export_folder="pretrained",
    seed=4,
)
"""
FLAGS = (
    "--train", "chats.jsonl", "--eval", "chats.jsonl", "--limit", "3", "--tokens", "900", "--max-new-tokens", "12",
    "--tree", "chain:2", "--slots", "2",
)  # fmt: skip
ROW = {
    "recipe", "seed", "source", "temperature", "tau", "tau_low", "tau_high", "drafter_passes", "drafter_parameters",
    "train_tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A target, its conversations and recipes; the working directory of all tests here."""
    path = tmp_path_factory.mktemp("compare")
    write_target(path / "target")
    lines = []
    for i in range(40):
        turns = [{"role": "user", "content": f"{i} and 2 make"}, {"role": "assistant", "content": f"{i + 2}, they say"}]
        lines.append(json.dumps({"id": str(i), "source": "odd" if i % 2 else "even", "messages": turns}))
    (path / "chats.jsonl").write_text("\n".join(lines))
    kinds = {"slow": (1e-3, "eagle"), "fast": (3e-3, "eagle"), "broken": (1e-3, "goose")}
    for name, (rate, drafter) in kinds.items():
        (path / f"{name}.py").write_text(RECIPE.format(rate=rate, drafter=drafter))
    (path / "ready.py").write_text(PRETRAINED)
    write_drafter(path / "pretrained")
    before = Path.cwd()
    os.chdir(path)
    yield path
    os.chdir(before)


class Watch:
    """Counts what is trained, answered and replayed, and does what is asked before a training or after a replay.

    Only the recipe `slow` is trained, on one device to compile less; the others are given random drafters.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[str] = []
        self.answered = self.replayed = 0
        self.before_training: dict[int, Any] = {}
        self.after_replay: dict[int, Any] = {}
        train, serve, replay = recipes.run_distillation, queue.serve, acceptance.replay

        def watched_train(config: DistillConfig, data: Any) -> Any:
            self.before_training.get(len(self.trained), lambda: None)()
            self.trained.append(config.name)
            if config.name.startswith("slow") or config.drafter != "eagle":
                return train(config, data)
            write_drafter(Path(config.export_folder))
            return {"steps": config.optimizer.steps}

        def watched_serve(*args: Any, **kwargs: Any) -> Any:
            for served in serve(*args, **kwargs):
                self.answered += 1
                yield served

        def watched_replay(*args: Any, **kwargs: Any) -> Any:
            for replayed in replay(*args, **kwargs):
                self.replayed += 1
                self.after_replay.get(self.replayed, lambda: None)()
                yield replayed

        monkeypatch.setattr("jaxspec.training.recipes.run_distillation", watched_train)
        monkeypatch.setattr("jaxspec.serving.queue.serve", watched_serve)
        monkeypatch.setattr("jaxspec.evaluation.acceptance.replay", watched_replay)
        one = make_mesh(1, devices=jax.devices()[:1])
        monkeypatch.setattr("jaxspec.training.resolve.make_mesh", lambda *_, **__: one)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_comparison_goes_on_at_every_level_and_says_what_failed(
    folder: Path, watch: Watch, capfd: pytest.CaptureFixture[str]
):
    """Killed before the second recipe, stopped among its prompts, finished beside one that fails, then only read."""
    words = ["compare", "slow.py", "broken.py", "fast.py", *FLAGS, "--out", "whole"]
    watch.before_training[1] = interrupt
    assert main(["compare", "slow.py", "fast.py", *FLAGS, "--out", "whole"]) == EXIT_INTERRUPTED
    assert watch.trained == ["slow, seed 0"] and watch.replayed == 2 * 6

    watch.before_training.clear()
    watch.after_replay[2 * 6 + 4] = terminate
    assert main(words) == EXIT_PREEMPTED
    shown = capfd.readouterr().err
    assert "stopped while fast, seed 0 was measured" in shown and "resume with the same command" in shown
    assert watch.trained == ["slow, seed 0", "broken, seed 0", "fast, seed 0"]

    assert main(words) == 1
    assert watch.trained[3:] == ["broken, seed 0"] and watch.replayed == 4 * 6
    assert watch.answered == 2 * 6  # every prompt once a temperature, whatever drafts
    shown = capfd.readouterr()
    assert "broken, seed 0 failed: drafter 'goose' is not one of" in shown.err
    assert "chain:2, greedy, 6 prompts" in shown.out and "temperature 1" in shown.out and "fast" in shown.out

    result = json.loads((folder / "whole" / "compare.json").read_text())
    assert result.keys() >= {"command", "version", "git_sha", "machine", "dtype", "wall_seconds", "seed", "rows"}
    assert all(row.keys() >= ROW for row in result["rows"])
    assert len(result["rows"]) == 2 * 2 * 3  # recipes, temperatures, sources with all
    assert {row["source"] for row in result["rows"]} == {"all", "odd", "even"}
    assert all(1 <= row["tau_low"] <= row["tau"] <= row["tau_high"] <= 3 for row in result["rows"])
    assert len({row["train_tokens"] for row in result["rows"]}) == 1 and result["rows"][0]["train_tokens"] >= 900
    ratios = [(r["ratio"], r["ratio_low"], r["ratio_high"]) for r in result["recipes"] if r["recipe"] == "slow"]
    assert set(ratios) == {(1.0, 1.0, 1.0)}
    assert result["failures"].keys() == {"broken, seed 0"}
    assert (folder / "whole" / "compare.txt").read_text().startswith("tau: chain:2, greedy, 6 prompts")
    assert [(c["recipe"], Path(c["metrics"]).is_file()) for c in result["learning_curves"]] == [("slow", True)]
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert [Path(name).read_bytes()[1:4] for name in result["figures"]] == [b"PNG", b"PNG"] * drawn

    assert main(["compare", "slow.py", "fast.py", *FLAGS, "--out", "whole", "--json", "again.json"]) == 0
    assert len(watch.trained) == 4 and watch.replayed == 4 * 6
    assert json.loads((folder / "again.json").read_text())["rows"] == result["rows"]


def test_changed_settings_are_refused_by_name(folder: Path, watch: Watch, capfd: pytest.CaptureFixture[str]):
    words = ["compare", "changing.py", *FLAGS, "--temperature", "0", "--out", "kept"]
    recipe = folder / "changing.py"
    recipe.write_text(RECIPE.format(rate=1e-3, drafter="goose"))
    assert main(words) == 1  # nothing was trained, so the recipe may still be mended
    recipe.write_text(RECIPE.format(rate=1e-3, drafter="eagle"))
    assert main(words) == 0
    assert main([*words, "--tokens", "1200"]) == 1
    assert (
        "kept: was begun with other settings (tokens was 900, is 1200): give another --out or the same flags"
        in capfd.readouterr().err
    )
    recipe.write_text(RECIPE.format(rate=1e-2, drafter="eagle"))
    assert main(words) == 1
    shown = capfd.readouterr().err
    assert "trained with other settings (optimizer.peak_lr was 0.001, is 0.01): give another --out, or move" in shown
    recipe.write_text(RECIPE.format(rate=1e-3, drafter="eagle"))
    assert main([*words, "--set", "optimizer.peak_lr=0.02"]) == 1
    assert "optimizer.peak_lr was 0.001, is 0.02" in capfd.readouterr().err
    chats = folder / "chats.jsonl"
    before = chats.read_text()
    chats.write_text(before.replace("they say", "they said"))
    assert main(words) == 1
    assert "train_contents was " in capfd.readouterr().err
    chats.write_text(before)
    noted = folder / "kept" / "decoded.jsonl"
    noted.write_text(noted.read_text() + noted.read_text())  # two comparisons' notes put together by hand
    assert main(words) == 1
    lines = len(noted.read_text().splitlines())
    assert (
        f"decoded.jsonl:{lines // 2 + 1}: has no 'of': not noted by this verb; remove the line"
        in capfd.readouterr().err
    )
    assert watch.trained == ["changing, seed 0"] * 2


def test_headlines_get_every_seed_and_a_pretrained_drafter_its_own(folder: Path):
    given = ("slow.py", "fast.py", "ready.py")
    args = compare.Args(recipes=given, seeds="0,2", headline="fast", out=Path("seeds"))
    terms, _, arms = compare.plan(args)
    assert terms.target == "target"
    assert [arm.name for arm in arms] == ["slow, seed 0", "fast, seed 0", "ready, seed 4", "fast, seed 2"]
    config = arms[3].config
    assert isinstance(config, DistillConfig) and config.seed == 2 and config.data.limit is None
    assert config.data.train == args.train and config.export_folder == "seeds/fast/seed-2/drafter"


def test_changes_are_made_to_every_recipe_that_is_trained(folder: Path):
    args = compare.Args(recipes=("slow.py", "ready.py"), target="target", set=("optimizer.peak_lr=0.5", "data.batch=4"))
    changed, ready = (arm.config for arm in compare.plan(args).arms)
    assert (changed.optimizer.peak_lr, changed.data.batch, ready.optimizer.peak_lr) == (0.5, 4, 1e-3)
    same = [dataclasses.replace(args, train="chats.jsonl", eval="chats.jsonl", set=s) for s in ((), args.set)]
    assert compare.begun_with(same[0], "target") == compare.begun_with(same[1], "target")  # each arm keeps its own


def test_a_change_may_be_of_one_recipe():
    changes = ("data.batch=4", "hass:optimizer.peak_lr=0.5", "hass:data.batch=2")
    args = compare.Args(recipes=("eagle2", "hass"), set=changes)
    assert args.changes_of("eagle2") == (["data.batch=4"], [])
    assert args.changes_of("hass") == (["data.batch=4"], ["optimizer.peak_lr=0.5", "data.batch=2"])
    arms = compare.plan(args).arms
    assert {arm.recipe: (arm.config.data.batch, arm.config.optimizer.peak_lr) for arm in arms} == {
        "eagle2": (4, 5e-3),
        "hass": (2, 0.5),
    }
    with pytest.raises(ValueError, match=r"--set best:data\.batch=4: best is not compared: eagle2, hass are"):
        compare.Args(recipes=("eagle2", "hass"), set=("best:data.batch=4",))


def test_one_chat_template_serves_all(folder: Path):
    args = compare.Args(recipes=("eagle2_vicuna_7b", "hass_vicuna_13b"), target="target")
    assert compare.template_of(compare.plan(args).arms).name == "vicuna"
    args = compare.Args(recipes=("eagle2_vicuna_7b", "eagle2"), target="target")
    with pytest.raises(ValueError, match=r"different chat templates .*choose one for all with --template"):
        compare.template_of(compare.plan(args).arms)
    args = compare.Args(recipes=args.recipes, target="target", template="chatml")
    assert compare.template_of(compare.plan(args).arms).name == "chatml"


def test_a_drafter_that_is_there_is_measured_and_trees_are_cut_to_its_depth(
    folder: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(Eagle, "deepest", 2)
    monkeypatch.setattr(compare.figures, "missing", lambda: "matplotlib is not installed: do this")
    words = ["compare", "ready.py", *FLAGS[:-4], *FLAGS[-2:], "--tree", "chain:3", "--temperature", "0", "--out", "cut"]
    words += ["--target", "target"]
    assert main([*words, "--json", "cut.json"]) == 0
    shown = capfd.readouterr()
    assert "drafts 2 deep at most, so chain:3 becomes chain:2" in shown.err and "tree cut to" in shown.out
    assert "matplotlib is not installed: do this" in shown.err
    result = json.loads((folder / "cut.json").read_text())
    row = result["rows"][0]
    assert (row["tree"], row["drafted_tree"], row["seed"], row["train_tokens"]) == ("chain:3", "chain:2", 4, 0)
    assert not watch.trained and not result["figures"] and not result["learning_curves"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["eagle3000"], "there is no recipe 'eagle3000' in configs/; there are best, best_llama3_8b, draft_lm"),
        (["eagle2", "eagle2"], "name recipes to compare, each once"),
        (["eagle2", "--headline", "hass"], "--headline names hass, which is not compared: eagle2 are"),
        (["eagle2", "--seeds", "0,x"], "--seeds is '0,x'"),
        (["eagle2", "--tree", "bush:3"], "tree 'bush:3' is not one of"),
        (["eagle2", "--tokens", "0"], "--tokens is 0"),
        (["eagle2", "--temperature", "-1"], "temperature is -1.0"),
    ],
)
def test_wrong_flags_are_wrong_usage(flags: list[str], sentence: str, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *flags])
    assert stop.value.code == 2
    assert sentence in " ".join(capfd.readouterr().err.split())


def test_missing_conversations_are_a_sentence_with_the_way_to_make_them(
    folder: Path, capfd: pytest.CaptureFixture[str]
):
    assert main(["compare", "slow.py", *FLAGS, "--train", "nowhere.jsonl", "--out", "none"]) == 1
    assert "nowhere.jsonl: no such file; make it with jaxspec regenerate" in capfd.readouterr().err
