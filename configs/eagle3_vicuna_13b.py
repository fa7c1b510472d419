"""EAGLE-3 for Vicuna-13B on 64 chips, all 32,000 tokens scored, else as `eagle3_llama3_8b`.

Source: EAGLE-3 (arXiv 2503.01840).
Hardware: TPU v5e or v6e, 8x8.
Expected: tau is not measured. The compiled step takes 14.6 GB a chip of v5e and 14.0 GB of v6e
(docs/results.md, "Training planned for TPUs that were not there").
"""

from jaxspec.config import derive

config = derive(
    "eagle3_llama3_8b",
    name="eagle3_vicuna_13b",
    target="models/vicuna-13b",
    data={"template": "vicuna"},
    draft_vocab=None,
    remat="full",  # or 64 chips of v5e do not hold the head's activations
)
