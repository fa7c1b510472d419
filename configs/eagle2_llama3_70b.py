"""An EAGLE-2 head for Llama-3-70B-Instruct on 128 chips of v5p."""

import dataclasses

from jaxspec.config import CheckpointConfig, MeshConfig, load

base = load("eagle2_llama3_8b")
config = dataclasses.replace(
    base,
    name="eagle2_llama3_70b",
    target="models/llama3-70b",
    mesh=MeshConfig(fsdp=128),
    checkpoint=CheckpointConfig("runs/eagle2_llama3_70b", save_every=None, save_minutes=15),
    export_folder="runs/eagle2_llama3_70b/drafter",
)
