"""`jaxspec lab cost`: its result, its file, what it refuses, and the prices of programs for absent TPUs."""

import contextlib
import importlib
import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from random_models import write_drafter, write_target

from jaxspec.__main__ import main
from jaxspec.console import cli
from jaxspec.lab.compiled import CompiledBench, tpu_machine
from jaxspec.lab.costs import PARTS, load_costs
from jaxspec.lab.cpu_rates import CpuRates
from jaxspec.lab.devices import peaks_of
from jaxspec.lab.roofline import Roofline
from jaxspec.lab.round_parts import Grid, Point
from jaxspec.lab.shapes import abstract_models
from jaxspec.targets.decoder import LlamaConfig

VERB = importlib.import_module("jaxspec.infer.lab_cost")
SMALL = ["--nodes", "1,8", "--widths", "2", "--contexts", "32"]


def run(*flags: str) -> int:
    return main(["lab", "cost", *SMALL, *flags])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target and a drafter, the costs of a roofline of theirs, and the verb's result."""
    place = tmp_path_factory.mktemp("lab")
    write_target(place / "target")
    write_drafter(place / "drafter")
    models = ["--target", str(place / "target"), "--drafter", str(place / "drafter")]
    written = ["--out", str(place / "roofline.json"), "--json", str(place / "result.json")]
    assert run(*models, "--source", "roofline", "--device", "v5e", *written) == 0
    return place


def test_the_result_has_the_rows_of_every_part_and_says_their_source(folder: Path):
    result = json.loads((folder / "result.json").read_text())
    assert {"command", "version", "git_sha", "machine", "dtype", "wall_seconds", "seed"} <= result.keys()
    assert {row["part"] for row in result["rows"]} == set(PARTS)
    keys = {"source", "device", "part", "nodes", "width", "batch", "context", "seconds"}
    assert all(row.keys() == keys and row["source"] == "roofline" and row["seconds"] > 0 for row in result["rows"])
    assert (result["device"], result["dtype"], result["left_out"], result["failed"]) == ("v5e", "bfloat16", [], [])


def test_the_file_holds_the_same_rows_and_the_facts(folder: Path):
    table = load_costs(folder / "roofline.json")
    result = json.loads((folder / "result.json").read_text())
    assert [row._asdict() for row in table.rows] == result["rows"]
    assert table.facts["one_pass"] is False and table.facts["reference_tree"].startswith("static:")
    assert table.facts["row_steps"] == {"ends": [], "every": 1}


def test_compiled_costs_have_a_whole_round_at_every_place_and_name_their_steps_and_method(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxspec.lab.compiled.CompiledBench.measure", lambda self, point: 1e-3 * (1 + point.nodes))
    monkeypatch.setattr(VERB, "cpu_rates", lambda job: CpuRates(1e9, {1: 1e9}))
    models = ["--target", str(folder / "target"), "--drafter", str(folder / "drafter"), "--batches", "1,2"]
    assert run(*models, "--source", "compiled", "--nodes", "1,16,32", "--out", str(folder / "compiled.json")) == 0
    table = load_costs(folder / "compiled.json")
    assert [r["batch"] for r in table.facts["rounds"]] == [1, 2]
    assert table.facts["row_steps"]["ends"][:4] == [1, 4, 8, 16] and "rate measured here" in table.facts["method"]
    nodes = {b: [r.nodes for r in table.rows if r.part == "verify" and r.batch == b] for b in (1, 2)}
    # Between 16 and 32 rows the first step ends at 20, between 2 and 32 at 4.
    assert nodes == {1: [1, 4, 16, 20, 32], 2: [1, 4, 16, 20, 32]}
    said = capsys.readouterr().out
    assert "Whole rounds, ms" in said and "rate measured here" in said


def test_a_gpu_that_is_here_is_priced_by_what_its_compiler_counts(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """No GPU is here: this CPU's compiler stands in, under its name."""
    monkeypatch.setattr(VERB, "device_here", lambda: "h100")
    models = ["--target", str(folder / "target"), "--drafter", str(folder / "drafter")]
    assert run(*models, "--source", "compiled", "--out", str(folder / "gpu.json")) == 0
    table = load_costs(folder / "gpu.json")
    assert {row.part for row in table.rows} == set(PARTS) and table.facts["device"] == "h100"
    assert "cost analysis" in table.facts["method"] and table.facts["peak_flops_per_second"] > 1e14
    assert "estimates no cycles" in capsys.readouterr().out


def test_the_file_holds_the_bytes_of_weights_and_of_a_token_in_the_caches(folder: Path):
    """Llama-3-8B in bf16: 131,072 bytes a token, 16 GB of weights; a drafter's caches come on top."""
    out = folder / "llama.json"
    assert (
        run("--shape", "llama3-8b", "--recipe", "none", "--source", "roofline", "--device", "v5p", "--out", str(out))
        == 0
    )
    facts = load_costs(out).facts
    assert facts["cache_bytes_per_token"] == 131_072 and 16.0e9 < facts["weights_bytes"] < 16.1e9
    assert facts["memory_bytes"] == peaks_of("v5p").memory
    assert facts["held_bytes"] == facts["weights_bytes"] + (32 + Grid((), (), (), ()).room) * 131_072
    more = ["--shape", "llama3-8b", "--source", "roofline", "--device", "v5p", "--out", str(out)]
    assert run(*more) == 0
    assert load_costs(out).facts["cache_bytes_per_token"] == 131_072 + 131_072 // 32  # one layer more


def test_the_paths_that_are_priced_are_those_of_the_flag(folder: Path):
    models = ["--target", str(folder / "target"), "--drafter", str(folder / "drafter")]
    out = folder / "paths.json"
    assert run(*models, "--source", "roofline", "--device", "v5e", "--paths", "2,17", "--out", str(out)) == 0
    assert {row.nodes for row in load_costs(out).rows if row.part == "extend"} == {2, 4, 17}


def test_a_table_is_held_against_another_of_the_same_device(folder: Path, capsys: pytest.CaptureFixture[str]):
    models = ["--target", str(folder / "target"), "--drafter", str(folder / "drafter")]
    slower = ["--source", "roofline", "--device", "v5e", "--overhead-us", "10", "--out", str(folder / "slower.json")]
    against = ["--against", str(folder / "roofline.json"), "--json", str(folder / "compared.json")]
    assert run(*models, *slower, *against) == 0
    (found,) = json.loads((folder / "compared.json").read_text())["against"]
    assert found["source"] == "roofline" and [p["part"] for p in found["parts"]] == list(PARTS)
    assert all(p["ratio"] > 1 for p in found["parts"])
    assert "roofline by roofline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--target", "tiny", "--shape", "tiny"], "--target and --shape are both given"),
        (["--drafter", "x", "--recipe", "hass"], "--drafter and --recipe are both given"),
        (["--shape", "llama9"], "--shape is 'llama9'; there are tiny,"),
        (["--nodes", "1,x"], "--nodes is '1,x'; give whole numbers"),
        (["--widths", "0"], "--widths is '0'; give whole numbers"),
        (["--source", "roofline", "--device", "v9"], "--device is 'v9'; give one of cpu, v4"),
        (["--source", "compiled", "--device", "h100"], "XLA compiles for no GPU that is not here"),
        (["--source", "measured", "--device", "v5e"], "this machine is cpu; leave out --device"),
        (["--contexts", "100000", "--shape", "tiny"], "--contexts 100000: the target has 2,048 positions"),
        (["--recipe", "tiny"], "--recipe tiny trains no drafter"),
        (["--routed"], "--routed and --overhead-us are for --source roofline"),
        (["--exact-layers"], "--exact-layers is for --source compiled"),
        (["--minutes", "0"], "--minutes is 0; it must be above 0"),
        (["--against", "nowhere.json"], "nowhere.json: there is no such file of costs"),
        (["--target", "nowhere"], "there is no such folder"),
    ],
)
def test_bad_input_is_one_sentence(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    with contextlib.suppress(SystemExit):
        assert main(["lab", "cost", *flags]) == cli.EXIT_FAILED
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said


def test_costs_of_another_device_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run("--source", "roofline", "--device", "v6e", "--against", str(folder / "roofline.json")) == 1
    assert "holds costs of v5e, and these are of v6e" in capsys.readouterr().err


def test_a_drafter_of_another_width_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    write_drafter(folder / "wide", width=64)
    given = ["--target", str(folder / "target"), "--drafter", str(folder / "wide")]
    assert run(*given, "--source", "roofline", "--device", "v5e") == 1
    assert "reads features of width 64, and the target's are 32 wide" in capsys.readouterr().err


WIDE = LlamaConfig(32000, 1024, 4, 8, 8, 128, 4096)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_programs_for_an_absent_tpu_are_priced_above_the_roofline(chip: str):
    """The clock is within its doubt of 1.4 to 3.2 GHz; a few rows cost little more than 8, one row too."""
    pytest.importorskip("libtpu")
    for name, value in VERB.LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    machine: Any = tpu_machine(chip)
    assert 1.4e9 < machine.clock < 3.2e9
    models = abstract_models(WIDE, None, dtype=jnp.bfloat16)
    grid = Grid((8,), (), (1,), (512,))
    bench, line = CompiledBench(models, grid, machine), Roofline(models, grid, peaks_of(chip))
    price = {n: bench.measure(Point("verify", n, 0, 1, 512)) for n in (1, 8, 16)}
    assert price[16] < 1.3 * price[8]
    assert price[1] < 1.5 * price[8]
    assert price[8] > 0.85 * line.measure(Point("verify", 8, 0, 1, 512))
