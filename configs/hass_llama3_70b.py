"""HASS for Llama-3-70B-Instruct on 128 chips of v5p, as `hass_llama3_8b`.

Source: HASS (arXiv 2408.15766).
Hardware: TPU v5p, 4x4x8.
Expected: tau is not measured. The compiled step takes 11.6 GB a chip, 6.9 hours at the roofline
(docs/results.md, "Training planned for TPUs that were not there").
"""

from jaxspec.config import derive

config = derive("hass_llama3_8b", name="hass_llama3_70b", target="models/llama3-70b", mesh={"fsdp": 128})
