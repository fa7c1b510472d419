"""ParallelSpec in EAGLE's place: EAGLE's head predicts six tokens in one pass, by mask tokens.

Source: ParallelSpec (arXiv 2410.05589), whose text and loss weights could not be obtained. The losses are a choice of
ours: EAGLE's SmoothL1 on features, where the slot is real, and the KL divergence of tokens at every depth, at a weight
of 1 where EAGLE's soft cross-entropy has 0.1. The optimizer is ours too. The drafter's docstring says what else is
reconstruction.
Hardware: two CPU cores.
Expected: tau 3.80 greedy and 2.70 at temperature 1 after two million tokens (docs/results.md, "Recipes compared").
"""

from jaxspec.config import derive
from jaxspec.distillation.objective import Objective
from jaxspec.drafters import ParallelSpecOptions

config = derive(
    "eagle2",
    name="parallelspec_eagle",
    drafter="parallelspec",
    head=ParallelSpecOptions(tokens=6, embedding_norm=True),
    optimizer={"kind": "muon"},
    objective=Objective(steps=6, weights=(("smooth_l1", 1.0), ("kl", 1.0)), feature_steps=1),
)
