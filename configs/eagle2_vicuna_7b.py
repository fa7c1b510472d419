"""An EAGLE-2 head for Vicuna-7B, as eagle2_llama3_8b."""

import dataclasses

from jaxspec.config import CheckpointConfig, load

base = load("eagle2_llama3_8b")
config = dataclasses.replace(
    base,
    name="eagle2_vicuna_7b",
    target="models/vicuna-7b",
    data=dataclasses.replace(base.data, template="vicuna"),
    checkpoint=CheckpointConfig("runs/eagle2_vicuna_7b", save_every=None, save_minutes=15),
    export_folder="runs/eagle2_vicuna_7b/drafter",
)
