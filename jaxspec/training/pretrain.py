"""Pretraining of a small language model: tokenizer, next-token loss, checkpoints, export as a HuggingFace folder."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxspec.base import Params
from jaxspec.checkpoints.runs import BestMetric
from jaxspec.config import PretrainConfig, resolve
from jaxspec.data.account import Account
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import read_all
from jaxspec.data.corpus import fingerprint
from jaxspec.data.packing import PackedBatches
from jaxspec.data.tokenizer_training import copy_tokenizer, train_bpe, write_tokenizer_folder
from jaxspec.distillation.compilers import under
from jaxspec.distillation.task import TrainState
from jaxspec.interchange import target_folders
from jaxspec.interchange.hf import write_llama
from jaxspec.parallel.agreement import meet, say
from jaxspec.parallel.mesh import batch_sharding, replicated, shardings
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.training.batches import SKIP_FLAG, Data, HostBatch, read_data, spread
from jaxspec.training.loop import Recipe, prepare, run
from jaxspec.training.next_token import TokenBatch, next_token_loss, target_weights
from jaxspec.training.resolve import attention_blocks, check_length, mesh_of, optimizer_of

RESUMABLE = ("model", "tokenizer", "data", "optimizer", "seed", "dtype")
"""Settings that a resumed run must share with its checkpoint."""


def run_pretraining(config: PretrainConfig) -> dict[str, Any]:
    """Trains as `config` says and exports the model; returns the keys of `jaxspec pretrain`.

    Raises ValueError for settings that do not fit together.
    """
    config = resolve(config)
    if config.data.features is not None or config.data.top_k is not None:
        raise ValueError("data.features and data.top_k are for jaxspec train: there is no target here; leave them out")
    prepare(config)
    check_length(config, config.model)
    mesh = mesh_of(config.mesh)
    tokenizer = find_tokenizer(config)
    data = read_data(config, tokenizer, mesh)
    shape = dataclasses.replace(
        config.model, bos_id=tokenizer.bos_id, eos_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id
    )
    done = run(make_recipe(config, shape, data, mesh), config, mesh)
    if jax.process_index() == 0:
        write_llama(config.export_folder, done.params, shape, dtype="bfloat16")
    return {**done.keys(), **data.keys(), "export": config.export_folder}


def make_recipe(config: PretrainConfig, shape: LlamaConfig, data: Data, mesh: Mesh) -> Recipe:
    """Returns the steps and evaluations that `config` asks for, of a model of this shape, compiled for `mesh`."""
    model = Decoder(shape, dtype=jnp.dtype(config.dtype), **attention_blocks(config, mesh))
    steps = config.optimizer.steps or len(data.train)
    optimizer = optimizer_of(config.optimizer, steps)
    init = functools.partial(init_state, model, optimizer, config.seed)
    update = jax.jit(
        functools.partial(train_step, model, optimizer, config.loss_block),
        donate_argnums=0,
        # The state leaves as it came in, or the second step would be compiled anew.
        out_shardings=(shardings(mesh, jax.eval_shape(init)), replicated(mesh)),
    )
    sums = jax.jit(
        functools.partial(eval_sums, model, config.loss_block, len(data.eval.corpus.sources)),
        out_shardings=replicated(mesh),
    )
    update, sums = under(mesh, update), under(mesh, sums)
    place = functools.partial(place_batch, batch_sharding(mesh))
    return Recipe(
        "pretrain",
        init,
        update=lambda state, batch: update(state, place(data.train, batch)[0]),
        evaluate=lambda state: evaluate(lambda batch: sums(state.params, *place(data.eval, batch)), data.eval),
        data=data.train,
        steps=steps,
        resumable=RESUMABLE,
        best_metrics=(BestMetric("loss", rising=False),),
        model={
            "kind": "target",
            "config": dataclasses.asdict(shape),
            "tokenizer": target_folders.tokenizer_manifest(Path(config.export_folder)),
        },
        contents={"data.train": fingerprint(data.train.corpus), "data.eval": fingerprint(data.eval.corpus)},
    )


def find_tokenizer(config: PretrainConfig) -> ChatTokenizer:
    """Returns the tokenizer that the config names, or that of the export folder, which is trained if it is not there.

    Leaves it in the export folder. Raises ValueError if its size is not `model.vocab`.
    """
    export, vocab = Path(config.export_folder), config.model.vocab
    first = jax.process_index() == 0
    folder = export if config.tokenizer is None else target_folders.target_folder(config.tokenizer)
    if first and config.tokenizer is None and not (folder / "tokenizer.json").is_file():
        train_tokenizer(config, folder)
    meet("tokenizer")
    tokenizer = ChatTokenizer.load(folder, config.data.chat)
    if tokenizer.vocab_size != vocab:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, but model.vocab is {vocab}; make them equal"
        )
    if first and config.tokenizer is not None:
        copy_tokenizer(folder, export)
    if first and config.data.template is not None and not tokenizer.is_bare:
        (export / "chat_template.jinja").write_text(tokenizer.template.text, encoding="utf-8")
    return tokenizer


def train_tokenizer(config: PretrainConfig, folder: Path) -> None:
    """Trains a BPE tokenizer of `model.vocab` ids on the text of `data.train`, and writes it into `folder`."""
    vocab = config.model.vocab
    say(f"training a tokenizer of {vocab:,} ids")
    account = Account(skip_bad=config.data.skip_bad, flag=SKIP_FLAG)  # read again, and told, with the tokens
    conversations = read_all(config.data.train, limit=config.data.limit, account=account)
    texts = (text for c in conversations for text in (c.text or "", *(m["content"] for m in c.messages)) if text)
    write_tokenizer_folder(folder, train_bpe(texts, size=vocab), max_length=config.model.max_positions)


def init_state(model: Decoder, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state of step 0."""
    init_key, train_key = jax.random.split(jax.random.key(seed))
    params = model.init_params(init_key)
    return TrainState(params, optimizer.init(params), jnp.int32(0), train_key)


def train_step(
    model: Decoder, optimizer: optax.GradientTransformation, block: int, state: TrainState, batch: TokenBatch
) -> tuple[TrainState, jax.Array]:
    """Returns the state after one update on one global batch, and its mean loss in nats a token.

    A loss that is not finite leaves the state as it was.
    """
    count = jnp.maximum(jnp.sum(target_weights(batch)), 1.0)
    loss, gradient = jax.value_and_grad(lambda p: jnp.sum(next_token_loss(model, p, batch, block=block)) / count)(
        state.params
    )
    updates, moments = optimizer.update(gradient, state.optimizer, state.params)
    updated = TrainState(optax.apply_updates(state.params, updates), moments, state.step + 1, state.key)
    fine = jnp.isfinite(loss)
    return jax.tree.map(lambda new, old: jnp.where(fine, new, old), updated, state), loss


def eval_sums(
    model: Decoder, block: int, sources: int, params: Params, batch: TokenBatch, sources_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss and the count of target tokens of a batch, summed by source: two `[sources]`."""
    loss_BL = next_token_loss(model, params, batch, block=block)
    # Padding has source -1. It is summed under one number more, which is dropped.
    source_N = jnp.where(sources_BL < 0, sources, sources_BL).ravel()
    totals = [jax.ops.segment_sum(x_BL.ravel(), source_N, sources + 1) for x_BL in (loss_BL, target_weights(batch))]
    return totals[0][:sources], totals[1][:sources]


def evaluate(sums: Callable[[HostBatch], tuple[jax.Array, jax.Array]], batches: PackedBatches) -> dict[str, Any]:
    """Returns the mean held-out loss in nats a token, over all and by source, and the count of tokens."""
    parts = [jax.device_get(sums(batches[i])) for i in range(len(batches))]
    loss, count = np.asarray(parts, np.float64).sum(axis=0)
    by_source = {s: float(x / max(n, 1)) for s, x, n in zip(batches.corpus.sources, loss, count, strict=True)}
    return {"loss": float(loss.sum() / max(count.sum(), 1)), "by_source": by_source, "tokens": int(count.sum())}


def place_batch(sharding: jax.sharding.Sharding, data: PackedBatches, batch: HostBatch) -> tuple[TokenBatch, jax.Array]:
    """Returns a batch of `data` and its source ids on the mesh, rows split as `sharding` says."""
    names = ("tokens", "segments", "positions", "loss_mask", "sources")
    *fields, sources = (spread(sharding, data, batch[name]) for name in names)
    return TokenBatch(*fields), sources
