"""ParallelSpec in EAGLE's place for Vicuna-7B on 64 chips, as `parallelspec_llama3_8b`.

Source: ParallelSpec (arXiv 2410.05589).
Hardware: TPU v5e or v6e, 8x8.
Expected: tau is not measured. The compiled step takes 9.5 GB a chip of v5e and 8.7 GB of v6e
(docs/results.md, "Training planned for TPUs that were not there").
"""

from jaxspec.config import derive

config = derive(
    "parallelspec_llama3_8b",
    name="parallelspec_vicuna_7b",
    target="models/vicuna-7b",
    data={"template": "vicuna"},
)
