"""Questions of evaluation sets: one turn or several, each turn asked when the one before has been answered.

Files: Spec-Bench's `question.jsonl`, SPEED-Bench's prepared files (JSON Lines or parquet), NeMo-Skills' lines with a
user message a turn, `speculator_benchmarks` (field `prompt`), and every file of prompts that `read_prompts` takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxspec.data.messages import Message, decode_line, text_bytes
from jaxspec.data.prompts import Prompt, parse_prompt, read_prompts

MT_BENCH = frozenset(("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"))
"""Categories of MT-Bench, which Spec-Bench's reports take as one task, `mt_bench`."""
SPEC_BENCH = frozenset(("translation", "summarization", "qa", "math_reasoning", "rag"))
"""The other tasks of Spec-Bench: a file that has all of them is Spec-Bench's."""


class Question(NamedTuple):
    """A conversation that the target answers turn by turn."""

    prompt: Prompt
    """The first turn: the conversation before the first answer."""
    further: tuple[tuple[Message, ...], ...] = ()
    """Messages that follow the first answer, the second ..; the answers between them are the target's own."""

    @property
    def task(self) -> str:
        """The category that results are told apart by."""
        return self.prompt.source

    @property
    def turns(self) -> int:
        """Number of answers."""
        return 1 + len(self.further)

    def asked(self, answers: Sequence[str]) -> Prompt:
        """Returns the prompt of the turn behind these answers."""
        messages = list(self.prompt.messages)
        for answer, more in zip(answers, self.further, strict=False):
            messages += [{"role": "assistant", "content": answer}, *more]
        return self.prompt._replace(messages=tuple(messages))


def read_questions(path: str | Path, *, limit: int | None = None) -> list[Question]:
    """Returns the questions of a file in file order, at most `limit` of every task.

    A line that cannot be used becomes a question whose prompt has a `problem`. The task of a line without a category
    is the file's stem. Raises ValueError if there is no such file, nothing in it, or it is parquet and pyarrow is not
    installed.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        found = [_of_record(row, str(n)) for n, row in enumerate(_read_parquet(path), 1)]
        found = [q._replace(prompt=q.prompt._replace(place=f"{path}:{n}")) for n, q in enumerate(found, 1)]
    else:
        found = [_of_prompt(prompt, line) for prompt, line in zip(read_prompts(path), _lines(path), strict=True)]
    found = [_in_task(question, question.task or path.stem) for question in found]
    if {question.task for question in found} >= SPEC_BENCH:
        found = [_in_task(q, "mt_bench") if q.task in MT_BENCH else q for q in found]
    return _first_of_each_task(found, limit)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a parquet file."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path}: parquet needs pyarrow, which is not installed: pip install pyarrow, or give JSON Lines"
        ) from None
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give JSON Lines, parquet, or plain text with one prompt a line")
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is not a parquet file that can be read ({error})") from error


def _lines(path: Path) -> list[bytes]:
    """Returns the lines that `read_prompts` makes a prompt of each."""
    return [line for line in text_bytes(path.read_bytes(), path).splitlines() if line.strip()]


def _of_prompt(prompt: Prompt, line: bytes) -> Question:
    """Returns the question of a line, whose prompt is what `read_prompts` made of it."""
    try:
        record = json.loads(decode_line(line))
    except (ValueError, RecursionError):
        return Question(prompt)
    if not isinstance(record, dict):
        return Question(prompt)
    question = _of_record(record, prompt.id)
    return question._replace(prompt=question.prompt._replace(place=prompt.place))


def _of_record(record: Mapping[str, Any], id: str) -> Question:
    """Returns the question of a record of any of the forms."""
    fields = dict(record)
    name = fields.pop("question_id", None)
    if name is not None and fields.get("id") is None:
        fields["id"] = name
    # `category` is what Spec-Bench, SPEED-Bench and their like report by.
    task = fields.pop("category", None) or fields.pop("task", None)
    if "turns" in fields and not {"messages", "conversations", "prompt"} & fields.keys():
        turns = fields.pop("turns")
        if not isinstance(turns, list | tuple) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
            bad = Prompt(str(fields.get("id") or id), (), "has `turns` that are not texts", source=str(task or ""))
            return Question(bad)
        fields["messages"] = [{"role": "user", "content": turn} for turn in turns]
    prompt = parse_prompt(json.dumps(fields, default=str), id)
    prompt = prompt._replace(source=str(task) if task else prompt.source)
    first, further = _split(prompt.messages)
    return Question(prompt._replace(messages=first), further)


def _split(messages: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], ...]]:
    """Returns the messages of the first turn, and of every further one: users' messages that stand at the end alone."""
    # Two user messages in a row are two turns: nothing but an answer can stand between them.
    at = [i for i in range(1, len(messages)) if messages[i]["role"] == messages[i - 1]["role"] == "user"]
    ends = [*at, len(messages)]
    parts = [tuple(messages[a:b]) for a, b in zip([0, *at], ends, strict=True)]
    return parts[0], tuple(parts[1:])


def _in_task(question: Question, task: str) -> Question:
    return question._replace(prompt=question.prompt._replace(source=task))


def _first_of_each_task(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Returns the first `limit` questions of every task."""
    seen: dict[str, int] = {}
    found = []
    for question in questions:
        seen[question.task] = seen.get(question.task, 0) + 1
        if limit is None or seen[question.task] <= limit:
            found.append(question)
    return found
