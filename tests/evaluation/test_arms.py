"""Names of arms, and the chain that servers verify."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from jaxspec.drafters.prompt_lookup import PromptLookup
from jaxspec.evaluation.arms import LONGEST_NAME, SERVED, check_tree, first_tree, served_tree, split_trees, tree_name
from jaxspec.trees import chain, parse_tree

LONG = ",".join("0" * depth for depth in range(1, 40))


@pytest.mark.parametrize("spec", ["chain:3", "dynamic:60x6x10", "static:0,1,00,01,000,0000,00000"])
def test_a_short_spec_is_the_name(spec: str):
    assert tree_name(parse_tree(spec)) == spec


def test_a_long_spec_is_named_by_its_size_and_others_of_that_size_otherwise():
    first, second = (parse_tree(f"static:{LONG},{last}") for last in ("1", "01"))
    assert tree_name(first).startswith("static:41x39#") and len(tree_name(first)) <= LONGEST_NAME
    assert tree_name(first) == tree_name(parse_tree(f"static:{LONG},1")) != tree_name(second)


def models_of(drafter: Any, tree: str) -> Any:
    return cast(Any, SimpleNamespace(engine=SimpleNamespace(drafter=drafter, tree=parse_tree(tree))))


@pytest.mark.parametrize("deepest, tokens", [(None, 3), (5, 5), (2, 2)])
@pytest.mark.parametrize("beside_lookup", [False, True])
def test_servers_verify_what_a_pass_drafts_and_three_tokens_of_other_heads(
    deepest: int | None, tokens: int, beside_lookup: bool
):
    head = cast(Any, SimpleNamespace(deepest=deepest))
    drafter = PromptLookup(head) if beside_lookup else head
    assert served_tree(models_of(drafter, "dynamic:60x6x10")) == chain(tokens)


def test_looked_up_tokens_are_served_as_their_own_chain():
    assert served_tree(models_of(PromptLookup(), "lookup:7")) == parse_tree("lookup:7")


def test_the_served_chain_stands_among_trees():
    trees = split_trees(["served,dynamic:60x6x10", "chain:3"])
    assert trees == [SERVED, "dynamic:60x6x10", "chain:3"] and first_tree(trees) == "dynamic:60x6x10"
    assert first_tree([SERVED]) is None
    for spec in trees:
        check_tree(spec)
    with pytest.raises(ValueError, match="serve"):
        check_tree("serve")
