"""EAGLE-3: auxiliary hidden states of three layers, five draft steps, an LM head of its own, no feature loss.

Source: EAGLE-3 (arXiv 2503.01840), its training-time test. The reference unrolls seven steps.
Hardware: two CPU cores, which have time for five.
Expected: tau 3.99 greedy and 2.81 at temperature 1 after two million tokens, and still rising: the LM head starts
from nothing (docs/results.md, "Recipes compared").
"""

from jaxspec.config import derive
from jaxspec.distillation.objective import Objective

config = derive(
    "eagle2",
    name="eagle3",
    drafter="eagle3",
    optimizer={"peak_lr": 3e-3},  # not searched
    objective=Objective(steps=5, weights=(("soft_cross_entropy", 1.0),), step_decay=0.8, noise=0.0),
)
