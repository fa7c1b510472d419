"""SentencePiece files: their tokens, spaces and bytes, tokens added beside them, and files that are not right."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_toys import BYTE, CONTROL, USER_DEFINED, piece_model, train_pieces, write_piece_folder

from jaxspec.data.chat import NO_TEMPLATE, ChatTokenizer, IncrementalDecoder
from jaxspec.data.sentencepiece_model import read_piece_model

PIECES = ["ab", "▁a", "bc", "▁ab", "▁▁", "▁", "a", "b", "c"]
FIRST = 259  # the id of the first of them


def load(folder: Path, pieces: list = PIECES, template: str = NO_TEMPLATE, **config: object) -> ChatTokenizer:
    return ChatTokenizer.load(write_piece_folder(folder, piece_model(pieces), **config), template)


def pieces_of(chat: ChatTokenizer, text: str) -> list[str | None]:
    return [chat.tokenizer.id_to_token(i) for i in chat.encode(text).tolist()]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("abc", ["▁ab", "c"]),  # "ab" has the lowest id, "▁a" and "bc" come later
        ("cab", ["▁", "c", "ab"]),
        (" abc", ["▁ab", "c"]),  # no second space is put in front
        ("bc  a", ["▁", "bc", "▁", "▁a"]),
        ("é\n", ["▁", "<0xC3>", "<0xA9>", "<0x0A>"]),
        ("a</s>b", ["▁a", "</s>", "b"]),
        ("<0x0A>", ["▁", *(f"<0x{ord(c):02X}>" for c in "<0x0A>")]),  # the name of a byte is not the byte
        ("", []),
    ],
)
def test_pieces_of_the_lowest_id_are_merged_first_and_what_is_unknown_is_bytes(tmp_path, text, tokens):
    assert pieces_of(load(tmp_path), text) == tokens


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, ["<s>", "a", "</s>", "b"]),
        ({"legacy": False}, ["<s>", "a", "</s>", "b"]),
        ({"legacy": True}, ["<s>", "▁a", "</s>", "▁", "b"]),
        ({"legacy": True, "add_prefix_space": False}, ["<s>", "a", "</s>", "b"]),
    ],
)
def test_a_space_is_put_behind_special_tokens_in_the_legacy_form_only(tmp_path, config, tokens):
    assert pieces_of(load(tmp_path, **config), "<s>a</s>b") == tokens


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load(tmp_path_factory.mktemp("pieces"), train_pieces(120), legacy=True)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20).filter(lambda text: "▁" not in text and "<" not in text), st.integers(1, 3))
def test_texts_come_back_whole_and_in_pieces(trained: ChatTokenizer, text: str, step: int):
    ids, decoder = trained.encode(text), IncrementalDecoder(trained)
    streamed = "".join(decoder.push(ids[i : i + step]) for i in range(0, len(ids), step)) + decoder.flush()
    assert trained.decode(ids) == streamed == (text[1:] if text.startswith(" ") else text)


def test_special_tokens_are_those_of_the_file_where_the_config_names_none(tmp_path):
    chat = load(tmp_path, bos_token=None)
    assert (chat.bos_id, chat.eos_id, chat.pad_id, chat.vocab_size) == (None, 2, 2, FIRST + len(PIECES))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert ChatTokenizer.load(tmp_path, NO_TEMPLATE).bos_id == 1


def test_control_pieces_are_special_and_user_defined_ones_whole(tmp_path):
    chat = load(tmp_path, [*PIECES, ("[x]", USER_DEFINED), ("<sep>", CONTROL)])
    assert pieces_of(chat, "a[x]<sep>") == ["▁a", "[x]", "<sep>"]
    assert chat.decode(chat.encode("a[x]<sep>")) == "a[x]"


def test_tokens_are_added_as_the_config_says(tmp_path):
    index = FIRST + len(PIECES)
    chat = load(tmp_path, pad_token="<pad>", added_tokens_decoder={str(index): {"content": "<pad>", "special": True}})
    assert chat.pad_id == index and pieces_of(chat, "a<pad>") == ["▁a", "<pad>"]


def test_tokens_are_added_as_the_files_of_older_folders_say(tmp_path):
    index = FIRST + len(PIECES)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": index}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    chat = load(tmp_path)
    assert chat.pad_id == index and pieces_of(chat, "a<pad>") == ["▁a", "<pad>"]


def test_an_added_token_of_another_id_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'<pad>' would get the id 268, and the added tokens beside it say 300"):
        load(tmp_path, added_tokens_decoder={"300": {"content": "<pad>"}})


def test_a_list_of_added_tokens_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="its list of added tokens is not one of tokens with their ids"):
        load(tmp_path, added_tokens_decoder={"300": "<pad>"})


def test_a_tokenizer_json_is_preferred(tmp_path):
    chat = load(tmp_path, legacy=True)
    chat.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert pieces_of(ChatTokenizer.load(tmp_path, NO_TEMPLATE), "<s>a") == ["<s>", "▁a"]


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (piece_model(PIECES, trainer={3: 1}), "not BPE"),
        (piece_model(PIECES, normalizer={2: b"x"}), "normalizes characters"),
        (piece_model(PIECES, normalizer={4: 1}), "drops spaces"),
        (piece_model(PIECES, trainer={24: 1}), "marks spaces in another way"),
        (piece_model([("<0x100>", BYTE)]), "bytes that are not 256"),
        (b"", "not a whole SentencePiece model"),
        (b"IQ== 0\nIg== 1\n", "not a whole SentencePiece model"),  # tiktoken's, as Llama-3's is
        (b"\xff" * 1000, "not a whole SentencePiece model"),
    ],
)
def test_other_models_are_refused_with_what_to_do(tmp_path, model, match):
    (tmp_path / "tokenizer.model").write_bytes(model)
    with pytest.raises(ValueError, match=f"tokenizer.model: .*({match}).*save_pretrained"):
        read_piece_model(tmp_path / "tokenizer.model")


def test_a_torn_file_is_refused_wherever_it_ends(tmp_path):
    whole, path = piece_model(PIECES), tmp_path / "tokenizer.model"
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"tokenizer\.model: "):
            read_piece_model(path)
