"""Medusa-1 heads in the layout of the paper's code and in vLLM's."""

from __future__ import annotations

import re

from jaxspec.drafters.medusa import MedusaConfig
from jaxspec.interchange.layout import Folder, Shapes, Table, TensorEntry

_AUTHORS = re.compile(r"(medusa_heads?\.)?(\d+)\.(\d+)\.linear\.weight")
_VLLM = re.compile(r"(medusa_heads?\.)?blocks\.(\d+)\.layers\.(\d+)\.weight")


def is_medusa(shapes: Shapes) -> bool:
    """Returns whether there are numbered residual blocks."""
    return any(_AUTHORS.fullmatch(name) or _VLLM.fullmatch(name) for name in shapes)


def read_medusa(folder: Folder) -> tuple[MedusaConfig, list[Table]]:
    """Returns the heads' shape, and one table for each copy of their block; the copies must hold the same weights.

    Raises ValueError where the numbers of heads and blocks leave gaps.
    """
    shapes = folder.shapes
    found = [(match, style) for style in (_AUTHORS, _VLLM) for name in shapes if (match := style.fullmatch(name))]
    if len({(match[1], style) for match, style in found}) > 1:
        raise ValueError(f"{folder.path} names Medusa's blocks in two ways at once: keep one of them")
    prefix, vllm = found[0][0][1] or "", found[0][1] is _VLLM
    heads = len({match[2] for match, _ in found})
    layers = len({match[3] for match, _ in found})
    if {(int(m[2]), int(m[3])) for m, _ in found} != {(i, j) for i in range(heads) for j in range(layers)}:
        raise ValueError(f"{folder.path}: Medusa's blocks are not numbered from 0 without gaps")
    width = shapes[found[0][0][0]][0]
    vocab = shapes.get(f"{prefix}lm_heads.0.weight" if vllm else f"{prefix}0.{layers}.weight", (0,))[0]
    config = MedusaConfig(width, heads, layers, vocab)
    return config, [medusa_table(config, j, vllm=vllm, prefix=prefix) for j in range(layers)]


def medusa_table(c: MedusaConfig, block: int = 0, *, vllm: bool = False, prefix: str = "") -> Table:
    """Returns the tensors of Medusa heads, with the copy number `block` of each head's residual block."""
    table: Table = {}
    for i in range(c.tokens):
        stem = f"{prefix}blocks.{i}.layers.{block}" if vllm else f"{prefix}{i}.{block}.linear"
        table[f"{stem}.weight"] = TensorEntry("block", lambda w, i=i: w[i].transpose(1, 0), (c.width, c.width))
        table[f"{stem}.bias"] = TensorEntry("block_bias", lambda w, i=i: w[i], (c.width,))
        if c.vocab:
            name = f"{prefix}lm_heads.{i}.weight" if vllm else f"{prefix}{i}.{c.layers}.weight"
            table[name] = TensorEntry("heads", lambda w, i=i: w[i], (c.vocab, c.width))
    return table
