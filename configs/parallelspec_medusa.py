"""ParallelSpec in Medusa's place: one layer and mask tokens predict five tokens in one pass, by token losses alone.

Source: ParallelSpec (arXiv 2410.05589), whose text and loss weights could not be obtained. The loss is a choice of
ours: the KL divergence, where Medusa has cross-entropy; later tokens weigh as Medusa's heads do. The optimizer is ours
too. The drafter's docstring says what else is reconstruction.
Hardware: two CPU cores.
Expected: tau 3.88 greedy and 2.56 at temperature 1, where `medusa` has 3.20 and 2.16 (docs/results.md, "Recipes
compared", the item on ParallelSpec).
"""

from jaxspec.config import derive
from jaxspec.distillation.objective import Objective
from jaxspec.drafters import ParallelSpecOptions

config = derive(
    "eagle2",
    name="parallelspec_medusa",
    drafter="parallelspec",
    # The layer norms its attention's input, as the target's layers do. A mask token starts from its anchor's feature.
    head=ParallelSpecOptions(
        tokens=5, host="medusa", embedding_norm=True, attention_norm=True, mask_feature="anchor_copy"
    ),
    optimizer={"kind": "muon"},
    objective=Objective(steps=5, weights=(("kl", 1.0),), step_decay=0.8, noise=0.0),
)
