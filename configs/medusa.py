"""Medusa-1: five heads on the frozen target's features, each a residual block and an LM head of its own.

Source: Medusa (arXiv 2401.10774): cross-entropy on the text, which the target wrote; head `k` weighs `0.8^k`.
Hardware: two CPU cores.
Expected: tau 2.93 greedy and 2.20 at temperature 1 after two million tokens (docs/results.md, "Recipes compared"). The
five LM heads are nearly as large as the bundled target.
"""

from jaxspec.config import derive
from jaxspec.distillation.objective import Objective
from jaxspec.drafters import MedusaOptions

config = derive(
    "eagle2",
    name="medusa",
    drafter="medusa",
    head=MedusaOptions(tokens=5),
    optimizer={"peak_lr": 3e-3},  # not searched
    objective=Objective(steps=5, weights=(("cross_entropy", 1.0),), step_decay=0.8, noise=0.0),
)
