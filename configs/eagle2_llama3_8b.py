"""EAGLE-2's head for Llama-3-8B-Instruct on 64 chips of v5e or v6e; every other large job derives from this one.

Source: EAGLE (arXiv 2401.15077) and EAGLE-2 (arXiv 2406.16858): AdamW at 3e-5, 2,000 steps of warm-up, values clipped
to 0.5, rows of up to 2,048 tokens, 16 of them an update, 20 epochs of 68,000 dialogues.
Hardware: TPU v5e or v6e, 8x8.
Expected: tau is not measured. The compiled step takes 4.7 GB a chip of v5e and 3.7 GB of v6e (docs/results.md,
"Training planned for TPUs that were not there").

Data: answers of the target to ShareGPT's dialogues and the like (`jaxspec regenerate`).
"""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, MeshConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective

config = DistillConfig(
    name="eagle2_llama3_8b",
    target="models/llama3-8b",
    data=DataConfig(
        train="data/answers",
        eval="data/answers_eval.jsonl",
        length=2048,
        batch=128,  # eight times EAGLE's
        loss_on="assistant",
    ),
    optimizer=OptimizerConfig(
        peak_lr=8.5e-5,  # EAGLE's 3e-5 times sqrt(8), because a step has eight times the rows
        warmup_steps=250,  # EAGLE's 2,000 over 8
        steps=10_600,  # EAGLE's 1.36 million dialogues at one a row; packed, they are seen more often
        weight_decay=0.01,
        clip_value=0.5,
        schedule="linear",
    ),
    objective=Objective(),
    mesh=MeshConfig(fsdp=64),
    checkpoint=CheckpointConfig(save_every=None, save_minutes=15),
    dtype="bfloat16",
    query_block=512,
    scan_layers=True,
)
