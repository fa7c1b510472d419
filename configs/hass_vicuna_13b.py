"""HASS for Vicuna-13B, as hass_llama3_8b."""

import dataclasses

from jaxspec.config import CheckpointConfig, load

base = load("hass_llama3_8b")
config = dataclasses.replace(
    base,
    name="hass_vicuna_13b",
    target="models/vicuna-13b",
    data=dataclasses.replace(base.data, template="vicuna"),
    checkpoint=CheckpointConfig("runs/hass_vicuna_13b", save_every=None, save_minutes=15),
    export_folder="runs/hass_vicuna_13b/drafter",
)
