"""Arms: the ways of decoding that are measured side by side, plain decoding and each drafter with each tree."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from jaxspec.base import TreePolicy
from jaxspec.drafters.prompt_lookup import PromptLookup
from jaxspec.evaluation import timing
from jaxspec.evaluation.rows import PLAIN
from jaxspec.serving.loading import Models
from jaxspec.trees import parse_tree, served_chain

LONGEST_NAME = 60
"""Characters of a tree's spec that still name an arm: tables and plots show the names side by side."""
SERVED = "served"
"""The spec of the chain that servers verify of a drafter, see `trees.served_chain`."""


class DecodingArm(NamedTuple):
    """Models to measure, with the drafter's folder and the tree by which they are named."""

    models: Models
    drafter: str | None = None
    tree: str | None = None

    def facts(self) -> dict[str, Any]:
        """Returns what rows of the arm are read with: its tree, rule and cost.

        `depth` and `nodes` are the tree's (0 and 1 for plain decoding); `cost` is that of drafting for a round, as a
        share of the bytes of the target's weights.
        """
        engine = self.models.engine
        return {
            "drafter": self.drafter,
            "tree": self.tree,
            "nodes": 1 if engine.tree is None else engine.tree.nodes,
            "depth": 0 if engine.tree is None else engine.tree.depth,
            "rule": None if engine.tree is None else engine.rule.name,
            "mode": None if engine.tree is None else engine.mode,
            "cost": 1 / timing.memory_bound_speedup(self.models, 1.0) - 1,
        }


def split_trees(given: Sequence[str]) -> list[str]:
    """Returns the trees of a repeated flag, whose values may join several by commas, in order."""
    # A comma inside a static tree's paths joins no trees.
    between = r",\s*(?=none|served|chain|static|dynamic|best_first|lookup|[^,]+\.json\s*(?:,|$))"
    return [spec for item in given for spec in re.split(between, item)]


def make_arms(
    every: Sequence[Models],
    drafters: Sequence[str],
    trees: Sequence[str | None],
    *,
    profile: tuple[float, ...] | None = None,
) -> dict[str, DecodingArm]:
    """Returns `plain`, then an arm a drafter and tree, named by `tree_name` and by the part of the path that differs.

    `every` are the models with each of `drafters`, or one with none; `trees` are specs (None, or none at all: the tree
    of the models; `SERVED`: the chain that servers verify of each). `profile` draws accept lengths, see
    `timing.simulate`. Raises ValueError naming the drafter that a tree is not for, and the name that two trees share.
    """
    arms = {PLAIN: DecodingArm(every[0].plain())}
    labels = [f"{label} " for label in telling(drafters)] if len(drafters) > 1 else [""]
    for models, label, drafter in zip(every, labels, drafters or [None], strict=True):
        if models.engine.tree is None:
            continue
        for tree in [_tree_of(models, spec) for spec in trees or (None,)]:
            spec = str(getattr(tree, "spec", tree))
            name = label + tree_name(tree)
            if (known := arms.get(name)) is not None and known.models.engine.tree != tree:
                raise ValueError(f"two trees that differ are both called {name}: measure them one at a time")
            try:
                arms[name] = DecodingArm(timing.simulate(models.with_tree(tree), profile), drafter, spec)
            except ValueError as error:
                raise ValueError(f"{drafter}: {error}" if drafter else str(error)) from error
    return arms


def check_tree(spec: str) -> None:
    """Raises ValueError unless `spec` names a tree for `make_arms`."""
    if spec != SERVED:
        parse_tree(spec)


def first_tree(trees: Sequence[str]) -> str | None:
    """Returns the first spec that is a tree whatever the drafter, with which models are loaded; None without one."""
    return next((spec for spec in trees if spec != SERVED), None)


def served_tree(models: Models) -> TreePolicy:
    """Returns the chain that servers verify of the models' drafter; looked-up tokens are one already, of their tree."""
    tree, drafter = models.engine.tree, models.engine.drafter
    assert tree is not None and drafter is not None
    head = drafter.head if isinstance(drafter, PromptLookup) else drafter
    return tree if head is None else served_chain(head.deepest)


def _tree_of(models: Models, spec: str | None) -> TreePolicy:
    """Returns the tree of a spec of `make_arms`."""
    assert models.engine.tree is not None
    return models.engine.tree if spec is None else served_tree(models) if spec == SERVED else parse_tree(spec)


def tree_name(tree: TreePolicy) -> str:
    """Returns the spec of a tree, or of a long one its kind, nodes, depth and a hash: `static:60x5#3fa2c1`."""
    spec = str(getattr(tree, "spec", tree))
    if len(spec) <= LONGEST_NAME:
        return spec
    return f"{spec.partition(':')[0]}:{tree.nodes}x{tree.depth}#{hashlib.sha256(spec.encode()).hexdigest()[:6]}"


def telling(paths: Sequence[str]) -> list[str]:
    """Returns each path without the folders that all begin with, and those that all end with."""
    parts = [Path(path).parts for path in paths]
    front, back = _common_words(parts), _common_words([part[::-1] for part in parts])
    return ["/".join(part[front : len(part) - back]) or path for part, path in zip(parts, paths, strict=True)]


def _common_words(rows: Sequence[Sequence[str]]) -> int:
    """Returns the number of words that all rows begin with."""
    columns = zip(*rows, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
