"""Tree policies: frozen dataclasses that grow a `Tree` of fixed arrays inside the decode program."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxspec.trees.adaptive import AdaptiveTree
from jaxspec.trees.best_first import BestFirstTree
from jaxspec.trees.dynamic import DynamicTree
from jaxspec.trees.lookup import LookupBranch
from jaxspec.trees.static import EAGLE1_PATHS, MEDUSA_PATHS, StaticTree, chain, parse_paths
from jaxspec.trees.tree_file import is_tree_file, other_batches, read_tree, write_tree

__all__ = [
    "EAGLE1_PATHS",
    "MEDUSA_PATHS",
    "AdaptiveTree",
    "BestFirstTree",
    "DynamicTree",
    "StaticTree",
    "chain",
    "cut_tree",
    "is_tree_file",
    "kept_tree",
    "other_batches",
    "parse_paths",
    "parse_tree",
    "policy_fields",
    "read_policy",
    "read_tree",
    "resolve_tree",
    "served_chain",
    "tree_kept",
    "write_tree",
]

NAMED = {"eagle1": EAGLE1_PATHS, "medusa": MEDUSA_PATHS}
"""Static trees by name."""
GROWN = {"dynamic": DynamicTree, "best_first": BestFirstTree}
"""Trees that three sizes describe."""


SERVED_TOKENS = 3
"""Tokens that servers draft with a head whose every level is a pass, as the configs that come with such heads say."""


Policy = StaticTree | DynamicTree | BestFirstTree | AdaptiveTree


def served_chain(deepest: int | None) -> StaticTree:
    """Returns the chain that servers verify of a drafter: as many tokens as it drafts in a pass, or three.

    `deepest` is the drafter's: None where every level is a pass of its own.
    """
    return chain(SERVED_TOKENS if deepest is None else deepest)


def parse_tree(text: str) -> Policy:
    """Returns the tree that a command line names.

    `none` (one node, plain decoding), `chain:4`, `static:eagle1`, `static:medusa`, `static:0,1,00,01`,
    `dynamic:60x6x10` (nodes x depth x beam; EAGLE-2's own setting), `best_first:60x4x10` (nodes x depth x
    width, for Medusa and ParallelSpec), `lookup:7` (a branch of so many looked-up tokens), `lookup:7+dynamic:16x4x4`
    (the best 16 nodes of both), or a tree file, `FILE.json`. Raises ValueError for anything else.
    """
    if is_tree_file(text):
        return _from_file(text.strip())
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
        "best_first:NODESxDEPTHxWIDTH, lookup:LENGTH, lookup:LENGTH+dynamic:NODESxDEPTHxBEAM, FILE.json"
    )


def _with_lookup(text: str) -> AdaptiveTree:
    """Returns a tree of one budget with a looked-up branch. Raises ValueError for what is none."""
    first, plus, rest = text.partition("+")
    kind, _, length = first.partition(":")
    base = parse_tree(rest) if plus else None
    if kind != "lookup" or not length.isdecimal() or not (base is None or isinstance(base, DynamicTree)):
        raise ValueError(f"tree {text!r} is neither lookup:LENGTH nor lookup:LENGTH+dynamic:NODESxDEPTHxBEAM")
    branch = LookupBranch(int(length))
    nodes = 1 + branch.length if base is None else base.nodes
    # One budget: whatever it costs, it is taken.
    return AdaptiveTree(base, (nodes,), (1.0,), level_seconds=0.0, fixed_seconds=0.0, rate=1.0, lookup=branch)


def _from_file(path: str) -> Policy:
    """Returns the tree of a tree file. Raises ValueError naming the file and what is wrong with it."""
    found = read_tree(path)
    spec = found["spec"]
    if is_tree_file(spec):  # files that name each other would never end
        raise ValueError(f"{path}: its spec names another file, {spec!r}: write the tree itself there")
    try:
        return read_policy(found["policy"]) if "policy" in found else parse_tree(spec)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def policy_fields(tree: AdaptiveTree) -> dict[str, Any]:
    """Returns the fields `spec` and `policy` of an adaptive tree's file; JSON."""
    policy = dataclasses.asdict(tree) | {"base": None if tree.base is None else tree.base.spec}
    return {"spec": tree.spec, "policy": policy}


def read_policy(fields: Any) -> AdaptiveTree:
    """Returns an adaptive tree from the `policy` of its file. Raises ValueError for what is none."""
    try:
        base, lookup = fields["base"], fields["lookup"]
        given = {name: _tuples(value) for name, value in fields.items()} | {
            "base": None if base is None else parse_tree(base),
            "lookup": None if lookup is None else LookupBranch(**{n: _tuples(v) for n, v in lookup.items()}),
        }
        return AdaptiveTree(**given)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"its policy is none of this version ({error}); make it anew") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def kept_tree(tree: Policy) -> str | dict[str, Any]:
    """Returns what a record keeps of a tree, JSON: its text, of an adaptive one that is more than a text its fields."""
    try:
        if parse_tree(tree.spec) == tree:
            return tree.spec
    except ValueError:  # the text of an adaptive tree is for people
        pass
    if not isinstance(tree, AdaptiveTree):
        raise ValueError(f"tree {tree.spec} has fields that its text does not hold, and is not kept")
    return policy_fields(tree)


def tree_kept(kept: str | dict[str, Any]) -> Policy:
    """Returns the tree of what `kept_tree` returned. Raises ValueError for what is none."""
    if isinstance(kept, str):
        return parse_tree(kept)
    if not isinstance(kept, dict) or "policy" not in kept:
        raise ValueError(f"a kept tree is a text or has a policy, and this is {kept!r}")
    return read_policy(kept["policy"])


def resolve_tree(text: str) -> str:
    """Returns the text of a tree, that of a tree file in the file's place: what a record keeps when the file is gone.

    An adaptive tree is more than a text, so its file stays named. Raises ValueError for a text that `parse_tree`
    refuses.
    """
    tree = parse_tree(text)
    return tree.spec if is_tree_file(text) and not tree.spec.startswith("adaptive") else text


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
