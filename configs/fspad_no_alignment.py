"""FSPAD's ablation without partial alignment: feature sampling alone.

Source: FSPAD (arXiv 2408.15562), ablation.
Hardware: two CPU cores.
Expected: tau 5.54 greedy and 3.29 at temperature 1 after two million tokens (docs/results.md, "Recipes compared").
"""

from jaxspec.config import derive
from jaxspec.drafters import FspadOptions

config = derive("fspad", name="fspad_no_alignment", head=FspadOptions(partial_alignment=False))
