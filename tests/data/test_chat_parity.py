"""Conversations as tokens, equal to those of transformers token for token, with every template that jaxspec has."""

from pathlib import Path
from typing import Any

import pytest
from tokenizer_toys import (
    CHATML_TOKENS,
    LLAMA_3_TOKENS,
    conversations,
    encode,
    texts,
    write_byte_folder,
    write_piece_folder,
)

from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.templates import TEMPLATES

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")
HELD_OUT = 2000


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A model of Llama's kind, trained by SentencePiece."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "trained"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(400)),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model").read_bytes()


def folder_for(name: str, path: Path, pieces: bytes, **config: Any) -> Path:
    if name == "llama-3":
        return write_byte_folder(path, LLAMA_3_TOKENS)
    return write_byte_folder(path, CHATML_TOKENS) if name == "chatml" else write_piece_folder(path, pieces, **config)


def assert_same_tokens(folder: Path, name: str, held_out: list) -> None:
    """Of the first 200 as prompts too."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(folder)), ChatTokenizer.load(folder, name)
    options = {"chat_template": TEMPLATES[name].text, "return_dict": False}
    for messages in held_out:
        # A row ends with the last answer's stop token.
        tokens = encode(ours, messages).tokens.tolist()
        assert theirs.apply_chat_template(messages, **options)[: len(tokens)] == tokens, messages
    for messages in held_out[:200]:
        wanted = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
        assert wanted == ours.encode_prompt(messages[:-1]).tolist(), messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_held_out_conversations_have_the_tokens_of_transformers(name: str, tmp_path: Path, pieces: bytes):
    held_out = conversations(HELD_OUT)
    assert len(held_out) == HELD_OUT
    assert_same_tokens(folder_for(name, tmp_path, pieces), name, held_out)


@pytest.mark.parametrize(
    "config", [{"legacy": True}, {"legacy": False}, {"legacy": True, "add_prefix_space": False}], ids=str
)
def test_spaces_of_pieces_are_those_of_transformers(config: dict[str, Any], tmp_path: Path, pieces: bytes):
    assert_same_tokens(folder_for("vicuna", tmp_path, pieces, **config), "vicuna", conversations(200, seed=1))


def test_plain_texts_have_the_tokens_of_sentencepiece(tmp_path: Path, pieces: bytes):
    ours = ChatTokenizer.load(write_piece_folder(tmp_path, pieces), "vicuna")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    for turns in conversations(200, seed=2):
        text = turns[-1]["content"]
        ids = theirs.encode(text)
        assert ours.encode(text).tolist() == ids and ours.decode(ids) == theirs.decode(ids), text
