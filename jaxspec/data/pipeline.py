"""Grain pipelines over packed batches, with exact resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from jaxspec.data.corpus import Documents


class Batches(Protocol):
    """Batches by number, such as `PackedBatches`; a batch does not depend on what was read before it."""

    @property
    def corpus(self) -> Documents:
        """The corpus that the `documents` of a batch index."""
        ...

    def token_count(self, index: int) -> int:
        """Returns the number of tokens of a batch, without padding, over all processes."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class BatchIterator(Protocol):
    """An iterator over batches whose place can be saved and restored."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...
    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def iterate(batches: Batches, *, threads: int = 1, prefetch: int = 4, workers: int = 0) -> BatchIterator:
    """Returns an iterator over `batches`, which `threads` or `workers` processes of Grain's prepare in advance.

    Its state is the number of the next batch. A global batch does not depend on the number of processes that train or
    prepare it, so neither does the state, and resume is exact for any number of either. A worker holds its own copy of
    a corpus that is in memory, and takes seconds to start.
    """
    return _Numbered(batches, threads, prefetch, workers)


class _Numbered:
    """The `BatchIterator` of `iterate`."""

    def __init__(self, batches: Batches, threads: int, prefetch: int, workers: int) -> None:
        self._batches, self._threads, self._prefetch, self._workers = batches, threads, prefetch, workers
        self._next, self._ahead = 0, None

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._ahead is None:
            self._ahead = self._open()
        batch = next(self._ahead)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self.close()
        self._next = int(state["next_index"])

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _open(self) -> Any:
        import grain

        rest = grain.MapDataset.source(self._batches)[self._next :]  # type: ignore[arg-type]
        ahead = rest.to_iter_dataset(grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._prefetch))
        if self._workers:
            _parse_flags()
            ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        return iter(ahead)


def _parse_flags() -> None:
    """Marks absl's flags as parsed: Grain 0.2.18 reads them when it starts workers, and fails if nobody has."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
