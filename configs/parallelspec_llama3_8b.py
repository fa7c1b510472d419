"""ParallelSpec in EAGLE's place for Llama-3-8B-Instruct on 64 chips: six tokens a pass.

Source: ParallelSpec (arXiv 2410.05589). Its losses and optimizer settings were not found: the losses are those of
`parallelspec_eagle`, the optimizer is EAGLE's.
Hardware: TPU v5e or v6e, 8x8.
Expected: tau is not measured. The compiled step takes 8.9 GB a chip of v5e and 8.7 GB of v6e
(docs/results.md, "Training planned for TPUs that were not there").
"""

from jaxspec.config import derive, load
from jaxspec.drafters import ParallelSpecOptions

config = derive(
    "eagle2_llama3_8b",
    name="parallelspec_llama3_8b",
    drafter="parallelspec",
    head=ParallelSpecOptions(tokens=6, keep=0.7),
    objective=load("parallelspec_eagle").objective,
)
