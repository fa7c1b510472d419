"""Direct alignment: the pretrained draft LM fine-tuned on the target, by forward KL unless `objective.weights` differ.

Source: direct alignment of draft models (arXiv 2403.00858): nine parts of answers that the target wrote at temperatures
0, 0.3, 0.7 and 1 to one part of pretraining text. `draft_lm_kld`, `draft_lm_tvd` and `draft_lm_tvdpp` are this config
with one loss each; `jaxspec train draft_lm name=mine objective.weights=jsd:1` is another.
Hardware: two CPU cores. Run `jaxspec pretrain draft_lm_pretrained` first.
Expected: see the three; forward KL is the best of them here (docs/results.md, "Recipes compared").
"""

from jaxspec.config import derive
from jaxspec.distillation.objective import Objective

config = derive(
    "eagle2",
    name="draft_lm",
    drafter="draft_lm",
    init_from="runs/draft_lm_pretrained/export",
    data={"mix": "data/prose/books-0[0-5].txt", "mix_share": 0.1},
    # Of 300 steps of TVD, Muon at 3e-3 gave a simulated tau of 1.72, AdamW at 1e-3 and 3e-3 1.59 and 1.62.
    optimizer={"kind": "muon", "peak_lr": 3e-3},
    objective=Objective(weights=(("kl", 1.0),), noise=0.0),
)
