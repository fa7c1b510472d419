"""Medusa-1: five heads on the frozen target's features, each a residual block and an LM head of its own.

Cross-entropy on the text (which the target wrote), head `k` counting `0.8^k`. Its heads are nearly as large as the
bundled target: the vocabulary times the width, five times.
"""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective
from jaxspec.drafters import MedusaOptions

config = DistillConfig(
    name="medusa",
    target="tiny",
    drafter="medusa",
    head=MedusaOptions(tokens=5),
    data=DataConfig(
        train="runs/answers.jsonl", eval="runs/answers_eval.jsonl", length=512, batch=2, loss_on="assistant"
    ),
    optimizer=OptimizerConfig(
        peak_lr=3e-3, warmup_steps=100, epochs=3, weight_decay=0.01, clip_value=0.5, schedule="linear"
    ),
    objective=Objective(steps=5, weights=(("cross_entropy", 1.0),), step_decay=0.8, noise=0.0),
    checkpoint=CheckpointConfig("runs/medusa", save_every=100),
    export_folder="runs/medusa/drafter",
)
