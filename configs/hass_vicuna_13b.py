"""HASS for Vicuna-13B on 64 chips, as `hass_llama3_8b`.

Source: HASS (arXiv 2408.15766).
Hardware: TPU v5e or v6e, 8x8.
Expected: tau is not measured. The compiled step takes 5.2 GB a chip of v5e and 8.9 GB of v6e
(docs/results.md, "Training planned for TPUs that were not there").
"""

from jaxspec.config import derive

config = derive(
    "hass_llama3_8b",
    name="hass_vicuna_13b",
    target="models/vicuna-13b",
    data={"template": "vicuna"},
)
