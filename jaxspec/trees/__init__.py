"""Tree policies: frozen dataclasses that grow a `Tree` of fixed arrays inside the decode program."""

from __future__ import annotations

import dataclasses

from jaxspec.trees.dynamic import DynamicTree
from jaxspec.trees.static import EAGLE1_PATHS, StaticTree, chain, parse_paths

__all__ = ["EAGLE1_PATHS", "DynamicTree", "StaticTree", "chain", "cut_tree", "parse_paths", "parse_tree"]


def parse_tree(text: str) -> StaticTree | DynamicTree:
    """The tree a command line names.

    `none` (one node, plain decoding), `chain:4`, `static:eagle1`, `static:0,1,00,01`, `dynamic:60x6x10`
    (nodes x depth x beam; EAGLE-2's setting is `dynamic:60x6x10`). Raises ValueError for anything else.
    """
    kind, _, rest = text.strip().partition(":")
    if kind == "none" and not rest:
        return chain(0)
    if kind == "chain" and rest.isdecimal():
        return chain(int(rest))
    if kind == "static" and rest:
        return StaticTree(parse_paths(EAGLE1_PATHS if rest == "eagle1" else rest))
    if kind == "dynamic":
        sizes = (rest or "60x6x10").split("x")
        if len(sizes) == 3 and all(w.isdecimal() for w in sizes):
            return DynamicTree(*map(int, sizes))
    raise ValueError(
        f"tree {text!r} is not one of none, chain:DEPTH, static:eagle1, static:0,1,00, dynamic:NODESxDEPTHxBEAM"
    )


def cut_tree(tree: StaticTree | DynamicTree, depth: int) -> StaticTree | DynamicTree:
    """`tree` without what lies below `depth`, for a drafter that cannot draft deeper; itself where nothing does."""
    if tree.depth <= depth:
        return tree
    if isinstance(tree, StaticTree):
        return StaticTree(tuple(path for path in tree.paths if len(path) <= depth))
    if depth < 1:
        return chain(0)
    return DynamicTree(min(tree.nodes, 1 + dataclasses.replace(tree, nodes=1, depth=depth).pool), depth, tree.beam)
