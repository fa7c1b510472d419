"""Tests of `jaxspec bench train`: the keys of its result, and what a step costs at Llama-3-8B shapes."""

import importlib
import json
import typing
from pathlib import Path

import pytest

from jaxspec.__main__ import main
from jaxspec.targets.decoder import SHAPES, LlamaConfig

ROW_KEYS = {
    "recipe", "steps_per_second", "tokens_per_second", "flops_per_second", "mfu", "target_ms", "drafter_ms",
    "head_and_loss_ms",
}  # fmt: skip
BENCH = importlib.import_module("jaxspec.train.bench_train")


def bench(path: Path, *flags: str) -> dict:
    assert main(["bench", "train", *flags, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def recipes(*names: str) -> list[str]:
    return [word for name in names for word in ("--recipe", name)]


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, dict]:
    """The rows of several recipes at Llama-3-8B shapes, where nothing could be allocated."""
    arms = recipes("eagle", "hass:3", "medusa:4", "parallelspec:4", "parallelspec:4 head.keep=0.7", "draft_lm")
    flags = ["--shape", "llama3-8b", "--dtype", "bf16", "--length", "1024", "--count-only", *arms]
    return {row["recipe"]: row for row in bench(tmp_path_factory.mktemp("count") / "out.json", *flags)["rows"]}


def test_three_steps_of_hass_take_at_most_half_as_much_again_as_eagle(counted):
    assert 1.3 < counted["hass:3"]["flops_ratio"] <= 1.5
    assert counted["hass:3"]["target_flops"] == counted["eagle"]["target_flops"]


def test_an_eagle_step_costs_what_its_matmuls_say(counted):
    """Logits of the target once, and of the draft forward and back: the gradient is made while they are at hand."""
    c, length = SHAPES["llama3-8b"], 1024
    attended = 4 * c.heads * c.head_dim * sum(128 * 128 * (i + 1) for i in range(length // 128))  # blocks of queries
    layer = c.width * (c.heads + 2 * c.kv_heads) * c.head_dim + c.heads * c.head_dim * c.width + 3 * c.width * c.mlp
    head, fusion = c.vocab * c.width, 2 * c.width**2
    assert counted["eagle"]["target_flops"] == c.layers * (2 * length * layer + attended)
    assert counted["eagle"]["head_and_loss_flops"] == 2 * length * head * 3
    weights = 2 * length * (3 * layer + 2 * fusion)  # what goes into the fusion needs no gradient
    assert counted["eagle"]["drafter_flops"] == weights + 4 * attended  # forward, again, and twice as much back


@pytest.mark.parametrize("name", ["eagle", "hass:3", "medusa:4", "parallelspec:4", "draft_lm"])
def test_the_parts_have_the_steps_matmuls(counted, name: str):
    row = counted[name]
    assert sum(row[f"{part}_flops"] for part in BENCH.PARTS) == row["flops_per_step"]
    assert (row["optimizer_flops"] > 0) == name.startswith(("parallelspec", "draft_lm"))  # those that learn by Muon


def test_dropping_positions_saves_drafter_work(counted):
    full, dropped = counted["parallelspec:4"], counted["parallelspec:4 head.keep=0.7"]
    assert dropped["drafter_flops"] < 0.7 * full["drafter_flops"]


def test_a_draft_vocabulary_saves_logits_of_the_draft_alone(tmp_path):
    """EAGLE-3's own head of 1,000 tokens: the draft's logits forward and back by both; the target's twice, for which
    positions are trained is known before the first of them is."""
    flags = ["--length", "256", "--draft-vocab", "1000", "--count-only", *recipes("eagle3:2")]
    (row,) = bench(tmp_path / "out.json", *flags)["rows"]
    c = SHAPES["tiny"]
    assert row["head_and_loss_flops"] == 2 * 256 * c.width * (2 * c.vocab + 2 * 3 * 1000)


def test_every_drafter_learns_with_a_draft_vocabulary(tmp_path):
    arms = recipes("eagle", "fspad", "eagle3:2", "medusa:2", "parallelspec:2", "draft_lm")
    rows = bench(tmp_path / "out.json", "--length", "64", "--draft-vocab", "1000", "--count-only", *arms)["rows"]
    assert len(rows) == 6 and all(row["flops_per_step"] > 0 for row in rows)


def test_count_only_times_nothing(counted):
    assert all(ROW_KEYS <= row.keys() for row in counted.values())
    assert all(row["step_ms"] is row["steps_per_second"] is row["mfu"] is None for row in counted.values())


def test_json_holds_the_agreed_keys_and_rates_fit_together(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", LlamaConfig(61, 16, 7, 2, 1, 8, 32))
    flags = ["--batch", "2", "--length", "24", "--repeats", "1", *recipes("medusa:1", "medusa:1 objective.noise=0.1")]
    result = bench(tmp_path / "out.json", *flags)
    assert {"command", "version", "git_sha", "machine", "dtype", "wall_seconds", "seed"} <= result.keys()
    assert [row["recipe"] for row in result["rows"]] == ["medusa:1", "medusa:1 objective.noise=0.1"]
    for row in result["rows"]:
        assert ROW_KEYS <= row.keys()
        assert row["tokens_per_second"] == pytest.approx(48 * row["steps_per_second"])
        assert row["flops_per_second"] == pytest.approx(row["flops_per_step"] * row["steps_per_second"])
        model = row["flops_per_second"] * (1 - row["recomputed_flops_per_step"] / row["flops_per_step"])
        assert row["mfu"] == pytest.approx(model / result["machine_matmul_flops_per_second"])
        assert sum(row[f"{part}_ms"] for part in (*BENCH.PARTS, "rest")) == pytest.approx(row["step_ms"])
    assert result["rows"][0]["time_ratio"] == result["rows"][0]["flops_ratio"] == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--recipe", "eagel2"], "did you mean eagle2"),
        (["--recipe", "tiny"], "--recipe tiny trains no drafter"),
        (["--recipe", "medusa:4 objective.steps=5"], "drafts 4 tokens ahead, and objective.steps is 5"),
        (["--recipe", "hass", "--recipe", "hass"], "names an arm twice"),
        (["--recipe", ""], "--recipe is empty"),
        (["--draft-vocab", "5000"], "--draft-vocab is 5000; tiny has 4096 tokens"),
        (["--batch", "0"], "--batch is 0"),
    ],
)
def test_wrong_flags_are_wrong_usage(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "train", *flags])
    assert stop.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_the_command_line_names_every_shape():
    assert typing.get_args(BENCH.Shape) == tuple(SHAPES)
