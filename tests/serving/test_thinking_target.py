"""A Qwen3-shaped target that thinks, does not, or does both: answered, learned and decoded, over several turns."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_toys import CHATML_TOKENS, write_byte_folder

from jaxspec.__main__ import main
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import read_conversations
from jaxspec.data.emitted import message_of, split_calls
from jaxspec.data.turns import TurnEncoder
from jaxspec.serving.regeneration import parse_template_mix

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

# Shows thoughts behind the last user's turn alone, and closes the block itself where thinking is switched off.
TEMPLATE = (
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last -%}"
    "{{ '<think>\\n' + m.reasoning_content.strip() + '\\n</think>\\n\\n' }}{%- endif -%}"
    "{{ m.content + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}{%- endif -%}"
)
CONFIG = """
from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig

config = DistillConfig(
    name="toy", target="target",
    data=DataConfig("answers.jsonl", "answers.jsonl", length=128, batch=8, loss_on="assistant"),
    optimizer=OptimizerConfig(peak_lr=1e-3, steps=2), checkpoint=CheckpointConfig("run"), export_folder="drafter",
)
"""
MODES = {
    "on": ("--template-args", "enable_thinking=true"),
    "off": ("--template-args", "enable_thinking=false"),
    "mixed": ("--template-mix", "enable_thinking=true:3,enable_thinking=false:1"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("thinking")
    write_byte_folder(path / "target", (*CHATML_TOKENS, "<think>", "</think>"))
    (path / "target" / "chat_template.jinja").write_text(TEMPLATE)
    vocab = ChatTokenizer.load(path / "target").vocab_size
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=False, eos_token_id=1,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(path / "target")
    stop = ChatTokenizer.load(path / "target").tokenizer.token_to_id("<|im_end|>")
    (path / "target" / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "x"}]
    lines = [{"id": str(i), "messages": [*turns, {"role": "user", "content": f"and {i}"}]} for i in range(8)]
    (path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "toy.py").write_text(CONFIG)
    return path


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_learned_behind_the_prompts_that_the_target_was_shown(
    folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(folder)
    for stale in ("answers.jsonl", "answers.jsonl.state"):
        Path(stale).unlink(missing_ok=True)
    flags = ["--target", "target", "--prompts", "prompts.jsonl", "--out", "answers.jsonl", "--max-new-tokens", "12"]
    assert main(["regenerate", *flags, "--temperature", "1", "--keep-unfinished", "--batch", "4", *MODES[mode]]) == 0
    read = read_conversations("answers.jsonl")
    chat = ChatTokenizer.load("target")
    shown = {c.variables["enable_thinking"] for c in read}
    assert shown == {"on": {True}, "off": {False}, "mixed": {True, False}}[mode]
    encoder = TurnEncoder(chat)
    for c in read:
        assert c.stored and c.made_with["tokenizer"] == chat.fingerprint["tokenizer"]
        rows = encoder.tokenize([encoder.render(c)], 1 << 30)[0].rows
        learned = [t for row in rows for t in row.tokens[row.assistant_mask].tolist()]
        assert learned == [t for answer in c.stored for t in answer.answer_ids]
        first = list(c.stored[0].prompt_ids or ())
        assert rows[0].tokens[: len(first)].tolist() == first
        closed = "</think>" in chat.decode(first, skip_special=False)
        assert closed == (not c.variables["enable_thinking"])
    run, drafter = f"checkpoint.folder=run_{mode}", f"export_folder=drafter_{mode}"
    assert main(["train", "toy.py", run, drafter]) == 0
    words = ["--target", "target", "--drafter", f"drafter_{mode}", "--tree", "chain:2", "--max-new-tokens", "8"]
    told = ["--template-args", "enable_thinking=false"] if mode == "off" else []
    capsys.readouterr()
    assert main(["generate", "--prompts", "prompts.jsonl", *words, *told, "--json", f"{mode}.json"]) == 0
    drafted = json.loads(Path(f"{mode}.json").read_text())
    assert main(["generate", "--prompts", "prompts.jsonl", *words[:2], *words[6:], *told, "--json", "plain.json"]) == 0
    plain = json.loads(Path("plain.json").read_text())
    assert [row["text"] for row in drafted["rows"]] == [row["text"] for row in plain["rows"]]


def test_what_was_emitted_becomes_a_message(folder: Path):
    chat = ChatTokenizer.load(folder / "target")

    def message(text: str, **told: Any) -> dict[str, Any]:
        return message_of(chat, chat.encode(text).tolist(), **told)

    assert message("hi there") == {"role": "assistant", "content": "hi there"}
    assert message("<think>\nwhy\n</think>\n\nso") == {"role": "assistant", "content": "so", "reasoning_content": "why"}
    assert message("why\n</think>\n\nso", opened=True)["reasoning_content"] == "why"
    assert message("<think>\nnot done") == {"role": "assistant", "content": "", "reasoning_content": "not done"}
    calls = {
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>': {"x": 1},
        "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>": {"x": 1},
        "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>two</arg_value>\n</tool_call>": {"x": "two"},
        '{"name": "f", "parameters": {"x": 1}}': {"x": 1},
    }
    for text, arguments in calls.items():
        content, (call,) = split_calls(text)
        assert (content, call["function"]) == ("", {"name": "f", "arguments": arguments})
        assert message(text, tools=True)["tool_calls"][0]["function"]["name"] == "f"
        assert "tool_calls" not in message(text)
    for text in ("[" * 99_999, "<tool_call>{</tool_call>", '{"a": 1}', "[1]", "say <tool_call>"):
        assert split_calls(text) == (text, [])


def test_a_mix_of_variables_that_the_template_does_not_read_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--target", str(folder / "target"), "--prompts", str(folder / "prompts.jsonl"), "--max-new-tokens", "4"]
    assert main(["regenerate", *words, "--template-mix", "thinking=true:1", "--out", str(tmp_path / "o.jsonl")]) == 1
    said = capsys.readouterr().err
    assert "--template-mix: the chat template does not read 'thinking'; it reads enable_thinking" in said
    assert not list(tmp_path.iterdir())
    twice = ["--template-args", "enable_thinking=true", "--template-mix", "enable_thinking=false:1"]
    with pytest.raises(SystemExit):
        main(["regenerate", *words, *twice, "--out", str(tmp_path / "o.jsonl")])
    said = " ".join(capsys.readouterr().err.split())
    assert "--template-args and --template-mix both set enable_thinking: give it in one of them" in said


def test_mixes_are_drawn_by_weight_and_wrong_ones_refused():
    mix = parse_template_mix("enable_thinking=true:3,enable_thinking=false:1")
    drawn = [mix.draw(5, i)["enable_thinking"] for i in range(400)]
    assert 0.65 < sum(drawn) / 400 < 0.85 and drawn == [mix.draw(5, i)["enable_thinking"] for i in range(400)]
    wrong = (
        "enable_thinking",
        "a=1:x",
        "a=1:-1",
        ":2",
        "a=1:0",
        "=1:1",
        "a=1,,b=2",
        "a=1,a=1:2",
        "a=1:nan",
        "a=:1",
        "",
    )
    for text in wrong:
        with pytest.raises(ValueError, match="--template-mix is"):
            parse_template_mix(text)
