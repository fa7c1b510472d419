"""EAGLE-3 heads as SafeAILab, SpecForge, AngelSlim and speculators publish them.

They differ in the name of the layer and in how the target's layers are counted. Ids inside `eagle_config` name layers
by their outputs (SpecForge and those who follow it), and ids beside it (speculators) by their inputs, as
`Eagle3Config.taps` does. A field `layer_id_convention` beside the ids, which jaxspec writes, overrides both.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from jaxspec.drafters.eagle3 import Eagle3Config, default_taps
from jaxspec.interchange.layout import (
    EMBEDDING,
    Folder,
    Shapes,
    Table,
    TensorEntry,
    head_shape,
    layer_table,
    matrix,
    vector,
)

IGNORED = (EMBEDDING, "d2t", "t2d")
IDS, CONVENTION = "eagle_aux_hidden_state_layer_ids", "layer_id_convention"
LayerIds = Literal["input", "output"]
NORMS = {"norm_before_fc": "input_norm", "fc_norm": "tap_norms", "norm_output": "normed_feature"}
"""Fields of config.json (speculators' option, and EAGLE-3.1's two) -> options of the drafter."""


def is_eagle3(shapes: Shapes) -> bool:
    """Returns whether tensors are an EAGLE-3 head's: the first layer norms the fused feature; there is no mask."""
    return fuses_taps(shapes) and "mask_hidden" not in shapes


def fuses_taps(shapes: Shapes) -> bool:
    """Returns whether the first layer is an EAGLE-3 or P-EAGLE head's."""
    return "midlayer.hidden_norm.weight" in shapes or "layers.0.hidden_norm.weight" in shapes


def eagle3_config(
    folder: Folder, target_layers: int | None = None, layer_ids: LayerIds | None = None, *, embeds: bool = False
) -> Eagle3Config:
    """Returns the shape of the head; raises ValueError as `head_fields`."""
    if folder.config.get("speculators_model_type") == "peagle":
        raise ValueError(f"{folder.path} is a P-EAGLE head by its config.json, and has no tensor mask_hidden")
    return Eagle3Config(**head_fields(folder, target_layers, layer_ids, embeds=embeds))


def head_fields(
    folder: Folder, target_layers: int | None, layer_ids: LayerIds | None, *, embeds: bool
) -> dict[str, Any]:
    """Returns the fields that the shapes of EAGLE-3 and P-EAGLE heads share.

    An embedding in the file is the head's own if the head is not as wide as its target, or if config.json says by
    `embed_requires_grad` (absent: `embeds`) that it was trained. Raises ValueError if tensors and fields disagree.
    """
    path, raw, shapes = folder.path, folder.config, folder.shapes
    fields = head_shape(folder)
    width, of = fields["width"], raw.get("target_hidden_size")
    of = width if of is None else of
    if type(of) is not int or of < 1:
        raise ValueError(f"{path / 'config.json'}: target_hidden_size={of!r} must be a whole number above 0, or null")
    rows, columns = shapes.get("fc.weight", (0, 0))
    if rows != width or columns % of or not columns or "lm_head.weight" not in shapes:
        raise ValueError(
            f"{path}: an EAGLE-3 head of width {width} for a target of width {of} needs lm_head.weight and an "
            f"fc.weight of {width} rows and a multiple of {of} columns, and fc.weight is {(rows, columns)}"
        )
    before = raw.get("norm_before_residual", "speculators_model_type" in raw)  # the defaults of the readers
    return {
        **fields,
        **{ours: bool(raw.get(theirs)) for theirs, ours in NORMS.items()},
        "vocab": shapes["lm_head.weight"][0],
        "taps": read_taps(folder, columns // of, target_layers, layer_ids),
        "norm_before_residual": bool(before),
        "target_width": None if of == width else of,
        "embed_vocab": _own_embedding(folder, of != width, embeds),
    }


def _own_embedding(folder: Folder, needed: bool, embeds: bool) -> int:
    """Returns the number of tokens of the head's own embedding; 0 if it reads the target's."""
    if EMBEDDING not in folder.tensors:
        if needed:
            raise ValueError(f"{folder.path} is not as wide as its target, and has no tensor {EMBEDDING} of its own")
        return 0
    if not (needed or folder.config.get("embed_requires_grad", embeds)):
        return 0
    tokens, vocab = folder.shapes[EMBEDDING][0], folder.config.get("vocab_size")
    if tokens != vocab:
        raise ValueError(f"{folder.path}: {EMBEDDING} has {tokens:,} rows, and vocab_size in config.json is {vocab!r}")
    return tokens


def read_taps(folder: Folder, count: int, target_layers: int | None, layer_ids: LayerIds | None) -> tuple[int, ...]:
    """Returns the layers of the target whose inputs the head reads.

    Raises ValueError if config.json names none and the target's depth is not known, if it names another number than
    `fc` reads, if `layer_ids` says how none are counted, or if the ids are the default ones of the other way.
    """
    raw, path = folder.config, folder.path / "config.json"
    inner = raw.get("eagle_config") if isinstance(raw.get("eagle_config"), dict) else {}
    ids = inner.get(IDS, raw.get(IDS))  # pyright: ignore[reportOptionalMemberAccess]
    if ids is None:
        if target_layers is None or count != 3:
            raise ValueError(
                f"{path} does not say which {count} layers of the target the head reads: name the target with "
                f"--target, for the default three, or add {IDS}"
            )
        if layer_ids is not None:
            raise ValueError(f"{path} names no layers to be counted: leave out --layer-ids, or add {IDS}")
        return default_taps(target_layers)
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids) or len(ids) != count:
        raise ValueError(f"{path}: {IDS}={ids!r} must be {count} layers' numbers, for fc.weight reads as many")
    told = layer_ids or inner.get(CONVENTION)  # pyright: ignore[reportOptionalMemberAccess]
    if told not in (None, "input", "output"):
        raise ValueError(f"{path}: {CONVENTION}={told!r} must be input or output")
    if told is None and IDS in inner and target_layers and tuple(ids) == default_taps(target_layers):  # pyright: ignore[reportOperatorIssue]
        raise ValueError(
            f"{path}: {IDS}={ids!r} are the default layers counted by their inputs, where this layout counts by "
            "outputs: say which with --layer-ids input or output"
        )
    convention = told or ("output" if IDS in inner else "input")  # pyright: ignore[reportOperatorIssue]
    return tuple(i + (convention == "output") for i in ids)


def eagle3_table(c: Eagle3Config, prefix: str = "midlayer.") -> Table:
    """Returns the tensors of a head, except `vocabulary_maps`; the names of the layer's begin with `prefix`."""
    shapes = c.shapes()
    before = {"input_norm.weight": vector("input_norm", shapes)} if c.input_norm else {}
    before |= {EMBEDDING: vector("embed", shapes)} if c.embed_vocab else {}
    for i in range(len(c.taps)) if c.tap_norms else ():
        before[f"fc_norm.{i}.weight"] = TensorEntry("taps_norm", lambda w_XD, i=i: w_XD[i], (c.feature_width,))
    return {
        **before,
        "fc.weight": matrix("fc", shapes),
        f"{prefix}input_layernorm.weight": vector("embedding_norm", shapes),
        f"{prefix}hidden_norm.weight": vector("feature_norm", shapes),
        **layer_table(prefix, c),
        "norm.weight": vector("norm", shapes),
        "lm_head.weight": vector("head", shapes),
    }


def prefix_of(shapes: Shapes) -> str:
    """Returns the prefix of the tensors of the first layer."""
    return "midlayer." if "midlayer.hidden_norm.weight" in shapes else "layers.0."


def read_vocabulary(folder: Folder, scored: int) -> tuple[int, ...] | None:
    """Returns the ids of the tokens that the LM head's rows score, in their order; None if they score all.

    Raises ValueError if the maps contradict each other or config.json.
    """
    vocab = folder.config.get("vocab_size")
    if not isinstance(vocab, int):
        raise ValueError(f"{folder.path / 'config.json'}: vocab_size={vocab!r} must be a whole number")
    if "d2t" not in folder.tensors:
        if scored != vocab:
            raise ValueError(
                f"{folder.path}: the LM head scores {scored:,} of {vocab:,} tokens, and no tensor d2t says which"
            )
        return None
    handle = folder.tensors["d2t"]
    if tuple(handle.get_shape()) != (scored,) or handle.get_dtype() not in ("I64", "I32"):
        raise ValueError(f"{folder.path}: d2t must be {scored:,} whole numbers, one a row of the LM head")
    offsets = handle[:].astype(np.int64)
    ids = offsets + np.arange(scored)
    mask = folder.tensors["t2d"][:].astype(bool) if "t2d" in folder.tensors else None
    if mask is not None and mask.shape != (vocab,):
        raise ValueError(f"{folder.path}: t2d is of shape {mask.shape}, and vocab_size is {vocab:,}")
    valid = len(set(ids.tolist())) == scored and ids.min() >= 0 and ids.max() < vocab
    if not valid or (mask is not None and not np.array_equal(np.flatnonzero(mask), np.sort(ids))):
        raise ValueError(
            f"{folder.path}: d2t as offsets (token = row + d2t[row]) does not name {scored:,} different tokens"
            f"{' that t2d names too' if mask is not None else ''}; the maps are damaged, or d2t holds the tokens "
            "themselves"
        )
    return None if np.array_equal(ids, np.arange(vocab)) else tuple(ids.tolist())


def vocabulary_maps(tokens: tuple[int, ...] | None, vocab: int) -> dict[str, np.ndarray]:
    """Returns `d2t`, offsets, and `t2d`, a mask; nothing if all tokens are scored."""
    if tokens is None:
        return {}
    ids, mask = np.asarray(tokens, np.int64), np.zeros(vocab, bool)
    mask[ids] = True
    return {"d2t": ids - np.arange(len(ids)), "t2d": mask}


def ascending(params: dict[str, Any], tokens: tuple[int, ...] | None) -> tuple[dict[str, Any], tuple[int, ...] | None]:
    """Returns the same head with its LM head's rows in the order of their tokens, as decoding needs them."""
    if tokens is None or list(tokens) == sorted(tokens):
        return params, tokens
    order = np.argsort(tokens)
    return {**params, "head": params["head"][order]}, tuple(sorted(tokens))
