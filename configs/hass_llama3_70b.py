"""HASS for Llama-3-70B-Instruct on 128 chips of v5p."""

import dataclasses

from jaxspec.config import CheckpointConfig, MeshConfig, load

base = load("hass_llama3_8b")
config = dataclasses.replace(
    base,
    name="hass_llama3_70b",
    target="models/llama3-70b",
    mesh=MeshConfig(fsdp=128),
    checkpoint=CheckpointConfig("runs/hass_llama3_70b", save_every=None, save_minutes=15),
    export_folder="runs/hass_llama3_70b/drafter",
)
