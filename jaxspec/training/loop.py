"""The loop of every training program, with its checkpoints, evaluations and preemption."""

import contextlib
import math
import signal
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
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
    PretrainConfig,
    completed,
    to_dict,
)
from jaxspec.console.cli import Preempted
from jaxspec.console.progress import progress
from jaxspec.console.results import differences, jsonable
from jaxspec.data.corpus import Documents
from jaxspec.data.pipeline import Batches, BatchIterator, iterate
from jaxspec.parallel import agreement
from jaxspec.parallel.agreement import say
from jaxspec.parallel.mesh import replicated, shardings
from jaxspec.training.batches import HostBatch


class Outcome(NamedTuple):
    """A run's state and figures at its last step."""

    state: Any
    loss: float  # mean of the last logged steps
    evaluation: dict[str, Any]  # of that state
    tokens: int  # real tokens since the run was started or resumed, over all processes, padding apart
    tokens_per_second: float


class Recipe(NamedTuple):
    """One kind of training, which `train` drives."""

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
    """Description of the weights, for `run.json`: `kind`, `config` and `tokenizer` of an exported model's manifest."""
    given: tuple[Any, ...] = ()
    """Arrays that `init` takes: it may not close over those that lie on the devices of several processes."""
    notes: Mapping[int, str] = types.MappingProxyType({})
    """Step -> what is said before it."""
    contents: Mapping[str, str | None] = types.MappingProxyType({})
    """Hashes of what settings such as `data.train` and `target` name: a resumed run must share these, not the names."""


class Meter:
    """Loss and speed since the run was started or resumed."""

    def __init__(self, window: int) -> None:
        self.window, self.began = window, time.monotonic()
        self.losses: list[float] = []
        self.tokens, self.rate = 0, 0.0

    def add(self, loss: float, tokens: int) -> None:
        """Counts a step."""
        self.losses = [*self.losses, loss][-self.window :]
        self.tokens += tokens
        self.rate = self.tokens / (time.monotonic() - self.began)

    @property
    def mean(self) -> float:
        """Mean loss of the last `window` steps."""
        return float(np.mean(self.losses)) if self.losses else math.nan


class OpenRun(NamedTuple):
    """A run with its batches and files open."""

    recipe: Recipe
    config: PretrainConfig | DistillConfig
    batches: BatchIterator
    checkpoints: RunCheckpoints
    log: Tracker

    def update(self, step: int, state: Any, meter: Meter) -> Any:
        """Makes step `step` and returns the new state; ValueError, with the step's documents, if its loss is not
        finite."""
        if step in self.recipe.notes:
            say(self.recipe.notes[step])
        batch, data = next(self.batches), self.recipe.data
        state, loss = self.recipe.update(state, batch)
        if not math.isfinite(loss := float(loss)):
            raise ValueError(_explain(step, loss, document_ids(data.corpus, batch), self.checkpoints))
        meter.add(loss, data.token_count(step - 1))
        return state

    def evaluation_due(self, step: int) -> bool:
        """Returns whether a step is evaluated."""
        return step == self.recipe.steps or step % self.config.eval_every == 0

    def evaluate(self, step: int, state: Any) -> dict[str, Any]:
        """Returns a step's figures on held-out data, and logs them."""
        figures = jsonable(self.recipe.evaluate(state))
        self.log.write(step, eval=figures)
        return figures

    def save(self, step: int, state: Any, **how: Any) -> float:
        """Saves a step; returns the time of it."""
        settings = to_dict(self.config) | {"contents": dict(self.recipe.contents)}
        self.checkpoints.save(step, state, self.batches.get_state(), settings, **how)
        return time.monotonic()


def train(opened: OpenRun, state: Any, *, start: int, evaluation: Mapping[str, Any] | None = None) -> Outcome:
    """Runs the recipe from step `start` to its last, and leaves a checkpoint of that one.

    `state` and the run's batches stand where `start` left them; `evaluation` is that of `start`, if it was made. A loss
    that is not finite raises ValueError naming the step and its documents. SIGTERM saves and raises Preempted. The loss
    is logged every `config.log_every` steps. Saves are due as `config.checkpoint` says, before the step is evaluated,
    and where an evaluation is the best so far.
    """
    recipe, config, checkpoints = opened.recipe, opened.config, opened.checkpoints
    steps, figures = recipe.steps, dict(evaluation or {})
    if start and opened.evaluation_due(start) and not figures:  # the run was stopped between save and evaluation
        figures = opened.evaluate(start, state)
        checkpoints.add_metrics(start, figures)
    if start < steps:
        rows = f"{config.data.batch:,} rows of {config.data.length:,} tokens"
        say(f"{recipe.verb} {config.name}: compiling the step for {rows}, which the first step waits for")
    else:
        say(f"{recipe.verb} {config.name}: all {steps:,} steps are already done")
    meter, saved = Meter(config.log_every), time.monotonic()
    with termination_notice() as noticed, progress(f"{recipe.verb} {config.name}", steps - start, "steps") as shown:
        for step in range(start + 1, steps + 1):
            state = opened.update(step, state, meter)
            shown.advance(status=f"step {step:,}, loss {meter.losses[-1]:.3f}, {meter.rate:,.0f} tokens/s")
            if step % config.log_every == 0:
                opened.log.write(step, loss=meter.mean, tokens_per_second=meter.rate)
            stopping = noticed(step)
            last = stopping or step == steps
            saving = save_due(config.checkpoint, step, time.monotonic() - saved) or last
            if saving:
                saved = opened.save(step, state, wait=last)
            if stopping:
                raise Preempted(f"stopped at step {step:,} of {steps:,}, saved in {checkpoints.folder}")
            if opened.evaluation_due(step):
                figures = opened.evaluate(step, state)
                if saving:
                    checkpoints.add_metrics(step, figures)
                elif checkpoints.improves(figures):
                    saved = opened.save(step, state, metrics=figures, wait=False)
    return Outcome(state, meter.mean, figures, meter.tokens, meter.rate)


def save_due(settings: CheckpointConfig, step: int, seconds: float) -> bool:
    """Returns whether a step is saved, `seconds` after the last save; all processes agree."""
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
    """Tokenizer, figures and provenance for the manifest of the exported model."""

    def keys(self) -> dict[str, Any]:
        """The keys that the training verbs report alike."""
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

    Metrics and `run.json` stay in that folder. Raises ValueError if the checkpoint belongs to a run that differs in
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
        evaluation = None if resumed is None else resumed.metrics
        del resumed  # the state may be donated: no second reference
        outcome = train(OpenRun(recipe, config, batches, checkpoints, log), state, start=start, evaluation=evaluation)
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
    """Returns the state of step 0, laid out as `wanted`."""
    return jax.jit(recipe.init, out_shardings=jax.tree.map(lambda a: a.sharding, wanted))(*recipe.given)


def resume(
    recipe: Recipe,
    config: PretrainConfig | DistillConfig,
    checkpoints: RunCheckpoints,
    batches: BatchIterator,
    wanted: Any,
) -> Restored | None:
    """Returns the last intact checkpoint, laid out as `wanted`, and moves `batches` to its place; None without one."""
    latest = checkpoints.latest_step()
    advice = f"all must see the same in {checkpoints.folder}; start again once they do"
    agreement.agree("checkpoint", {"last checkpoint": latest}, advice)
    if latest is None:
        return None
    saved = checkpoints.settings(latest)
    if latest > recipe.steps:
        raise ValueError(
            f"{checkpoints.folder}: is at step {latest:,}, beyond the {recipe.steps:,} that are asked for: give as "
            "many steps or more, or another checkpoint.folder"
        )
    refuse_other_settings(saved, config, recipe.resumable, checkpoints.folder, recipe.contents)
    tell_other_end(saved, config, recipe.steps)
    restored = checkpoints.restore(None, wanted)
    batches.set_state(restored.data_state)
    say(f"resumed from step {restored.step:,} of {checkpoints.folder}")
    return restored


def best_metric_of(recipe: Recipe, settings: CheckpointConfig) -> BestMetric:
    """Returns the figure by which a run's best step is found; ValueError if its evaluation has no such figure."""
    for best_metric in recipe.best_metrics:
        if settings.best_by in (None, best_metric.figure):
            return best_metric
    known = ", ".join(best_metric.figure for best_metric in recipe.best_metrics)
    raise ValueError(
        f"checkpoint.best_by is {settings.best_by!r}, but {recipe.verb} evaluates {known}; name one of these"
    )


@contextmanager
def termination_notice() -> Iterator[Callable[[int], bool]]:
    """Yields `noticed(step)`: whether SIGTERM has come; all processes of a distributed run agree on it.

    In a run of one process an interrupt (Ctrl-C) counts as one, and a second interrupt stops at once.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received: list[int] = []

    def listen(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, listen) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda _: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain(step: int, loss: float, documents: list[str], checkpoints: RunCheckpoints) -> str:
    last = checkpoints.latest_step()
    good = (
        "no checkpoint was saved" if last is None else f"the last good checkpoint is {checkpoints.folder / str(last)}"
    )
    shown = ", ".join(documents[:8]) + (f" and {len(documents) - 8} more" if len(documents) > 8 else "")
    advice = "lower the learning rate or mend the data"
    return f"the loss is {loss} at step {step}, whose documents are {shown}; {good}; {advice}"


def prepare(config: PretrainConfig | DistillConfig) -> None:
    """Raises ValueError unless all processes run the same and share the folders of its results."""
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


def document_ids(corpus: Documents, batch: HostBatch) -> list[str]:
    """Returns the ids of the conversations in a batch."""
    return [str(corpus.ids[i]) for i in np.unique(batch["documents"]) if i >= 0]


LENGTHS = ("optimizer.steps", "optimizer.epochs")
"""Settings of a run's length: a resumed run may be longer or shorter."""
ALWAYS_FREE = ("data.workers", *LENGTHS)
NAMED_DATA = (
    *("data.train", "data.eval", "data.mix", "data.limit", "data.eval_limit", "data.template", "data.template_args"),
    *("data.date", "data.thinking", "data.last_turn_only", "data.max_turns", "data.skip_bad"),
)
"""Settings that say which documents there are, and nothing else."""


def refuse_other_settings(
    saved: dict[str, Any],
    config: Any,
    fields: Sequence[str],
    folder: Path,
    contents: Mapping[str, str | None] = types.MappingProxyType({}),
) -> None:
    """Raises ValueError if a run would go on with settings, or contents of what they name, that change its results.

    A setting whose contents are the same may have another name. Runs of earlier versions noted no contents, and are
    held to the names.
    """
    before = saved.get("contents", {})
    shared = [name for name in contents if name in before]
    other = [f"the contents of {name} are not those of before" for name in shared if before[name] != contents[name]]
    free = [*ALWAYS_FREE, *(name for name in shared if before[name] == contents[name])]
    if {"data.train", "data.eval"} <= set(free):
        free += NAMED_DATA
    saved, now = completed(saved, config), to_dict(config)
    changed = differences({k: saved.get(k) for k in fields}, {k: now[k] for k in fields})
    changed = other or [line for line in changed if line.partition(" ")[0] not in free]
    if changed:
        raise ValueError(
            f"{folder}: belongs to a run with other settings ({'; '.join(changed)}); choose another checkpoint.folder"
        )


def tell_other_end(saved: dict[str, Any], config: PretrainConfig | DistillConfig, steps: int) -> None:
    """Says where a resumed run has another length, after which its learning rate falls from here on."""
    before, now = saved["optimizer"], to_dict(config.optimizer)
    if any(before.get(name.partition(".")[2]) != now[name.partition(".")[2]] for name in LENGTHS):
        say(f"the run is now {steps:,} steps long, and its learning rate goes by that from here on")
        if isinstance(config, DistillConfig) and config.objective.late:
            say("so does objective.late: what had joined counts again from its share of the longer run")
