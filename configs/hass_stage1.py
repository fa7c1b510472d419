"""HASS as its script has it, first stage: three draft steps, no top-k loss; `hass_stage2` goes on from it.

Source: HASS (arXiv 2408.15766) and its script.
Hardware: two CPU cores.
Expected: tau is not measured. Its step takes 2.10 times EAGLE's (docs/results.md, "What a training step costs").
"""

from jaxspec.config import derive
from jaxspec.distillation.objective import Objective

config = derive("eagle2", name="hass_stage1", objective=Objective(steps=3))
