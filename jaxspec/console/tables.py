"""Tables for a terminal, and the numbers in their cells."""

import io
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxspec.console.results import jsonable

UNFOLDED = 1000  # columns of a table in a file, which need not fold


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table on stdout. Numbers are right-aligned, floats get four digits, None and NaN become a dash.

    A cell that is a string is printed as it is.
    """
    width = None if sys.stdout.isatty() else UNFOLDED
    Console(markup=False, highlight=False, width=width).print(_table(title, columns, rows))


def table_text(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns the text of the table that `print_table` prints, unfolded."""
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
    if isinstance(plain, list):
        return ", ".join(map(cell, plain))
    if isinstance(plain, float):
        return four_digits(plain)
    if isinstance(plain, int) and not isinstance(plain, bool):
        return f"{plain:,}"
    return str(plain)


def four_digits(value: float) -> str:
    """Returns `value` with four significant digits, and all digits before the point."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def shorten(text: str, longest: int) -> str:
    """Returns a text, cut where it has more than `longest` letters."""
    return text if len(text) <= longest else text[: longest - 3] + "..."
