"""The sentence below a table of recipes: what its numbers depend on, as far as the result tells."""

from typing import Any

from jaxspec.report.recipe_table import by_recipe

COMPARED: dict[str, Any] = {
    "baseline": "eagle2",
    "dtype": "float32",
    "max_new_tokens": 64,
    "recipes": [
        {
            "recipe": recipe,
            "source": "all",
            "temperature": 0.0,
            "tree": "chain:3",
            "drafted_tree": "chain:3",
            "prompts": 12,
            **{f"tau{end}": tau for end in ("", "_low", "_high")},
            **{f"ratio{end}": tau / 2 for end in ("", "_low", "_high")},
            "train_tokens": 1_000_000,
        }
        for recipe, tau in (("draft_lm_kld", 1.5), ("eagle2", 2.0), ("best", 2.5))
    ],
}


def sentence(found: dict[str, Any], **options: str) -> str:
    return by_recipe({"intervals": "no", **options}, found)[2]


def test_target_and_draft_vocabulary_are_named_where_the_result_tells_them():
    scored = {"draft_vocab": {"name": "v.safetensors", "tokens": 8192}}
    settings = {"draft_lm_kld": {"draft_vocab": None}, "eagle2": scored, "best": scored}
    told = COMPARED | {"target": "models/smollm2", "settings": settings}
    begins = "12 held-out prompts, target smollm2, tree chain:3, 1.00M trained tokens, up to 64 new tokens, float32"
    assert sentence(told) == f"{begins}, a draft vocabulary of 8,192 for eagle2 and best:"
    assert sentence(told, recipes="best,eagle2") == f"{begins}, a draft vocabulary of 8,192:"
    assert sentence(told, recipes="draft_lm_kld") == f"{begins}:"


def test_a_result_of_before_that_tells_neither_is_a_table_too():
    assert (
        sentence(COMPARED) == "12 held-out prompts, tree chain:3, 1.00M trained tokens, up to 64 new tokens, float32:"
    )
