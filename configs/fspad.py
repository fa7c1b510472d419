"""FSPAD: feature sampling and partial alignment, with EAGLE's losses on the two halves of the head's output.

Source: FSPAD (arXiv 2408.15562). Twice the drafter parameters of EAGLE-2 at the same width.
Hardware: two CPU cores.
Expected: tau 5.59 greedy and 3.29 at temperature 1 after two million tokens (docs/results.md, "Recipes compared").

The paper's optimizer is AdamW at 5e-5 (5/3 of EAGLE's rate) with betas 0.9 and 0.95, weight decay 0.01 and clipping by
value. Here the rate is that of `eagle2`.
"""

from jaxspec.config import derive

config = derive("eagle2", name="fspad", drafter="fspad")
