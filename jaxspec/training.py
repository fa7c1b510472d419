"""What every training program runs: the loop with its checkpoints and preemption, and the pieces around it."""

import dataclasses
import functools
import json
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

from jaxspec.base import Params
from jaxspec.checkpoint import RunCheckpoints, abstract_like, save_drafter
from jaxspec.cli import Preempted
from jaxspec.config import DistillConfig, OptimizerConfig, PretrainConfig, differences, to_dict
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import read_conversations, split_names
from jaxspec.data.draft_vocab import load_maps
from jaxspec.data.features import FeatureBatches, FeatureStore
from jaxspec.data.packing import Documents, Mix, PackedBatches, join, tokenize_conversations
from jaxspec.data.pipeline import Batches, BatchIterator, iterate
from jaxspec.data.stored_corpus import StoredCorpus, is_corpus
from jaxspec.distill import Batch, TrainState, eval_step, init_state, train_step
from jaxspec.drafters import DRAFTERS, shape_of
from jaxspec.interchange.hf import fingerprint, load_tables, load_target
from jaxspec.loading import check_width, open_drafter, target_folder
from jaxspec.losses import FEATURE_LOSSES, refuse_lumped
from jaxspec.optimizer import make_optimizer, make_schedule
from jaxspec.report import progress
from jaxspec.sharding import batch_sharding, make_mesh, replicated, shardings
from jaxspec.stored import ARRAYS, from_arrays
from jaxspec.targets.llama import Llama, LlamaConfig
from jaxspec.targets.tables import Tables

HostBatch = Mapping[str, np.ndarray]


class Outcome(NamedTuple):
    """What a run came to."""

    state: Any
    loss: float  # mean of the last logged steps
    evaluation: dict[str, Any]  # of the final state
    tokens: int  # real tokens of this process's part of the run, padding apart
    tokens_per_second: float


class Recipe(NamedTuple):
    """What one kind of training does; `train` drives it."""

    verb: str
    init: Callable[[], Any]
    """The state of step 0, under `jit`."""
    update: Callable[[Any, HostBatch], tuple[Any, Any]]
    """A step: the new state and its loss, or where that is not finite the old state and the loss."""
    evaluate: Callable[[Any], dict[str, Any]]
    """Figures of a state on held-out data."""
    data: Batches
    steps: int
    resumable: Sequence[str]
    """Fields of the config that a resumed run must share."""


def train(
    recipe: Recipe,
    config: PretrainConfig | DistillConfig,
    state: Any,
    batches: BatchIterator,
    checkpoints: RunCheckpoints,
    *,
    start: int,
) -> Outcome:
    """Run the recipe from step `start` to its last, and leave a checkpoint of that one.

    `state` and `batches` stand where `start` left them. A loss that is not finite raises ValueError naming the step and
    its documents. SIGTERM saves and raises Preempted. Metrics are appended to `metrics.jsonl` beside the checkpoints
    every `config.log_every` steps.
    """
    log = MetricLog(checkpoints.folder / "metrics.jsonl", start)
    steps, settings = recipe.steps, to_dict(config)
    losses, tokens = [], 0
    began = time.monotonic()

    def save(step: int) -> None:
        checkpoints.save(step, state, batches.get_state(), settings)

    with termination_notice() as noticed, progress(f"{recipe.verb} {config.name}", steps - start, "steps") as shown:
        for step in range(start + 1, steps + 1):
            batch = next(batches)
            state, loss = recipe.update(state, batch)
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise ValueError(_explain(step, losses[-1], document_ids(recipe.data.corpus, batch), checkpoints))
            tokens += int(np.count_nonzero(batch["segments"]))
            rate = tokens / (time.monotonic() - began)
            losses = losses[-config.log_every :]
            shown.advance(status=f"step {step:,}, loss {losses[-1]:.3f}, {rate:,.0f} tokens/s")
            if step % config.log_every == 0:
                log.write(step=step, loss=float(np.mean(losses)), tokens_per_second=rate)
            if step % config.eval_every == 0 and step != steps:
                log.write(step=step, eval=recipe.evaluate(state))
            if step % config.checkpoint.save_every == 0 or step == steps:
                save(step)
            if noticed(step):
                save(step)
                raise Preempted(f"stopped at step {step:,} of {steps:,}, saved in {checkpoints.folder}")
    seconds = time.monotonic() - began
    evaluation = recipe.evaluate(state)
    log.write(step=steps, eval=evaluation)
    mean = float(np.mean(losses)) if losses else math.nan
    return Outcome(state, mean, evaluation, tokens, tokens / seconds if tokens else 0.0)


class Finished(NamedTuple):
    """A run at its last step."""

    params: Params
    """Whole on every device."""
    outcome: Outcome
    steps: int
    checkpoint: str
    resumed_from: int | None

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
        }


def run(recipe: Recipe, config: PretrainConfig | DistillConfig, mesh: Mesh) -> Finished:
    """`train` on a mesh, from the last checkpoint in the config's folder if there is one, else from the beginning.

    Raises ValueError if that checkpoint belongs to a run that differs in one of the recipe's `resumable` settings.
    """
    abstract = jax.eval_shape(recipe.init)
    layout = shardings(mesh, abstract)
    with RunCheckpoints(config.checkpoint.folder, keep=config.checkpoint.keep) as checkpoints:
        batches = iterate(recipe.data, workers=config.data.workers or 0)
        resumed_from = checkpoints.latest_step()
        if resumed_from is None:
            state = jax.jit(recipe.init, out_shardings=layout)()
        else:
            restored = checkpoints.restore(resumed_from, abstract_like(abstract, layout))
            refuse_other_settings(restored.config, to_dict(config), recipe.resumable, checkpoints.folder)
            state = restored.state
            batches.set_state(restored.data_state)
            say(f"resumed from step {resumed_from:,} of {checkpoints.folder}")
        try:
            outcome = train(recipe, config, state, batches, checkpoints, start=resumed_from or 0)
        finally:
            batches.close()
        checkpoint = str(checkpoints.folder / str(checkpoints.latest_step()))
    whole = jax.jit(lambda params: params, out_shardings=replicated(mesh))(outcome.state.params)
    return Finished(whole, outcome, recipe.steps, checkpoint, resumed_from)


class MetricLog:
    """A JSONL file of metrics; lines past the step a run resumes from are dropped, for they will come again."""

    def __init__(self, path: Path, start: int):
        self.path = path if jax.process_index() == 0 else None
        if self.path is not None and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            self.path.write_text("".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= start))

    def write(self, **metrics: Any) -> None:
        """Append one line."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")


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


def read_data(config: PretrainConfig | DistillConfig, tokenizer: ChatTokenizer) -> Data:
    """The conversations of the config's files, tokenized and packed; says what they hold."""
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
    return pack_data(config, shares[0].corpus, read("eval", data.eval, limit=data.eval_limit), mix, shares[1:])


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


def pack_data(
    config: PretrainConfig | DistillConfig,
    train: Documents,
    judged: Documents,
    mixed: Documents | None = None,
    others: Sequence[Share] = (),
) -> Data:
    """This process's share of the corpora in packed rows: of `train`, `others` in their shares and `mixed` with the
    config's, shuffled epochs; of `judged` one in file order."""
    data = config.data
    left = 1 if mixed is None else 1 - data.mix_share
    corpora, mixes = [train], []
    for other in others:
        mixes.append(Mix(_count(corpora), other.share * left, data.loss_on, other.name))
        corpora.append(other.corpus)
    if mixed is not None:
        mixes.append(Mix(_count(corpora), data.mix_share, data.mix_loss_on))
        corpora.append(mixed)
    shard: dict[str, Any] = {"shard_index": jax.process_index(), "shard_count": jax.process_count()}
    packed = functools.partial(PackedBatches, length=data.length, batch=data.batch, loss_on=data.loss_on, **shard)
    rows = packed(join(*corpora), seed=config.seed, epochs=config.optimizer.epochs, mixes=tuple(mixes))
    for mix in rows.mixed:
        say(f"{mix.name}: {mix}")
    return Data(rows, packed(judged, shuffle=False))


def _count(corpora: Sequence[Documents]) -> int:
    return sum(len(corpus.lengths) for corpus in corpora)


RESUMABLE = ("target", "drafter", "head", "init_from", "draft_vocab", "objective", "data", "optimizer", "seed", "dtype")
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
        "rope_scaling": target.rope_scaling,
        "norm_eps": target.norm_eps,
        "vocab": scored or target.vocab,
    }
    shape = shape_of(config.drafter, like, target.layers, config.head.given)
    return Beginning(DRAFTERS[config.drafter][0](shape, dtype=dtype), None)


def distill(
    config: DistillConfig, target: Llama | Tables, frozen: Params, train_data: PackedBatches, eval_data: PackedBatches
) -> tuple[Any, Finished]:
    """Train the drafter of `config` on a frozen target; returns its module and the run, weights in it.

    The target's forward pass and the drafter's update are one jitted program on the config's mesh. With
    `config.data.features` the target is not run: what it made of the data is read from disk.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    vocab_U = None if config.draft_vocab is None else load_maps(config.draft_vocab, target.config.vocab)
    drafter, params = drafter_for(config, target.config, None if vocab_U is None else len(vocab_U))
    data = read_features(config, Data(train_data, eval_data), drafter.taps)
    blocks = attention_blocks(config, mesh)
    target, learner = target.clone(**blocks, taps=drafter.taps), drafter.clone(**blocks)
    steps = config.optimizer.steps or len(data.train)
    optimizer = optimizer_of(config.optimizer, steps)
    frozen = jax.device_put(frozen, shardings(mesh, frozen))
    key = jax.random.key(config.seed)

    def init() -> TrainState:
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
    updated = jax.jit(functools.partial(train_step, target, learner, optimizer, objective), donate_argnums=1)
    sums_of = jax.jit(functools.partial(eval_step, target, learner, judged), out_shardings=replicated(mesh))
    place = functools.partial(place_rows, batch_sharding(mesh))

    def evaluate(state: TrainState) -> dict[str, Any]:
        rows = (place(data.eval[i]) for i in range(len(data.eval)))
        parts = [jax.device_get(sums_of(frozen, state.params, row, vocab_U)) for row in rows]
        return jax.tree.map(lambda *x: sum(x), *parts).summary(objective)

    def update(state: TrainState, batch: HostBatch) -> tuple[TrainState, Any]:
        state, loss, _ = updated(frozen, state, place(batch), vocab_U)
        return state, loss

    return drafter, run(Recipe("train", init, update, evaluate, data.train, steps, RESUMABLE), config, mesh)


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
    tokenizer = ChatTokenizer.load(folder)
    store.check(weights=fingerprint(folder), **tokenizer.fingerprint, dtype=config.dtype)
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
    folder, dtype = target_folder(config.target), jnp.dtype(config.dtype)
    if config.data.features is None:
        target, frozen, _ = load_target(folder, dtype=dtype, stacked=False)
    else:
        target, frozen = load_tables(folder, dtype=dtype)
    data = data or read_data(config, ChatTokenizer.load(folder))
    module, done = distill(config, target, frozen, data.train, data.eval)
    scored = None if config.draft_vocab is None else load_maps(config.draft_vocab, target.config.vocab).tolist()
    about = {"target": config.target}
    save_drafter(config.export_folder, config.drafter, module, done.params, about, draft_vocab=scored)
    return {**done.keys(), **data.keys(), "drafter": config.export_folder}


def attention_blocks(config: PretrainConfig | DistillConfig, mesh: Mesh) -> dict[str, Any]:
    """How the models attend over training rows; see `layers.attend_causal`."""
    return {
        "query_block": config.query_block,
        "row_by_row": mesh.size == 1 and jax.default_backend() == "cpu",
    }


def place_rows(sharding: jax.sharding.Sharding, batch: HostBatch) -> Batch:
    """A packed batch on the mesh, rows split as `sharding` says."""
    names = ("tokens", "segments", "positions", "loss_mask", *ARRAYS)
    placed = {n: jax.make_array_from_process_local_data(sharding, batch[n]) for n in names if n in batch}
    return Batch(*[placed[name] for name in names[:4]], stored=from_arrays(placed))


def optimizer_of(c: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW as the config says, over `steps` updates."""
    rate = make_schedule(
        peak_lr=c.peak_lr,
        steps=steps,
        warmup_steps=c.warmup_steps,
        schedule=c.schedule,
        final_lr_fraction=c.final_lr_fraction,
    )
    return make_optimizer(
        rate,
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


def refuse_other_settings(saved: dict[str, Any], now: dict[str, Any], fields: Sequence[str], folder: Path) -> None:
    """ValueError if a run would go on with settings that change what it computes."""
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
