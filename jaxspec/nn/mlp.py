"""Gated MLPs, and mixtures of experts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxspec.base import Array, Params
from jaxspec.nn.matmul import multiply
from jaxspec.nn.options import Options
from jaxspec.parallel.mesh import AXIS_RULES, constrain, splits

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""The activations by the names that `config.json` gives them."""

EXPERTS = ("expert_gate", "expert_up", "expert_down")
"""Weights of a layer whose leading axis is its experts."""

WIDE = ("batch", None, "mlp")
"""Logical axes of an MLP's inner activations."""


def constrain_rows(x_BLD: Array) -> Array:
    """Returns the activations, constrained to rows over `data` and `fsdp`."""
    # Without the constraint XLA may gather activations where it should gather weights.
    return constrain(x_BLD, "batch", None, None)


def gated_mlp(layer: Params, x_BLD: Array, activation: str = "silu") -> Array:
    """Returns `down(silu(gate(x)) * up(x))`, `[B, L, D]`, or the same with another of `ACTIVATIONS`."""
    # Gate and up are two weights: fused as [D, 2, F], XLA:TPU would lay them out anew on every call, and XLA:CPU could
    # not run the two matmuls at once on two cores.
    gate_BLF = ACTIVATIONS[activation](constrain(multiply(layer, "gate", x_BLD), *WIDE))
    inner_BLF = gate_BLF * constrain(multiply(layer, "up", x_BLD), *WIDE)
    return constrain_rows(multiply(layer, "down", inner_BLF))


def expert_mlp(layer: Params, x_BLD: Array, options: Options) -> Array:
    """Returns a mixture of gated MLPs `[B, L, D]`: those that the router chooses for a token, weighted by its softmax.

    Under a mesh each device takes its own rows through the experts that it holds, and one sum over the experts' axis
    follows, as for a dense MLP.
    """
    weights = {name: layer[name] for name in ("router", *EXPERTS)}
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return _mix_experts(weights, x_BLD, options)
    rows = P(None if x_BLD.shape[0] % splits("batch") else AXIS_RULES["batch"])
    over = AXIS_RULES["experts"]
    specs = {"router": P(), **dict.fromkeys(EXPERTS, P(over))}
    # XLA's own partition would gather the rows of all devices, to sort them by expert.
    part = functools.partial(_mix_part, options, over)
    return constrain_rows(jax.shard_map(part, in_specs=(specs, rows), out_specs=rows, check_vma=False)(weights, x_BLD))


def _mix_part(options: Options, over: str, weights: Params, x_BLD: Array) -> Array:
    """Returns the mixture of one device's rows, summed over the mesh axis `over` that its experts are spread on."""
    first = jax.lax.axis_index(over) * weights[EXPERTS[0]].shape[0]
    return jax.lax.psum(_mix_experts(weights, x_BLD, options, first), over)


def _mix_experts(layer: Params, x_BLD: Array, options: Options, first: Array | int = 0) -> Array:
    """Returns the part of the mixture that comes from the experts of `layer`, the first of which is number `first`.

    Rows are sorted by expert and multiplied in groups, so a token costs as many MLPs as it has experts.
    """
    (batch, length, width), held = x_BLD.shape, layer["expert_gate"].shape[0]
    x_ND = x_BLD.reshape(-1, width)
    scores_NE = jax.nn.softmax((x_ND @ layer["router"].astype(x_ND.dtype)).astype(jnp.float32), axis=-1)
    weight_NR, expert_NR = jax.lax.top_k(scores_NE, options.chosen)
    if options.renormalize:
        weight_NR = weight_NR / jnp.sum(weight_NR, axis=-1, keepdims=True)
    expert_NR = (expert_NR - first) % options.experts  # the experts of this device come first
    # Sorted, the rows of one expert are contiguous, as `ragged_dot` takes them.
    order = jnp.argsort(expert_NR.reshape(-1), stable=True)
    sizes_E = jnp.bincount(expert_NR.reshape(-1), length=options.experts)[:held].astype(jnp.int32)
    rows_MD = x_ND[order // options.chosen]
    gate_MF = ACTIVATIONS[options.activation](_multiply_groups(layer, "expert_gate", rows_MD, sizes_E))
    inner_MF = gate_MF * _multiply_groups(layer, "expert_up", rows_MD, sizes_E)
    made_MD = _multiply_groups(layer, "expert_down", inner_MF, sizes_E)[jnp.argsort(order)]
    made_NRD = made_MD.reshape(-1, options.chosen, width)
    if held < options.experts:
        # Rows of other devices' experts lie behind all groups, where `ragged_dot` defines no result.
        made_NRD = jnp.where(expert_NR[..., None] < held, made_NRD, 0)
    mixed_ND = jnp.einsum("NRD,NR->ND", made_NRD, weight_NR.astype(x_BLD.dtype))
    return mixed_ND.reshape(batch, length, width)


def _multiply_groups(layer: Params, name: str, rows: Array, sizes_E: Array) -> Array:
    """Returns each group of rows times its own expert's matrix."""
    return jax.lax.ragged_dot(rows, layer[name].astype(rows.dtype), sizes_E)
