"""Traits: the departures of families from Llama, read from a `config.json` into `Options` and written to one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxspec.targets.decoder import LlamaConfig
from jaxspec.targets.fields import Fields


class Trait(NamedTuple):
    """A departure from Llama as some fields of a `config.json` describe it, in both directions."""

    read: Callable[[Fields], dict[str, Any]]
    """Returns arguments of `Options`; raises ValueError for a value that is not supported."""
    write: Callable[[LlamaConfig], dict[str, Any]]
    """Returns the fields that `read` reads as the config's options."""


def always(**options: Any) -> Trait:
    """Returns the trait of options that all of a family have, without a field."""
    return Trait(lambda _: options, lambda _: {})


def named(field: str, option: str, read: Callable[[Fields, str], Any]) -> Trait:
    """Returns the trait of an option that a field holds as it is."""
    return Trait(lambda fields: {option: read(fields, field)}, lambda c: {field: getattr(c.options, option)})


def _plain(fields: Fields) -> dict[str, Any]:
    """Raises ValueError for biases, and for another activation than SiLU."""
    for name in ("attention_bias", "mlp_bias"):
        if fields.flag(name):
            raise ValueError(
                f"{fields.path}: {name}={fields.find(name)!r} is not supported; only projections without bias are"
            )
    if fields.activation() != "silu":
        raise ValueError(f"{fields.path}: hidden_act={fields.find('hidden_act')!r} is not supported; only 'silu' is")
    return {}


PLAIN_LLAMA = Trait(_plain, lambda _: {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
"""No departure; fields that describe one are refused."""
ACTIVATION = named("hidden_act", "activation", Fields.activation)
"""Activation of the MLP."""


def _read_bias(fields: Fields) -> dict[str, Any]:
    """Reads one flag for all projections of attention."""
    bias = fields.flag("attention_bias")
    return {"qkv_bias": bias, "out_bias": bias}


BIAS = Trait(_read_bias, lambda c: {"attention_bias": c.options.qkv_bias})
"""Biases of all four projections of attention, or of none."""


def the_window(config: LlamaConfig) -> int | None:
    """Returns the window of the layers that have one; None where none has."""
    return next((window for window in config.options.windows if window is not None), None)


def layer_types(config: LlamaConfig) -> list[str]:
    """Returns transformers' name of each layer's kind: with a window, or without."""
    windows = config.options.windows or (None,) * config.layers
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


def _everywhere(fields: Fields) -> dict[str, Any]:
    """Reads a window for all layers."""
    window = fields.optional_integer("sliding_window")
    return {"windows": () if window is None else (window,) * fields.integer("num_hidden_layers")}


def _everywhere_if_asked(fields: Fields) -> dict[str, Any]:
    """Reads a window for all layers that `use_sliding_window` switches on."""
    return _everywhere(fields) if fields.flag("use_sliding_window") else {}


def _above(fields: Fields) -> dict[str, Any]:
    """Reads a window for the upper layers."""
    if not fields.flag("use_sliding_window"):
        return {}
    first = fields.find("max_window_layers")
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ValueError(f"{fields.path}: max_window_layers={first!r} must be a whole number of layers")
    local = [i >= first for i in range(fields.integer("num_hidden_layers"))]
    return {"windows": fields.windows(fields.optional_integer("sliding_window"), local)}


def _write_above(config: LlamaConfig) -> dict[str, Any]:
    """Writes the layers with a window, in the newer field and the older one."""
    kinds = layer_types(config)
    local = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    return {
        **WINDOW_IF_ASKED.write(config),
        "max_window_layers": local[0] if local else len(kinds),
        "layer_types": kinds,
    }


WINDOW = Trait(_everywhere, lambda c: {"sliding_window": the_window(c)})
"""A window in every layer, where it is set."""
WINDOW_IF_ASKED = Trait(
    _everywhere_if_asked, lambda c: {"use_sliding_window": bool(c.options.windows), "sliding_window": the_window(c)}
)
"""A window in every layer, with `use_sliding_window`."""
WINDOW_ABOVE = Trait(_above, _write_above)
"""Qwen's window: with `use_sliding_window`, in the layers from `max_window_layers` on or those of `layer_types`."""


def _rotated(fields: Fields) -> dict[str, Any]:
    """Reads the number of rotated channels of a head."""
    channels = fields.layer_shape()["head_dim"]
    rotary = int(channels * fields.rope().part)
    return {"rotary": None if rotary == channels else rotary}


def _write_rotated(config: LlamaConfig) -> dict[str, Any]:
    """Writes the share of rotated channels, from which all readers get the same number."""
    channels, rotary = config.head_dim, config.options.rotary or config.head_dim
    part = rotary / channels
    while int(channels * part) < rotary:  # readers round down
        part = math.nextafter(part, math.inf)
    return {"partial_rotary_factor": part}


ROTATED_PART = Trait(_rotated, _write_rotated)
"""Rotation of a part of each head's channels."""


def score_scale(field: str) -> Trait:
    """Returns the trait of attention scores that are divided by the root of a field."""
    return Trait(
        lambda fields: {"score_scale": fields.number(field) ** -0.5}, functools.partial(_write_score_scale, field)
    )


def _write_score_scale(field: str, config: LlamaConfig) -> dict[str, Any]:
    """Writes a whole number where that gives the same scale."""
    value = config.options.score_scale or config.head_dim**-0.5
    whole = round(value**-2)
    return {field: whole if whole**-0.5 == value else value**-2}
