"""EAGLE-2's head for Vicuna-7B on 64 chips, as `eagle2_llama3_8b`.

Source: EAGLE-2 (arXiv 2406.16858).
Hardware: TPU v5e or v6e, 8x8.
Expected: tau is not measured. The compiled step takes 2.4 GB a chip of v5e and 1.8 GB of v6e
(docs/results.md, "Training planned for TPUs that were not there").
"""

from jaxspec.config import derive

config = derive(
    "eagle2_llama3_8b",
    name="eagle2_vicuna_7b",
    target="models/vicuna-7b",
    data={"template": "vicuna"},
)
