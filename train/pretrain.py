"""Train a small language model from scratch: tokenizer, next-token loss, checkpoints, HuggingFace export."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tyro.conf import OmitArgPrefixes, Positional

from jaxspec.checkpoints.runs import BestMetric
from jaxspec.config import PretrainConfig, load
from jaxspec.console import cli
from jaxspec.console.results import result, write_json
from jaxspec.console.tables import print_table
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import read_all
from jaxspec.data.packing import PackedBatches
from jaxspec.data.tokenizer_training import copy_tokenizer, train_bpe, write_tokenizer_folder
from jaxspec.distillation.compilers import under
from jaxspec.distillation.task import TrainState
from jaxspec.interchange import target_folders
from jaxspec.interchange.hf import write_llama
from jaxspec.parallel.agreement import meet, say
from jaxspec.parallel.mesh import batch_sharding, replicated, shardings
from jaxspec.parallel.processes import Launch, joined
from jaxspec.targets.decoder import Decoder
from jaxspec.training.batches import HostBatch, read_data, spread
from jaxspec.training.loop import Recipe, prepare, run
from jaxspec.training.next_token import TokenBatch, next_token_loss, target_weights
from jaxspec.training.resolve import attention_blocks, mesh_of, optimizer_of

PROG = "jaxspec pretrain"
RESUMABLE = ("model", "tokenizer", "data", "optimizer", "seed", "dtype")
"""Settings that may not change under a run's feet."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of `jaxspec pretrain`."""

    config: Positional[str]
    """Name of an experiment in configs/, or path of a Python file."""
    overrides: Positional[tuple[str, ...]] = ()
    """Changes such as optimizer.peak_lr=1e-3."""
    json: Path | None = None
    """Write the result here."""
    launch: OmitArgPrefixes[Launch] = dataclasses.field(default_factory=Launch)


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog=PROG, description=__doc__ or "")
    config = load(args.config, args.overrides)
    if not isinstance(config, PretrainConfig):
        raise ValueError(f"{args.config}: holds a {type(config).__name__}, not a PretrainConfig")
    with joined(args.launch, prog=PROG):
        found = pretrain(config)
        if jax.process_index() == 0:
            show(config, result("pretrain", dtype=config.dtype, seed=config.seed, started=started, **found), args)
    return 0


def show(config: PretrainConfig, found: dict[str, Any], args: Args) -> None:
    """Write the result where it is asked for, and print it."""
    if args.json:
        write_json(args.json, found)
    by_source = found["eval"]["by_source"]
    print_table(
        f"{config.name}: held-out loss after {found['steps']:,} steps",
        ("source", "nats a token"),
        [*by_source.items(), ("all", found["eval"]["loss"])],
    )


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Train and export; returns the verb's own JSON keys."""
    if config.data.features is not None or config.data.top_k is not None:
        raise ValueError("data.features and data.top_k are for jaxspec train: there is no target here; leave them out")
    prepare(config)
    mesh = mesh_of(config.mesh)
    tokenizer = find_tokenizer(config)
    data = read_data(config, tokenizer, mesh)
    steps = config.optimizer.steps or len(data.train)
    shape = dataclasses.replace(
        config.model, bos_id=tokenizer.bos_id, eos_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id
    )
    model = Decoder(shape, dtype=jnp.dtype(config.dtype), **attention_blocks(config, mesh))
    optimizer = optimizer_of(config.optimizer, steps)

    def init() -> TrainState:
        init_key, train_key = jax.random.split(jax.random.key(config.seed))
        params = model.init_params(init_key)
        return TrainState(params, optimizer.init(params), jnp.int32(0), train_key)

    place = functools.partial(place_batch, batch_sharding(mesh))
    update = jax.jit(
        functools.partial(train_step, model, optimizer, config.loss_block),
        donate_argnums=0,
        out_shardings=(shardings(mesh, jax.eval_shape(init)), replicated(mesh)),  # as it came in, or it compiles anew
    )
    update = under(mesh, update)
    sums = jax.jit(
        functools.partial(eval_sums, model, config.loss_block, len(data.eval.corpus.sources)),
        out_shardings=replicated(mesh),
    )
    sums = under(mesh, sums)
    recipe = Recipe(
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
    )
    done = run(recipe, config, mesh)
    if jax.process_index() == 0:
        write_llama(config.export_folder, done.params, shape, dtype="bfloat16")
    return {**done.keys(), **data.keys(), "export": config.export_folder}


def find_tokenizer(config: PretrainConfig) -> ChatTokenizer:
    """The tokenizer that the config names, else that of the export folder, trained on `data.train` if there is none."""
    folder, vocab = Path(config.export_folder), config.model.vocab
    if config.tokenizer is not None:
        folder = target_folders.target_folder(config.tokenizer)
    elif jax.process_index() == 0 and not (folder / "tokenizer.json").is_file():
        say(f"training a tokenizer of {vocab:,} ids")
        conversations = read_all(config.data.train, limit=config.data.limit)
        texts = (text for c in conversations for text in (c.text or "", *(m["content"] for m in c.messages)) if text)
        write_tokenizer_folder(folder, train_bpe(texts, size=vocab), max_length=config.model.max_positions)
    meet("tokenizer")
    tokenizer = ChatTokenizer.load(folder, config.data.template)
    if tokenizer.vocab_size != vocab:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, but model.vocab is {vocab}; make them equal"
        )
    if config.tokenizer is not None and jax.process_index() == 0:
        copy_tokenizer(folder, config.export_folder)
    if config.data.template is not None and tokenizer.template is not None and jax.process_index() == 0:
        (Path(config.export_folder) / "chat_template.jinja").write_text(tokenizer.template, encoding="utf-8")
    return tokenizer


def train_step(
    model: Decoder, optimizer: optax.GradientTransformation, block: int, state: TrainState, batch: TokenBatch
) -> tuple[TrainState, jax.Array]:
    """One update on one global batch and its mean loss; the state stays as it was if the loss is not finite."""
    count = jnp.maximum(jnp.sum(target_weights(batch)), 1.0)
    loss, gradient = jax.value_and_grad(lambda p: jnp.sum(next_token_loss(model, p, batch, block=block)) / count)(
        state.params
    )
    updates, moments = optimizer.update(gradient, state.optimizer, state.params)
    updated = TrainState(optax.apply_updates(state.params, updates), moments, state.step + 1, state.key)
    fine = jnp.isfinite(loss)
    return jax.tree.map(lambda new, old: jnp.where(fine, new, old), updated, state), loss


def eval_sums(
    model: Decoder, block: int, sources: int, params: Any, batch: TokenBatch, sources_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Loss and target tokens of a batch, summed by source: two `[sources]`."""
    loss_BL = next_token_loss(model, params, batch, block=block)
    which = jnp.where(sources_BL < 0, sources, sources_BL).ravel()

    def total(x_BL: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x_BL.ravel(), which, sources + 1)[:sources]

    return total(loss_BL), total(target_weights(batch))


def evaluate(sums: Callable[[HostBatch], tuple[jax.Array, jax.Array]], batches: PackedBatches) -> dict[str, Any]:
    """Mean held-out loss in nats a token, over all and by source."""
    parts = [jax.device_get(sums(batches[i])) for i in range(len(batches))]
    loss, count = np.asarray(parts, np.float64).sum(axis=0)
    by_source = {s: float(x / max(n, 1)) for s, x, n in zip(batches.corpus.sources, loss, count, strict=True)}
    return {"loss": float(loss.sum() / max(count.sum(), 1)), "by_source": by_source, "tokens": int(count.sum())}


def place_batch(sharding: jax.sharding.Sharding, data: PackedBatches, batch: HostBatch) -> tuple[TokenBatch, jax.Array]:
    """A batch of `data` and its source ids on the mesh, rows split as `sharding` says."""
    names = ("tokens", "segments", "positions", "loss_mask", "sources")
    *fields, sources = (spread(sharding, data, batch[name]) for name in names)
    return TokenBatch(*fields), sources


if __name__ == "__main__":
    sys.exit(cli.run(main))
