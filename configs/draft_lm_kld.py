"""Direct alignment by forward KL: `draft_lm` with this loss.

Source: direct alignment of draft models (arXiv 2403.00858).
Hardware: two CPU cores.
Expected: tau 4.25 greedy and 3.00 at temperature 1 after two million tokens (docs/results.md, "Recipes compared").
"""

from jaxspec.config import derive

config = derive("draft_lm", name="draft_lm_kld", objective={"weights": (("kl", 1.0),)})
