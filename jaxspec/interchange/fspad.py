"""FSPAD heads as their authors publish them, and the layouts of their two ablations."""

from __future__ import annotations

from jaxspec.drafters.fspad import FspadConfig
from jaxspec.interchange.layout import EMBEDDING, Folder, Shapes, Table, head_shape, layer_table, matrix, vector


def is_fspad(shapes: Shapes) -> bool:
    """Returns whether `fc` is a module (feature sampling), or the layer is twice as wide (partial alignment)."""
    rows = shapes.get("fc.weight", (0,))[0]
    doubled = rows > 0 and shapes.get("layers.0.mlp.down_proj.weight", (0,))[0] == 2 * rows
    return "fc.fc.weight" in shapes or doubled


def fspad_config(folder: Folder, *, embeds: bool = False) -> FspadConfig:
    """Returns the shape of the head; the tensors tell of its parts and the bias.

    `embeds` says whether the embedding in the file is the head's own.
    """
    fields, shapes = head_shape(folder), folder.shapes
    sampling = "fc.fc.weight" in shapes
    return FspadConfig(
        **fields,
        bias=("fc.fc.bias" if sampling else "fc.bias") in shapes,
        embed_vocab=shapes[EMBEDDING][0] if embeds else 0,
        feature_sampling=sampling,
        partial_alignment=shapes.get("layers.0.mlp.down_proj.weight", (0,))[0] == 2 * fields["width"],
    )


def fspad_table(c: FspadConfig) -> Table:
    """Returns the tensors of a head."""
    shapes = c.shapes()
    fc = "fc.fc" if c.feature_sampling else "fc"
    table = {f"{fc}.weight": matrix("fc", shapes)}
    if c.bias:
        table[f"{fc}.bias"] = vector("fc_bias", shapes)
    table |= {EMBEDDING: vector("embed", shapes)} if c.embed_vocab else {}
    if c.feature_sampling:
        table["fc.post_attention_layernorm.weight"] = vector("sampling_norm", shapes)
        table |= {f"fc.mlp.{n}_proj.weight": matrix(f"sampling_{n}", shapes) for n in ("gate", "up", "down")}
    return table | layer_table("layers.0.", c)
