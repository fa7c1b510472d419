"""What every training program runs: the loop with its checkpoints and preemption, and the pieces around it."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxspec import __version__
from jaxspec.base import Params
from jaxspec.checkpoints.folders import abstract_like, refuse_to_replace
from jaxspec.checkpoints.runs import BestMetric, Restored, RunCheckpoints
from jaxspec.checkpoints.tracking import Tracker, provenance, session, sole, track
from jaxspec.config import (
    CheckpointConfig,
    DistillConfig,
    MeshConfig,
    OptimizerConfig,
    PretrainConfig,
    completed,
    to_dict,
)
from jaxspec.console.cli import Preempted
from jaxspec.console.progress import progress
from jaxspec.console.results import differences, jsonable
from jaxspec.data.corpus import Documents
from jaxspec.data.pipeline import Batches, BatchIterator, iterate
from jaxspec.distillation.optimizer import make_optimizer, make_schedule
from jaxspec.nn.kernels import choose_kernel
from jaxspec.parallel import agreement
from jaxspec.parallel.agreement import say
from jaxspec.parallel.mesh import make_mesh, replicated, shardings
from jaxspec.training.batches import HostBatch


class Outcome(NamedTuple):
    """What a run came to."""

    state: Any
    loss: float  # mean of the last logged steps
    evaluation: dict[str, Any]  # of that state
    tokens: int  # real tokens since the run was started or resumed, over all processes, padding apart
    tokens_per_second: float


class Recipe(NamedTuple):
    """What one kind of training does; `train` drives it."""

    verb: str
    init: Callable[..., Any]
    """The state of step 0, under `jit`, from what is `given`."""
    update: Callable[[Any, HostBatch], tuple[Any, Any]]
    """A step: the new state and its loss, or where that is not finite the old state and the loss."""
    evaluate: Callable[[Any], dict[str, Any]]
    """Figures of a state on held-out data."""
    data: Batches
    steps: int
    resumable: Sequence[str]
    """Fields of the config that a resumed run must share."""
    best_metrics: Sequence[BestMetric]
    """Figures of the evaluation by which a step can be the best; the first unless the config says."""
    model: Mapping[str, Any]
    """What the weights are, for `run.json`: `kind`, `config` and `tokenizer` of an exported model's manifest."""
    given: tuple[Any, ...] = ()
    """Arrays that `init` takes: it may not close over those that lie on the devices of several processes."""


def train(
    recipe: Recipe,
    config: PretrainConfig | DistillConfig,
    state: Any,
    batches: BatchIterator,
    checkpoints: RunCheckpoints,
    log: Tracker,
    *,
    start: int,
    evaluation: Mapping[str, Any] | None = None,
) -> Outcome:
    """Run the recipe from step `start` to its last, and leave a checkpoint of that one.

    `state` and `batches` stand where `start` left them; `evaluation` is that of `start`, if it was made. A loss that is
    not finite raises ValueError naming the step and its documents. SIGTERM saves and raises Preempted. The loss is
    logged every `config.log_every` steps. Saves are due as `config.checkpoint` says, before the step is evaluated, and
    where an evaluation is the best so far.
    """
    steps, settings = recipe.steps, to_dict(config)
    losses, tokens, rate = [], 0, 0.0
    judged = dict(evaluation or {})

    def evaluation_due(step: int) -> bool:
        return step == steps or step % config.eval_every == 0

    def evaluate(step: int) -> dict[str, Any]:
        judged = jsonable(recipe.evaluate(state))
        log.write(step, eval=judged)
        return judged

    def save(step: int, **how: Any) -> float:
        checkpoints.save(step, state, batches.get_state(), settings, **how)
        return time.monotonic()

    if start and evaluation_due(start) and not judged:  # it was stopped in between
        judged = evaluate(start)
        checkpoints.add_metrics(start, judged)
    began = saved = time.monotonic()
    with termination_notice() as noticed, progress(f"{recipe.verb} {config.name}", steps - start, "steps") as shown:
        for step in range(start + 1, steps + 1):
            batch = next(batches)
            state, loss = recipe.update(state, batch)
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise ValueError(_explain(step, losses[-1], document_ids(recipe.data.corpus, batch), checkpoints))
            tokens += recipe.data.token_count(step - 1)
            rate = tokens / (time.monotonic() - began)
            losses = losses[-config.log_every :]
            shown.advance(status=f"step {step:,}, loss {losses[-1]:.3f}, {rate:,.0f} tokens/s")
            if step % config.log_every == 0:
                log.write(step, loss=float(np.mean(losses)), tokens_per_second=rate)
            stopping = noticed(step)
            last = stopping or step == steps
            saving = save_due(config.checkpoint, step, time.monotonic() - saved) or last
            if saving:
                saved = save(step, wait=last)
            if stopping:
                raise Preempted(f"stopped at step {step:,} of {steps:,}, saved in {checkpoints.folder}")
            if evaluation_due(step):
                judged = evaluate(step)
                if saving:
                    checkpoints.add_metrics(step, judged)
                elif checkpoints.improves(judged):
                    saved = save(step, metrics=judged, wait=False)
    mean = float(np.mean(losses)) if losses else math.nan
    return Outcome(state, mean, judged, tokens, rate)


def save_due(settings: CheckpointConfig, step: int, seconds: float) -> bool:
    """Whether a step is to be saved, `seconds` after the last save; all processes agree."""
    due = settings.save_every is not None and step % settings.save_every == 0
    if settings.save_minutes is not None:
        late = seconds >= 60 * settings.save_minutes
        due |= bool(multihost_utils.broadcast_one_to_all(np.int32(late))) if jax.process_count() > 1 else late
    return due


class RunResult(NamedTuple):
    """A run at its last step."""

    params: Params
    """Whole on every device."""
    outcome: Outcome
    steps: int
    checkpoint: str
    resumed_from: int | None
    exported_step: int
    """The step that the weights are of, and the evaluation."""
    manifest: dict[str, Any]
    """What the manifest of the exported model says of where it comes from."""

    def keys(self) -> dict[str, Any]:
        """What the training verbs report alike."""
        return {
            "steps": self.steps,
            "tokens": self.outcome.tokens,
            "loss": self.outcome.loss,
            "eval": self.outcome.evaluation,
            "tokens_per_second": self.outcome.tokens_per_second,
            "checkpoint": self.checkpoint,
            "resumed_from": self.resumed_from,
            "exported_step": self.exported_step,
        }


def run(recipe: Recipe, config: PretrainConfig | DistillConfig, mesh: Mesh) -> RunResult:
    """`train` on a mesh, from the last intact checkpoint in the config's folder, or from the beginning.

    Metrics and `run.json` are left in that folder. Raises ValueError if the checkpoint belongs to a run that differs in
    one of the recipe's `resumable` settings.
    """
    kept, best_metric = config.checkpoint, best_metric_of(recipe, config.checkpoint)
    abstract = jax.eval_shape(recipe.init, *recipe.given)
    wanted = abstract_like(abstract, shardings(mesh, abstract))
    opened = RunCheckpoints(kept.folder, keep=kept.keep, keep_best=kept.keep_best, best_metric=best_metric, tell=say)
    facts = {"name": config.name, "kind": recipe.verb, "steps": recipe.steps, "config": to_dict(config)}
    ahead = contextlib.closing(iterate(recipe.data, workers=config.data.workers or 0))
    with sole(Path(kept.folder)), opened as checkpoints, ahead as batches, contextlib.ExitStack() as stack:
        resumed = resume(recipe, config, checkpoints, batches, wanted)
        start = 0 if resumed is None else resumed.step
        state = start_state(recipe, wanted) if resumed is None else resumed.state
        facts |= {"model": recipe.model, "best_metric": best_metric._asdict()}
        record = stack.enter_context(session(checkpoints.folder, facts, start))
        tracked = track(checkpoints.folder, start, wandb=config.tracking.wandb, record=record, tell=say)
        log = stack.enter_context(tracked)
        judged = None if resumed is None else resumed.metrics
        del resumed
        outcome = train(recipe, config, state, batches, checkpoints, log, start=start, evaluation=judged)
        checkpoint = str(checkpoints.folder / str(checkpoints.latest_step()))
        exported = recipe.steps
        best = checkpoints.best_step() if kept.export == "best" else None
        if best is not None and best != recipe.steps:
            outcome = outcome._replace(state=None)  # makes room for the other
            found = checkpoints.restore(best, wanted)
            outcome, exported = outcome._replace(state=found.state, evaluation=found.metrics), best
            say(f"step {best:,} is exported, the best by {best_metric.figure}")
    whole = jax.jit(lambda params: params, out_shardings=replicated(mesh))(outcome.state.params)
    manifest = {
        "tokenizer": recipe.model.get("tokenizer"),
        "metrics": outcome.evaluation,
        "provenance": provenance(record, exported),
    }
    return RunResult(whole, outcome, recipe.steps, checkpoint, start or None, exported, manifest)


def start_state(recipe: Recipe, wanted: Any) -> Any:
    """The state of step 0, laid out as `wanted`."""
    return jax.jit(recipe.init, out_shardings=jax.tree.map(lambda a: a.sharding, wanted))(*recipe.given)


def resume(
    recipe: Recipe,
    config: PretrainConfig | DistillConfig,
    checkpoints: RunCheckpoints,
    batches: BatchIterator,
    wanted: Any,
) -> Restored | None:
    """The last intact checkpoint, laid out as `wanted`, with `batches` moved to its place; None where there is none."""
    latest = checkpoints.latest_step()
    advice = f"all must see the same in {checkpoints.folder}; start again once they do"
    agreement.agree("checkpoint", {"last checkpoint": latest}, advice)
    if latest is None:
        return None
    refuse_other_settings(checkpoints.settings(latest), config, recipe.resumable, checkpoints.folder)
    restored = checkpoints.restore(None, wanted)
    batches.set_state(restored.data_state)
    say(f"resumed from step {restored.step:,} of {checkpoints.folder}")
    return restored


def best_metric_of(recipe: Recipe, settings: CheckpointConfig) -> BestMetric:
    """By which figure a run's best step is found; ValueError if its evaluation has no such figure."""
    for best_metric in recipe.best_metrics:
        if settings.best_by in (None, best_metric.figure):
            return best_metric
    known = ", ".join(best_metric.figure for best_metric in recipe.best_metrics)
    raise ValueError(
        f"checkpoint.best_by is {settings.best_by!r}, but {recipe.verb} evaluates {known}; name one of these"
    )


@contextmanager
def termination_notice() -> Iterator[Callable[[int], bool]]:
    """Yields `noticed(step)`: whether SIGTERM has come, agreed on by all processes of a distributed run."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda _: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def _explain(step: int, loss: float, documents: list[str], checkpoints: RunCheckpoints) -> str:
    last = checkpoints.latest_step()
    good = (
        "no checkpoint was saved" if last is None else f"the last good checkpoint is {checkpoints.folder / str(last)}"
    )
    shown = ", ".join(documents[:8]) + (f" and {len(documents) - 8} more" if len(documents) > 8 else "")
    advice = "lower the learning rate or mend the data"
    return f"the loss is {loss} at step {step}, whose documents are {shown}; {good}; {advice}"


def prepare(config: PretrainConfig | DistillConfig) -> None:
    """ValueError unless all processes run the same and share the folders that it leaves things in."""
    folders = {"checkpoint.folder": config.checkpoint.folder, "export_folder": config.export_folder}
    for name, folder in folders.items():
        if "://" in folder:
            raise ValueError(
                f"{name} is {folder!r}, and files are written to folders only: mount the bucket (docs/tpu.md says how) "
                "and give the path in it"
            )
    if jax.process_count() > 1 and isinstance(config, DistillConfig) and config.compiler == "pmap":
        raise ValueError("compiler='pmap' is for one process, and there are several: set compiler=jit or shard_map")
    versions = {"jaxspec": __version__, "jax": jax.__version__}
    agreement.agree("settings", {**to_dict(config), "version": versions}, "start the same command on every host")
    if isinstance(config, DistillConfig) and jax.process_index() == 0:  # the others would see what it writes there
        refuse_to_replace(config.export_folder)
    for folder in folders.values():
        agreement.check_shared(folder)


def attention_blocks(config: PretrainConfig | DistillConfig, mesh: Mesh) -> dict[str, Any]:
    """How the models attend over training rows, and what they keep of it; see `attention.attend_text` and `recompute`.

    ValueError where the mesh's devices cannot attend as the config says.
    """
    return {
        "kernel": choose_kernel(config.attention, mesh.devices.flat[0], config.dtype),
        "remat": config.remat,
        "query_block": config.query_block,
        "row_by_row": mesh.size == 1 and mesh.devices.flat[0].platform == "cpu",
    }


def mesh_of(c: MeshConfig) -> Mesh:
    """The mesh that a config asks for."""
    return make_mesh(c.data, c.fsdp, c.tensor, slices=c.slices)


def optimizer_of(c: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer that the config says, over `steps` updates."""
    rate = make_schedule(
        peak_lr=c.peak_lr,
        steps=steps,
        warmup_steps=c.warmup_steps,
        schedule=c.schedule,
        final_lr_fraction=c.final_lr_fraction,
    )
    return make_optimizer(
        rate,
        kind=c.kind,
        weight_decay=c.weight_decay,
        b1=c.b1,
        b2=c.b2,
        eps=c.eps,
        clip_norm=c.clip_norm,
        clip_value=c.clip_value,
    )


def document_ids(corpus: Documents, batch: HostBatch) -> list[str]:
    """The ids of the conversations in a batch."""
    return [str(corpus.ids[i]) for i in np.unique(batch["documents"]) if i >= 0]


def refuse_other_settings(saved: dict[str, Any], config: Any, fields: Sequence[str], folder: Path) -> None:
    """ValueError if a run would go on with settings that change what it computes."""
    saved, now = completed(saved, config), to_dict(config)
    changed = differences({k: saved.get(k) for k in fields}, {k: now[k] for k in fields})
    changed = [line for line in changed if not line.startswith("data.workers ")]
    if changed:
        raise ValueError(
            f"{folder}: belongs to a run with other settings ({'; '.join(changed)}); choose another checkpoint.folder"
        )
