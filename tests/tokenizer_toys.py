"""Small tokenizers and conversations for tests: SentencePiece files written field by field, texts with odd letters."""

import json
import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from jaxspec.data.chat import ChatTokenizer, EncodedConversation
from jaxspec.data.messages import Conversation
from jaxspec.data.tokenizer_training import SPECIAL_TOKENS, train_bpe, write_tokenizer_folder
from jaxspec.data.turns import EVERY_TURN, TurnEncoder, TurnOptions

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LOOKALIKES = ("</s>", "<s>", "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "[/INST]", "<<SYS>>", "ASSISTANT: ")
"""Texts that are control tokens of some template, or look like what stands around an answer."""
_WORDS = (
    "the cat sat on a mat and 12 dogs ran after it; if (a == b) return x[3]; naïve 日本語 🙂 é\u0301 it's\t\n\n  ok"
)


def message_text(draw: random.Random, *, lookalikes: bool) -> str:
    """Up to 30 words, perhaps none, with odd spaces now and then."""
    words = _WORDS.split(" ") + (list(LOOKALIKES) if lookalikes else [])
    return draw.choice(("", " ")).join(draw.choice(("", " ")) + w for w in draw.choices(words, k=draw.randrange(30)))


def conversations(count: int, *, seed: int = 0) -> list[list[dict[str, str]]]:
    """Conversations of one to three turns, some with a system prompt; what users write may look like control tokens,
    and answers begin with no space."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        turns = [{"role": "system", "content": message_text(draw, lookalikes=True)}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            turns.append({"role": "user", "content": message_text(draw, lookalikes=True)})
            turns.append({"role": "assistant", "content": message_text(draw, lookalikes=False).lstrip()})
        found.append(turns)
    return found


def texts(count: int = 60) -> list[str]:
    """Returns texts to train a tokenizer on; of other seeds than `conversations` by default."""
    return [message["content"] for turns in conversations(count, seed=10**6) for message in turns]


def rows_of(
    chat: ChatTokenizer, messages: Sequence[dict[str, Any]], options: TurnOptions = EVERY_TURN, **fields: Any
) -> list[EncodedConversation]:
    """The rows of one conversation, without a limit to their length."""
    encoder = TurnEncoder(chat, options)
    return encoder.tokenize([encoder.render(Conversation("c", "s", tuple(messages), **fields))], 1 << 30)[0].rows


def encode(chat: ChatTokenizer, messages: Sequence[dict[str, Any]], **fields: Any) -> EncodedConversation:
    """The one row of a conversation."""
    (row,) = rows_of(chat, messages, **fields)
    return row


def train_pieces(count: int) -> list[str]:
    """At most `count` pieces as SentencePiece orders them: those merged, the first merge first, and then characters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    plain = [text for text in texts() if not any(look in text for look in LOOKALIKES)]
    trained.train_from_iterator(plain, trainers.BpeTrainer(vocab_size=count, show_progress=False))
    vocab = trained.get_vocab()
    return sorted(vocab, key=lambda piece: (len(piece) == 1, vocab[piece]))


def piece_model(
    pieces: Sequence[str | tuple[str, int]],
    *,
    trainer: Mapping[int, Any] = {},
    normalizer: Mapping[int, Any] = {},
) -> bytes:
    """A `tokenizer.model` of Llama's kind: `<unk>`, `<s>`, `</s>`, the bytes, then `pieces`, a kind beside odd ones."""
    known = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *((f"<0x{i:02X}>", BYTE) for i in range(256))]
    named = [p if isinstance(p, tuple) else (p, 1) for p in (*known, *pieces)]
    scored = [_message({1: text.encode(), 2: -float(i), 3: kind}) for i, (text, kind) in enumerate(named)]
    about = [(2, _message({3: 2, 35: 1, **trainer})), (3, _message({1: b"identity", 3: 1, 4: 0, 5: 1, **normalizer}))]
    return b"".join(_field(number, value) for number, value in [*((1, piece) for piece in scored), *about])


def write_piece_folder(folder: Path, model: bytes, **config: Any) -> Path:
    """A folder as Vicuna's: `tokenizer.model`, and a config that names special tokens and no template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    return folder


def write_byte_folder(folder: Path, tokens: Sequence[str]) -> Path:
    """A folder of a byte-level tokenizer with the control tokens `tokens`, and no template."""
    tokenizer = train_bpe(texts(), size=500, special_tokens=SPECIAL_TOKENS)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    write_tokenizer_folder(folder, tokenizer)
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    if "<|begin_of_text|>" in tokens:
        config["bos_token"] = "<|begin_of_text|>"
    path.write_text(json.dumps(config))
    return folder


def _message(fields: Mapping[int, Any]) -> bytes:
    return b"".join(_field(number, value) for number, value in fields.items())


def _field(number: int, value: Any) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])
