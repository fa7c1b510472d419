"""The data of a training run: files tokenized and packed for a mesh, and its batches on the devices."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxspec.config import DataConfig, DistillConfig, PretrainConfig
from jaxspec.data.account import Account, sentences
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import read_conversations, split_names
from jaxspec.data.corpus import Documents, fingerprint, join, tokenize_conversations
from jaxspec.data.packing import Mix, PackedBatches
from jaxspec.data.target_outputs import ARRAYS, from_arrays
from jaxspec.data.tokenized_corpus import StoredCorpus, is_corpus
from jaxspec.data.turns import TurnEncoder
from jaxspec.distillation.task import Batch
from jaxspec.parallel import agreement
from jaxspec.parallel.agreement import say
from jaxspec.parallel.mesh import ROW_AXES, batch_sharding

SKIP_FLAG = "data.skip_bad=true"
"""How bad records are skipped where a config says it."""
HostBatch = Mapping[str, np.ndarray]


class Data(NamedTuple):
    """This process's share of the training and held-out data of a run, in packed rows."""

    train: PackedBatches
    eval: PackedBatches

    def keys(self) -> dict[str, Any]:
        """The keys that the training verbs report of it: documents, the mix that was reached (None without one), and
        the shares of weighted files."""
        mixed = {mix.name: mix._asdict() for mix in self.train.mixed}
        corpora = {part: getattr(self, part).corpus for part in ("train", "eval")}
        documents = {part: corpus.summary._asdict() for part, corpus in corpora.items()}
        counts = {part: dict(corpus.counts) for part, corpus in corpora.items()}
        return {
            "documents": documents,
            "left_out": counts,
            "mix": mixed.pop("mix", None),
            "weighted": list(mixed.values()),
        }


class Share(NamedTuple):
    """A corpus mixed with another in a fixed proportion."""

    name: str
    corpus: Documents
    share: float
    """Of the trained tokens of them all."""


def read_data(config: PretrainConfig | DistillConfig, tokenizer: ChatTokenizer, mesh: Mesh) -> Data:
    """Returns the conversations of the config's files, tokenized and packed for a mesh; says what they hold."""
    data = config.data
    read = functools.partial(read_corpus, tokenizer=tokenizer, data=data)
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


def read_corpus(
    part: str, names: str, *, tokenizer: ChatTokenizer, data: DataConfig, limit: int | None = None
) -> Documents:
    """Returns the tokenized conversations of the files `names`, from disk where `jaxspec tokenize` wrote them.

    Says what they hold, and what was left out. `limit` is of each name; rows are made as `data` says."""
    parts: list[Documents] = []
    told: list[str] = []
    for name, weight in split_names(names):
        if weight is not None:
            raise ValueError(f"data.{part} is {names!r}: weights are for data.train; leave them out")
        if is_corpus(name):
            stored = StoredCorpus(name, limit)
            stored.check(tokenizer, data.turns)
            parts.append(stored)
            told += sentences(stored.counts)
        else:
            # The template is judged anew in each file: what it drops there is named with the file's own line.
            account, turns = Account(skip_bad=data.skip_bad, flag=SKIP_FLAG), TurnEncoder(tokenizer, data.turns)
            conversations = read_conversations(name, limit=limit, account=account)
            parts.append(tokenize_conversations(conversations, turns, length=data.length, account=account))
            told += account.sentences()
    corpus = join(*parts)
    say(f"{part}: {corpus.summary}")
    for line in told:
        say(f"{part}: {line}")
    return corpus


def own_rows(mesh: Mesh, batch: int) -> tuple[int, ...]:
    """Returns the rows of a global batch that devices of this process hold; ValueError if the mesh cannot share them
    evenly."""
    parts = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    if batch % parts:
        raise ValueError(f"data.batch is {batch}, and the mesh spreads rows over {parts} devices: let it be a multiple")
    held = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return tuple(sorted({row for index in held for row in range(batch)[index[0]]}))  # type: ignore[index]


def pack_data(
    config: PretrainConfig | DistillConfig,
    train: Documents,
    held_out: Documents,
    mixed: Documents | None = None,
    others: Sequence[Share] = (),
    batch_rows: tuple[int, ...] | None = None,
) -> Data:
    """Returns the corpora in packed rows: `train`, `others` in their shares and `mixed` with the config's as shuffled
    epochs, `held_out` once in file order. Of every batch only `batch_rows`, unless None. Raises ValueError where a
    corpus holds no token to train on."""
    data = config.data
    for part, corpus in (("train", train), ("eval", held_out)):
        if data.loss_on == "assistant" and not np.any(corpus.said):
            raise ValueError(
                f"data.{part} holds no assistant turn, and data.loss_on=assistant trains on those alone: let the "
                "target answer it (jaxspec regenerate), or set data.loss_on=all"
            )
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
    prints = {"train": [fingerprint(corpus) for corpus in corpora], "eval": fingerprint(held_out)}
    agreement.agree("data", {"data": prints}, "give every host the same files and the same tokenizer")
    rows = packed(join(*corpora), seed=config.seed, epochs=config.optimizer.epochs, mixes=tuple(mixes))
    for mix in rows.mixed:
        say(f"{mix.name}: {mix}")
    return Data(rows, packed(held_out, shuffle=False))


def _count(corpora: Sequence[Documents]) -> int:
    return sum(len(corpus.lengths) for corpus in corpora)


def place_rows(sharding: jax.sharding.Sharding, data: PackedBatches, batch: HostBatch) -> Batch:
    """Returns a batch of `data` on the mesh, rows split as `sharding` says."""
    names = ("tokens", "segments", "positions", "loss_mask", *ARRAYS)
    placed = {name: spread(sharding, data, batch[name]) for name in names if name in batch}
    return Batch(*[placed[name] for name in names[:4]], stored=from_arrays(placed))


def spread(sharding: jax.sharding.Sharding, data: PackedBatches, x_BL: np.ndarray) -> jax.Array:
    """Returns a field of this process's rows of a batch as the global array. Several devices may hold the same rows."""
    every = np.arange(data.batch)
    held = every if data.rows is None else np.asarray(data.rows)

    def rows(index: Any) -> np.ndarray:
        return x_BL[np.searchsorted(held, every[index[0]])]

    return jax.make_array_from_callback((data.batch, *x_BL.shape[1:]), sharding, rows)
