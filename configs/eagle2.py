"""EAGLE-2's head for the bundled tiny target, trained on answers that the target wrote.

Source: EAGLE (arXiv 2401.15077) and EAGLE-2 (arXiv 2406.16858): losses, noise, gradient clipping.
Hardware: two CPU cores.
Expected: tau 5.10 greedy and 3.06 at temperature 1 after two million tokens (docs/results.md, "Recipes compared").

Make the data first: `jaxspec regenerate --prompts data/chat/train.jsonl --out runs/answers.jsonl`, and likewise
`runs/answers_eval.jsonl` from held-out prompts. `jaxspec compare` takes both as flags.
"""

from jaxspec.config import DataConfig, DistillConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective

config = DistillConfig(
    name="eagle2",
    target="tiny",
    data=DataConfig(
        train="runs/answers.jsonl",
        eval="runs/answers_eval.jsonl",
        length=512,
        # So few tokens need many small steps: of 500,000 tokens, steps of 8, 4, 2 and 1 rows gave a simulated tau
        # (greedy) of 2.53, 2.89, 3.05 and 3.08.
        batch=2,
        loss_on="assistant",
    ),
    optimizer=OptimizerConfig(
        # EAGLE's 3e-5 is for heads of 0.2B parameters and more. Here 2e-3 gave 2.78, 5e-3 3.05, and 1e-2 2.85.
        peak_lr=5e-3,
        warmup_steps=100,
        epochs=3,
        weight_decay=0.01,
        clip_value=0.5,
        schedule="linear",
    ),
    objective=Objective(),
)
