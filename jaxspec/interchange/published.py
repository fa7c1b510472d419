"""Drafters in the layouts of papers and servers, recognised by the names and shapes of their tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.base import Params
from jaxspec.checkpoints.manifest import verify_layout
from jaxspec.interchange import eagle, eagle3, fspad, medusa, peagle
from jaxspec.interchange.copies import ReadTables, check_head, find_embedding
from jaxspec.interchange.eagle3 import LayerIds
from jaxspec.interchange.layout import (
    EMBEDDING,
    HEAD,
    Folder,
    Shapes,
    Table,
    open_weights,
    read_weights,
    refuse_unknown,
)
from jaxspec.interchange.tensors import read_json


class Published(NamedTuple):
    """A drafter read from a folder of another project."""

    name: str
    """Its name in the `DRAFTERS` table."""
    config: Any
    """Its shape."""
    params: Params
    """Its weights as numpy arrays, in the dtype of the files."""
    draft_vocab: tuple[int, ...] | None
    """Ids of the tokens it scores, ascending; None for all."""
    notes: tuple[str, ...] = ()
    """Sentences about tensors that were left out, or might be taken for another's."""


def is_lm(shapes: Shapes) -> bool:
    """Returns whether the tensors are those of a whole causal LM."""
    return "model.embed_tokens.weight" in shapes and "model.norm.weight" in shapes and "fc.weight" not in shapes


SIGNS: dict[str, Callable[[Shapes], bool]] = {
    "eagle": eagle.is_eagle,
    "fspad": fspad.is_fspad,
    "eagle3": eagle3.is_eagle3,
    "peagle": peagle.is_peagle,
    "medusa": medusa.is_medusa,
    "lm": is_lm,
}
"""Family -> tells whether tensors of these shapes are of it; `lm` is a whole model, which may draft too."""


def family_of(folder: Folder) -> str:
    """Returns the family of a folder by `SIGNS`; raises ValueError listing its tensors if it is of none or several."""
    shapes = folder.shapes
    found = [name for name, bears in SIGNS.items() if bears(shapes)]
    if len(found) == 1:
        return found[0]
    seen = ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:8])
    raise ValueError(
        f"{folder.path} is {' and '.join(found) or 'no drafter'} by its tensors, and must be exactly one of "
        f"{', '.join(SIGNS)}; of its {len(shapes)} tensors the first are {seen or 'none'}"
    )


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Folder]:
    """Yields a folder: config.json and the headers of its tensors; raises as `open_weights` and `verify_layout`."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    verify_layout(path)
    config = read_json(path / "config.json")
    if "speculators_model_type" in config and isinstance(config.get("transformer_layer_config"), dict):
        config = {**config["transformer_layer_config"], **config}
    with contextlib.ExitStack() as stack:
        tensors = open_weights(path, stack)
        yield Folder(path, config, tensors)


def published_family(path: str | Path) -> str:
    """Returns the family of the folder at `path`; raises as `opened` and `family_of`."""
    with opened(path) as folder:
        return family_of(folder)


def read_drafter(
    path: str | Path,
    *,
    target_layers: int | None = None,
    layer_ids: LayerIds | None = None,
    tokens: int | None = None,
    tables: ReadTables | None = None,
) -> Published:
    """Returns the drafter in a folder of any of these layouts.

    EAGLE-3 heads that do not say which layers they read need `target_layers`. `layer_ids` ("input", "output") overrides
    how their layers are counted, and `tokens` how many tokens a P-EAGLE head drafts in a pass. `tables` are the
    target's, with which copies of them in the file are compared. Raises ValueError or OSError, one sentence naming the
    file, tensor or field, if something is missing, extra, contradictory or not supported, if the folder holds a whole
    LM, and if `layer_ids` or `tokens` is given for a kind of head that does not read it.
    """
    with opened(path) as folder:
        family = family_of(folder)
        if layer_ids and family not in ("eagle3", "peagle", "lm"):
            raise ValueError(f"{path}: {family} heads name no layers of the target: leave out --layer-ids")
        if tokens and family not in ("peagle", "lm"):
            raise ValueError(f"{path}: {family} heads have no number of tokens a pass to choose: leave out --tokens")
        match family:
            case "eagle" | "fspad":
                return _pair_reader(folder, family, tables)
            case "eagle3":
                embedding = find_embedding(folder, tables)
                config = eagle3.eagle3_config(folder, target_layers, layer_ids, embeds=embedding.own)
                table = eagle3.eagle3_table(config, eagle3.prefix_of(folder.shapes))
                notes = embedding.notes if embedding.own == bool(config.embed_vocab) else ()
                return _tap_reader(folder, family, config, (table, []))._replace(notes=notes)
            case "peagle":
                config = peagle.peagle_config(folder, target_layers, layer_ids, tokens)
                shapes = folder.shapes
                parts = peagle.peagle_tables(config, eagle3.prefix_of(shapes), shapes["mask_hidden"])
                return _tap_reader(folder, family, config, parts)
            case "medusa":
                return _medusa(folder, tables)
            case _:
                raise ValueError(f"{path} holds a whole LM, which drafts as it is: give the folder itself as drafter")


def _pair_reader(folder: Folder, family: str, tables: ReadTables | None) -> Published:
    """Returns an EAGLE or FSPAD head."""
    embedding, notes = find_embedding(folder, tables), check_head(folder, tables)
    config: Any
    if family == "eagle":
        config = eagle.eagle_config(folder, embeds=embedding.own)
        table, added = eagle.eagle_table(config), ("fc.bias",) if eagle.adds_bias(folder) else ()
    else:
        config = fspad.fspad_config(folder, embeds=embedding.own)
        table, added = fspad.fspad_table(config), ()
    refuse_unknown(folder, table, (EMBEDDING, HEAD, *added))
    params = read_weights(folder, table, config.shapes())
    return Published(family, config, params, None, embedding.notes + notes)


def _tap_reader(folder: Folder, family: str, config: Any, tables: tuple[Table, list[Table]]) -> Published:
    """Returns an EAGLE-3 or P-EAGLE head, from the tables of its first layer and of those above."""
    first, upper = tables
    whole = {name: entry for part in (first, *upper) for name, entry in part.items()}
    refuse_unknown(folder, whole, eagle3.IGNORED)
    params = read_weights(folder, first, config.shapes())
    if upper:
        params["layers"] = [read_weights(folder, part, config.upper_shapes()) for part in upper]
    params, scored = eagle3.ascending(params, eagle3.read_vocabulary(folder, config.vocab))
    return Published(family, config, params, scored)


def _medusa(folder: Folder, tables: ReadTables | None) -> Published:
    config, blocks = medusa.read_medusa(folder)
    # vLLM's layout has the target's LM head in any case.
    notes = check_head(folder, tables, needed=bool(config.vocab))
    refuse_unknown(folder, {name: entry for table in blocks for name, entry in table.items()}, (HEAD,))
    first, *others = (read_weights(folder, table, config.shapes()) for table in blocks)
    for other in others:
        if not all(np.array_equal(first[name], other[name]) for name in first):
            raise ValueError(
                f"{folder.path}: a head's residual blocks differ from each other; jaxspec repeats one block, as the "
                "released code does"
            )
    return Published("medusa", config, first, None, notes)
