"""Chat tokenizers: masks, prompts, streamed decoding, and folders that are not right."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizer_toys import encode, rows_of

from jaxspec.data.chat import ChatTokenizer, IncrementalDecoder, TemplateChoice
from jaxspec.data.chat_template import parse_variables
from jaxspec.data.tokenizer_training import CHAT_TEMPLATE, SPECIAL_TOKENS, train_bpe, write_tokenizer_folder
from jaxspec.data.turns import TurnEncoder

TEXTS = ["the cat sat on the mat and the dog ran after 12 cats", "naïve café 日本語 🙂", "if (a == b) return a;"] * 4
CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
FORGETFUL = (  # shows an assistant turn only while it is the last one, as templates that hide reasoning do
    "{% for message in messages %}{% if loop.last or message['role'] == 'user' %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

contents = st.text(max_size=20) | st.text(alphabet="🙂日é\u0301a \n<|>1", max_size=12)
conversations = st.lists(st.tuples(contents, contents), min_size=1, max_size=3).map(
    lambda turns: [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer_folder(path, train_bpe(TEXTS, size=290))
    return path


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatTokenizer:
    return ChatTokenizer.load(folder)


@pytest.fixture
def editable(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "tokenizer"))


def with_template(folder: Path, template: str) -> ChatTokenizer:
    (folder / "chat_template.jinja").write_text(template)
    return ChatTokenizer.load(folder)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@settings(max_examples=60, deadline=None)
@given(conversations)
def test_masked_tokens_decode_to_the_assistants_text_and_end_token(chat: ChatTokenizer, messages: list[dict[str, str]]):
    encoded = encode(chat, messages)
    # An empty answer is not learned: it would teach to stop at once.
    said = [m["content"] for m in messages if m["role"] == "assistant" and m["content"].strip()]
    wanted = "".join(text + "<|end|>" for text in said)
    assert chat.decode(encoded.tokens[encoded.assistant_mask], skip_special=False) == wanted


@settings(max_examples=50, deadline=None)
@given(conversations)
def test_the_mask_begins_right_behind_the_prompt(chat: ChatTokenizer, messages: list[dict[str, str]]):
    assume(messages[1]["content"].strip())
    encoded = encode(chat, messages)
    prompt = chat.encode_prompt(messages[:1])
    assert encoded.tokens[: len(prompt)].tolist() == prompt.tolist()
    assert not encoded.assistant_mask[: len(prompt)].any() and encoded.assistant_mask[len(prompt)]


def test_every_token_of_a_character_that_takes_several_is_masked(chat: ChatTokenizer):
    encoded = encode(chat, [{"role": "user", "content": "𝄞"}, {"role": "assistant", "content": "𝄞"}])
    assert len(chat.encode("𝄞")) > 1
    assert encoded.assistant_mask.sum() == len(chat.encode("𝄞")) + 1


@pytest.mark.parametrize("last", ["10000 is 4 too many", "padded  "])
def test_an_unfinished_conversation_ends_with_its_words(chat: ChatTokenizer, last: str):
    messages = [{"role": role, "content": last} for role in ("user", "assistant", "user", "assistant")]
    whole, cut = (encode(chat, messages, unfinished=flag) for flag in (False, True))
    assert whole.tokens[: len(cut.tokens)].tolist() == cut.tokens.tolist()
    assert chat.eos_id in whole.tokens[len(cut.tokens) :] and cut.assistant_mask[-1]
    assert cut.assistant_mask.tolist() == whole.assistant_mask[: len(cut.tokens)].tolist()
    assert chat.decode(cut.tokens).endswith(last.strip())


def test_an_unfinished_answer_that_the_template_rewrites_is_refused(editable: Path):
    chat = with_template(editable, CHATML.replace("message['content']", "message['content'] | upper"))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    with pytest.raises(ValueError, match="rewrites an unfinished answer"):
        encode(chat, messages, unfinished=True)


def test_white_space_behind_the_end_token_is_not_the_assistants(editable: Path):
    chat = with_template(editable, CHATML)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    encoded = encode(chat, messages)
    assert chat.decode(encoded.tokens[encoded.assistant_mask], skip_special=False) == "b<|end|>"


def test_begin_token_is_not_doubled(chat: ChatTokenizer):
    assert chat.encode_prompt([{"role": "user", "content": "hi"}]).tolist().count(chat.bos_id) == 1


def test_a_generation_tag_renders_as_its_body(editable: Path):
    tagged = CHAT_TEMPLATE.replace(
        "message['content'] + eos_token }}",
        "'' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}",
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert with_template(editable, tagged).render(messages) == "<|begin|><|user|>a<|end|><|assistant|>b<|end|>"


def test_a_template_that_rewrites_earlier_turns_gives_a_row_a_turn(editable: Path):
    chat = with_template(editable, FORGETFUL)
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    rows = rows_of(chat, messages)
    assert [chat.decode(row.tokens, skip_special=False) for row in rows] == [
        "<|user|>a<|end|><|assistant|>b<|end|>",
        "<|user|>a<|end|><|user|>c<|end|><|assistant|>d<|end|>",
    ]
    assert [chat.decode(row.tokens[row.assistant_mask]) for row in rows] == ["b", "d"]


def test_what_the_template_refuses_is_a_value_error(editable: Path):
    chat = with_template(editable, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"):
        chat.render([{"role": "user", "content": "a"}])


def test_a_template_cannot_reach_python(editable: Path):
    chat = with_template(editable, "{{ ''.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="refused"):
        chat.render([])


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="🙂日é\u0301a \n1𝄞", max_size=20), st.integers(1, 5))
def test_streamed_pieces_join_to_the_text_and_none_is_broken(chat: ChatTokenizer, text: str, step: int):
    ids = chat.encode(text)
    decoder = IncrementalDecoder(chat)
    pieces = [decoder.push(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) == text and decoder.flush() == ""


def test_a_stream_that_ends_inside_a_character_is_flushed(chat: ChatTokenizer):
    decoder = IncrementalDecoder(chat)
    assert decoder.push(chat.encode("𝄞")[:-1]) == ""
    assert "\N{REPLACEMENT CHARACTER}" in decoder.flush()


def test_stop_ids_include_those_of_the_generation_config(editable: Path):
    (editable / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert ChatTokenizer.load(editable).stop_ids == (1, 2)


def test_special_tokens_and_templates_are_read_in_every_form_huggingface_writes(editable: Path):
    (editable / "chat_template.jinja").unlink()
    edit_config(
        editable, bos_token={"content": "<|begin|>"}, chat_template=[{"name": "default", "template": "{{ bos_token }}"}]
    )
    assert ChatTokenizer.load(editable).render([]) == "<|begin|>"


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        ChatTokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(editable: Path, name: str):
    (editable / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        ChatTokenizer.load(editable)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_not_json_is_named(editable: Path, name: str):
    (editable / name).write_text("{")
    with pytest.raises(ValueError, match=name):
        ChatTokenizer.load(editable)


def test_a_missing_template_is_an_error(editable: Path):
    (editable / "chat_template.jinja").unlink()
    edit_config(editable, chat_template=None)
    with pytest.raises(ValueError, match="has no chat template"):
        ChatTokenizer.load(editable)


def test_a_template_that_does_not_parse_is_an_error(editable: Path):
    with pytest.raises(ValueError, match="does not parse"):
        with_template(editable, "{% for %}")


@pytest.mark.parametrize(
    ("value", "match"), [(None, "`eos_token` is missing"), ("<nowhere>", "`eos_token` is '<nowhere>'")]
)
def test_a_wrong_end_token_is_named(editable: Path, value: str | None, match: str):
    edit_config(editable, eos_token=value)
    with pytest.raises(ValueError, match=match):
        ChatTokenizer.load(editable)


def test_training_a_tokenizer_twice_gives_the_same():
    assert train_bpe(TEXTS, size=290).to_str() == train_bpe(TEXTS, size=290).to_str()


def test_a_trained_tokenizer_has_the_size_asked_for_and_its_special_tokens_first(chat: ChatTokenizer):
    assert chat.vocab_size == 290
    assert [chat.tokenizer.id_to_token(i) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)


def test_digits_stand_alone():
    chat = train_bpe(["12 12 12 12 12 123 123"] * 9 + TEXTS, size=280)
    assert [t for t in chat.encode("12").tokens] == ["1", "2"]


@pytest.mark.parametrize(("size", "match"), [(100, "at least 262"), (5000, "yield only")])
def test_a_size_that_cannot_be_reached_is_an_error(size: int, match: str):
    with pytest.raises(ValueError, match=match):
        train_bpe(TEXTS, size=size)


def test_encoded_conversations_are_int32_and_bool(chat: ChatTokenizer):
    encoded = encode(chat, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}])
    assert encoded.tokens.dtype == np.int32 and encoded.assistant_mask.dtype == np.bool_


@pytest.mark.parametrize("place", ["tokenizer_config.json", "added_tokens.json", "extra_special_tokens"])
def test_added_tokens_are_read_wherever_a_folder_keeps_them(editable: Path, place: str):
    if place == "tokenizer_config.json":
        edit_config(editable, added_tokens_decoder={"290": {"content": "<tool>", "special": True}})
    elif place == "added_tokens.json":
        (editable / place).write_text(json.dumps({"<tool>": 290}))
    else:
        edit_config(editable, extra_special_tokens=["<tool>"])
    chat = ChatTokenizer.load(editable)
    assert chat.encode("a<tool>b").tolist()[1] == 290 and chat.vocab_size == 291
    with pytest.raises(ValueError, match=r"its token '<tool>' has the id 290, and the target's embedding has 290 rows"):
        chat.check_ids(290)
    chat.check_ids(291)


def test_added_tokens_that_contradict_the_vocabulary_are_of_another_model(editable: Path):
    edit_config(editable, added_tokens_decoder={"300": {"content": "<tool>", "special": True}})
    with pytest.raises(ValueError, match="'<tool>' would get the id 290, and the added tokens beside it say 300"):
        ChatTokenizer.load(editable)


def test_raw_text_begins_as_the_tokenizer_begins_it(editable: Path):
    assert ChatTokenizer.load(editable).encode_raw("a")[0] == 0
    written = json.loads((editable / "tokenizer.json").read_text())
    (editable / "tokenizer.json").write_text(json.dumps(written | {"post_processor": None}))
    chat = ChatTokenizer.load(editable)
    assert chat.bos_id == 0 and chat.encode_raw("a").tolist() == chat.encode("a").tolist()
    assert chat.encode_text("a").tokens.tolist() == [*chat.encode("a"), chat.eos_id]


def test_an_end_that_is_no_stop_id_is_told(editable: Path):
    ended = CHATML.replace("<|end|>", "<|pad|>")
    assert TurnEncoder(with_template(editable, ended)).unmarked_end() == "<|pad|>"
    assert TurnEncoder(with_template(editable, CHATML)).unmarked_end() is None
    row = encode(with_template(editable, ended), [{"role": r, "content": r} for r in ("user", "assistant")])
    assert with_template(editable, ended).decode(row.tokens, skip_special=False).endswith("assistant<|pad|>")


def test_names_that_a_template_is_not_given_are_those_of_transformers(editable: Path):
    told = "{% if tools is not none %}TOOLS{% endif %}{% if documents is not none %}DOCS{% endif %}"
    told += "{% if sep_token is defined %}SEP{% endif %}{{ bos_token }}"
    assert with_template(editable, told).render([{"role": "user", "content": "a"}]) == "<|begin|>"


def test_variables_of_a_template_are_set_and_unknown_ones_refused(editable: Path):
    (editable / "chat_template.jinja").write_text("{{ mood | default('calm') }}{{ strftime_now('%d %b %Y') }}")
    chosen = TemplateChoice(None, parse_variables("mood=angry"), "2026-01-02")
    chat = ChatTokenizer.load(editable, chosen)
    assert chat.render([]) == "angry02 Jan 2026"
    assert chat.render([], variables={"mood": "mild"}).startswith("mild")
    prints = {ChatTokenizer.load(editable, chosen._replace(date=day)).fingerprint["template"] for day in DAYS}
    assert len(prints) == 2
    with pytest.raises(ValueError, match="the chat template does not read 'mod'; it reads mood"):
        ChatTokenizer.load(editable, TemplateChoice(None, parse_variables("mod=angry")))
    with pytest.raises(ValueError, match="date is 'tomorrow'; it must be a day such as"):
        ChatTokenizer.load(editable, TemplateChoice(None, (), "tomorrow"))
    with pytest.raises(ValueError, match="template arguments are 'mood'"):
        parse_variables("mood")
    with pytest.raises(ValueError, match="template arguments are 'mood='"):
        parse_variables("mood=")
    found = dict(parse_variables("a=False,b=TRUE,c=None,d=no,e=1"))
    assert found == {"a": False, "b": True, "c": None, "d": "no", "e": 1}


DAYS = ("2026-01-01", "2026-01-02")
