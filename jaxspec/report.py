"""What a program shows and leaves behind: a progress line, a table, and one JSON object."""

import io
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from jaxspec import __version__

UNFOLDED = 1000  # columns: a file has no edge at which to fold a table
PLAIN_INTERVAL_SECONDS = 20.0  # between two progress lines where there is no terminal


def machine_facts() -> dict[str, Any]:
    """Returns the processor, the cores this process may use, the kind and count of accelerators, and the jax version.

    `accelerator` is None on a machine without one. Starts the JAX backend.
    """
    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu"
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "accelerator": None if on_cpu else devices[0].device_kind,
        "accelerator_count": 0 if on_cpu else len(devices),
        "jax": jax.__version__,
    }


def cpu_name() -> str:
    """Returns the model name of the processor, or its architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_sha() -> str | None:
    """Returns the commit of the checkout this package runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or not (root / "pyproject.toml").exists():
        return None
    try:
        found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def result(command: str, *, dtype: Any, seed: int | None, started: float, **keys: Any) -> dict[str, Any]:
    """Returns the result of a verb: the keys common to all verbs, then its own `keys`.

    `started` is what `time.monotonic()` said when the program began; `dtype` may be a name or anything numpy takes.
    """
    return {
        "command": command,
        "version": __version__,
        "git_sha": git_sha(),
        "machine": machine_facts(),
        "dtype": dtype if isinstance(dtype, str) else np.dtype(dtype).name,
        "wall_seconds": time.monotonic() - started,
        "seed": seed,
        **keys,
    }


def jsonable(value: Any) -> Any:
    """Returns `value` in JSON's own types: arrays become lists, paths strings, and numbers that are not finite None."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        wide = array.astype(np.float64) if jax.numpy.issubdtype(array.dtype, jax.numpy.floating) else array
        return jsonable(wide.tolist())
    raise TypeError(f"a result cannot hold a {type(value).__name__}: {value!r}")


def write_json(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Writes `result` to `path` all at once, making its folder; `OSError` with one sentence if that is not possible."""
    path = Path(path)
    text = json.dumps(jsonable(result), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as failure:
        raise OSError(f"cannot write the result to {path}: {failure.strerror}") from failure


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table on stdout; numbers are right-aligned, floats get four digits, None and NaN a dash.

    Format a cell as a string to say otherwise.
    """
    width = None if sys.stdout.isatty() else UNFOLDED
    Console(markup=False, highlight=False, width=width).print(_table(title, columns, rows))


def table_text(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns the table that `print_table` prints, as lines of a file."""
    written = io.StringIO()
    Console(file=written, markup=False, highlight=False, width=UNFOLDED).print(_table(title, columns, rows))
    return written.getvalue()


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        numeric = any(isinstance(row[index], int | float | np.number | jax.Array) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*[cell(value) for value in row])
    return table


def cell(value: Any) -> str:
    """Returns the text of one table cell."""
    plain = jsonable(value)
    if plain is None:
        return "-"
    if isinstance(plain, float):
        return four_digits(plain)
    if isinstance(plain, int) and not isinstance(plain, bool):
        return f"{plain:,}"
    return str(plain)


def four_digits(value: float) -> str:
    """Returns `value` with four significant digits, and with all digits before the point."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


class Progress:
    """How far one piece of long work is; made by `progress`, told by `advance`."""

    def __init__(self, description: str, total: int | None, unit: str, bar: Bar | None) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.completed, self.status = 0, ""
        self.started = self.printed = time.monotonic()
        self.bar = bar
        self.task = None if bar is None else bar.add_task(description, total=total, rate="", status="")
        self.show()

    def advance(self, count: int = 1, status: str | None = None) -> None:
        """Adds `count` finished units; `status` is free text, such as "loss 2.31", that stays until replaced."""
        self.completed += count
        self.status = self.status if status is None else status
        last = self.completed == self.total
        if last or self.bar is not None or time.monotonic() - self.printed >= PLAIN_INTERVAL_SECONDS:
            self.show()

    def show(self) -> None:
        """Redraws the bar on a terminal; elsewhere writes one plain line to stderr."""
        elapsed = time.monotonic() - self.started
        rate = f"{four_digits(self.completed / elapsed)} {self.unit}/s" if self.completed and elapsed else ""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.completed, rate=rate, status=self.status)
            return
        self.printed = time.monotonic()
        count = f"{self.completed:,}" if self.total is None else f"{self.completed:,}/{self.total:,}"
        left = (self.total or 0) - self.completed
        eta = f"{left * elapsed / self.completed:,.0f} s left" if self.completed and left > 0 else ""
        details = [f"{count} {self.unit}", rate, eta, self.status]
        sys.stderr.write(f"{self.description}: {', '.join(filter(None, details))}\n")
        sys.stderr.flush()


@contextmanager
def progress(description: str, total: int | None, unit: str) -> Iterator[Progress]:
    """Yields a `Progress` shown on stderr: a live bar on a terminal, elsewhere a plain line at most every 20 s.

    `unit` is a plural noun ("steps"); `total` is None where the end is not known. Of several processes the first shows
    it.
    """
    console = Console(stderr=True)
    if jax.distributed.is_initialized() and jax.process_index():
        yield Progress(description, total, unit, Bar(disable=True))
        return
    if not console.is_terminal:
        line = Progress(description, total, unit, None)
        yield line
        if line.completed != line.total:  # the last unit has shown itself
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
