"""FSPAD for Vicuna-33B on 64 chips, as `fspad_llama3_8b`.

Source: FSPAD (arXiv 2408.15562). Rows are no longer than the target's 2,048 positions.
Hardware: TPU v5e or v6e, 8x8.
Expected: tau is not measured. The compiled step takes 7.7 GB a chip of v5e and 6.3 GB of v6e
(docs/results.md, "Training planned for TPUs that were not there").
"""

from jaxspec.config import derive

config = derive(
    "fspad_llama3_8b",
    name="fspad_vicuna_33b",
    target="models/vicuna-33b",
    data={"template": "vicuna"},
)
