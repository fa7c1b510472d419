"""A loss is named by a spec such as `top_k:10`; a spec that names none is refused with the choices."""

import pytest

from jaxspec.losses import LOGIT_LOSSES, logit_loss
from jaxspec.losses.spec import read_spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nll", r"'nll' is unknown: choose from soft_cross_entropy, .*, jsd\[:beta\], top_k\[:K\]"),
        ("kl:2", "'kl:2' has a number to spare: write kl"),
        ("jsd:1", "'jsd:1' does not fit: in jsd.*, beta is a number between 0 and 1"),
        ("jsd:", "'jsd:' does not fit"),
        ("top_k:2.5", "'top_k:2.5' does not fit: .* whole number"),
        ("top_k:0", "'top_k:0' does not fit"),
        ("lk:inf", "'lk:inf' does not fit"),
    ],
)
def test_a_spec_that_names_no_loss_is_told_what_there_is(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        logit_loss(spec)


def test_a_bare_name_has_the_papers_number():
    knobs = {name: entry.parameter for name, entry in LOGIT_LOSSES.items()}
    for name, number in (("jsd", 0.5), ("top_k", 10), ("lk", 3.0), ("tvdpp_sampled", 4)):
        assert read_spec("loss", name, knobs) == read_spec("loss", f"{name}:{number}", knobs) == (name, (number,))


def test_a_spec_is_one_object_so_that_programs_are_reused():
    assert logit_loss("jsd:0.3") is logit_loss("jsd:0.3") and logit_loss("jsd:0.3").name == "jsd:0.3"
