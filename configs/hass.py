"""HASS: EAGLE-2's head trained over three of its own draft steps, with the top-10 loss in the last fifth.

Source: HASS (arXiv 2408.15766): harmonized context alignment (`steps`) and top-k distillation (`top_k:10`).
Hardware: two CPU cores.
Expected: tau 5.35 greedy and 3.11 at temperature 1 after two million tokens (docs/results.md, "Recipes compared").

The paper's script trains 40 epochs without the top-k loss, then 10 with it at a lower rate: `hass_stage1` and
`hass_stage2` are those two runs. Here both are one run, whose falling rate is a fifth of the peak where they meet.
"""

from jaxspec.config import derive
from jaxspec.distillation.objective import Objective

config = derive(
    "eagle2",
    name="hass",
    objective=Objective(
        steps=3,
        weights=(("smooth_l1", 1.0), ("soft_cross_entropy", 0.1), ("top_k:10", 1.0)),
        # With the top-k loss from the beginning, features are learned later.
        late=(("top_k:10", 0.8),),
    ),
)
