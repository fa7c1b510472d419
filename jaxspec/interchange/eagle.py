"""EAGLE-1, EAGLE-2 and HASS heads as their authors publish them, in one layout, since they share the network."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxspec.drafters.eagle import EagleConfig
from jaxspec.interchange.layout import EMBEDDING, Folder, Shapes, Table, head_shape, layer_table, matrix, vector

NORMS = {"embed_layernorm.weight": "embedding_norm", "lm_head_layernorm.weight": "head_norm"}
"""Tensors of some HASS heads, by the names in speculators' converter -> the options of the drafter."""


def is_eagle(shapes: Shapes) -> bool:
    """Returns whether tensors are an EAGLE-1/2 head's: `fc` reads pairs, and the layer keeps the width."""
    rows, columns = shapes.get("fc.weight", (0, 0))
    down = shapes.get("layers.0.mlp.down_proj.weight", (0, 0))
    return columns == 2 * rows > 0 and down[0] == rows and "layers.0.hidden_norm.weight" not in shapes


def eagle_config(folder: Folder, *, embeds: bool = False) -> EagleConfig:
    """Returns the shape of the head; the tensors tell of bias and norms, since config.json is often wrong.

    `embeds` says whether the embedding in the file is the head's own.
    """
    fields: dict[str, Any] = {weight: name in folder.tensors for name, weight in NORMS.items()}
    fields["bias"] = "fc.bias" in folder.tensors and not adds_bias(folder)
    fields["embed_vocab"] = folder.shapes[EMBEDDING][0] if embeds else 0
    return EagleConfig(**head_shape(folder), **fields)


def adds_bias(folder: Folder) -> bool:
    """Returns whether jaxspec's own writer added a bias of zeros, for a server that needs one."""
    stamp = folder.config.get("jaxspec")
    added = isinstance(stamp, dict) and stamp.get("fc_bias") is False and "fc.bias" in folder.tensors
    return added and not np.any(folder.tensors["fc.bias"][:])


def eagle_table(c: EagleConfig) -> Table:
    """Returns the tensors of a head."""
    shapes = c.shapes()
    table = {"fc.weight": matrix("fc", shapes)}
    if c.bias:
        table["fc.bias"] = vector("fc_bias", shapes)
    table |= {EMBEDDING: vector("embed", shapes)} if c.embed_vocab else {}
    table |= {name: vector(weight, shapes) for name, weight in NORMS.items() if weight in shapes}
    return table | layer_table("layers.0.", c)
