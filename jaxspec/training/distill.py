"""A distillation run: from its config to a trained, exported drafter."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Params
from jaxspec.checkpoints.models import drafter_config, save_drafter
from jaxspec.checkpoints.runs import BestMetric
from jaxspec.config import DistillConfig, resolve
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.corpus import fingerprint as documents_hash
from jaxspec.data.draft_vocab import load_maps
from jaxspec.data.feature_store import FeatureBatches, open_features
from jaxspec.data.packing import PackedBatches
from jaxspec.data.pipeline import Batches
from jaxspec.distillation.compilers import compile_step, under
from jaxspec.distillation.objective import Objective
from jaxspec.distillation.step import eval_step, init_state
from jaxspec.distillation.task import Frozen, TrainState, read_tables
from jaxspec.interchange import hf
from jaxspec.interchange.hf import load_tables, load_target
from jaxspec.interchange.hf_config import read_config, read_table_config
from jaxspec.interchange.target_folders import target_folder, tokenizer_manifest
from jaxspec.losses import FEATURE_LOSSES, refuse_lumped
from jaxspec.parallel import agreement
from jaxspec.parallel.agreement import say
from jaxspec.parallel.mesh import batch_sharding, replicated, shardings
from jaxspec.targets.decoder import Decoder
from jaxspec.targets.tables import Tables
from jaxspec.training.batches import Data, HostBatch, place_rows, read_data
from jaxspec.training.loop import Recipe, RunResult, prepare, run
from jaxspec.training.resolve import DistillStep, build_step, check_length, drafter_for, mesh_of

BEST_METRICS = (
    BestMetric("simulated_tau", rising=True),
    BestMetric("simulated_tau_greedy", rising=True),
    BestMetric("expected_acceptance", rising=True),
    BestMetric("top1_agreement", rising=True),
    BestMetric("loss", rising=False),
)
"""Figures by which a drafter's steps are compared."""
RESUMABLE = (
    *("target", "target_weights", "drafter", "head", "init_from", "draft_vocab"),
    *("objective", "data", "optimizer", "seed", "dtype"),
)
"""Settings of a distillation that may not change under a run's feet."""
EVAL_STEPS = 5
"""Draft steps that evaluation unrolls at least, for simulated tau."""


def distill(
    config: DistillConfig, target: Decoder | Tables, frozen: Params, train_data: PackedBatches, eval_data: PackedBatches
) -> tuple[Any, RunResult]:
    """Trains the drafter of `config` on a frozen target; returns its module and the run, weights in it.

    The target's forward pass and the drafter's update are one program on the config's mesh, see `compile_step`. With
    `config.data.features` the target is not run: its outputs for the data are read from disk.
    """
    check_length(config, target.config)
    mesh = mesh_of(config.mesh)
    vocab_U = None if config.draft_vocab is None else load_maps(config.draft_vocab, target.config.vocab)
    drafter, params = drafter_for(config, target.config, None if vocab_U is None else len(vocab_U))
    data = read_features(config, Data(train_data, eval_data), drafter.taps)
    steps = config.optimizer.steps or len(data.train)
    built = build_step(config, mesh, target, drafter, steps)
    arrays = Frozen(frozen, vocab_U)  # type: ignore[arg-type]
    arrays = jax.device_put(arrays, shardings(mesh, arrays))
    recipe = Recipe(
        "train",
        functools.partial(_init, built, jax.random.key(config.seed), params),
        _updates(built, arrays, train_data, steps),
        _evaluation(built, arrays, data.eval, eval_data),
        data.train,
        steps,
        RESUMABLE,
        BEST_METRICS,
        {
            "kind": "drafter",
            "config": drafter_config(
                config.drafter, drafter, {"target": config.target}, None if vocab_U is None else vocab_U.tolist()
            ),
            "tokenizer": tokenizer_manifest(target_folder(config.target)),
        },
        (arrays,),
        notes=late_parts(config.objective, steps),
        contents=contents_of(config, train_data, eval_data),
    )
    return drafter, run(recipe, config, mesh)


def contents_of(config: DistillConfig, train_data: PackedBatches, eval_data: PackedBatches) -> dict[str, str | None]:
    """Returns hashes of the data and models that the config names."""
    read, folder = {"init_from": config.init_from, "draft_vocab": config.draft_vocab}, target_folder(config.target)
    return {
        "data.train": documents_hash(train_data.corpus),
        "data.eval": documents_hash(eval_data.corpus),
        # A target whose features are stored may be one whose layers cannot be read.
        "target": (hf.fingerprint if config.data.features is None else hf.table_fingerprint)(folder),
        **{name: None if path is None else digest(repr(files_in(Path(path)))) for name, path in read.items()},
    }


def digest(text: str) -> str:
    """Returns a short hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _init(built: DistillStep, key: Array, params: Params | None, frozen: Frozen) -> TrainState:
    """The state of step 0."""
    task = built.task
    return init_state(task.drafter, built.optimizer, key, read_tables(task.target, frozen), params)


def _updates(
    built: DistillStep, frozen: Frozen, data: PackedBatches, steps: int
) -> Callable[[TrainState, HostBatch], tuple[TrainState, Any]]:
    """The update of a state by a batch; each stage of the objective has a program of its own."""
    stages = built.task.objective.stages(steps)
    tasks = [(first, dataclasses.replace(built.task, objective=stage)) for first, stage in stages]
    compiled = [(first, compile_step(built.compiler, built.mesh, task, built.optimizer)) for first, task in tasks]
    place = functools.partial(place_rows, batch_sharding(built.mesh), data)

    def update(state: TrainState, batch: HostBatch) -> tuple[TrainState, Any]:
        done = int(state.step) if len(compiled) > 1 else 0
        step = [step for first, step in compiled if first <= done][-1]
        return step(frozen, state, place(batch))

    return update


def late_parts(objective: Objective, steps: int) -> dict[int, str]:
    """Returns a sentence for every update at which losses or draft steps of `objective.late` join."""
    stages, told = objective.stages(steps), {}
    for (_, before), (first, stage) in itertools.pairwise(stages):
        joined = [f"{name} (weight {weight:g})" for name, weight in stage.weights if name not in dict(before.weights)]
        if stage.steps > before.steps:
            joined += [f"draft step {step + 1}" for step in range(before.steps, stage.steps)]
        joins = f"{' and '.join(joined)} join{'s' * (len(joined) == 1)} the loss (objective.late)"
        told[first + 1] = f"step {first + 1:,}: {joins}, which jumps by it; the new step is compiled"
    return told


def _evaluation(
    built: DistillStep, frozen: Frozen, batches: Batches, data: PackedBatches
) -> Callable[[TrainState], dict[str, Any]]:
    """The figures of a state on held-out data, with as many draft steps as simulated tau needs."""
    mesh, task, objective = built.mesh, built.task, built.task.objective
    deepest = EVAL_STEPS if task.drafter.deepest is None else min(EVAL_STEPS, task.drafter.deepest)
    further = (0.0,) * (max(objective.steps, deepest) - objective.steps)
    counted = (*objective.per_step, *further)
    longer = dataclasses.replace(objective, steps=len(counted), step_weights=counted)
    step = functools.partial(eval_step, dataclasses.replace(task, objective=longer))
    sums_of = under(mesh, jax.jit(step, out_shardings=replicated(mesh)))
    place = functools.partial(place_rows, batch_sharding(mesh), data)

    def evaluate(state: TrainState) -> dict[str, Any]:
        parts = [jax.device_get(sums_of(frozen, state.params, place(batches[i]))) for i in range(len(batches))]
        return jax.tree.map(lambda *x: sum(x), *parts).summary(objective)

    return evaluate


class TrainingData(NamedTuple):
    """Batches to train on and to evaluate with; they may hold the target's stored features."""

    train: Batches
    eval: Batches


def read_features(config: DistillConfig, data: Data, taps: tuple[int, ...]) -> TrainingData:
    """Returns `data` with the target's stored outputs for it, where the config names a store of them.

    `taps` are the target's layers that the drafter reads. Raises ValueError where the store was made by another target
    or otherwise than this run would make it, or does not hold what the drafter or its losses need.
    """
    top_k, scored = config.data.top_k or 0, config.draft_vocab is not None
    if config.data.features is None:
        if top_k:
            raise ValueError("data.top_k is for stored features: give data.features too, or leave it out")
        return TrainingData(*data)
    if top_k:
        refuse_top_k(config, top_k)
    store, folder = open_features(config.data.features), target_folder(config.target)
    tokenizer = ChatTokenizer.load(folder, config.data.chat)
    if store.imported:
        # The target may be one whose layers cannot be run or are not there; its activations were of another program.
        store.check(weights=hf.table_fingerprint(folder), **tokenizer.fingerprint)
    else:
        store.check(weights=hf.fingerprint(folder), **tokenizer.fingerprint, dtype=config.dtype)
    if taps:
        store.check(taps=list(taps))
    return TrainingData(
        FeatureBatches(data.train, store, taps=bool(taps), top_k=top_k, whole=scored),
        FeatureBatches(data.eval, store, taps=bool(taps), whole=scored),
    )


def refuse_top_k(config: DistillConfig, top_k: int) -> None:
    """Raises ValueError where the objective needs more than the target's `top_k` likeliest tokens."""
    for name, _ in config.objective.weights:
        if name not in FEATURE_LOSSES:
            refuse_lumped(name, top_k)
    if config.objective.position_weights.partition(":")[0] in ("cat", "d_pace"):
        raise ValueError(
            f"objective.position_weights={config.objective.position_weights} needs the probability of the "
            "label, which data.top_k may not hold: leave one of them out"
        )
    if config.draft_vocab is not None:
        raise ValueError(
            "data.top_k is of all tokens, and the drafter scores those of draft_vocab: leave data.top_k out"
        )


def run_distillation(config: DistillConfig, data: Data | None = None) -> dict[str, Any]:
    """Distils as `config` says, on the conversations of its files unless `data` is given, and exports the drafter.

    Returns the keys of `jaxspec train`.
    """
    config = resolve(config)
    prepare(config)
    folder, dtype = target_folder(config.target), jnp.dtype(config.dtype)
    # With stored features a target's layers need not be of a kind that can be run here.
    check_length(config, (read_config if config.data.features is None else read_table_config)(folder))
    mesh = mesh_of(config.mesh)
    tokenizer = ChatTokenizer.load(folder, config.data.chat)
    tokenizer.check_ids(read_table_config(folder).vocab)
    data = data or read_data(config, tokenizer, mesh)
    read = {"target": folder, "init_from": config.init_from, "draft_vocab": config.draft_vocab}
    agreement.agree("models", {k: files_in(Path(v)) for k, v in read.items() if v}, "give every host the same files")
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
    save_drafter(
        config.export_folder, config.drafter, module, done.params, about, draft_vocab=scored, manifest=done.manifest
    )
    return {**done.keys(), **data.keys(), "drafter": config.export_folder}


def files_in(path: Path) -> dict[str, int | str]:
    """Returns a fingerprint of a model's folder or a draft vocabulary's file: sizes of weights, settings in hex."""
    found: dict[str, int | str] = {}
    for file in [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.json")]:
        settings = file.suffix == ".json"
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if settings else file.stat().st_size
    return found
