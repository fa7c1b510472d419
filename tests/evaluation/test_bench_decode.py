"""Tests of `jaxspec bench decode`: the keys and sums of its result, and of the paper costs behind it."""

import hashlib
import importlib
import json
import signal
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_weights, write_drafter, write_target
from toys import grow, path_tables

from jaxspec import drafters
from jaxspec.__main__ import main
from jaxspec.base import SharedTables, TreePolicy
from jaxspec.decoding.answers import block_efficiency
from jaxspec.drafters import DraftLM, DraftLMConfig, Eagle, Eagle3, Eagle3Config, EagleConfig, Medusa, MedusaConfig
from jaxspec.evaluation import timing
from jaxspec.evaluation.arms import telling
from jaxspec.evaluation.machine import copy_bandwidth, matmul_rate
from jaxspec.planning.flops import _jaxprs
from jaxspec.planning.work import (
    Work,
    _drafting,
    draft_ratio,
    draft_work,
    drafter_passes,
    frontier_widths,
    mbsu,
    target_work,
)
from jaxspec.sampling import Sampling
from jaxspec.serving import loading
from jaxspec.serving.flags import RuleName
from jaxspec.targets.decoder import SHAPES, LlamaConfig
from jaxspec.trees import EAGLE1_PATHS, BestFirstTree, DynamicTree, StaticTree, chain, parse_paths
from jaxspec.verify import RULES, VerifyInputs, simulated

program: Any = importlib.import_module("jaxspec.infer.bench_decode")
ROW_KEYS = {
    "arm", "batch", "prefix", "nodes", "tokens_per_second", "tau", "block_efficiency", "mbsu", "round_ms", "draft_ms",
    "target_ms", "verify_ms", "commit_ms", "overhead_ms", "bytes_per_second", "flops_per_second",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def steady() -> Iterator[None]:
    """A machine that is as fast at all times."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(program, "copy_bandwidth", lambda: 1e10)
        yield


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def result(tmp_path_factory, target) -> dict:
    """Plain decoding, a static tree and transformers."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bench")
    prompts, path = folder / "prompts.txt", folder / "out.json"
    prompts.write_text("how much is 2 and 3?\nwhat does everybody know\n\nsay it again\n")
    drafter = write_drafter(folder / "head")
    flags = ["--target", target, "--drafter", drafter, "--tree", "static:0,1,00", "--prompts", prompts]
    flags += ["--max-new-tokens", "12", "--repeats", "2", "--peer", "transformers", "--json", path]
    assert main(["bench", "decode", *map(str, flags)]) == 0
    return json.loads(path.read_text())


def test_json_holds_the_agreed_keys(result):
    assert {"command", "version", "git_sha", "machine", "dtype", "wall_seconds", "seed"} <= result.keys()
    assert {"efficiency", "speedup", "peer"} <= result.keys()
    assert {"machine_copy_bytes_per_second", "machine_matmul_flops_per_second"} <= result.keys()
    assert all(ROW_KEYS <= row.keys() for row in result["rows"])
    for row in [*result["rows"], result["peer"]]:
        assert row["tokens_per_second_min"] <= row["tokens_per_second"] <= row["tokens_per_second_max"]
    assert result["copy_bandwidth"] == {"bytes_per_second": [1e10, 1e10], "moved": 0.0, "steady": True}
    assert [row["arm"] for row in result["rows"]] == ["plain", "static:0,1,00"]


def test_the_parts_and_the_rest_are_the_round(result):
    for row in result["rows"]:
        parts = [row[f"{part}_ms"] for part in ("draft", "target", "verify", "commit", "overhead")]
        assert sum(parts) == pytest.approx(row["round_ms"])
        assert min(parts[:-1]) >= 0
    assert result["rows"][0]["draft_ms"] == 0 < result["rows"][1]["draft_ms"]


def test_speedup_and_efficiency_are_the_fastest_arms(result):
    plain, *drafted = result["rows"]
    best = max(drafted, key=lambda row: row["tokens_per_second"])
    assert result["speedup"] == pytest.approx(best["tokens_per_second"] / plain["tokens_per_second"])
    assert result["efficiency"] == pytest.approx(result["speedup"] / best["tau"])


def test_the_memory_bound_speedup_is_tau_by_the_weights_that_drafting_reads(result):
    plain, drafted = result["rows"]
    assert plain["mbsu"] == plain["tau"] == 1
    assert drafted["block_efficiency"] == drafted["tau"] > drafted["mbsu"] > 0


@pytest.mark.parametrize(("passes", "factor"), [(0, 1.0), (3, 0.953), (5, 0.924)])
def test_the_papers_drafter_keeps_what_its_ratio_leaves(passes: int, factor: float):
    assert mbsu(2.0, ratio=0.0164, passes=passes) / 2 == pytest.approx(factor, abs=5e-4)


def test_a_perfect_chain_has_the_block_efficiency_of_its_depth_and_a_bonus():
    assert block_efficiency(4 * 7, 7) == 4 and block_efficiency(0, 0) == 0


def test_passes_are_one_a_level_unless_one_drafts_them_all():
    step_by_step, at_once = Eagle(EagleConfig(8, 2, 1, 4, 8)), Medusa(MedusaConfig(8))
    assert [drafter_passes(step_by_step, depth) for depth in (0, 1, 6)] == [1, 1, 6]
    assert drafter_passes(at_once, 4) == 1


def test_a_borrowed_head_counts_as_the_drafters_and_an_own_one_once():
    target = {"embed": np.zeros((50, 8)), "layers": np.zeros(600)}
    assert draft_ratio({"fc": np.zeros(100)}, target, target["embed"]) == 500 / 1000
    assert draft_ratio({"embed": np.zeros((50, 2)), "layers": np.zeros(100)}, target, None) == 0.2


def test_arms_and_peer_decode_the_same_tokens(result):
    assert all(row["identical_fraction"] == 1 for row in result["rows"])
    peer = result["peer"]
    assert peer["name"] == "transformers" and peer["version"] and peer["identical_fraction"] == 1
    assert peer["plain_speedup"] == pytest.approx(result["rows"][0]["tokens_per_second"] / peer["tokens_per_second"])


def test_drafters_are_compared_with_every_tree(tmp_path, target, capsys):
    prompts, path = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("how much is 2 and 3?\n")
    heads = [str(write_drafter(tmp_path / name / "drafter")) for name in ("one", "two")]
    flags = ["--target", target, "--drafter", heads[0], "--drafter", heads[1], "--tree", "chain:2,static:0,1"]
    flags += ["--prompts", prompts, "--max-new-tokens", "6", "--repeats", "1", "--json", path]
    assert main(["bench", "decode", *map(str, flags)]) == 0
    result = json.loads(path.read_text())
    plain, *drafted = result["rows"]
    assert result["drafters"] == heads
    sha256 = hashlib.sha256(prompts.read_bytes()).hexdigest()
    assert result["prompts"] == {"name": "prompts.txt", "sha256": sha256, "count": 1}
    assert [row["arm"] for row in drafted] == ["one chain:2", "one static:0,1", "two chain:2", "two static:0,1"]
    assert [(row["drafter"], row["tree"]) for row in drafted[1:3]] == [(heads[0], "static:0,1"), (heads[1], "chain:2")]
    assert [row["draft_ratio"] for row in drafted] == [row["draft_ms"] / drafted[0]["draft_ms"] for row in drafted]
    assert plain["draft_ratio"] is plain["drafter"] is plain["tree"] is None
    assert all(row["identical_fraction"] == 1 for row in drafted) and "x draft" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["runs/one/drafter", "runs/two/drafter"], ["one", "two"]),
        (["runs/one", "elsewhere/two/a"], ["runs/one", "elsewhere/two/a"]),
        (["a/one", "a/one/b"], ["a/one", "b"]),
    ],
)
def test_arms_are_named_by_what_tells_their_drafters_apart(paths, labels):
    assert telling(paths) == labels


def test_a_missing_peer_is_one_sentence(target, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["bench", "decode", "--target", str(target), "--peer", "transformers"]) == 1
    shown = capsys.readouterr().err
    assert "needs torch, which is not installed: install jaxspec-decoding[parity]" in shown
    assert len(shown.splitlines()) == 1


def test_prompts_that_do_not_fill_a_batch_are_refused(tmp_path, target, capsys):
    prompts = tmp_path / "one.txt"
    prompts.write_text("one\n")
    assert main(["bench", "decode", "--target", str(target), "--prompts", str(prompts), "--batch", "2"]) == 1
    assert "1 prompts do not fill a batch of 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tree", "chain:2"], "--tree needs a --drafter"),
        (["--drafter", "d", "--tree", "chain:2,chian:3"], "tree 'chain:2,chian:3' is not one of"),
        (["--drafter", "d", "--drafter", "e", "--drafter", "d"], "--drafter d is given twice"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--peer", "transformers", "--temperature", "1"], "--peer transformers is greedy and in fp32"),
    ],
)
def test_wrong_flags_are_wrong_usage(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "decode", *flags])
    assert stop.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_trees_are_joined_by_commas_that_do_not_stand_inside_one():
    args = program.Args(drafter=("d",), tree=("chain:2,static:0,1,00", "dynamic:8x3x3,best_first:8x3x3,none"))
    assert args.trees == ["chain:2", "static:0,1,00", "dynamic:8x3x3", "best_first:8x3x3", "none"]


def test_frontiers_are_the_nodes_with_children():
    assert frontier_widths(chain(4), 50) == [1, 1, 1]
    assert frontier_widths(DynamicTree(8, 3, 3), 50) == [3, 3]
    paths = parse_paths(EAGLE1_PATHS)
    inner = {p[:-1] for p in paths} - {()}
    widths = frontier_widths(StaticTree(paths), 50)
    assert widths == [sum(len(p) == d for p in inner) for d in range(1, len(widths) + 1)]


def test_a_target_call_reads_every_weight_once(target):
    models = loading.load_models(str(target))
    c, params = models.config, models.weights.target
    weights = sum(np.size(leaf) for leaf in jax.tree.leaves(params)) - c.vocab * c.width
    one = target_work(params, c, batch=1, tokens=1, prefix=0, itemsize=4)
    assert one == (4 * weights, 2 * weights + 4 * c.layers * c.heads * c.head_dim)
    four = target_work(params, c, batch=2, tokens=2, prefix=10, itemsize=4)
    assert four.bytes - one.bytes == 2 * c.layers * 2 * c.kv_heads * c.head_dim * 10 * 4
    assert four.flops == 2 * weights * 4 + 4 * c.layers * 4 * c.heads * c.head_dim * 12


def drafted_work(drafter: Any, scored: int) -> Work:
    """Of a round of a chain of four at batch 2, the target's head having so many rows."""
    shared = SharedTables(jnp.zeros((50, 8)), jnp.zeros((scored, 8)))
    return draft_work(drafter, random_weights(drafter, 1.0, 0), shared, chain(4), batch=2)


def test_a_round_of_drafting_counts_the_head_that_is_scored_with():
    """The target's, a draft vocabulary's rows of it, or the drafter's own, each read and used once a depth."""
    shape = (8, 2, 1, 4, 16)
    eagle = Eagle(EagleConfig(*shape))
    whole, part = drafted_work(eagle, 50), drafted_work(eagle, 20)
    assert (whole.bytes - part.bytes, whole.flops - part.flops) == (4 * 4 * 30 * 8, 4 * 2 * 2 * 30 * 8)
    for few, many in (
        [Eagle3(Eagle3Config(*shape, vocab=v, taps=(0, 1))) for v in (20, 50)],
        [DraftLM(DraftLMConfig(v, 8, 1, 2, 1, 4, 16, tied=tied)) for v, tied in ((20, True), (50, False))],
    ):
        part, whole = drafted_work(few, 7), drafted_work(many, 50)
        assert part == drafted_work(few, 50)
        assert (whole.bytes - part.bytes, whole.flops - part.flops) == (4 * 4 * 30 * 8, 4 * 2 * 2 * 30 * 8)


def test_a_round_of_a_drafter_of_one_pass_reads_its_body_once():
    """Medusa's heads read one feature a row; then each depth scores it with a head of its own."""
    found = drafted_work(Medusa(MedusaConfig(8, 4, vocab=20)), 50)
    assert found == (4 * (4 * (8 * 8 + 8) + 4 * 20 * 8), 2 * (2 * 4 * 8 * 8 + 4 * 2 * 20 * 8))


def test_a_head_that_all_depths_share_is_read_twice_a_round():
    """For the root's children, and for those of all other depths at once; with a matmul of its own each."""
    drafter = Medusa(MedusaConfig(8, 4))
    whole, part = drafted_work(drafter, 50), drafted_work(drafter, 20)
    assert (whole.bytes - part.bytes, whole.flops - part.flops) == (2 * 4 * 30 * 8, 4 * 2 * 2 * 30 * 8)


def count_products(jaxpr: Any, tokens: int) -> int:
    """Matmuls whose output's first axis is the tokens; of what is written for several platforms, the usual one."""
    count = 0
    for equation in jaxpr.eqns:
        shape = equation.outvars[0].aval.shape
        count += equation.primitive.name == "dot_general" and shape[:1] == (tokens,)
        inner = list(_jaxprs(equation))
        platforms = equation.params.get("branches_platforms")
        count += sum(count_products(each, tokens) for each in ([inner[platforms.index(None)]] if platforms else inner))
    return count


@pytest.mark.parametrize("tree", [DynamicTree(12, 4, 3), BestFirstTree(12, 4, 3)], ids=lambda tree: tree.spec)
def test_the_program_of_a_drafter_of_one_pass_multiplies_by_a_shared_head_twice(tree: TreePolicy):
    """As counted above, and where its heads are the depths' own once a depth."""
    tokens = 53  # so many have no other matmul's outputs
    for drafter, matmuls in ((Medusa(MedusaConfig(8, 4)), 2), (Medusa(MedusaConfig(8, 4, vocab=tokens)), 4)):
        shared = SharedTables(jnp.zeros((tokens, 8)), jnp.zeros((tokens, 8)))
        program = _drafting(drafter, random_weights(drafter, 1.0, 0), shared, tree, 1)
        assert count_products(jax.make_jaxpr(program[0])(*program[1:]).jaxpr, tokens) == matmuls


@pytest.mark.parametrize(("scored", "gigabytes"), [(128256, (9.3, 2.6)), (32000, (4.6, 1.0))])
def test_drafting_for_llama_3_8b_by_one_pass_reads_a_third_of_what_six_read(
    scored: int, gigabytes: tuple[float, float]
):
    """The figures of docs/results.md, for weights in bf16 that are described only."""

    def described(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    shape, table = (4096, 32, 8, 128, 14336), described(scored, 4096)
    found = []
    for drafter, tree in (
        (Eagle(EagleConfig(*shape, bias=False)), DynamicTree()),
        (drafters.ParallelSpec(drafters.ParallelSpecConfig(*shape, bias=False, tokens=6)), BestFirstTree(60, 6, 10)),
    ):
        params = {name: described(*size) for name, size in drafter.config.shapes().items()}
        work = draft_work(drafter, params, SharedTables(table, table), tree, batch=1)  # type: ignore[arg-type]
        found.append(work.bytes / 1e9)
    assert found == pytest.approx(gigabytes, abs=0.05) and found[0] > 3 * found[1]


def test_the_machine_moves_and_multiplies():
    assert copy_bandwidth(1, seconds=0.05) > 0
    assert matmul_rate(size=64) > 0


@pytest.fixture
def tinier(monkeypatch):
    """The shape `tiny` with less of everything."""
    monkeypatch.setitem(SHAPES, "tiny", LlamaConfig(97, 16, 1, 2, 1, 8, 32))


@pytest.mark.slow
def test_a_shape_with_simulated_acceptance_needs_no_model(tmp_path, tinier, capsys):
    path = tmp_path / "out.json"
    flags = ["--shape", "tiny", "--tree", "chain:3,dynamic:8x3x3", "--simulate-acceptance", "0.7", "--limit", "2"]
    flags += ["--prefix", "20", "--max-new-tokens", "60", "--repeats", "1", "--capacity", "512", "--json", str(path)]
    assert main(["bench", "decode", *flags]) == 0
    result = json.loads(path.read_text())
    assert "prefill is left out" in capsys.readouterr().out
    plain, chained, grown = result["rows"]
    expected = 1 + 0.7 + 0.7**2 + 0.7**3
    for row in (chained, grown):
        assert abs(row["tau"] - expected) < 0.5 and row["identical_fraction"] is None and row["capacity"] == 512
    assert plain["tau"] == 1 and plain["prefill_ms"] == 0 and result["target"] == "tiny"


STOPPED = ["--shape", "tiny", "--tree", "chain:2", "--simulate-acceptance", "0.7", "--limit", "1", "--prefix", "5"]
STOPPED += ["--max-new-tokens", "8", "--repeats", "2"]


@pytest.mark.parametrize(("at", "repeats"), [("decode_all", 1), ("_parts", 2)])
def test_a_stopped_bench_says_and_writes_what_it_has_measured(tmp_path, tinier, monkeypatch, capfd, at, repeats):
    """Stopped in the sixth pass, after one repeat of both arms and another of the first; or in the parts."""
    original, calls = getattr(timing, at), []

    def stopping(*args):
        calls.append(args)
        if at == "_parts" or len(calls) == 6:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(timing, at, stopping)
    before, path = signal.getsignal(signal.SIGTERM), tmp_path / "out.json"
    assert main(["bench", "decode", *STOPPED, "--json", str(path)]) == 130
    shown, found = capfd.readouterr(), json.loads(path.read_text())
    assert shown.out.count("chain:2") == 1 and "tokens/s" in shown.out and "One round" not in shown.out
    assert f"stopped; the table above is of {repeats} of 2 repeats" in shown.err and "compiling chain:2" in shown.err
    assert [row["arm"] for row in found["rows"]] == ["plain", "chain:2"] and found["stopped"]
    assert all(row["tokens_per_second"] > 0 and row["round_ms"] is None for row in found["rows"])
    assert found["prompts"] == {"name": None, "sha256": None, "count": 1}  # made here
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_bench_stopped_at_once_has_measured_nothing(tinier, monkeypatch, capfd):
    monkeypatch.setattr(timing, "decode_all", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(["bench", "decode", *STOPPED]) == 130
    assert "stopped before anything was measured" in capfd.readouterr().err


def test_ratios_are_refused_where_the_copy_bandwidth_moved(tinier, tmp_path, monkeypatch, capsys):
    figures = iter([1e10, 1.5e10])
    monkeypatch.setattr(program, "copy_bandwidth", lambda: next(figures))
    assert main(["bench", "decode", *STOPPED, "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert all(row["speedup"] is row["efficiency"] is None and row["tokens_per_second"] > 0 for row in found["rows"])
    assert found["speedup"] is found["efficiency"] is None and not found["copy_bandwidth"]["steady"]
    assert "50% apart: over 10%, so ratios are refused" in capsys.readouterr().out


@pytest.mark.parametrize("profile", [(0.1, 0.2, 0.3, 0.4), (1.0,), (0.0, 0.0, 0.0, 1.0)])
def test_simulated_accept_lengths_follow_their_profile(profile):
    rule = simulated(RULES["target-draw"], profile)
    batch = 4000
    tree = jax.tree.map(
        lambda a: jax.numpy.broadcast_to(a, (batch, *a.shape[1:])), grow(chain(3), path_tables(0, 3, 3))
    )
    logits = jax.numpy.zeros((batch, 4, 3))
    zero = jax.numpy.zeros(batch)
    sampling = Sampling(zero, zero.astype(int), zero + 1, jax.numpy.arange(batch, dtype=jax.numpy.uint32))
    accept = jax.jit(lambda tree, length: rule.accept(VerifyInputs("topk", tree, 3, logits, length, sampling)))
    accepted = jax.device_get(accept(tree, zero.astype(int)))
    seen = np.bincount(accepted.count_B, minlength=4) / batch
    want = np.pad(profile, (0, 4 - len(profile)))
    assert np.abs(seen - want).max() < 0.04
    assert (np.sort(accepted.path_BP, axis=1) == accepted.path_BP).all() and not rule.lossless


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--shape", "13b"], "13b"),
        (["--shape", "tiny", "--prompts", "x"], "leave out --prompts"),
        (["--shape", "tiny", "--simulate-acceptance", "1.5"], "give one chance from 0 to 1"),
        (["--shape", "tiny", "--simulate-acceptance", "0.5,0.4"], "which sum to 1"),
        (["--simulate-acceptance", "0.5"], "--simulate-acceptance needs a --drafter"),
        (["--rule", "traversal"], "--rule needs a --drafter"),
        (["--shape", "tiny", "--prefix", "0"], "--prefix is 0"),
        (["--shape", "tiny", "--draft-vocab", "v"], "leave out --prompts, --drafter, --draft-vocab"),
    ],
)
def test_wrong_flags_of_shapes_are_wrong_usage(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "decode", *flags])
    assert stop.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_the_command_line_names_every_rule_and_shape():
    assert typing.get_args(RuleName) == tuple(RULES)
    assert typing.get_args(program.Shape) == tuple(SHAPES)


def test_drawn_text_is_not_compared_with_plain_text(tmp_path, tinier):
    path = tmp_path / "out.json"
    flags = ["--shape", "tiny", "--tree", "chain:2", "--draft-mode", "sample", "--temperature", "1", "--limit", "1"]
    flags += ["--prefix", "5", "--max-new-tokens", "8", "--repeats", "1", "--json", str(path)]
    assert main(["bench", "decode", *flags]) == 0
    plain, drawn = json.loads(path.read_text())["rows"]
    assert plain["identical_fraction"] == 1 and drawn["identical_fraction"] is None


def test_bf16_on_a_cpu_is_not_compared(target: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["bench", "decode", "--target", str(target), "--dtype", "bf16"]) == 1
    assert "--dtype bf16 is computed several times slower" in capfd.readouterr().err
