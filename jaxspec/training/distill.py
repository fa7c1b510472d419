"""A distillation run as its config says it: the drafter, the data or stored features, and what it leaves behind."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Params
from jaxspec.checkpoints.models import drafter_config, save_drafter
from jaxspec.checkpoints.runs import BestMetric
from jaxspec.config import (
    DistillConfig,
)
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.draft_vocab import load_maps
from jaxspec.data.feature_store import FeatureBatches, FeatureStore
from jaxspec.data.packing import PackedBatches
from jaxspec.data.pipeline import Batches
from jaxspec.distillation.compilers import compile_step, under
from jaxspec.distillation.step import TrainState, eval_step, init_state
from jaxspec.drafters import TargetShape, config_of, kind_named, options_of
from jaxspec.interchange import hf
from jaxspec.interchange.hf import load_tables, load_target
from jaxspec.interchange.target_folders import target_folder, tokenizer_manifest
from jaxspec.losses import FEATURE_LOSSES, refuse_lumped
from jaxspec.parallel import agreement
from jaxspec.parallel.agreement import say
from jaxspec.parallel.mesh import batch_sharding, replicated, shardings
from jaxspec.serving.loading import check_width, open_drafter
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.targets.tables import Tables
from jaxspec.training.batches import Data, HostBatch, place_rows, read_data
from jaxspec.training.loop import Recipe, RunResult, attention_blocks, mesh_of, optimizer_of, prepare, run

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


class InitialDrafter(NamedTuple):
    """A drafter before its training."""

    module: Any
    params: Params | None
    """The weights to go on from; None for fresh ones."""


def drafter_for(config: DistillConfig, target: LlamaConfig, scored: int | None = None) -> InitialDrafter:
    """The drafter that `config` names: that of `config.init_from`, or one layer of the target's shape with the changes
    of `config.head`. `scored` is the size of its draft vocabulary.

    Raises ValueError where that does not fit together.
    """
    dtype, kind, head = jnp.dtype(config.dtype), kind_named(config.drafter), options_of(config.drafter, config.head)
    if config.init_from is not None:
        if head.given:
            raise ValueError(f"head.{next(iter(head.given))} is that of {config.init_from}: leave it out")
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
        return InitialDrafter(found.module.clone(dtype=dtype), found.params)
    shape = config_of(config.drafter, shape_to_follow(target, scored), head)
    return InitialDrafter(kind.module(shape, dtype=dtype), None)


def shape_to_follow(target: LlamaConfig, scored: int | None) -> TargetShape:
    """What a drafter's shape follows of its target's; `scored` is the size of its draft vocabulary."""
    return TargetShape(
        width=target.width,
        heads=target.heads,
        kv_heads=target.kv_heads,
        head_dim=target.head_dim,
        mlp=target.mlp,
        rope_theta=target.rope_theta,
        rope_scaling=target.drafter_rope,
        norm_eps=target.norm_eps,
        layers=target.layers,
        vocab=target.vocab,
        scored=scored or target.vocab,
    )


def distill(
    config: DistillConfig, target: Decoder | Tables, frozen: Params, train_data: PackedBatches, eval_data: PackedBatches
) -> tuple[Any, RunResult]:
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
        return init_state(drafter, optimizer, key, target.shared_tables(frozen), params)

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
        "tokenizer": tokenizer_manifest(target_folder(config.target)),
    }
    recipe = Recipe("train", init, update, evaluate, data.train, steps, RESUMABLE, BEST_METRICS, model, (frozen,))
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
    """What tells a model's folder, or a file of a draft vocabulary, from another: sizes of weights, settings in hex."""
    found: dict[str, int | str] = {}
    for file in [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.json")]:
        settings = file.suffix == ".json"
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if settings else file.stat().st_size
    return found
