"""Declarations of weights: a name means one thing, and everything that a drafter has is declared."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drafter_toys import KINDS

from jaxspec.drafters import DRAFTERS
from jaxspec.nn.layer_weights import LAYER, layer_weights
from jaxspec.nn.weights import NORM, Weight, declare, declared, init_weights, normal, ones, uniform, zeros
from jaxspec.parallel.mesh import leaf_name


def test_a_name_is_declared_the_same_by_all_who_use_it():
    again = declare({"fc": dataclasses.replace(declared("fc"), init=zeros)})  # initial values are each module's own
    assert again["fc"].init is zeros
    for other in (Weight(axes=("mlp",)), Weight(axes=declared("fc").axes), NORM):
        with pytest.raises(ValueError, match=r"weight 'fc' is declared .* and elsewhere .*: give it another name"):
            declare({"fc": other})
    with pytest.raises(ValueError, match="convention 'fc' is declared twice"):
        declare({}, {"fc": "reads nothing"})
    with pytest.raises(ValueError, match="has a logical axis 'breadth', and the axis rules know batch"):
        declare({"broad": Weight(axes=("breadth",))})


def test_a_weight_that_is_not_declared_is_named():
    with pytest.raises(ValueError, match="weight 'fd' is not declared; declared are attention_norm"):
        init_weights(LAYER, {"fd": (3, 4)}, jax.random.key(0))
    assert declared("fd") == Weight()


@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_of_a_drafter_are_declared_and_of_their_axes(kind: str):
    shapes = jax.eval_shape(KINDS[kind].init_params, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name, weight = leaf_name(path), declared(leaf_name(path))
        assert name in {**KINDS[kind].declarations, **LAYER, "embed": 0, "head": 0, "norm": 0}, name
        assert len(weight.axes) <= leaf.ndim
        assert weight.decays == (not name.endswith(("norm", "bias"))), name
        assert weight.matrix is None or min(weight.matrix) >= -leaf.ndim


def test_initial_values_are_what_they_are_called():
    key, shape = jax.random.key(0), (400, 30)
    assert jnp.all(zeros(key, shape) == 0) and jnp.all(ones(key, shape) == 1)
    assert float(jnp.std(normal(0.5)(key, shape))) == pytest.approx(0.5, rel=0.05)
    drawn = uniform()(key, shape)
    assert float(jnp.abs(drawn).max()) == pytest.approx(400**-0.5, rel=0.01)
    assert normal()(key, shape, jnp.bfloat16).dtype == jnp.bfloat16
    deep, alone = (layer_weights(layers)["down"].init(key, shape) for layers in (8, 1))
    np.testing.assert_allclose(deep * 8**0.5, alone, rtol=1e-5)
    assert jnp.all(layer_weights(1, centred=True)["q_norm"].init(key, (4,)) == 0)


@pytest.mark.parametrize("name", DRAFTERS)
def test_options_are_fields_of_the_drafters_config_and_none_by_default(name: str):
    options, config = DRAFTERS[name].options, DRAFTERS[name].config
    assert {f.name for f in dataclasses.fields(options)} <= {f.name for f in dataclasses.fields(config)}
    assert not options().given
