"""Direct alignment by total variation distance: `draft_lm` with this loss.

Source: direct alignment of draft models (arXiv 2403.00858).
Hardware: two CPU cores.
Expected: tau 2.70 greedy and 2.21 at temperature 1 after two million tokens (docs/results.md, "Recipes compared").
"""

from jaxspec.config import derive

config = derive("draft_lm", name="draft_lm_tvd", objective={"weights": (("tvd", 1.0),)})
