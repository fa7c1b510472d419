"""EAGLE-2's head for Llama-3-70B-Instruct on 128 chips of v5p, as `eagle2_llama3_8b`.

Source: EAGLE-2 (arXiv 2406.16858).
Hardware: TPU v5p, 4x4x8.
Expected: tau is not measured. The compiled step takes 12.1 GB a chip
(docs/results.md, "Training planned for TPUs that were not there").
"""

from jaxspec.config import derive

config = derive("eagle2_llama3_8b", name="eagle2_llama3_70b", target="models/llama3-70b", mesh={"fsdp": 128})
