"""Progress lines of long runs."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from jaxspec.console.tables import four_digits

PLAIN_INTERVAL_SECONDS = 20.0  # between two progress lines where there is no terminal


class Progress:
    """Progress of one long piece of work; `progress` makes it, `advance` moves it on."""

    def __init__(self, description: str, total: int | None, unit: str, bar: Bar | None) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.completed, self.status = 0, ""
        self.started = self.printed = time.monotonic()
        self.bar = bar
        self.task = None if bar is None else bar.add_task(description, total=total, rate="", status="")
        self.show()

    def tell(self, status: str) -> None:
        """Shows what is being done, such as "compiling", at once."""
        self.status = status
        self.show()

    def advance(self, count: int = 1, status: str | None = None, *, at_once: bool = False) -> None:
        """Adds `count` finished units, and shows them now and then or `at_once`.

        `status` is free text, such as "loss 2.31"; it stays until it is replaced.
        """
        self.completed += count
        self.status = self.status if status is None else status
        last = self.completed == self.total
        if at_once or last or self.bar is not None or time.monotonic() - self.printed >= PLAIN_INTERVAL_SECONDS:
            self.show()

    def show(self) -> None:
        """Redraws the bar on a terminal; elsewhere writes one plain line to stderr."""
        elapsed = time.monotonic() - self.started
        rate = f"{four_digits(self.completed / elapsed)} {self.unit}/s" if self.completed and elapsed else ""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.completed, rate=rate, status=self.status)
            return
        self.printed = time.monotonic()
        if self.total == 0:  # whoever has nothing to do says so
            return
        count = f"{self.completed:,}" if self.total is None else f"{self.completed:,}/{self.total:,}"
        left = (self.total or 0) - self.completed
        eta = f"{left * elapsed / self.completed:,.0f} s left" if self.completed and left > 0 else ""
        details = [f"{count} {self.unit}", rate, eta, self.status]
        sys.stderr.write(f"{self.description}: {', '.join(filter(None, details))}\n")
        sys.stderr.flush()


@contextmanager
def progress(description: str, total: int | None, unit: str) -> Iterator[Progress]:
    """Yields a `Progress` shown on stderr: a live bar on a terminal, elsewhere a plain line at most every 20 s.

    `unit` is a plural noun ("steps"). `total` is None if the end is not known. Of several processes only the first
    shows it.
    """
    console = Console(stderr=True)
    if jax.distributed.is_initialized() and jax.process_index():
        yield Progress(description, total, unit, Bar(disable=True))
        return
    if not console.is_terminal:
        line = Progress(description, total, unit, None)
        yield line
        if line.completed != line.total:  # otherwise `advance` has shown the last unit
            line.show()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}", markup=False),
    )
    with Bar(*columns, console=console) as bar:
        yield Progress(description, total, unit, bar)
