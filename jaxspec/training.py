"""What every training program runs: the loop with its checkpoints and preemption, and the pieces around it."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxspec import __version__, launch
from jaxspec.base import Params
from jaxspec.checkpoint import (
    Merit,
    Restored,
    RunCheckpoints,
    abstract_like,
    drafter_config,
    refuse_to_replace,
    save_drafter,
)
from jaxspec.cli import Preempted
from jaxspec.compilers import compile_step, under
from jaxspec.config import (
    CheckpointConfig,
    DistillConfig,
    MeshConfig,
    OptimizerConfig,
    PretrainConfig,
    completed,
    differences,
    to_dict,
)
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import read_conversations, split_names
from jaxspec.data.draft_vocab import load_maps
from jaxspec.data.features import FeatureBatches, FeatureStore
from jaxspec.data.packing import Documents, Mix, PackedBatches, fingerprint, join, tokenize_conversations
from jaxspec.data.pipeline import Batches, BatchIterator, iterate
from jaxspec.data.stored_corpus import StoredCorpus, is_corpus
from jaxspec.distill import Batch, TrainState, eval_step, init_state
from jaxspec.drafters import DRAFTERS, shape_of
from jaxspec.interchange import hf
from jaxspec.interchange.hf import load_tables, load_target
from jaxspec.kernels import choose_kernel
from jaxspec.loading import check_width, open_drafter, target_folder, tokenizer_card
from jaxspec.losses import FEATURE_LOSSES, refuse_lumped
from jaxspec.optimizer import make_optimizer, make_schedule
from jaxspec.report import jsonable, progress
from jaxspec.sharding import ROW_AXES, batch_sharding, make_mesh, replicated, shardings
from jaxspec.stored import ARRAYS, from_arrays
from jaxspec.targets.llama import Llama, LlamaConfig
from jaxspec.targets.tables import Tables
from jaxspec.tracking import Tracker, provenance, session, sole, track

HostBatch = Mapping[str, np.ndarray]


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
    merits: Sequence[Merit]
    """Figures of the evaluation by which a step can be the best; the first unless the config says."""
    model: Mapping[str, Any]
    """What the weights are, for `run.json`: `kind`, `config` and `tokenizer` of an exported model's card."""
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


class Finished(NamedTuple):
    """A run at its last step."""

    params: Params
    """Whole on every device."""
    outcome: Outcome
    steps: int
    checkpoint: str
    resumed_from: int | None
    exported_step: int
    """The step that the weights are of, and the evaluation."""
    card: dict[str, Any]
    """What the card of the exported model says of where it comes from."""

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


def run(recipe: Recipe, config: PretrainConfig | DistillConfig, mesh: Mesh) -> Finished:
    """`train` on a mesh, from the last intact checkpoint in the config's folder, or from the beginning.

    Metrics and `run.json` are left in that folder. Raises ValueError if the checkpoint belongs to a run that differs in
    one of the recipe's `resumable` settings.
    """
    kept, merit = config.checkpoint, merit_of(recipe, config.checkpoint)
    abstract = jax.eval_shape(recipe.init, *recipe.given)
    wanted = abstract_like(abstract, shardings(mesh, abstract))
    opened = RunCheckpoints(kept.folder, keep=kept.keep, keep_best=kept.keep_best, merit=merit, tell=say)
    facts = {"name": config.name, "kind": recipe.verb, "steps": recipe.steps, "config": to_dict(config)}
    ahead = contextlib.closing(iterate(recipe.data, workers=config.data.workers or 0))
    with sole(Path(kept.folder)), opened as checkpoints, ahead as batches, contextlib.ExitStack() as stack:
        resumed = resume(recipe, config, checkpoints, batches, wanted)
        start = 0 if resumed is None else resumed.step
        state = start_state(recipe, wanted) if resumed is None else resumed.state
        facts |= {"model": recipe.model, "merit": merit._asdict()}
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
            say(f"step {best:,} is exported, the best by {merit.figure}")
    whole = jax.jit(lambda params: params, out_shardings=replicated(mesh))(outcome.state.params)
    card = {
        "tokenizer": recipe.model.get("tokenizer"),
        "metrics": outcome.evaluation,
        "provenance": provenance(record, exported),
    }
    return Finished(whole, outcome, recipe.steps, checkpoint, start or None, exported, card)


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
    launch.agree("checkpoint", {"last checkpoint": latest}, advice)
    if latest is None:
        return None
    refuse_other_settings(checkpoints.settings(latest), config, recipe.resumable, checkpoints.folder)
    restored = checkpoints.restore(None, wanted)
    batches.set_state(restored.data_state)
    say(f"resumed from step {restored.step:,} of {checkpoints.folder}")
    return restored


def merit_of(recipe: Recipe, settings: CheckpointConfig) -> Merit:
    """By which figure a run's best step is found; ValueError if its evaluation has no such figure."""
    for merit in recipe.merits:
        if settings.best_by in (None, merit.figure):
            return merit
    known = ", ".join(merit.figure for merit in recipe.merits)
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


class Data(NamedTuple):
    """This process's share of what a run learns from and is judged by, in packed rows."""

    train: PackedBatches
    eval: PackedBatches

    def keys(self) -> dict[str, Any]:
        """What the training verbs report of it: what happened to the conversations, the mix that was reached (None
        without one), and what weighted files came to."""
        mixed = {mix.name: mix._asdict() for mix in self.train.mixed}
        documents = {part: getattr(self, part).corpus.summary._asdict() for part in ("train", "eval")}
        return {"documents": documents, "mix": mixed.pop("mix", None), "weighted": list(mixed.values())}


class Share(NamedTuple):
    """A corpus that stands beside another in a fixed proportion."""

    name: str
    corpus: Documents
    share: float
    """Of the trained tokens of them all."""


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
    launch.agree("settings", {**to_dict(config), "version": versions}, "start the same command on every host")
    if isinstance(config, DistillConfig) and jax.process_index() == 0:  # the others would see what it writes there
        refuse_to_replace(config.export_folder)
    for folder in folders.values():
        launch.check_shared(folder)


def read_data(config: PretrainConfig | DistillConfig, tokenizer: ChatTokenizer, mesh: Mesh) -> Data:
    """The conversations of the config's files, tokenized and packed for a mesh; says what they hold."""
    data = config.data
    read = functools.partial(read_corpus, tokenizer=tokenizer, length=data.length)
    named = split_names(data.train)
    total = sum(weight or 0 for _, weight in named)
    if total:
        corpora = [read(f"train, {name}", name, limit=data.limit) for name, _ in named]
        shares = [Share(n.name, c, (n.weight or 0) / total) for n, c in zip(named, corpora, strict=True)]
    else:
        shares = [Share("", read("train", data.train, limit=data.limit), 1.0)]
    mix = None if data.mix is None else read("mix", data.mix)
    rows = own_rows(mesh, data.batch)
    return pack_data(config, shares[0].corpus, read("eval", data.eval, limit=data.eval_limit), mix, shares[1:], rows)


def read_corpus(part: str, names: str, *, tokenizer: ChatTokenizer, length: int, limit: int | None = None) -> Documents:
    """The tokenized conversations that `names` names, from disk where `jaxspec tokenize` wrote them; says what they
    hold. `limit` is of each name."""
    parts: list[Documents] = []
    for name, weight in split_names(names):
        if weight is not None:
            raise ValueError(f"data.{part} is {names!r}: weights are for data.train; leave them out")
        if is_corpus(name):
            stored = StoredCorpus(name, limit)
            stored.check(tokenizer)
            parts.append(stored)
        else:
            parts.append(tokenize_conversations(read_conversations(name, limit=limit), tokenizer, length=length))
    corpus = join(*parts)
    say(f"{part}: {corpus.summary}")
    return corpus


def own_rows(mesh: Mesh, batch: int) -> tuple[int, ...]:
    """The rows of a global batch that devices of this process hold; ValueError if the mesh cannot share them evenly."""
    parts = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    if batch % parts:
        raise ValueError(f"data.batch is {batch}, and the mesh spreads rows over {parts} devices: let it be a multiple")
    held = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return tuple(sorted({row for index in held for row in range(batch)[index[0]]}))  # type: ignore[index]


def pack_data(
    config: PretrainConfig | DistillConfig,
    train: Documents,
    judged: Documents,
    mixed: Documents | None = None,
    others: Sequence[Share] = (),
    batch_rows: tuple[int, ...] | None = None,
) -> Data:
    """The corpora in packed rows: of `train`, `others` in their shares and `mixed` with the config's, shuffled epochs;
    of `judged` one in file order. Of every batch only `batch_rows`, unless None."""
    data = config.data
    left = 1 if mixed is None else 1 - data.mix_share
    corpora, mixes = [train], []
    for other in others:
        mixes.append(Mix(_count(corpora), other.share * left, data.loss_on, other.name))
        corpora.append(other.corpus)
    if mixed is not None:
        mixes.append(Mix(_count(corpora), data.mix_share, data.mix_loss_on))
        corpora.append(mixed)
    packed = functools.partial(
        PackedBatches, length=data.length, batch=data.batch, loss_on=data.loss_on, rows=batch_rows
    )
    prints = {"train": [fingerprint(corpus) for corpus in corpora], "eval": fingerprint(judged)}
    launch.agree("data", {"data": prints}, "give every host the same files and the same tokenizer")
    rows = packed(join(*corpora), seed=config.seed, epochs=config.optimizer.epochs, mixes=tuple(mixes))
    for mix in rows.mixed:
        say(f"{mix.name}: {mix}")
    return Data(rows, packed(judged, shuffle=False))


def _count(corpora: Sequence[Documents]) -> int:
    return sum(len(corpus.lengths) for corpus in corpora)


MERITS = (
    Merit("simulated_tau", rising=True),
    Merit("simulated_tau_greedy", rising=True),
    Merit("expected_acceptance", rising=True),
    Merit("top1_agreement", rising=True),
    Merit("loss", rising=False),
)
"""Figures by which a drafter's steps are compared."""
RESUMABLE = (
    *("target", "target_weights", "drafter", "head", "init_from", "draft_vocab"),
    *("objective", "data", "optimizer", "seed", "dtype"),
)
"""Settings of a distillation that may not change under a run's feet."""
EVAL_STEPS = 5
"""Draft steps that evaluation unrolls at least, for simulated tau."""


class Beginning(NamedTuple):
    """A drafter before its training."""

    module: Any
    params: Params | None
    """The weights to go on from; None for fresh ones."""


def drafter_for(config: DistillConfig, target: LlamaConfig, scored: int | None = None) -> Beginning:
    """The drafter that `config` names: that of `config.init_from`, or one layer of the target's shape with the changes
    of `config.head`. `scored` is the size of its draft vocabulary.

    Raises ValueError where that does not fit together.
    """
    dtype = jnp.dtype(config.dtype)
    if config.drafter not in DRAFTERS:
        raise ValueError(f"drafter {config.drafter!r} is not one of {', '.join(DRAFTERS)}")
    if config.init_from is not None:
        if config.head.given:
            raise ValueError(f"head.{next(iter(config.head.given))} is that of {config.init_from}: leave it out")
        found = open_drafter(config.init_from, dtype=jnp.float32)
        if found.name != config.drafter:
            raise ValueError(
                f"{config.init_from}: holds a drafter {found.name!r}, and the config says {config.drafter!r}"
            )
        check_width(config.init_from, found.module, target)
        if found.module.vocab not in (None, scored or target.vocab):
            raise ValueError(
                f"{config.init_from}: its own LM head scores {found.module.vocab:,} tokens, and it is to score "
                f"{scored or target.vocab:,}; it was made for another tokenizer or draft vocabulary"
            )
        return Beginning(found.module.clone(dtype=dtype), found.params)
    like = {
        "width": target.width,
        "heads": target.heads,
        "kv_heads": target.kv_heads,
        "head_dim": target.head_dim,
        "mlp": target.mlp,
        "rope_theta": target.rope_theta,
        "rope_scaling": target.drafter_rope,
        "norm_eps": target.norm_eps,
        "vocab": scored or target.vocab,
        "embed_vocab": target.vocab,
    }
    shape = shape_of(config.drafter, like, target.layers, config.head.given)
    return Beginning(DRAFTERS[config.drafter][0](shape, dtype=dtype), None)


def distill(
    config: DistillConfig, target: Llama | Tables, frozen: Params, train_data: PackedBatches, eval_data: PackedBatches
) -> tuple[Any, Finished]:
    """Train the drafter of `config` on a frozen target; returns its module and the run, weights in it.

    The target's forward pass and the drafter's update are one program on the config's mesh, see `compile_step`. With
    `config.data.features` the target is not run: what it made of the data is read from disk.
    """
    mesh = mesh_of(config.mesh)
    vocab_U = None if config.draft_vocab is None else load_maps(config.draft_vocab, target.config.vocab)
    drafter, params = drafter_for(config, target.config, None if vocab_U is None else len(vocab_U))
    data = read_features(config, Data(train_data, eval_data), drafter.taps)
    blocks = attention_blocks(config, mesh)
    target, learner = target.clone(**blocks, taps=drafter.taps), drafter.clone(**blocks)
    steps = config.optimizer.steps or len(data.train)
    optimizer = optimizer_of(config.optimizer, steps)
    frozen = jax.device_put(frozen, shardings(mesh, frozen))
    key = jax.random.key(config.seed)

    def init(frozen: Params) -> TrainState:
        return init_state(drafter, optimizer, key, target.borrowed(frozen), params)

    objective = config.objective
    deepest = drafter.deepest
    if deepest is not None and objective.steps > deepest:
        raise ValueError(
            f"objective.steps is {objective.steps}, and this drafter drafts {deepest} tokens ahead: lower it"
        )
    judged = dataclasses.replace(
        objective,
        steps=max(objective.steps, EVAL_STEPS if deepest is None else min(EVAL_STEPS, deepest)),
        step_weights=(),
    )
    stages = [
        (first, compile_step(config.compiler, mesh, target, learner, optimizer, stage))
        for first, stage in objective.stages(steps)
    ]
    sums_of = jax.jit(functools.partial(eval_step, target, learner, judged), out_shardings=replicated(mesh))
    sums_of = under(mesh, sums_of)
    place = functools.partial(place_rows, batch_sharding(mesh))

    def evaluate(state: TrainState) -> dict[str, Any]:
        rows = (place(eval_data, data.eval[i]) for i in range(len(data.eval)))
        parts = [jax.device_get(sums_of(frozen, state.params, row, vocab_U)) for row in rows]
        return jax.tree.map(lambda *x: sum(x), *parts).summary(objective)

    def update(state: TrainState, batch: HostBatch) -> tuple[TrainState, Any]:
        made = int(state.step) if len(stages) > 1 else 0
        updated = [compiled for first, compiled in stages if first <= made][-1]
        return updated(frozen, state, place(train_data, batch), vocab_U)

    model = {
        "kind": "drafter",
        "config": drafter_config(
            config.drafter, drafter, {"target": config.target}, None if vocab_U is None else vocab_U.tolist()
        ),
        "tokenizer": tokenizer_card(target_folder(config.target)),
    }
    recipe = Recipe("train", init, update, evaluate, data.train, steps, RESUMABLE, MERITS, model, (frozen,))
    return drafter, run(recipe, config, mesh)


class Reading(NamedTuple):
    """Batches to learn from and to be judged by, wherever the target's features come from."""

    train: Batches
    eval: Batches


def read_features(config: DistillConfig, data: Data, taps: tuple[int, ...]) -> Reading:
    """`data` with what the target makes of it, for a drafter that reads `taps`, where the config says it is stored.

    Raises ValueError where it was made by another target or otherwise than this run would make it, or does not hold
    what the drafter or its losses need.
    """
    top_k = config.data.top_k or 0
    if config.data.features is None:
        if top_k:
            raise ValueError("data.top_k is for stored features: give data.features too, or leave it out")
        return Reading(*data)
    if top_k:
        refuse_top_k(config, top_k)
    store, folder = FeatureStore(config.data.features), target_folder(config.target)
    tokenizer = ChatTokenizer.load(folder, config.data.template)
    store.check(weights=hf.fingerprint(folder), **tokenizer.fingerprint, dtype=config.dtype)
    if taps:
        store.check(taps=list(taps))
    return Reading(
        FeatureBatches(data.train, store, taps=bool(taps), top_k=top_k),
        FeatureBatches(data.eval, store, taps=bool(taps)),
    )


def refuse_top_k(config: DistillConfig, top_k: int) -> None:
    """ValueError where what is to be learned needs more than the target's `top_k` likeliest tokens."""
    for name, _ in config.objective.weights:
        if name not in FEATURE_LOSSES:
            refuse_lumped(name, top_k)
    if config.objective.position_weights.partition(":")[0] in ("cat", "d_pace"):
        raise ValueError(
            f"objective.position_weights={config.objective.position_weights} needs what the text's own "
            "token got, which data.top_k may not hold: leave one of them out"
        )
    if config.draft_vocab is not None:
        raise ValueError(
            "data.top_k is of all tokens, and the drafter scores those of draft_vocab: leave data.top_k out"
        )


def run_distillation(config: DistillConfig, data: Data | None = None) -> dict[str, Any]:
    """Distil as `config` says, on the conversations that its files hold unless `data` is given, and export the drafter.

    Returns the keys of `jaxspec train`.
    """
    prepare(config)
    folder, dtype = target_folder(config.target), jnp.dtype(config.dtype)
    mesh = mesh_of(config.mesh)
    data = data or read_data(config, ChatTokenizer.load(folder, config.data.template), mesh)
    read = {"target": folder, "init_from": config.init_from, "draft_vocab": config.draft_vocab}
    launch.agree("models", {k: files_in(Path(v)) for k, v in read.items() if v}, "give every host the same files")
    if config.data.features is None:
        how = {"stacked": config.scan_layers, "weights": config.target_weights}
        target, frozen, _ = load_target(folder, dtype=dtype, mesh=mesh, **how)
    else:
        if config.target_weights != "same":
            say(f"target_weights={config.target_weights} saves nothing: features are read, and no layer of the target")
        target, frozen = load_tables(folder, dtype=dtype)
    module, done = distill(config, target, frozen, data.train, data.eval)
    scored = None if config.draft_vocab is None else load_maps(config.draft_vocab, target.config.vocab).tolist()
    about = {"target": config.target}
    save_drafter(config.export_folder, config.drafter, module, done.params, about, draft_vocab=scored, card=done.card)
    return {**done.keys(), **data.keys(), "drafter": config.export_folder}


def files_in(path: Path) -> dict[str, int | str]:
    """What tells a model's folder, or a file of a draft vocabulary, from another: sizes of weights, settings in hex."""
    found: dict[str, int | str] = {}
    for file in [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.json")]:
        settings = file.suffix == ".json"
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if settings else file.stat().st_size
    return found


def attention_blocks(config: PretrainConfig | DistillConfig, mesh: Mesh) -> dict[str, Any]:
    """How the models attend over training rows, and what they keep of it; see `layers.attend_text` and `recompute`.

    ValueError where the mesh's devices cannot attend as the config says.
    """
    return {
        "kernel": choose_kernel(config.attention, mesh.devices.flat[0], config.dtype),
        "remat": config.remat,
        "query_block": config.query_block,
        "row_by_row": mesh.size == 1 and mesh.devices.flat[0].platform == "cpu",
    }


def place_rows(sharding: jax.sharding.Sharding, data: PackedBatches, batch: HostBatch) -> Batch:
    """A batch of `data` on the mesh, rows split as `sharding` says."""
    names = ("tokens", "segments", "positions", "loss_mask", *ARRAYS)
    placed = {name: spread(sharding, data, batch[name]) for name in names if name in batch}
    return Batch(*[placed[name] for name in names[:4]], stored=from_arrays(placed))


def spread(sharding: jax.sharding.Sharding, data: PackedBatches, x_BL: np.ndarray) -> jax.Array:
    """A field of this process's rows of a batch as the global array; devices that hold the same rows may be several."""
    every = np.arange(data.batch)
    held = every if data.rows is None else np.asarray(data.rows)

    def rows(index: Any) -> np.ndarray:
        return x_BL[np.searchsorted(held, every[index[0]])]

    return jax.make_array_from_callback((data.batch, *x_BL.shape[1:]), sharding, rows)


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


def say(line: str) -> None:
    """One line for the reader of the log."""
    if jax.process_index() == 0:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
