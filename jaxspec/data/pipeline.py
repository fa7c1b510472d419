"""Grain pipelines over packed conversations, with exact resume."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import Conversation
from jaxspec.data.packing import PackedBatches, tokenize_conversations


class BatchIterator(Protocol):
    """An iterator whose place can be written down: a Grain dataset iterator is one."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...
    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def iterate(batches: PackedBatches, *, threads: int = 1, prefetch: int = 4) -> BatchIterator:
    """A Grain iterator over `batches`, assembled ahead of need; its state is small JSON and resume is exact.

    A global batch does not depend on the number of processes, so neither does the state.
    """
    import grain

    dataset = grain.MapDataset.source(batches)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))


def packed_batches(
    conversations: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    *,
    length: int,
    batch: int,
    seed: int = 0,
    epochs: int | None = None,
    loss_on: Literal["all", "assistant"] = "all",
    rows: tuple[int, ...] | None = None,
) -> BatchIterator:
    """Shuffled packed batches of `conversations`, as `PackedBatches` describes them, through Grain."""
    corpus = tokenize_conversations(conversations, tokenizer, length=length)
    return iterate(
        PackedBatches(
            corpus,
            length,
            batch,
            seed=seed,
            epochs=epochs,
            loss_on=loss_on,
            rows=rows,
        )
    )
