"""EAGLE-3 for Llama-3-8B-Instruct on 64 chips: seven draft steps, a draft vocabulary of 32,000.

Source: EAGLE-3 (arXiv 2503.01840), the released settings: AdamW at 5e-5 without weight decay, 12,000 of 800,000
updates of 16 dialogues for warm-up, the gradient's norm clipped to 0.5.
Hardware: TPU v5e or v6e, 8x8. Make the draft vocabulary first (`jaxspec draft-vocab`).
Expected: tau is not measured. The compiled step takes 12.0 GB a chip of v5e and 11.2 GB of v6e
(docs/results.md, "Training planned for TPUs that were not there").
"""

import dataclasses

from jaxspec.config import OptimizerConfig, derive, load

config = derive(
    "eagle2_llama3_8b",
    name="eagle3_llama3_8b",
    drafter="eagle3",
    draft_vocab="models/llama3-8b/draft_vocab.safetensors",
    optimizer=OptimizerConfig(
        peak_lr=1.4e-4,  # the released 5e-5 times sqrt(8), because a step has eight times the rows
        warmup_steps=1500,  # an eighth of 12,000
        steps=100_000,  # an eighth of 800,000
        clip_norm=0.5,
        schedule="linear",
    ),
    objective=dataclasses.replace(load("eagle3").objective, steps=7),
)
