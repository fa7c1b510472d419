"""Names of arms."""

import pytest

from jaxspec.evaluation.arms import LONGEST_NAME, tree_name
from jaxspec.trees import parse_tree

LONG = ",".join("0" * depth for depth in range(1, 40))


@pytest.mark.parametrize("spec", ["chain:3", "dynamic:60x6x10", "static:0,1,00,01,000,0000,00000"])
def test_a_short_spec_is_the_name(spec: str):
    assert tree_name(parse_tree(spec)) == spec


def test_a_long_spec_is_named_by_its_size_and_others_of_that_size_otherwise():
    first, second = (parse_tree(f"static:{LONG},{last}") for last in ("1", "01"))
    assert tree_name(first).startswith("static:41x39#") and len(tree_name(first)) <= LONGEST_NAME
    assert tree_name(first) == tree_name(parse_tree(f"static:{LONG},1")) != tree_name(second)
