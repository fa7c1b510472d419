"""FSPAD for Llama-3-8B-Instruct on 64 chips, with EAGLE's losses on the two halves of its output.

Source: FSPAD (arXiv 2408.15562): as EAGLE-2, at 5e-5.
Hardware: TPU v5e or v6e, 8x8.
Expected: tau is not measured. The compiled step takes 5.7 GB a chip of v5e and 4.3 GB of v6e
(docs/results.md, "Training planned for TPUs that were not there").
"""

from jaxspec.config import derive

config = derive(
    "eagle2_llama3_8b",
    name="fspad_llama3_8b",
    drafter="fspad",
    optimizer={"peak_lr": 1.4e-4},  # the paper's 5e-5 times sqrt(8), because a step has eight times the rows
)
