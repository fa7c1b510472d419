"""The part of the LM head in what a drafter reads, and the note for those that could read much less.

A draft vocabulary is not made unasked: it is part of what a run is resumed by, of its export, and of what a config
means, and its tokens should be counted in answers of the target itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxspec.config import DistillConfig
from jaxspec.data.conversations import split_names
from jaxspec.interchange.hf_config import read_config
from jaxspec.interchange.target_folders import target_folder
from jaxspec.targets.decoder import LlamaConfig
from jaxspec.training.resolve import initial_drafter, takes_vocab

PART = 4
"""The suggested draft vocabulary is the target's by this, as EAGLE-3's 32,000 of 128,256."""


class Reads(NamedTuple):
    """Weights that a drafter reads for a draft."""

    head: int
    """Of the LM head, the target's or its own."""
    rest: int


def vocab_note(config: DistillConfig, flag: str) -> str | None:
    """Returns what a draft vocabulary would save, and how it is made, where the LM head is most of what is read.

    None where it is not, where the drafter has one or cannot take one, and where the run has begun: it goes on as it
    is. `flag` is how the file is given.
    """
    if config.draft_vocab is not None or any(Path(config.checkpoint.folder).glob("[0-9]*")):
        return None
    try:
        shape = read_config(target_folder(config.target))
        reads = drafter_reads(config, shape)
    except (ValueError, OSError):  # the training says what is wrong
        return None
    if reads is None or reads.head <= reads.rest:
        return None
    size, whole = shape.vocab // PART, reads.head + reads.rest
    times = whole / (reads.rest + reads.head / PART)
    data, template = split_names(config.data.train)[0].name, config.data.template
    words = ["jaxspec draft-vocab", data, "--target", config.target, *(["--template", template] if template else [])]
    return (
        f"note: {reads.head / whole:.0%} of the weights that {config.name} reads for a draft are the LM head's, over "
        f"{shape.vocab:,} tokens. Where it drafts the {size:,} commonest alone it reads {times:.1f} times fewer, and "
        f"texts stay the same: {' '.join(words)} --size {size} --out vocab.safetensors, then {flag}vocab.safetensors"
    )


def drafter_reads(config: DistillConfig, shape: LlamaConfig) -> Reads | None:
    """Returns what the drafter of a config reads for a draft over all tokens; None where its LM head is fixed."""
    if not takes_vocab(config, shape, 1):
        return None
    module = initial_drafter(config, shape).module
    params: Any = jax.eval_shape(module.init_params, jax.random.key(0))
    own = sum(leaf.size for leaf in jax.tree.leaves(module.scoring(params)) if leaf.ndim > 1)
    looked_up = params["embed"].size if "embed" in params else 0  # a row of it is read
    rest = sum(leaf.size for leaf in jax.tree.leaves(params)) - own - looked_up
    return Reads(own or shape.vocab * shape.width, rest)
