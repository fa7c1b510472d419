"""The training loop: it stops where the loss is not finite, and keeps its metrics straight."""

import dataclasses
import json
import math
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.checkpoints.manifest import amend_manifest
from jaxspec.checkpoints.models import save_drafter
from jaxspec.checkpoints.runs import BestMetric, RunCheckpoints, complete_steps
from jaxspec.checkpoints.tracking import read_record, track
from jaxspec.config import CheckpointConfig, load
from jaxspec.console.cli import Preempted
from jaxspec.data.pipeline import BatchIterator
from jaxspec.drafters import DraftLM, DraftLMConfig
from jaxspec.parallel.mesh import batch_sharding, make_mesh
from jaxspec.targets.decoder import LlamaConfig
from jaxspec.training.batches import own_rows, spread
from jaxspec.training.loop import OpenRun, Recipe, best_metric_of, save_due, termination_notice, train
from jaxspec.training.loop import run as whole_run
from jaxspec.training.resolve import drafter_for

BEST_METRIC = BestMetric("loss", rising=False)


class Numbers:
    """Batches 1, 2, 3 ... that say which documents they hold."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> "Numbers":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        self.at += 1
        return {"documents": np.full((1, 4), self.at)}

    def get_state(self) -> dict[str, Any]:
        return {"at": self.at}

    def set_state(self, state: dict[str, Any]) -> None:
        self.at = state["at"]

    def close(self) -> None: ...


class Documents:
    """Stands for the data: document `n` is called `doc-n`."""

    corpus = SimpleNamespace(ids=[f"doc-{n}" for n in range(9)])

    def token_count(self, index: int) -> int:
        return 4


def run(
    folder: Path,
    losses: list[float],
    *,
    evaluations: Sequence[float] = (),
    keep: CheckpointConfig | None = None,
    eval_every: int = 2,
) -> Any:
    """Train a number that counts its steps, whose evaluations are these, else the number itself."""
    remaining_evaluations = iter(evaluations)
    batches: BatchIterator = Numbers()
    remaining = iter(losses)
    recipe = Recipe(
        "toy",
        init=lambda: {"a": np.zeros(1)},
        update=lambda state, batch: ({"a": state["a"] + 1}, next(remaining)),
        evaluate=lambda state: {"loss": next(remaining_evaluations) if evaluations else float(state["a"][0])},
        data=cast(Any, Documents()),
        steps=len(losses),
        resumable=(),
        best_metrics=(BEST_METRIC,),
        model={},
    )
    kept = keep or CheckpointConfig(str(folder), save_every=2)
    config = dataclasses.replace(load("tiny"), checkpoint=kept, eval_every=eval_every, log_every=2)
    opened = RunCheckpoints(folder, keep=kept.keep, keep_best=kept.keep_best, best_metric=BEST_METRIC)
    with opened as checkpoints, track(folder) as log:
        return train(OpenRun(recipe, config, batches, checkpoints, log), recipe.init(), start=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_step_documents_and_last_good_checkpoint(tmp_path: Path, bad: float):
    with pytest.raises(ValueError, match=rf"is {bad} at step 4, whose documents are doc-4; .*good checkpoint is .*/2;"):
        run(tmp_path, [1.0, 1.0, 1.0, bad])


def test_without_a_checkpoint_the_stop_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match="no checkpoint was saved"):
        run(tmp_path, [math.nan])


class Interrupting(list[float]):
    """Losses, the third of which comes with an interrupt, and the fourth with another if it is reached."""

    def __iter__(self) -> Iterator[float]:
        for number, loss in enumerate(super().__iter__(), 1):
            if number >= 3:
                signal.raise_signal(signal.SIGINT)
            yield loss


def test_the_step_is_announced_before_it_is_compiled(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run(tmp_path, [1.0, 1.0])
    first = capfd.readouterr().err.splitlines()[0]
    assert first == "toy tiny: compiling the step for 8 rows of 512 tokens, which the first step waits for"


def test_a_finished_run_that_is_run_again_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    finish(monkeypatch, tmp_path / "run", 3)
    capfd.readouterr()
    finish(monkeypatch, tmp_path / "run", 3)
    told = capfd.readouterr().err
    assert "all 3 steps are already done" in told and "compiling" not in told and "0/0" not in told


def test_an_interrupt_saves_the_step_it_came_in(tmp_path: Path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Preempted, match="step 3"):
        run(tmp_path, Interrupting([1.0] * 7))
    assert max(complete_steps(tmp_path)) == 3 and signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_stops_at_once(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), termination_notice() as noticed:
        signal.raise_signal(signal.SIGINT)
        assert noticed(1)
        signal.raise_signal(signal.SIGINT)


def test_the_outcome_and_the_log_agree(tmp_path: Path):
    outcome = run(tmp_path, [4.0, 3.0, 2.0, 1.0])
    assert outcome.loss == 1.5 and outcome.tokens == 16 and outcome.evaluation == {"loss": 4.0}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["loss"]) for x in lines if "loss" in x] == [(2, 3.5), (4, 1.5)]
    assert [(x["step"], x["eval"]["loss"]) for x in lines if "eval" in x] == [(2, 2.0), (4, 4.0)]


def test_a_step_that_evaluates_best_so_far_is_saved_and_kept(tmp_path: Path):
    keep = CheckpointConfig(str(tmp_path), save_every=None, keep=1)
    run(tmp_path, [1.0] * 7, evaluations=[5.0, 3.0, 4.0, 4.5], keep=keep)
    assert complete_steps(tmp_path) == {4: {"loss": 3.0}, 7: {"loss": 4.5}}


def test_without_best_ones_evaluations_save_nothing(tmp_path: Path):
    keep = CheckpointConfig(str(tmp_path), save_every=3, keep=9, keep_best=0)
    run(tmp_path, [1.0] * 7, keep=keep)
    assert complete_steps(tmp_path) == {3: {}, 6: {"loss": 6.0}, 7: {"loss": 7.0}}


class State(NamedTuple):
    params: Any


def finish(monkeypatch: pytest.MonkeyPatch, folder: Path, steps: int, export: Literal["last", "best"] = "last") -> Any:
    """A whole run, resumed if there is one, whose weights count steps and whose evaluation is best at step 2."""
    monkeypatch.setattr("jaxspec.training.loop.iterate", lambda data, **_: Numbers())
    recipe = Recipe(
        "toy",
        init=lambda: State({"a": jnp.zeros(1)}),
        update=lambda state, batch: (jax.tree.map(lambda a: a + 1, state), 1.0),
        evaluate=lambda state: {"loss": abs(float(state.params["a"][0]) - 2)},
        data=cast(Any, Documents()),
        steps=steps,
        resumable=(),
        best_metrics=(BEST_METRIC,),
        model={"kind": "toy"},
    )
    kept = CheckpointConfig(str(folder), save_every=3, keep=1, export=export)
    config = dataclasses.replace(load("tiny"), checkpoint=kept, eval_every=2)
    return whole_run(recipe, config, make_mesh(1, devices=jax.devices()[:1]))


def test_a_finished_run_exports_its_last_step_or_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    last = finish(monkeypatch, tmp_path, 6)
    assert (last.exported_step, last.params["a"].item(), last.resumed_from) == (6, 6, None)
    best = finish(monkeypatch, tmp_path, 6, "best")
    assert (best.exported_step, best.params["a"].item(), best.resumed_from) == (2, 2, 6)
    assert last.outcome.evaluation == {"loss": 4.0} and best.outcome.evaluation == {"loss": 0.0}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines if "eval" in x] == [2, 4, 6]  # the last was not evaluated again


def test_an_evaluation_that_a_stop_came_before_is_made_on_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    finish(monkeypatch, tmp_path, 4)
    assert complete_steps(tmp_path) == {2: {"loss": 0.0}, 4: {"loss": 2.0}}
    amend_manifest(tmp_path / "4", {"metrics": {}})
    finish(monkeypatch, tmp_path, 8)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines if "eval" in x] == [2, 4, 4, 6, 8]
    assert complete_steps(tmp_path) == {2: {"loss": 0.0}, 8: {"loss": 6.0}}


def test_a_run_that_goes_on_says_so_in_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    finish(monkeypatch, tmp_path, 4)
    finish(monkeypatch, tmp_path, 8)
    found = read_record(tmp_path)
    assert found and found["model"] == {"kind": "toy"} and found["steps"] == 8
    assert [x["resumed_from"] for x in found["sessions"]] == [None, 4]


def test_saves_are_due_by_steps_or_minutes():
    either = CheckpointConfig("x", save_every=10, save_minutes=0.5)
    assert [save_due(either, 20, 0.0), save_due(either, 21, 29.0), save_due(either, 21, 30.0)] == [True, False, True]
    assert not save_due(CheckpointConfig("x", save_every=None), 20, 1e9)


def test_a_figure_that_is_not_evaluated_is_named():
    recipe: Any = SimpleNamespace(verb="pretrain", best_metrics=(BEST_METRIC,))
    assert (
        best_metric_of(recipe, CheckpointConfig("x"))
        == best_metric_of(recipe, CheckpointConfig("x", best_by="loss"))
        == BEST_METRIC
    )
    with pytest.raises(ValueError, match="best_by is 'simulated_tau', but pretrain evaluates loss; name one of these"):
        best_metric_of(recipe, CheckpointConfig("x", best_by="simulated_tau"))


def test_a_draft_lm_of_another_vocabulary_is_refused_before_it_is_trained(tmp_path):
    target = LlamaConfig(32, 16, 1, 2, 1, 8, 16)
    drafter = DraftLM(DraftLMConfig(24, 8, 1, 2, 1, 4, 16))
    save_drafter(tmp_path / "drafter", "draft_lm", drafter, jax.jit(drafter.init_params)(jax.random.key(0)))
    config = load("draft_lm_kld", [f"init_from={tmp_path / 'drafter'}"])
    with pytest.raises(ValueError, match="scores 24 tokens, and it is to score 32; it was made for another tokenizer"):
        drafter_for(config, target)
    assert drafter_for(config, dataclasses.replace(target, vocab=24)).module == drafter


class Host:
    """Stands for a sharding of which one process holds devices with some rows, several of them the same."""

    def __init__(self, *rows: slice) -> None:
        self.rows = rows

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[int, tuple[slice]]:
        return {device: (rows,) for device, rows in enumerate(self.rows)}


def test_a_process_reads_the_rows_that_its_devices_hold_wherever_they_stand(monkeypatch: pytest.MonkeyPatch):
    mesh = make_mesh(2, 2, 2)
    assert own_rows(mesh, 8) == tuple(range(8))
    monkeypatch.setattr(
        "jaxspec.training.batches.batch_sharding", lambda _: Host(slice(6, 8), slice(0, 2), slice(6, 8))
    )
    assert own_rows(mesh, 8) == (0, 1, 6, 7)
    with pytest.raises(ValueError, match=r"data.batch is 6, and the mesh spreads rows over 4 devices"):
        own_rows(mesh, 6)


def test_rows_are_laid_where_the_global_batch_has_them(monkeypatch: pytest.MonkeyPatch):
    x_BL = np.arange(8)[:, None] * np.ones((1, 4), np.int32)
    whole, some = (cast(Any, SimpleNamespace(batch=8, rows=rows)) for rows in (None, (0, 1, 6, 7)))
    placed = spread(batch_sharding(make_mesh(2, 2, 2)), whole, x_BL)
    np.testing.assert_array_equal(placed, x_BL)
    asked: list[Any] = []
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, sharding, rows: asked.append((shape, rows)))
    spread(cast(Any, None), some, x_BL[[0, 1, 6, 7]])
    shape, rows = asked[0]
    assert shape == (8, 4) and rows((slice(6, 8), slice(None))).tolist() == x_BL[6:8].tolist()


def test_a_run_that_is_further_than_it_is_asked_to_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    finish(monkeypatch, tmp_path, 6)
    with pytest.raises(ValueError, match="is at step 6, beyond the 4 that are asked for: give as many steps or more"):
        finish(monkeypatch, tmp_path, 4)
    assert finish(monkeypatch, tmp_path, 6).exported_step == 6
