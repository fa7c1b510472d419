"""An EAGLE-2 head for the bundled tiny target, from answers that the target wrote itself.

Make the data first: `jaxspec regenerate --prompts data/chat/train.jsonl --out runs/answers.jsonl` (and likewise
`runs/answers_eval.jsonl` from the held-out prompts); `jaxspec compare` takes both by flags. EAGLE's losses, noise and
gradient clipping; a larger learning rate than the paper's 3e-5, which is for heads of 0.2B parameters and more.
"""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.objective import Objective

config = DistillConfig(
    name="eagle2",
    target="tiny",
    data=DataConfig(
        train="runs/answers.jsonl", eval="runs/answers_eval.jsonl", length=512, batch=8, loss_on="assistant"
    ),
    optimizer=OptimizerConfig(
        peak_lr=5e-3, warmup_steps=50, epochs=3, weight_decay=0.01, clip_value=0.5, schedule="linear"
    ),
    objective=Objective(),
    checkpoint=CheckpointConfig("runs/eagle2", save_every=100),
    export_folder="runs/eagle2/drafter",
)
