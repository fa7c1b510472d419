"""The recipe of this project (`best`) for Llama-3-8B-Instruct, on 64 chips.

Source: `best`; as long as `hass_llama3_8b`.
Hardware: TPU v5e or v6e, 8x8.
Expected: tau is not measured. The compiled step takes 11.7 GB a chip of v5e and 6.9 GB of v6e
(docs/results.md, "Training planned for TPUs that were not there").
"""

from jaxspec.config import derive, load

config = derive(
    "hass_llama3_8b",
    name="best_llama3_8b",
    drafter="fspad",
    head=load("best").head,
    # The rate of fspad_llama3_8b, because the small best and fspad have one rate too. Not searched at this size: a step
    # of Muon, as one of AdamW, changes a weight by as much whatever the width.
    optimizer={"kind": "muon", "peak_lr": 1.4e-4},
)
