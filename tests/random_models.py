"""A tiny random target with its tokenizer, and a random drafter for it, in folders as programs read them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspec.checkpoints.models import save_drafter
from jaxspec.data.tokenizer_training import END, PAD, SPECIAL_TOKENS, train_bpe, write_tokenizer_folder
from jaxspec.drafters import Eagle, EagleConfig
from jaxspec.interchange.hf import write_llama
from jaxspec.targets.decoder import Decoder, LlamaConfig

SIZE = 300
POSITIONS = 256


def random_weights(module: Any, scale: float, seed: int) -> Any:
    """Normal weights of the shapes that `module.init_params` gives, norms one."""
    draw = np.random.default_rng(seed)

    def one(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        is_norm = "norm" in jax.tree_util.keystr(path)
        return (np.ones(shape.shape) if is_norm else scale * draw.normal(size=shape.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(module.init_params, jax.random.key(0)))


def write_target(folder: Path, *, layers: int = 1) -> Path:
    """A target whose answers end after some thirty tokens and hold hardly any other special token."""
    fillers = ("they say", "as is well known", "or so it seems to everyone here", "which nobody would deny")
    texts = [f"{a} and {b} make {a + b}, {filler}" for a in range(20) for b in range(20) for filler in fillers]
    tokenizer = train_bpe(texts, size=SIZE)
    write_tokenizer_folder(folder, tokenizer, max_length=POSITIONS)
    end = SPECIAL_TOKENS.index(END)
    config = LlamaConfig(
        vocab=SIZE, width=32, layers=layers, heads=4, kv_heads=2, head_dim=8, mlp=64, max_positions=POSITIONS,
        bos_id=0, eos_ids=(end,), pad_id=SPECIAL_TOKENS.index(PAD),
    )  # fmt: skip
    params = random_weights(Decoder(config), 0.5, 37)
    # A constant channel of the embedding, which the layer disturbs: the end is likely, and where depends on the text.
    params["embed"][:, 0] = 3.0
    params["head"][:, 0] = 0.0
    params["head"][: len(SPECIAL_TOKENS)] = 0.0
    params["head"][end, 0] = 4.0
    write_llama(folder, params, config, dtype="float32")
    return folder


def write_drafter(
    folder: Path, *, width: int = 32, tree: str = "dynamic:8x3x3", draft_vocab: Sequence[int] | None = None
) -> Path:
    """A random head, noted as fastest with `tree`, that scores the tokens `draft_vocab`."""
    module = Eagle(EagleConfig(width=width, heads=4, kv_heads=2, head_dim=8, mlp=64))
    save_drafter(folder, "eagle", module, random_weights(module, 0.2, 2), {"tree": tree}, draft_vocab=draft_vocab)
    return folder
