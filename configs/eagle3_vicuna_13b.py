"""EAGLE-3 for Vicuna-13B, all 32,000 tokens scored, else as eagle3_llama3_8b.

Its backward pass computes the head's activations again, so that 64 chips of v5e hold it.
"""

import dataclasses

from jaxspec.config import CheckpointConfig, load

base = load("eagle3_llama3_8b")
config = dataclasses.replace(
    base,
    name="eagle3_vicuna_13b",
    target="models/vicuna-13b",
    data=dataclasses.replace(base.data, template="vicuna"),
    draft_vocab=None,
    remat="full",
    checkpoint=CheckpointConfig("runs/eagle3_vicuna_13b", save_every=None, save_minutes=15),
    export_folder="runs/eagle3_vicuna_13b/drafter",
)
