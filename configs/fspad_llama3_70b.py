"""FSPAD for Llama-3-70B-Instruct on 128 chips of v5p, as `fspad_llama3_8b`.

Source: FSPAD (arXiv 2408.15562).
Hardware: TPU v5p, 4x4x8.
Expected: tau is not measured. The compiled step takes 11.7 GB a chip
(docs/results.md, "Training planned for TPUs that were not there").
"""

from jaxspec.config import derive

config = derive("fspad_llama3_8b", name="fspad_llama3_70b", target="models/llama3-70b", mesh={"fsdp": 128})
