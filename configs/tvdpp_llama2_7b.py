"""Direct alignment: a draft LM of 115M parameters fine-tuned on Llama-2-7B-Chat by TVD++, on 64 chips.

Source: direct alignment of draft models (arXiv 2403.00858): the shape of the draft LM (4 layers, width 1,024, 8 heads,
MLP of 2,816, untied), and nine parts of answers at temperatures 0, 0.3, 0.7 and 1 to one of pretraining text.
Optimizer, batch and length were not found; these are ours. The reading of TVD++ is that of `draft_lm_tvdpp`.
Hardware: TPU v5e or v6e, 8x8. Pretrain the draft LM first: `draft_lm_pretrained` shows how, with this shape and
the target's tokenizer.
Expected: tau is not measured. The compiled step takes 2.2 GB a chip of v5e and 2.1 GB of v6e
(docs/results.md, "Training planned for TPUs that were not there").
"""

from jaxspec.config import derive, load
from jaxspec.drafters import DraftLMOptions

config = derive(
    "eagle2_llama3_8b",
    name="tvdpp_llama2_7b",
    target="models/llama2-7b",
    drafter="draft_lm",
    head=DraftLMOptions(width=1024, layers=4, heads=8, kv_heads=8, head_dim=128, mlp=2816, tied=False),
    data={"mix": "data/pretraining", "mix_share": 0.1},
    optimizer={"peak_lr": 1e-4, "steps": 10_000, "clip_norm": 1.0, "clip_value": None},
    objective=load("draft_lm_tvdpp").objective,
)
