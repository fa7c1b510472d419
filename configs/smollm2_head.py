"""The EAGLE head for SmolLM2-135M-Instruct that comes with jaxspec, `--drafter smollm2-head`.

Source: EAGLE (arXiv 2401.15077): losses and noise. The norm on embeddings and Muon are ours: with them the head learns
faster at first (docs/results.md, "Recipes on the real model, first seed").
Hardware: one CPU core, 79 minutes.
Expected: a simulated tau of 1.81 greedy on held-out answers, and tau 2.49 with its tree (docs/results.md, "A real
model"). jaxspec/bundled/smollm2_head/README.md says how the data was made.
"""

from jaxspec.config import derive
from jaxspec.drafters import EagleOptions

config = derive(
    "eagle2",
    name="smollm2_head",
    target="smollm2",
    data={"train": "runs/smollm2/answers.jsonl", "eval": "runs/smollm2/held_out.jsonl", "length": 640, "batch": 4},
    draft_vocab="runs/smollm2/vocab.safetensors",
    head=EagleOptions(embedding_norm=True),
    optimizer={"kind": "muon", "warmup_steps": 50, "epochs": None, "steps": 1600},
    eval_every=200,
)
