"""HASS for Llama-3-8B-Instruct: three draft steps and the top-10 loss, on 64 chips.

Source: HASS (arXiv 2408.15766): 40 epochs at 3e-5 without the top-k loss, 10 with it at a third of that. This is one
run of the same length, whose rate has fallen to a fifth where that loss joins.
Hardware: TPU v5e or v6e, 8x8.
Expected: tau is not measured. The compiled step takes 6.0 GB a chip of v5e and 4.8 GB of v6e
(docs/results.md, "Training planned for TPUs that were not there").
"""

from jaxspec.config import derive, load

config = derive(
    "eagle2_llama3_8b",
    name="hass_llama3_8b",
    optimizer={"steps": 26_200},  # 2.65 + 0.7 million dialogues at one a row
    objective=load("hass").objective,
)
