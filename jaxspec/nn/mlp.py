"""Gated MLPs and mixtures of experts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxspec.base import Array, Params
from jaxspec.nn.options import Options
from jaxspec.nn.quantization import rescale
from jaxspec.parallel.mesh import AXIS_RULES, constrain, splits

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


EXPERTS = ("expert_gate", "expert_up", "expert_down")
"""Weights of a layer that have an axis over its experts, in front."""


WIDE = ("batch", None, "mlp")
"""Logical axes of what is inside an MLP."""


def constrain_rows(x_BLD: Array) -> Array:
    """Activations, held to rows over `data` and `fsdp`: so XLA gathers weights and never activations."""
    return constrain(x_BLD, "batch", None, None)


def gated_mlp(layer: Params, x_BLD: Array, activation: str = "silu") -> Array:
    """`down(silu(gate(x)) * up(x))`, or with another of `ACTIVATIONS`."""

    def times(x: Array, name: str) -> Array:
        return rescale(layer, name, x @ layer[name].astype(x.dtype))

    inner_BLF = ACTIVATIONS[activation](constrain(times(x_BLD, "gate"), *WIDE)) * constrain(times(x_BLD, "up"), *WIDE)
    return constrain_rows(times(inner_BLF, "down"))


def expert_mlp(layer: Params, x_BLD: Array, options: Options) -> Array:
    """A mixture of gated MLPs: the sum of those that the router chooses for a token, by its softmax over all of them.

    Under a mesh each device takes its own rows through the experts that it holds, and what the
    devices along the experts' axis make is summed: XLA, left alone, would gather the rows of all of them to sort.
    """
    weights = {name: layer[name] for name in ("router", *EXPERTS)}
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return _mix_experts(weights, x_BLD, options)
    rows = P(None if x_BLD.shape[0] % splits("batch") else AXIS_RULES["batch"])
    over = AXIS_RULES["experts"]

    def part(weights: Params, x_BLD: Array) -> Array:
        first = jax.lax.axis_index(over) * weights[EXPERTS[0]].shape[0]
        return jax.lax.psum(_mix_experts(weights, x_BLD, options, first), over)

    lie = {"router": P(), **dict.fromkeys(EXPERTS, P(over))}
    return constrain_rows(jax.shard_map(part, in_specs=(lie, rows), out_specs=rows, check_vma=False)(weights, x_BLD))


def _mix_experts(layer: Params, x_BLD: Array, options: Options, first: Array | int = 0) -> Array:
    """What the experts from number `first` on add to the mixture, as many as `layer` has.

    Rows are sorted by expert and multiplied in groups, so a token costs as many MLPs as it is given.
    """
    (batch, length, width), held = x_BLD.shape, layer["expert_gate"].shape[0]
    x_ND = x_BLD.reshape(-1, width)
    scores_NE = jax.nn.softmax((x_ND @ layer["router"].astype(x_ND.dtype)).astype(jnp.float32), axis=-1)
    weight_NR, expert_NR = jax.lax.top_k(scores_NE, options.chosen)
    if options.renormalize:
        weight_NR = weight_NR / jnp.sum(weight_NR, axis=-1, keepdims=True)
    expert_NR = (expert_NR - first) % options.experts  # those that are here come first
    order = jnp.argsort(expert_NR.reshape(-1), stable=True)
    sizes_E = jnp.bincount(expert_NR.reshape(-1), length=options.experts)[:held].astype(jnp.int32)

    def times(rows: Array, name: str) -> Array:
        return jax.lax.ragged_dot(rows, layer[name].astype(rows.dtype), sizes_E)

    rows_MD = x_ND[order // options.chosen]
    inner_MF = ACTIVATIONS[options.activation](times(rows_MD, "expert_gate")) * times(rows_MD, "expert_up")
    made_MD = times(inner_MF, "expert_down")[jnp.argsort(order)]
    made_NRD = made_MD.reshape(-1, options.chosen, width)
    if held < options.experts:
        made_NRD = jnp.where(expert_NR[..., None] < held, made_NRD, 0)
    mixed_ND = jnp.einsum("NRD,NR->ND", made_NRD, weight_NR.astype(x_BLD.dtype))
    return mixed_ND.reshape(batch, length, width)
