"""An EAGLE-2 head for the bundled tiny target, from answers that the target wrote itself.

Make the data first: `jaxspec regenerate --prompts data/chat/train.jsonl --out runs/answers.jsonl` (and likewise
`runs/answers_eval.jsonl` from the held-out prompts); `jaxspec compare` takes both by flags. EAGLE's losses, noise and
gradient clipping; a larger learning rate than the paper's 3e-5, which is for heads of 0.2B parameters and more. Steps
are small, for of so few tokens many small steps make more than few large ones: from 500,000 tokens, rows of 512 in
steps of 8, 4, 2 and 1 gave a simulated tau (greedy) of 2.53, 2.89, 3.05 and 3.08; at 2 rows a rate of 2e-3 gave 2.78,
and 1e-2 2.85.
"""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective

config = DistillConfig(
    name="eagle2",
    target="tiny",
    data=DataConfig(
        train="runs/answers.jsonl", eval="runs/answers_eval.jsonl", length=512, batch=2, loss_on="assistant"
    ),
    optimizer=OptimizerConfig(
        peak_lr=5e-3, warmup_steps=100, epochs=3, weight_decay=0.01, clip_value=0.5, schedule="linear"
    ),
    objective=Objective(),
    checkpoint=CheckpointConfig("runs/eagle2", save_every=100),
    export_folder="runs/eagle2/drafter",
)
