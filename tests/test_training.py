"""The training loop: it stops where the loss is not finite, and keeps its metrics straight."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest

from jaxspec import training
from jaxspec.checkpoint import RunCheckpoints, save_drafter
from jaxspec.config import CheckpointConfig, load
from jaxspec.data.pipeline import BatchIterator
from jaxspec.drafters import DraftLM, DraftLMConfig
from jaxspec.sharding import batch_sharding, make_mesh
from jaxspec.targets.llama import LlamaConfig
from jaxspec.training import MetricLog, Recipe, drafter_for, own_rows, spread, train


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


def run(folder: Path, losses: list[float], *, save_every: int = 2) -> Any:
    batches: BatchIterator = Numbers()
    remaining = iter(losses)
    recipe = Recipe(
        "toy",
        init=lambda: {"a": np.zeros(1)},
        update=lambda state, batch: ({"a": state["a"] + 1}, next(remaining)),
        evaluate=lambda state: {"loss": float(state["a"][0])},
        data=cast(Any, Documents()),
        steps=len(losses),
        resumable=(),
    )
    kept = CheckpointConfig(str(folder), save_every)
    config = dataclasses.replace(load("tiny"), checkpoint=kept, eval_every=2, log_every=2)
    with RunCheckpoints(folder) as checkpoints:
        return train(recipe, config, recipe.init(), batches, checkpoints, start=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_step_documents_and_last_good_checkpoint(tmp_path: Path, bad: float):
    with pytest.raises(ValueError, match=rf"is {bad} at step 4, whose documents are doc-4; .*good checkpoint is .*/2;"):
        run(tmp_path, [1.0, 1.0, 1.0, bad])


def test_without_a_checkpoint_the_stop_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match="no checkpoint was saved"):
        run(tmp_path, [math.nan])


def test_the_outcome_and_the_log_agree(tmp_path: Path):
    outcome = run(tmp_path, [4.0, 3.0, 2.0, 1.0])
    assert outcome.loss == 1.5 and outcome.tokens == 16 and outcome.evaluation == {"loss": 4.0}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["loss"]) for x in lines if "loss" in x] == [(2, 3.5), (4, 1.5)]
    assert [(x["step"], x["eval"]["loss"]) for x in lines if "eval" in x] == [(2, 2.0), (4, 4.0)]


def test_metrics_past_the_resumed_step_and_torn_lines_are_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricLog(path, 2).write(step=3, loss=1.0)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 1.0}\n'


def test_a_draft_lm_of_another_vocabulary_is_refused_before_it_is_trained(tmp_path):
    target = LlamaConfig(32, 16, 1, 2, 1, 8, 16)
    drafter = DraftLM(DraftLMConfig(24, 8, 1, 2, 1, 4, 16))
    save_drafter(tmp_path / "drafter", "draft_lm", drafter, drafter.init_params(jax.random.key(0)))
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
    monkeypatch.setattr(training, "batch_sharding", lambda _: Host(slice(6, 8), slice(0, 2), slice(6, 8)))
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
