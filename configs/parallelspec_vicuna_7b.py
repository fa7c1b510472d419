"""ParallelSpec in EAGLE's place for Vicuna-7B, as parallelspec_llama3_8b."""

import dataclasses

from jaxspec.config import CheckpointConfig, load

base = load("parallelspec_llama3_8b")
config = dataclasses.replace(
    base,
    name="parallelspec_vicuna_7b",
    target="models/vicuna-7b",
    data=dataclasses.replace(base.data, template="vicuna"),
    checkpoint=CheckpointConfig("runs/parallelspec_vicuna_7b", save_every=None, save_minutes=15),
    export_folder="runs/parallelspec_vicuna_7b/drafter",
)
