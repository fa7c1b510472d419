"""ParallelSpec in EAGLE's place for Llama-3-8B-Instruct on 64 chips: six tokens a pass.

The paper's optimizer settings were not found; these are EAGLE's.
"""

import dataclasses

from jaxspec.config import CheckpointConfig, load
from jaxspec.distillation.objective import Objective
from jaxspec.drafters import ParallelSpecOptions

base = load("eagle2_llama3_8b")
config = dataclasses.replace(
    base,
    name="parallelspec_llama3_8b",
    drafter="parallelspec",
    head=ParallelSpecOptions(tokens=6, keep=0.7),
    objective=Objective(steps=6, weights=(("smooth_l1", 1.0), ("kl", 1.0)), feature_steps=1),
    checkpoint=CheckpointConfig("runs/parallelspec_llama3_8b", save_every=None, save_minutes=15),
    export_folder="runs/parallelspec_llama3_8b/drafter",
)
