"""Training of small byte-level tokenizers, and writing and copying of tokenizers in HuggingFace folders."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (BEGIN, END, "<|user|>", "<|assistant|>", "<|system|>", PAD)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""The files of a HuggingFace folder that describe its tokenizer, apart from its stop ids."""


def copy_tokenizer(source: str | Path, folder: str | Path) -> None:
    """Copies the tokenizer of the folder `source` into `folder`, byte for byte."""
    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())


def train_bpe(texts: Iterable[str], *, size: int = 4096, special_tokens: tuple[str, ...] = SPECIAL_TOKENS) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of exactly `size` ids, special tokens first; each digit is a token.

    The same texts give the same tokenizer. Raises ValueError if `size` cannot hold the bytes, or `texts` are too few.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + len(special_tokens):
        raise ValueError(f"size is {size}; byte-level BPE needs at least {len(alphabet) + len(special_tokens)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != size:
        raise ValueError(
            f"the texts yield only {tokenizer.get_vocab_size()} of {size} ids; give more text or a smaller size"
        )
    return tokenizer


def write_tokenizer_folder(
    folder: str | Path, tokenizer: Tokenizer, *, template: str = CHAT_TEMPLATE, max_length: int = 1024
) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, which transformers loads.

    `max_length` is the number of positions the model was trained for.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = Tokenizer.from_str(tokenizer.to_str())
    if (begin := written.token_to_id(BEGIN)) is not None:
        # A raw text begins as the texts of pretraining do; what a chat template renders brings its own.
        first = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)])
        written.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
    written.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": written.token_to_id(BEGIN) is not None,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
