"""Tests of `jaxspec lab report`: the page and its figures, comparisons, refusals, and its looks in Chromium."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab_toys import ROW, cost_table, log_toys, rates_alone, times
from page_checks import check_in_chromium, check_page

from jaxspec.__main__ import main
from jaxspec.console.cli import EXIT_FAILED, EXIT_USAGE
from jaxspec.lab.costs import CostTable
from jaxspec.lab.profile import load_profile
from jaxspec.lab.simulate import join, simulate
from jaxspec.lab.tree_picture import layout, tree_picture
from jaxspec.pages.chromium import find_chromium

HOSTILE = "<script>alert(1)</script>"
SECTIONS = {"best", "trees", "size", "acceptance", "calibration", "map", "measured", "errors", "made"}


def on(table: CostTable, device: str, source: str) -> CostTable:
    """Returns costs as those of another device and source."""
    rows = tuple(row._replace(device=device, source=source) for row in table.rows)
    return CostTable(rows, {**table.facts, "device": device, "source": source})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name two profiles and the costs of two machines."""
    folder = tmp_path_factory.mktemp("report")
    rate_DK = np.tile(ROW[:4], (4, 1))
    easy, hard = (simulate(s * rate_DK, prompts=16, tokens=60, seed=i, source=str(s)) for i, s in enumerate((1, 0.5)))
    join([easy, hard]).save(folder / "easy.npz")
    hostile = {**hard.facts, "drafter": HOSTILE, "temperature": 1.0}
    dataclasses.replace(hard, facts=hostile).save(folder / "hard.npz")
    on(cost_table(), "v5e", "roofline").save(folder / "v5e.json")
    on(times(cost_table(batches=(1, 4), contexts=(512,)), 30), "cpu", "measured").save(folder / "cpu.json")
    names = {"profile": ("easy.npz", "hard.npz"), "cost": ("v5e.json", "cpu.json")}
    flags = [word for kind, mine in names.items() for name in mine for word in (f"--{kind}", str(folder / name))]
    return [*flags, "--max-nodes", "16"]


def bench(path: Path, **changes: Any) -> str:
    """Writes a result of `bench decode` on a CPU."""
    arms = {"plain": None, "chain:2": "chain:2", "static": "static:0,1,00", "grown": "dynamic:16x4x4"}
    rows = [
        {"arm": arm, "tree": tree, "drafter": None, "batch": 1, "prefix": 500, "tokens_per_second": 3.0, "tau": 1.5}
        for arm, tree in arms.items()
    ]
    rows.append({**rows[1], "batch": 64, "arm": "chain:2 of many"})
    value = {"command": "bench decode", "machine": {"accelerator": None}, "temperature": 0.0, "rows": rows}
    path.write_text(json.dumps({**value, **changes}), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def made(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The page of two profiles, two machines and a bench, and its JSON."""
    folder = tmp_path_factory.mktemp("made")
    page, result = folder / "new/report.html", folder / "result.json"
    measured = ["--measured", bench(folder / "bench.json")]
    assert main(["lab", "report", str(page), *files, *measured, "--json", str(result)]) == 0
    return page, json.loads(result.read_text())


def test_the_page_is_whole_and_every_plot_has_its_numbers(made):
    page, _ = made
    text = page.read_text(encoding="utf-8")
    read = check_page(text)
    assert SECTIONS <= set(read.ids)
    figures = [given["id"] for tag, given in read.attributes if tag == "figure"]
    assert {"tree-1", "nodes-1", "nodes-1-1", "depth-2-2", "acceptance-2", "ranks-1", "calibration-1", "ece-2"} <= {
        *figures
    }
    assert {"map-4", "errors-4", "measured-speed", "measured-tau"} <= {*figures}
    assert "nan" not in re.sub(r"<(?:p|dd|td|desc)[^>]*>[^<]*", "", text).lower()
    assert "http" not in text.replace("http-equiv", "")


def test_text_of_files_stays_text(made):
    text = made[0].read_text(encoding="utf-8")
    assert HOSTILE not in text and "&lt;script&gt;alert(1)" in text


def test_every_profile_is_searched_with_every_machine(made):
    _, result = made
    assert result["command"] == "lab report" and len(result["rows"]) == 4
    assert {"page", "pictures", "measured", "left_out", "seed", "dtype", "machine"} <= result.keys()
    assert {(Path(r["profile"]).stem, r["made_from"]["costs"]["device"]) for r in result["rows"]} == {
        (profile, device) for profile in ("easy", "hard") for device in ("v5e", "cpu")
    }
    assert all(row["speedup"] >= 1 for row in result["rows"])


def test_the_page_says_how_it_was_made(made):
    page, result = made
    text = page.read_text(encoding="utf-8")
    assert "jaxspec lab report" in text and "--max-nodes 16" in text
    for row in result["rows"]:
        assert row["made_from"]["profile"]["sha256"] in text and row["made_from"]["costs"]["sha256"] in text
    assert "easy on v5e (roofline)" in text and "hard on cpu (measured)" in text
    assert "roofline: not run" in text and "measured: a clock" in text
    assert "acceptance is of simulated for simulated, costs are of d for t" in text


def test_measured_trees_are_compared_with_the_predictions_of_their_device_and_temperature(made):
    _, result = made
    assert {row["arm"] for row in result["measured"]} == {"plain", "chain:2", "static"}
    assert {row["search"] for row in result["measured"]} == {"easy on cpu (measured)", "hard on cpu (measured)"}
    assert len([row for row in result["measured"] if row["arm"] == "plain"]) == 1
    for row in result["measured"]:
        assert row["error"] == pytest.approx(row["predicted_tokens_per_second"] / 3.0 - 1)
    assert next(row for row in result["measured"] if row["arm"] == "plain")["expected_tau"] == 1
    reasons = {row["arm"]: row["reason"] for row in result["left_out"]}
    assert reasons.keys() == {"grown", "chain:2 of many"}
    assert "drawn from rates" in reasons["grown"] and "batch of 64" in reasons["chain:2 of many"]


def test_the_figures_are_those_of_search_and_table(files, tmp_path):
    one = ["--profile", files[1], "--cost", files[5], "--max-nodes", "16"]
    report, table = tmp_path / "report.json", tmp_path / "table.json"
    page = tmp_path / "page.html"
    assert main(["lab", "report", str(page), *one, "--batch", "4", "--context", "2048", "--json", str(report)]) == 0
    assert main(["lab", "table", *one, "--json", str(table)]) == 0
    rows = json.loads(table.read_text())["rows"]
    found = json.loads(report.read_text())["rows"][0]
    mine = next(row for row in rows if (row["batch"], row["context"]) == (4, 2048))
    assert {key: found[key] for key in mine} == mine
    text = page.read_text(encoding="utf-8")
    assert all(f">{row['nodes']}x{row['depth']}<" in text for row in rows if row["nodes"] > 1)
    assert "Nothing was measured" in text and "v5e (roofline)" in text and "on v5e" not in text


def test_batches_and_contexts_beyond_the_costs_are_said_cell_by_cell(files, tmp_path):
    one = ["--profile", files[1], "--cost", files[7], "--batches", "1,4,64", "--contexts", "512"]
    assert main(["lab", "report", str(tmp_path / "p.html"), *one]) == 0
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "1 of 3 lie beyond the costs or the memory" in text and "a batch of 64 lies more than" in text


def test_a_drafter_that_does_not_pay_gets_no_tree(files, tmp_path):
    simulate(np.full((3, 2), 0.01), prompts=10, tokens=50).save(tmp_path / "bad.npz")
    assert main(["lab", "report", str(tmp_path / "p.html"), "--profile", str(tmp_path / "bad.npz"), *files[4:6]]) == 0
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    check_page(text)
    assert "no tree pays; plain decoding gives" in text and 'id="tree-1"' not in text


def test_a_profile_of_rates_alone_is_reported_without_calibration(files, tmp_path):
    rates_alone(log_toys(np.tile([0.7, 0.1], (8, 2, 1)), rounds=30)).save(tmp_path / "rates.npz")
    page = tmp_path / "p.html"
    assert main(["lab", "report", str(page), "--profile", str(tmp_path / "rates.npz"), *files[4:6]]) == 0
    check_page(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--profile", "gone.npz"], EXIT_FAILED, "gone.npz: there is no such profile"),
        (["--cost", "gone.json"], EXIT_FAILED, "gone.json: there is no such file of costs"),
        (["--measured", "gone.json"], EXIT_FAILED, "gone.json: there is no such result"),
        (["--batch", "500"], EXIT_FAILED, "v5e.json: a batch of 500"),
        (["--batch", "0"], EXIT_USAGE, "--batch is 0"),
        (["--batches", "a"], EXIT_USAGE, "--batches is 'a'"),
        (["--contexts", "0"], EXIT_USAGE, "--contexts is '0'"),
        (["--max-cache-gib", "1"], EXIT_FAILED, "--cache-bytes-per-token"),
    ],
)
def test_wrong_inputs_are_refused_in_a_sentence(files, tmp_path, flags, code, said, capsys):
    assert_refused([str(tmp_path / "p.html"), *files, *flags], code, said, capsys)
    assert not (tmp_path / "p.html").exists()


def assert_refused(words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        found = main(["lab", "report", *words])
    except SystemExit as stop:
        found = stop.code
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert found == code and said in complaint and complaint.startswith("jaxspec lab report: ")


def test_a_report_needs_files_and_the_name_of_a_page(files, tmp_path, capsys):
    page = str(tmp_path / "p.html")
    assert_refused([page, *files[4:]], EXIT_USAGE, "a report needs a --profile", capsys)
    assert_refused([page, *files[:4]], EXIT_USAGE, "a report needs a --cost", capsys)
    assert_refused([page, *files, *files[:2]], EXIT_USAGE, "easy.npz is given twice", capsys)
    assert_refused([str(tmp_path / "p.txt"), *files], EXIT_USAGE, "must end in .html", capsys)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"command": "generate"}, "is no result of bench decode"),
        ({"rows": []}, "has no rows"),
        ({"rows": [{"arm": "plain"}]}, "a row lacks one of"),
        ({"simulated_acceptance": [0.8]}, "its acceptance is simulated"),
    ],
)
def test_a_measurement_that_cannot_be_compared_is_refused(files, tmp_path, changes, said, capsys):
    path = bench(tmp_path / "bench.json", **changes)
    assert_refused([str(tmp_path / "p.html"), *files, "--measured", path], EXIT_FAILED, f"bench.json: {said}", capsys)
    (tmp_path / "bench.json").write_text("{")
    assert_refused([str(tmp_path / "p.html"), *files, "--measured", path], EXIT_FAILED, "is no JSON", capsys)


def test_a_check_of_predictions_is_a_measurement_too(files, tmp_path):
    rows = [
        {
            "spec": spec,
            "nodes": nodes,
            "batch": 1,
            "context": 500,
            "measured_tokens_per_second": 3.0,
            "measured_tau": 1.5,
        }
        for spec, nodes in (("none", 1), ("chain:2", 3))
    ]
    path = bench(tmp_path / "check.json", command="lab check", drafter="heads/one", rows=rows)
    out = tmp_path / "r.json"
    flags = [*files[:2], *files[6:], "--measured", path, "--json", str(out)]
    assert main(["lab", "report", str(tmp_path / "p.html"), *flags]) == 0
    found = json.loads(out.read_text())["measured"]
    assert [(row["arm"], row["tree"], row["drafter"]) for row in found] == [
        ("plain", None, None),
        ("chain:2", "chain:2", "heads/one"),
    ]
    assert {(row["tokens_per_second"], row["tau"], row["context"]) for row in found} == {(3.0, 1.5, 500)}


def test_a_measurement_of_another_device_is_left_out_with_the_reason(files, tmp_path):
    path = bench(tmp_path / "bench.json", machine={"accelerator": "TPU v6 lite"})
    page = tmp_path / "p.html"
    assert main(["lab", "report", str(page), *files[:2], *files[4:6], "--measured", path]) == 0
    text = page.read_text(encoding="utf-8")
    assert "No measured arm has a prediction" in text and "no file of costs is of this device" in text


def test_a_profile_of_another_temperature_or_drafter_is_left_out_or_said(files, tmp_path):
    profile = load_profile(Path(files[1]))
    facts = {**profile.facts, "kind": "ranks", "calibration": []}
    dataclasses.replace(profile, facts=facts).save(tmp_path / "cold.npz")
    page, out = tmp_path / "p.html", tmp_path / "r.json"
    flags = ["--profile", str(tmp_path / "cold.npz"), *files[6:], "--json", str(out)]
    hot = bench(tmp_path / "bench.json", temperature=1.0)
    assert main(["lab", "report", str(page), *flags, "--measured", hot]) == 0
    result = json.loads(out.read_text())
    assert [row["arm"] for row in result["measured"]] == ["plain"]
    assert {row["reason"] for row in result["left_out"]} == {"no profile is of temperature 1"}
    assert main(["lab", "report", str(page), *flags, "--measured", bench(tmp_path / "bench.json")]) == 0
    assert "Measured with None, predicted with the acceptance of simulated." in page.read_text(encoding="utf-8")


def test_costs_of_one_device_say_how_far_they_are_from_measured_ones(files, tmp_path):
    on(times(cost_table(batches=(1, 4), contexts=(512,)), 15), "cpu", "compiled").save(tmp_path / "compiled.json")
    page = tmp_path / "p.html"
    flags = [*files[:2], *files[6:], "--cost", str(tmp_path / "compiled.json")]
    assert main(["lab", "report", str(page), *flags]) == 0
    text = page.read_text(encoding="utf-8")
    check_page(text)
    assert "Costs of compiled.json against the measured ones of cpu.json" in text
    assert '<th scope="row">verify</th><td class="number">14</td><td class="number">0.5</td>' in text


def test_pictures_without_chromium_are_refused_before_the_search(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = [str(tmp_path / "p.html"), *files, "--png", str(tmp_path / "pictures")]
    assert_refused(words, EXIT_USAGE, "--png needs Chromium", capsys)


# The drawing of a tree.


def test_first_children_stand_beside_their_parent_and_others_below_all_before():
    paths = {(), (0,), (1,), (0, 0), (0, 2), (0, 0, 0)}
    assert layout(paths) == {(): (0, 0), (0,): (1, 0), (0, 0): (2, 0), (0, 0, 0): (3, 0), (0, 2): (2, 1), (1,): (1, 2)}


def test_of_a_large_tree_the_likeliest_nodes_are_drawn_and_all_are_listed():
    shape = tuple((rank,) for rank in range(100))
    picture = tree_picture("t", "a tree", shape, {(): 1.0, **{path: 1 / (2 + path[0]) for path in shape}})
    assert picture.drawing.count("<circle") == 64 and len(picture.table.rows) == 101
    assert "37 nodes that fewer rounds reach are not drawn" in str(picture.note)
    gaps = tree_picture("t", "a tree", ((0,), (2,)), {(): 1.0, (0,): 0.5, (2,): 0.1})
    assert "10% r2" in gaps.drawing and "rN" in str(gaps.note)


# In Chromium.

NEEDS_CHROMIUM = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")


@NEEDS_CHROMIUM
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_desktop_and_phone_in_light_and_dark(made, width: int, dark: bool):
    check_in_chromium(made[0], width=width, dark=dark)


@NEEDS_CHROMIUM
def test_a_picture_of_the_page_and_of_every_figure_is_written(files, tmp_path):
    page, folder, result = tmp_path / "p.html", tmp_path / "pictures", tmp_path / "r.json"
    flags = [*files[:2], *files[4:6], "--png", str(folder), "--json", str(result)]
    assert main(["lab", "report", str(page), *flags]) == 0
    read = check_page(page.read_text(encoding="utf-8"))
    anchors = {str(given["id"]) for tag, given in read.attributes if tag == "figure"}
    assert {path.stem for path in folder.iterdir()} == {"page", *anchors}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    assert len(json.loads(result.read_text())["pictures"]) == len(anchors) + 1
