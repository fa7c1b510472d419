"""HASS as its script has it, second stage: on from `hass_stage1` with the top-10 loss at a third of its rate.

Source: HASS (arXiv 2408.15766) and its script, which gives this stage a quarter of the first stage's epochs.
Hardware: two CPU cores.
Expected: not measured.
"""

from jaxspec.config import derive
from jaxspec.distillation.objective import Objective

config = derive(
    "hass_stage1",
    name="hass_stage2",
    init_from="runs/hass_stage1/drafter",
    optimizer={"peak_lr": 1.7e-3},  # a third of hass_stage1's 5e-3
    objective=Objective(steps=3, weights=(("smooth_l1", 1.0), ("soft_cross_entropy", 0.1), ("top_k:10", 1.0))),
)
