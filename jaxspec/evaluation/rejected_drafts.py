"""The drafts that an answer's rounds rejected, found by decoding it once more, one round at a time and untimed."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxspec.decoding.answers import Answer
from jaxspec.decoding.requests import Request
from jaxspec.decoding.rounds import RUNNING
from jaxspec.decoding.seen_tree import SeenTree
from jaxspec.decoding.slots import Slots
from jaxspec.serving.loading import Models


def rejected_drafts(models: Models, request: Request, answer: Answer, longest: int) -> list[list[int]] | None:
    """Returns for every target call of an answer the drafts behind the accepted path, the first child at each depth.

    `longest` is the width of prompts that the program is compiled for. None where one row alone writes another text,
    which a near tie of two tokens can do to answers that were decoded in a batch, or in other rounds: rows of a batch
    share the decisions of an adaptive tree.
    """
    settings = request.settings
    engine, weights = models.engine, models.weights
    slots = Slots(
        engine,
        weights,
        1,
        longest=max(longest, len(request.tokens)),
        max_new_tokens=settings.max_new_tokens,
        stops=max(1, len(settings.stop_ids)),
    )
    text, added, found = [int(slots.admit(request, 0)[0])], [], []
    while len(text) < len(answer.tokens):
        record = slots.step()
        text += record.token_BP[0, : record.added_B[0]].tolist()
        added.append(int(record.added_B[0]))
        found.append(behind_path(record.tree, int(record.accepted_B[0])))
        if record.finish_B[0] != RUNNING:
            break
    emitted = np.bincount(answer.call_of, minlength=answer.calls + 1)[1:]
    return found if text == answer.tokens.tolist() and added == emitted.tolist() else None


def behind_path(tree: SeenTree, accepted: int) -> list[int]:
    """Returns the tokens below the last accepted node of the first row's tree, the first child at each depth."""
    parents: Any = tree.parent_BN[0]
    node, found = int(tree.path_BP[0, accepted]), []
    while True:
        below = [n for n in range(node + 1, len(parents)) if parents[n] == node and tree.valid_BN[0, n]]
        if not below:
            return found
        node = below[0]
        found.append(int(tree.token_BN[0, node]))
