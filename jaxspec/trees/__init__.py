"""Tree policies: frozen dataclasses that grow a `Tree` of fixed arrays inside the decode program."""

from __future__ import annotations

import dataclasses

from jaxspec.trees.adaptive import AdaptiveTree
from jaxspec.trees.best_first import BestFirstTree
from jaxspec.trees.dynamic import DynamicTree
from jaxspec.trees.lookup import LookupBranch
from jaxspec.trees.static import EAGLE1_PATHS, MEDUSA_PATHS, StaticTree, chain, parse_paths

__all__ = [
    "EAGLE1_PATHS",
    "MEDUSA_PATHS",
    "AdaptiveTree",
    "BestFirstTree",
    "DynamicTree",
    "StaticTree",
    "chain",
    "cut_tree",
    "parse_paths",
    "parse_tree",
]

NAMED = {"eagle1": EAGLE1_PATHS, "medusa": MEDUSA_PATHS}
"""Static trees by name."""
GROWN = {"dynamic": DynamicTree, "best_first": BestFirstTree}
"""Trees that three sizes describe."""


Policy = StaticTree | DynamicTree | BestFirstTree | AdaptiveTree


def parse_tree(text: str) -> Policy:
    """Returns the tree that a command line names.

    `none` (one node, plain decoding), `chain:4`, `static:eagle1`, `static:medusa`, `static:0,1,00,01`,
    `dynamic:60x6x10` (nodes x depth x beam; EAGLE-2's own setting), `best_first:60x4x10` (nodes x depth x
    width, for Medusa and ParallelSpec), `lookup:7` (a branch of so many looked-up tokens), `lookup:7+dynamic:16x4x4`
    (the best 16 nodes of both). Raises ValueError for anything else.
    """
    if "lookup" in text:
        return _with_lookup(text.strip())
    kind, _, rest = text.strip().partition(":")
    if kind == "none" and not rest:
        return chain(0)
    if kind == "chain" and rest.isdecimal():
        return chain(int(rest))
    if kind == "static" and rest:
        return StaticTree(parse_paths(NAMED.get(rest, rest)))
    if kind in GROWN:
        sizes = rest.split("x") if rest else []
        if len(sizes) in (0, 3) and all(w.isdecimal() for w in sizes):
            return GROWN[kind](*map(int, sizes))
    raise ValueError(
        f"tree {text!r} is not one of none, chain:DEPTH, static:eagle1, static:0,1,00, dynamic:NODESxDEPTHxBEAM, "
        "best_first:NODESxDEPTHxWIDTH, lookup:LENGTH, lookup:LENGTH+dynamic:NODESxDEPTHxBEAM"
    )


def _with_lookup(text: str) -> AdaptiveTree:
    """Returns a tree of one budget with a looked-up branch. Raises ValueError for what is none."""
    first, plus, rest = text.partition("+")
    kind, _, length = first.partition(":")
    base = parse_tree(rest) if plus else None
    if kind != "lookup" or not length.isdecimal() or not (base is None or isinstance(base, DynamicTree)):
        raise ValueError(f"tree {text!r} is neither lookup:LENGTH nor lookup:LENGTH+dynamic:NODESxDEPTHxBEAM")
    branch = LookupBranch(int(length))
    return AdaptiveTree(
        base, (1 + branch.length if base is None else base.nodes,), (1.0,), 0.0, 0.0, 1.0, lookup=branch
    )


def cut_tree(tree: Policy, depth: int) -> Policy:
    """Returns `tree` without the nodes below `depth`, for a drafter that cannot draft deeper."""
    if tree.depth <= depth:
        return tree
    if isinstance(tree, StaticTree):
        return StaticTree(tuple(path for path in tree.paths if len(path) <= depth))
    if isinstance(tree, AdaptiveTree):
        # Looked-up tokens may be as deep as they are: they are not the drafter's.
        if tree.base is None or tree.base.depth <= depth:
            return tree
        raise ValueError(f"the tree {tree.spec} is made for a drafter that drafts {tree.base.depth} tokens ahead")
    if depth < 1:
        return chain(0)
    if isinstance(tree, BestFirstTree):
        most = sum(tree.width**d for d in range(depth + 1))
        return BestFirstTree(min(tree.nodes, most), depth, tree.width)
    return DynamicTree(min(tree.nodes, 1 + dataclasses.replace(tree, nodes=1, depth=depth).pool), depth, tree.beam)
