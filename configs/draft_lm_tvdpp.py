"""Direct alignment by TVD++, in the reading `exact_pos`: `draft_lm` with this loss.

Source: direct alignment of draft models (arXiv 2403.00858), whose text could not be obtained. By what is known of it
`mu` and `sigma` are over all entries, positions and sequences of the batch; that is `tvdpp_exact`, the gradient of
`draft_lm_tvd` divided by one number a batch. This config has each position's own, which lifts positions that are far
from right, as the negative log of the acceptance would.
Hardware: two CPU cores.
Expected: tau 3.43 greedy and 2.63 at temperature 1 after two million tokens (docs/results.md, "Recipes compared").
"""

from jaxspec.config import derive

config = derive("draft_lm", name="draft_lm_tvdpp", objective={"weights": (("tvdpp_exact_pos", 1.0),)})
