"""Tests of `jaxspec lab search` and `jaxspec lab table`: keys, files, refusals, and the trees that verbs then take."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from lab_toys import ROW, cost_table, log_toys, rates_alone
from random_models import write_drafter, write_target

from jaxspec.__main__ import main
from jaxspec.console.cli import EXIT_FAILED, EXIT_USAGE
from jaxspec.decoding.rounds import Weights
from jaxspec.lab import cost_model
from jaxspec.lab.costs import load_costs
from jaxspec.lab.profile import load_profile
from jaxspec.lab.simulate import join, simulate
from jaxspec.report.tree_table import by_place
from jaxspec.serving.loading import Models
from jaxspec.trees import AdaptiveTree, StaticTree, parse_tree, resolve_tree, write_tree


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name a profile of two sources and the toys' costs."""
    folder = tmp_path_factory.mktemp("lab")
    rate_DK = np.tile(ROW, (5, 1))
    easy, hard = (simulate(s * rate_DK, prompts=20, tokens=80, seed=i, source=str(s)) for i, s in enumerate((1, 0.6)))
    join([easy, hard]).save(folder / "profile.npz")
    cost_table().save(folder / "costs.json")
    return ["--profile", str(folder / "profile.npz"), "--cost", str(folder / "costs.json")]


def run(verb: str, flags: list[str], tmp_path: Path, *more: str) -> dict[str, Any]:
    """Returns the JSON of a verb."""
    path = tmp_path / "result.json"
    assert main(["lab", verb, *flags, *more, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_a_search_writes_a_tree_file_and_the_agreed_keys(files, tmp_path, capsys):
    out = tmp_path / "trees/tree.json"
    result = run("search", files, tmp_path, "--batch", "4", "--context", "1000", "--max-nodes", "24", "--out", str(out))
    assert {
        "command", "version", "git_sha", "machine", "dtype", "wall_seconds", "seed", "tree", "spec", "nodes", "depth",
        "expected_tau", "predicted_tokens_per_second", "measured_tokens_per_second", "frontier", "runner_up",
        "shapes_tried",
    } <= result.keys()  # fmt: skip
    assert result["tree"] == str(out) and result["measured_tokens_per_second"] is None
    assert 2 <= result["nodes"] <= 24 and result["batch"] == 4 and result["context"] == 1000
    assert result["tau_low"] <= result["expected_tau"] <= result["tau_high"]
    seconds = 4 * result["expected_tau"] / result["predicted_tokens_per_second"]
    assert seconds == pytest.approx(result["round_seconds"])
    assert result["speedup"] > 1 and result["runner_up"]["spec"] != result["spec"]
    tree = parse_tree(str(out))
    assert tree.spec == result["spec"] and tree.nodes == result["nodes"]
    stored = json.loads(out.read_text())
    assert stored["format"] == "jaxspec tree 1" and stored["made_from"]["costs"]["device"] == "toy"
    assert len(stored["made_from"]["profile"]["sha256"]) == 16
    assert stored["expected_tau"] == result["expected_tau"]
    printed = capsys.readouterr().out
    assert printed.startswith("root\n├─ 0") and "Predicted at batch 4, context 1000" in printed
    assert "acceptance is of simulated for simulated, costs are of d for t" in printed
    assert f"--tree {out}" in printed and "costs are roofline" in printed


def test_the_chosen_tree_is_measured_beside_its_prediction(files, tmp_path, capsys):
    target, drafter = write_target(tmp_path / "target"), write_drafter(tmp_path / "drafter")
    profile = load_profile(Path(files[1]))
    facts = profile.facts | {"kind": "ranks", "target": str(target), "drafter": str(drafter)}
    named = dataclasses.replace(profile, facts=facts)
    named.save(tmp_path / "named.npz")
    (tmp_path / "prompts.txt").write_text("how much is 2 and 3?\nsay it again\nwhat does everybody know\n")
    flags = ["--profile", str(tmp_path / "named.npz"), *files[2:], "--max-nodes", "8"]
    more = ("--measure", str(tmp_path / "prompts.txt"), "--repeats", "1", "--limit", "2")
    result = run("search", flags, tmp_path, "--context", "1000", *more)
    measured = result["measured"]
    assert set(measured) == {"plain", "chosen", "runner-up"} and measured["plain"]["tau"] == 1
    assert result["measured_tokens_per_second"] == measured["chosen"]["tokens_per_second"] > 0
    assert "Measured, prefill left out" in capsys.readouterr().out
    assert main(["lab", "search", *files, "--measure", str(tmp_path / "prompts.txt")]) == 1
    assert "--measure needs a profile that was measured" in capsys.readouterr().err


def test_an_adaptive_tree_around_the_best_one_is_a_file_that_trees_are_read_from(files, tmp_path, capsys):
    out = tmp_path / "adaptive.json"
    result = run("search", files, tmp_path, "--max-nodes", "24", "--adaptive", str(out), "--lookup", "3")
    tree, stored = parse_tree(str(out)), json.loads(out.read_text())
    assert isinstance(tree, AdaptiveTree) and tree.lookup is not None and tree.lookup.length == 3
    assert tree.budgets == (1, 2, 4, 8, 16) and tree.rate == pytest.approx(result["predicted_tokens_per_second"])
    costs = cost_model.round_cost(load_costs(Path(files[3])), result["batch"], result["context"])
    assert tree.verify_seconds == pytest.approx([costs.verify_N[n] for n in tree.budgets])
    assert list(tree.verify_seconds) == sorted(tree.verify_seconds)
    assert tree.reach and all(0 < p <= 1 for p in tree.reach)
    assert parse_tree(str(out)) == tree and hash(tree) == hash(parse_tree(str(out)))
    assert stored["made_from"]["around"]["spec"] == result["spec"]
    assert resolve_tree(str(out)) == str(out)  # it is more than a text
    stored["policy"]["budgets"] = [4, 2]
    out.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"adaptive\.json: the budgets of an adaptive tree must rise"):
        parse_tree(str(out))
    stored["policy"] = {"budgets": 3}
    out.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="its policy is none of this version"):
        parse_tree(str(out))


def test_where_no_fixed_tree_pays_an_adaptive_one_may_still_draft(tmp_path, capsys):
    simulate(np.full((4, 3), 0.02), prompts=8, tokens=60, seed=0).save(tmp_path / "profile.npz")
    cost_table().save(tmp_path / "costs.json")
    flags = ["--profile", str(tmp_path / "profile.npz"), "--cost", str(tmp_path / "costs.json")]
    result = run("search", flags, tmp_path, "--max-nodes", "8", "--adaptive", str(tmp_path / "adaptive.json"))
    assert result["spec"] == "none"
    tree = parse_tree(str(tmp_path / "adaptive.json"))
    assert isinstance(tree, AdaptiveTree) and tree.base is not None
    assert tree.base.depth >= 3 and tree.base.beam >= 2 and tree.budgets == (1, 2, 4, 8)


def test_an_adaptive_tree_is_ragged_where_that_is_asked_for(files, tmp_path, capsys):
    for more in ((), ("--ragged",)):
        out = str(tmp_path / "adaptive.json")
        run("search", files, tmp_path, "--batch", "4", "--max-nodes", "8", "--adaptive", out, *more)
        tree = parse_tree(out)
        assert isinstance(tree, AdaptiveTree) and tree.ragged == bool(more)
    with pytest.raises(SystemExit):
        main(["lab", "search", *files, "--ragged"])
    assert "--ragged is for an adaptive tree" in capsys.readouterr().err


def test_a_lookup_without_an_adaptive_tree_is_wrong_usage(files, capsys):
    with pytest.raises(SystemExit, match=str(EXIT_USAGE)):
        main(["lab", "search", *files, "--lookup", "3"])
    assert "--lookup is for an adaptive tree" in capsys.readouterr().err


def test_the_frontier_has_more_tokens_for_longer_waits(files, tmp_path, capsys):
    result = run("search", files, tmp_path, "--batch", "1,4,16", "--objective", "frontier")
    points = result["frontier"]
    assert [p["batch"] for p in points] == [1, 4, 16]
    assert all(np.diff([p["predicted_tokens_per_second"] for p in points]) > 0)
    assert all(np.diff([p["seconds_per_token"] for p in points]) > 0)
    assert result["batch"] == 16 and "Nothing beats" in capsys.readouterr().out
    assert run("search", files, tmp_path, "--batch", "1,4,16", "--objective", "latency")["batch"] == 1


def test_a_search_may_end_without_a_tree(tmp_path, files, capsys):
    simulate(np.full((3, 2), 0.01), prompts=10, tokens=50).save(tmp_path / "bad.npz")
    flags = ["--profile", str(tmp_path / "bad.npz"), *files[2:], "--out", str(tmp_path / "none.json")]
    result = run("search", flags, tmp_path)
    assert result["spec"] == "none" and result["speedup"] == 1 and result["expected_tau"] == 1
    assert "no tree pays" in capsys.readouterr().out
    assert parse_tree(str(tmp_path / "none.json")).nodes == 1


def test_a_profile_of_rates_alone_is_searched_on_texts_drawn_from_its_counts(tmp_path, files, capsys):
    profile = rates_alone(log_toys(np.tile(ROW[:3], (20, 2, 1)), rounds=60), target="paper")
    profile.save(tmp_path / "paper.npz")
    result = run("search", ["--profile", str(tmp_path / "paper.npz"), *files[2:]], tmp_path)
    assert result["depth"] >= 1 and result["made_from"]["profile"]["target"] == "paper"
    assert result["made_from"]["profile"]["rule"] == "recursive-rejection"
    assert result["made_from"]["prompts_choosing"] == result["made_from"]["prompts_reporting"] == 10
    assert "rates alone" in capsys.readouterr().out
    for name, other, said in (
        ("nothing", {"facts": {"ranks": 3}, "counts": None}, "neither starts nor rates"),
        ("old", {"counts": None}, "make it anew with `jaxspec lab profile`"),
    ):
        dataclasses.replace(profile, **other).save(tmp_path / f"{name}.npz")
        assert main(["lab", "search", "--profile", str(tmp_path / f"{name}.npz"), *files[2:]]) == EXIT_FAILED
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--batch", "0"], EXIT_USAGE, "--batch"),
        (["--batch", "500"], EXIT_FAILED, "batch of 500"),
        (["--context", "9"], EXIT_FAILED, "context of 9"),
        (["--multiple", "0"], EXIT_USAGE, "--multiple"),
        (["--out", "tree.txt"], EXIT_USAGE, ".json"),
        (["--max-cache-gib", "1"], EXIT_FAILED, "--cache-bytes-per-token"),
        (["--max-cache-gib", "1e-6", "--cache-bytes-per-token", "99"], EXIT_FAILED, "lower the batch"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_a_sentence(files, flags, code, said, capsys):
    try:
        found = main(["lab", "search", *files, *flags])
    except SystemExit as exit:
        found = exit.code
    assert found == code
    assert said in capsys.readouterr().err


def test_the_memory_of_the_caches_leaves_out_batches_that_were_not_asked_for(files, tmp_path):
    room = ["--max-cache-gib", str(2.0 * 100 * 600 / 2**30), "--cache-bytes-per-token", "100", "--context", "512"]
    result = run("search", files, tmp_path, *room)
    assert [point["batch"] for point in result["frontier"]] == [1]


def test_missing_files_are_named(tmp_path, files, capsys):
    assert main(["lab", "search", "--profile", "gone.npz", *files[2:]]) == EXIT_FAILED
    assert "gone.npz" in capsys.readouterr().err
    assert main(["lab", "table", *files[:2], "--cost", "gone.json"]) == EXIT_FAILED
    assert "gone.json" in capsys.readouterr().err


def test_a_table_has_a_tree_for_every_batch_and_context(files, tmp_path, capsys):
    out = tmp_path / "table.json"
    result = run("table", files, tmp_path, "--batches", "1,8", "--contexts", "512,2048", "--out", str(out))
    table = json.loads(out.read_text())
    assert table["format"] == "jaxspec tree table 1" and table["batches"] == [1, 8] and table["contexts"] == [512, 2048]
    assert {(row["batch"], row["context"]) for row in table["rows"]} == {(b, c) for b in (1, 8) for c in (512, 2048)}
    assert all(parse_tree(row["spec"]).nodes == row["nodes"] for row in table["rows"])
    assert table["draft_len_schedule"] is None and table["refused"] == []
    assert result["rows"] == table["rows"]
    assert "batch 8" in capsys.readouterr().out


def test_a_table_marks_the_cells_that_the_memory_or_the_costs_refuse(files, tmp_path, capsys):
    """Two rows of 512 tokens fit, and of 2,048 one; a batch of 64 lies beyond the costs."""
    room = ["--max-cache-gib", str(2.0 * 100 * 2060 / 2**30), "--cache-bytes-per-token", "100"]
    table = run("table", files, tmp_path, *room, "--batches", "1,4,64", "--contexts", "512,2048")
    assert {(row["batch"], row["context"]) for row in table["rows"]} == {(1, 512), (4, 512), (1, 2048)}
    reasons = {(cell["batch"], cell["context"]): cell["reason"] for cell in table["refused"]}
    assert "lower the batch or the context" in reasons[4, 2048] and "a batch of 64" in reasons[64, 512]
    printed = capsys.readouterr().out
    assert "–" in printed and "batch 4, context 2048: 4 rows of 2048 tokens" in printed
    columns, lines, about = by_place({}, table)
    assert columns[1:] == ["batch 1", "batch 4", "batch 64"] and [line[2] for line in lines][1] == "–"
    assert "–: beyond the costs or the memory" in about
    wide = run(
        "table", files, tmp_path, *room, "--batches", "1,4", "--contexts", "1024", "--tree", "static:0,1,2,3,4,5,6,7"
    )
    assert [row["batch"] for row in wide["rows"]] == [1] and "with 9 of the round" in wide["refused"][0]["reason"]
    assert main(["lab", "table", *files, *room, "--batches", "64", "--contexts", "512"]) == EXIT_FAILED
    assert "costs.json: a batch of 64" in capsys.readouterr().err


def test_the_memory_that_weights_leave_is_the_default_limit(files, tmp_path, capsys):
    memory = 10**6 + 4 * 100 * 600
    for name, weights in (("chip", 10**6), ("small", 10**7)):
        table = cost_table(memory_bytes=memory, weights_bytes=weights, cache_bytes_per_token=100)
        table.save(tmp_path / f"{name}.json")
    flags = [*files[:2], "--cost", str(tmp_path / "chip.json")]
    table = run("table", flags, tmp_path, "--batches", "1,4,16", "--contexts", "512")
    assert [row["batch"] for row in table["rows"]] == [1, 4] and len(table["refused"]) == 1
    assert table["made_from"]["limits"]["max_cache_gib"] == pytest.approx(4 * 100 * 600 / 2**30)
    more = run("table", flags, tmp_path, "--batches", "16", "--contexts", "512", "--max-cache-gib", "1")
    assert [row["batch"] for row in more["rows"]] == [16]
    assert main(["lab", "table", *files[:2], "--cost", str(tmp_path / "small.json")]) == EXIT_FAILED
    assert "the weights take" in capsys.readouterr().err


def test_an_adaptive_tree_beyond_the_costs_names_the_flag_that_helps(files, tmp_path, capsys):
    short = cost_table(paths=(2, 4, 8))
    for name, table in (("short", short), ("long", cost_table(paths=(2, 4, 8, 17)))):
        table.save(tmp_path / f"{name}.json")
    more = ["--max-nodes", "16", "--lookup", "16", "--adaptive", str(tmp_path / "a.json")]
    assert main(["lab", "search", *files[:2], "--cost", str(tmp_path / "short.json"), *more]) == EXIT_FAILED
    assert "--paths, such as 2,4,8,17, and --widths" in capsys.readouterr().err
    run("search", [*files[:2], "--cost", str(tmp_path / "long.json")], tmp_path, *more)


def test_trees_that_the_costs_do_not_know_are_counted_and_told(files, tmp_path, capsys):
    simulate(np.full((12, 1), 0.9), prompts=8, tokens=60).save(tmp_path / "deep.npz")
    cost_table(paths=(2, 4)).save(tmp_path / "costs.json")
    flags = ["--profile", str(tmp_path / "deep.npz"), "--cost", str(tmp_path / "costs.json")]
    result = run("search", flags, tmp_path, "--max-branch", "1")
    assert result["shapes_unpriced"] == 5 and result["depth"] <= 7  # chains of 8 to 12 levels
    assert "5 shapes were not tried" in capsys.readouterr().out
    run("table", flags, tmp_path, "--max-branch", "1")
    assert "--paths and --widths" in capsys.readouterr().out


def test_a_table_of_one_tree_says_what_it_makes_of_every_place(files, tmp_path, capsys):
    best = run("table", files, tmp_path)
    cell = next(row for row in best["rows"] if row["nodes"] > 1)
    one = run("table", files, tmp_path, "--tree", cell["spec"])
    assert {row["spec"] for row in one["rows"]} == {cell["spec"]} and one["made_from"]["tree"] == cell["spec"]
    assert cell in one["rows"]
    rated = zip(best["rows"], one["rows"], strict=True)
    assert any(a["speedup"] > b["speedup"] for a, b in rated)
    assert "the tree, and tokens/s over" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["lab", "table", *files, "--tree", "lookup:4"])
    assert left.value.code == EXIT_USAGE
    assert "is adaptive" in capsys.readouterr().err
    assert main(["lab", "table", *files, "--tree", "dynamic:8x3x2"]) == EXIT_FAILED
    assert "texts are drawn from rates" in capsys.readouterr().err


def test_a_table_of_chains_is_a_schedule_of_draft_lengths(files, tmp_path):
    table = run("table", files, tmp_path, "--max-branch", "1")
    assert table["batches"] == [1, 4, 16]
    schedule = table["draft_len_schedule"]["512"]
    depths = {row["batch"]: row["depth"] for row in table["rows"] if row["context"] == 512}
    for batch, depth in depths.items():
        assert depth == next(length for most, length in schedule.items() if batch <= int(most))
    assert len(set(schedule.values())) == len(schedule)


# Tree files in the verbs that take trees.

WIDE = StaticTree(((0,), (12,), (0, 0)))


@pytest.fixture
def tree_file(tmp_path: Path) -> str:
    write_tree(tmp_path / "tree.json", {"spec": WIDE.spec})
    return str(tmp_path / "tree.json")


def test_every_verb_that_keeps_a_trees_text_keeps_that_of_the_file(tree_file):
    infer = "jaxspec.infer."
    bench_decode, bench_device, quickstart, compare = (
        importlib.import_module(name)
        for name in (f"{infer}bench_decode", f"{infer}bench_device", f"{infer}quickstart", "jaxspec.train.compare")
    )
    args = bench_decode.Args(drafter=("d",), tree=(f"chain:2,{tree_file},static:0,1,00", tree_file))
    assert args.trees == ["chain:2", tree_file, "static:0,1,00", tree_file]
    assert bench_device.Args(minutes=1, out=Path("o"), tree=tree_file, tau=2).plan.tree == WIDE.spec
    assert bench_device.Args(minutes=1, out=Path("o")).plan.tree == "dynamic:64x6x10"
    assert compare.Args(recipes=("eagle2",), train="t", eval="e", tree=(tree_file,)).trees == [WIDE.spec]
    models = Models(cast(Any, None), Weights({}), cast(Any, None), cast(Any, None))
    assert quickstart.Args(trees=(tree_file, "chain:2")).sizes(models).trees == (WIDE.spec, "chain:2")


def test_generate_drafts_the_tree_of_a_file_and_says_which(tmp_path, tree_file):
    target, drafter = write_target(tmp_path / "target"), write_drafter(tmp_path / "head")
    out = tmp_path / "out.json"
    common = ["generate", "1 and 2", "--target", str(target), "--max-new-tokens", "8", "--json", str(out)]
    assert main([*common, "--drafter", str(drafter), "--tree", tree_file]) == 0
    drafted = json.loads(out.read_text())
    assert drafted["tree"] == WIDE.spec
    assert main(common) == 0
    assert json.loads(out.read_text())["rows"][0]["token_ids"] == drafted["rows"][0]["token_ids"]
