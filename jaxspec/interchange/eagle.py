"""EAGLE-1, EAGLE-2 and HASS heads as their authors publish them: one layout, for they share the network."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxspec.drafters.eagle import EagleConfig
from jaxspec.interchange.layout import Folder, Shapes, Table, head_shape, layer_table, matrix, vector

IGNORED = ("embed_tokens.weight",)
"""A copy of the target's embedding, which our drafters borrow from the target."""
NORMS = {"embed_layernorm.weight": "embedding_norm", "lm_head_layernorm.weight": "head_norm"}
"""Of some HASS heads (speculators' converter knows them by these names)."""


def is_eagle(shapes: Shapes) -> bool:
    """Whether tensors of these shapes are an EAGLE-1/2 head's: an `fc` of pairs, and a layer that keeps the width."""
    rows, columns = shapes.get("fc.weight", (0, 0))
    down = shapes.get("layers.0.mlp.down_proj.weight", (0, 0))
    return columns == 2 * rows > 0 and down[0] == rows and "layers.0.hidden_norm.weight" not in shapes


def eagle_config(folder: Folder) -> EagleConfig:
    """The shape of the head: `fc`'s bias and the norms by the tensors that are there, for config.json often errs."""
    fields: dict[str, Any] = {weight: name in folder.tensors for name, weight in NORMS.items()}
    fields["bias"] = "fc.bias" in folder.tensors and not adds_bias(folder)
    return EagleConfig(**head_shape(folder), **fields)


def adds_bias(folder: Folder) -> bool:
    """Whether our own writer added the bias, of zeros, for a server that wants one."""
    stamp = folder.config.get("jaxspec")
    added = isinstance(stamp, dict) and stamp.get("fc_bias") is False and "fc.bias" in folder.tensors
    return added and not np.any(folder.tensors["fc.bias"][:])


def eagle_table(c: EagleConfig) -> Table:
    """Its tensors."""
    shapes = c.shapes()
    table = {"fc.weight": matrix("fc", shapes)}
    if c.bias:
        table["fc.bias"] = vector("fc_bias", shapes)
    table |= {name: vector(weight, shapes) for name, weight in NORMS.items() if weight in shapes}
    return table | layer_table("layers.0.", c)
