"""FSPAD for Vicuna-33B on 64 chips: its rows are no longer than the target's 2,048 positions."""

import dataclasses

from jaxspec.config import CheckpointConfig, load

base = load("fspad_llama3_8b")
config = dataclasses.replace(
    base,
    name="fspad_vicuna_33b",
    target="models/vicuna-33b",
    data=dataclasses.replace(base.data, template="vicuna"),
    checkpoint=CheckpointConfig("runs/fspad_vicuna_33b", save_every=None, save_minutes=15),
    export_folder="runs/fspad_vicuna_33b/drafter",
)
