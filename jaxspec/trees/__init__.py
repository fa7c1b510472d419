"""Tree policies: frozen dataclasses that grow a `Tree` of fixed arrays inside the decode program."""

from __future__ import annotations

import dataclasses

from jaxspec.trees.best_first import BestFirstTree
from jaxspec.trees.dynamic import DynamicTree
from jaxspec.trees.static import EAGLE1_PATHS, MEDUSA_PATHS, StaticTree, chain, parse_paths
from jaxspec.trees.tree_file import is_tree_file, read_tree, write_tree

__all__ = [
    "EAGLE1_PATHS",
    "MEDUSA_PATHS",
    "BestFirstTree",
    "DynamicTree",
    "StaticTree",
    "chain",
    "cut_tree",
    "is_tree_file",
    "parse_paths",
    "parse_tree",
    "read_tree",
    "resolve_tree",
    "write_tree",
]

NAMED = {"eagle1": EAGLE1_PATHS, "medusa": MEDUSA_PATHS}
"""Static trees by name."""
GROWN = {"dynamic": DynamicTree, "best_first": BestFirstTree}
"""Trees that three sizes describe."""


def parse_tree(text: str) -> StaticTree | DynamicTree | BestFirstTree:
    """Returns the tree that a command line names.

    `none` (one node, plain decoding), `chain:4`, `static:eagle1`, `static:medusa`, `static:0,1,00,01`,
    `dynamic:60x6x10` (nodes x depth x beam; EAGLE-2's own setting), `best_first:60x4x10` (nodes x depth x
    width, for Medusa and ParallelSpec), or a tree file, `FILE.json`. Raises ValueError for anything else.
    """
    if is_tree_file(text):
        return _from_file(text.strip())
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
        "best_first:NODESxDEPTHxWIDTH, FILE.json"
    )


def _from_file(path: str) -> StaticTree | DynamicTree | BestFirstTree:
    """Returns the tree of a tree file. Raises ValueError naming the file and what is wrong with it."""
    spec = read_tree(path)["spec"]
    if is_tree_file(spec):  # files that name each other would never end
        raise ValueError(f"{path}: its spec names another file, {spec!r}: write the tree itself there")
    try:
        return parse_tree(spec)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def resolve_tree(text: str) -> str:
    """Returns the text of a tree, that of a tree file in the file's place: what a record keeps when the file is gone.

    Raises ValueError for a text that `parse_tree` refuses.
    """
    tree = parse_tree(text)
    return tree.spec if is_tree_file(text) else text


def cut_tree(tree: StaticTree | DynamicTree | BestFirstTree, depth: int) -> StaticTree | DynamicTree | BestFirstTree:
    """Returns `tree` without the nodes below `depth`, for a drafter that cannot draft deeper."""
    if tree.depth <= depth:
        return tree
    if isinstance(tree, StaticTree):
        return StaticTree(tuple(path for path in tree.paths if len(path) <= depth))
    if depth < 1:
        return chain(0)
    if isinstance(tree, BestFirstTree):
        most = sum(tree.width**d for d in range(depth + 1))
        return BestFirstTree(min(tree.nodes, most), depth, tree.width)
    return DynamicTree(min(tree.nodes, 1 + dataclasses.replace(tree, nodes=1, depth=depth).pool), depth, tree.beam)
