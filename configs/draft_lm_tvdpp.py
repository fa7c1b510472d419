"""Direct alignment by TVD++ (sigma of each position): `draft_lm` with this loss.

Source: direct alignment of draft models (arXiv 2403.00858).
Hardware: two CPU cores.
Expected: tau 3.43 greedy and 2.63 at temperature 1 after two million tokens (docs/results.md, "Recipes compared").
"""

from jaxspec.config import derive

config = derive("draft_lm", name="draft_lm_tvdpp", objective={"weights": (("tvdpp_exact_pos", 1.0),)})
