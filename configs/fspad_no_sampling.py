"""FSPAD's ablation without feature sampling: partial alignment alone.

Source: FSPAD (arXiv 2408.15562), ablation.
Hardware: two CPU cores.
Expected: tau 5.32 greedy and 3.10 at temperature 1 after two million tokens (docs/results.md, "Recipes compared").
"""

from jaxspec.config import derive
from jaxspec.drafters import FspadOptions

config = derive("fspad", name="fspad_no_sampling", head=FspadOptions(feature_sampling=False))
