"""ParallelSpec in EAGLE's place: EAGLE's head predicts six tokens in a pass, by mask tokens, with EAGLE's losses.

Features are regressed where the slot is real. See the drafter's docstring for what is reconstruction;
so is the optimizer, of which nothing is known.
"""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective
from jaxspec.drafters import ParallelSpecOptions

config = DistillConfig(
    name="parallelspec_eagle",
    target="tiny",
    drafter="parallelspec",
    head=ParallelSpecOptions(tokens=6, embedding_norm=True),
    data=DataConfig(
        train="runs/answers.jsonl", eval="runs/answers_eval.jsonl", length=512, batch=2, loss_on="assistant"
    ),
    optimizer=OptimizerConfig(
        kind="muon", peak_lr=5e-3, warmup_steps=100, epochs=3, weight_decay=0.01, clip_value=0.5, schedule="linear"
    ),
    objective=Objective(steps=6, weights=(("smooth_l1", 1.0), ("kl", 1.0)), feature_steps=1),
    checkpoint=CheckpointConfig("runs/parallelspec_eagle", save_every=100),
    export_folder="runs/parallelspec_eagle/drafter",
)
