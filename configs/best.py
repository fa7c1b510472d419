"""The recipe of this project: FSPAD's head with normed embeddings, HASS's draft steps and losses, Muon.

Source: FSPAD (arXiv 2408.15562) and HASS (arXiv 2408.15766). The norm and Muon are ours: the norm makes a token's
embedding weigh as much as the feature it is fused with, whatever scale the target's embeddings have.
Hardware: two CPU cores.
Expected: tau 6.00 greedy and 3.43 at temperature 1 after two million tokens (docs/results.md, "Recipes compared").
"""

from jaxspec.config import derive
from jaxspec.drafters import FspadOptions

config = derive(
    "hass",
    name="best",
    drafter="fspad",
    head=FspadOptions(embedding_norm=True),
    optimizer={"kind": "muon"},
)
