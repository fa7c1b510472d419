"""Tree files: a static tree in JSON with what it was predicted to do, as `jaxspec lab search` writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxspec.console.results import write_json

FORMAT = "jaxspec tree 1"
SUFFIX = ".json"


def is_tree_file(text: str) -> bool:
    """Returns whether the text of a flag names a tree file and no tree."""
    return text.strip().lower().endswith(SUFFIX)


def write_tree(path: str | os.PathLike[str], tree: dict[str, Any]) -> None:
    """Writes a tree file, and makes its folder. `tree` has `spec`, and whatever else a reader is to know; JSON."""
    write_json(path, {"format": FORMAT, **tree})


def other_batches(texts: Iterable[str | None], batch: int) -> list[str]:
    """Returns a sentence for each adaptive tree file of another batch, by whose seconds it decides what pays.

    `texts` are those of flags: trees, files or None.
    """
    notes = []
    for text in texts:
        found = read_tree(text.strip()) if text and is_tree_file(text) else {}
        made_for = found.get("batch")
        if "policy" in found and made_for not in (None, batch):
            notes.append(
                f"note: {text}: its costs are of a batch of {made_for}, and up to {batch} rows are decoded together: "
                f"make one with jaxspec lab search --batch {batch} --adaptive FILE.json"
            )
    return notes


def read_tree(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the fields of a tree file; `spec` is a text. Raises ValueError where the file holds no tree."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such tree file; make one with `jaxspec lab search --out FILE`") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is no tree file ({error}); make one with `jaxspec lab search --out FILE`") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("spec"), str):
        raise ValueError(
            f"{path}: is no tree file: it needs the format {FORMAT!r} and a spec; make one with `jaxspec lab search "
            "--out FILE`"
        )
    return value
