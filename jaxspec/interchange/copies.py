"""The embedding and the LM head in a head's file: its own, or copies of its target's.

Published files often hold copies. A copy is left out, and that is said; what differs from the target's table is not a
copy: an embedding is then the head's own, as vLLM has it, and an LM head that no such head has is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxspec.base import SharedTables
from jaxspec.interchange.layout import EMBEDDING, HEAD, Folder

ReadTables = Callable[[], SharedTables]
"""Returns the target's tables; called only where something is to be compared with them."""
_ROWS = 4096


class Embedding(NamedTuple):
    """The answer about the embedding in a file."""

    own: bool
    """Whether it is the head's own."""
    notes: tuple[str, ...] = ()


def find_embedding(folder: Folder, tables: ReadTables | None) -> Embedding:
    """Returns whether the embedding in a file is the head's own.

    config.json may say it (`embed_requires_grad`, as speculators writes it, or jaxspec's stamp); else it is compared
    with the target's. Raises ValueError if it is not the target's and has fewer rows.
    """
    if EMBEDDING not in folder.tensors:
        return Embedding(False)
    stamp = folder.config.get("jaxspec")
    if isinstance(stamp, dict) and isinstance(stamp.get("own_embedding"), bool):
        return Embedding(stamp["own_embedding"])
    if isinstance(folder.config.get("embed_requires_grad"), bool):
        return Embedding(folder.config["embed_requires_grad"])
    if tables is None:
        note = f"{EMBEDDING} is taken for a copy of the target's embedding, and left out; --target TARGET compares them"
        return Embedding(False, (note,))
    stored, table = folder.tensors[EMBEDDING], tables().embed_VD
    rows, different = table.shape[0], differing_rows(stored, table)
    if different == 0:
        return Embedding(False, (f"{EMBEDDING} equals the target's embedding, which is read in its place",))
    if stored.get_shape()[0] < rows:
        raise ValueError(
            f"{folder.path}: {EMBEDDING} has {stored.get_shape()[0]:,} rows, and the target has {rows:,} tokens: it is "
            "for another target"
        )
    told = "is of another width than" if different is None else f"differs in {different:,} of {rows:,} rows from"
    return Embedding(True, (f"{EMBEDDING} {told} the target's embedding: the head keeps it as its own",))


def check_head(folder: Folder, tables: ReadTables | None, *, needed: bool = True) -> tuple[str, ...]:
    """Returns notes about the LM head in the file of a head that scores with its target's.

    Raises ValueError if it is not the target's LM head, or, with `needed`, if no target is given to compare it with.
    """
    if HEAD not in folder.tensors:
        return ()
    if tables is None:
        if needed:
            raise ValueError(
                f"{folder.path} has a tensor {HEAD}, and such a head scores with its target's LM head: name the target "
                "with --target, so that the two are compared, or remove the tensor"
            )
        return (f"{HEAD} is taken for a copy of the target's LM head, and left out; --target TARGET compares them",)
    stored, table = folder.tensors[HEAD], tables().head_VD
    different = differing_rows(stored, table)
    if different == 0:
        return (f"{HEAD} equals the target's LM head, which is read in its place",)
    found, wanted = tuple(stored.get_shape()), tuple(table.shape)
    told = (
        f"is of shape {found}, not {wanted}" if different is None else f"differs in {different:,} of {wanted[0]:,} rows"
    )
    raise ValueError(
        f"{folder.path}: its tensor {HEAD} is not the target's LM head ({told}), and jaxspec's drafter of this kind "
        "scores with the target's: it is for another target, or of a kind that is not supported"
    )


def differing_rows(stored: Any, table: Any) -> int | None:
    """Returns how many rows of a target's table differ from those of a stored tensor, which may have more.

    Either may be the other rounded to another dtype. None if the shapes do not allow a comparison.
    """
    shape = tuple(stored.get_shape())
    if len(shape) != 2 or shape[0] < table.shape[0] or shape[1] != table.shape[1]:
        return None
    different = 0
    for first in range(0, table.shape[0], _ROWS):
        ours = np.asarray(table[first : first + _ROWS])
        theirs = np.asarray(stored[first : first + len(ours)])
        with np.errstate(over="ignore"):
            same = (theirs.astype(ours.dtype) == ours) | (theirs == ours.astype(theirs.dtype))
        different += int(np.sum(~np.all(same, axis=-1)))
    return different
