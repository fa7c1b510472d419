"""An independent draft LM for the bundled target, before it is aligned with it: 0.87M parameters, one epoch.

Source: direct alignment of draft models (arXiv 2403.00858): pretrained on general text, with the target's tokenizer.
Hardware: one CPU core, a quarter of an hour for 6.9M tokens.
Expected: tau 1.56 greedy and 1.50 at temperature 1 as it is (docs/results.md, "Recipes compared").

It has the target's proportions: two query heads for a key-value head, an MLP 2.5 times the width. That is 14.8 % of
the target's parameters, where the paper's drafter is 1.64 % of its target: the embedding of 4,096 tokens alone is
0.52M. Without embeddings it is 7.2 %.
"""

from jaxspec.config import derive

config = derive(
    "tiny",
    name="draft_lm_pretrained",
    model={"width": 128, "layers": 2, "heads": 2, "kv_heads": 1, "mlp": 320},
    tokenizer="tiny",
    data={"train": "data/prose/books-0[0-5].txt", "eval": "data/prose/books-06.txt"},
    # Larger than the target's 2.5e-3 because the width is smaller; not searched. AdamW needs several times the tokens.
    optimizer={"kind": "muon", "peak_lr": 5e-3, "epochs": 1},
)
