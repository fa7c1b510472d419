"""Hand-made evaluations for tests of reports: files of rows of three arms, with the bundled target's tokens."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxspec.data.chat import ChatTokenizer
from jaxspec.evaluation.rows import FORMAT, PLAIN, Row, to_record
from jaxspec.interchange.target_folders import target_folder
from jaxspec.report.documents import renew

DEPTH = 3
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {"drafter": None, "tree": None, "nodes": 1, "depth": 0, "rule": None, "cost": 0.0},
    "chain:3": {"drafter": "head", "tree": "chain:3", "nodes": 4, "depth": DEPTH, "rule": "target-draw", "cost": 0.1},
    "wide": {
        "drafter": "head",
        "tree": "dynamic:8x3x3",
        "nodes": 8,
        "depth": DEPTH,
        "rule": "target-draw",
        "cost": 0.2,
    },
}
TASKS = ("math_reasoning", "translation", "qa")
SECONDS = {PLAIN: 0.010, "chain:3": 0.015, "wide": 0.030}
"""Of a target call of a batch of one."""


@functools.cache
def tiny_tokenizer() -> ChatTokenizer:
    return ChatTokenizer.load(target_folder("tiny"))


@functools.cache
def some_tokens() -> list[int]:
    text = "The cat sat on the mat, and 12 dogs ran after it: naïve 日本語 🙂. " * 12
    return [int(i) for i in tiny_tokenizer().encode(text)]


def settings(**changes: Any) -> dict[str, Any]:
    """The first line of a file of rows."""
    known = tiny_tokenizer()
    return {
        "format": FORMAT,
        "target": "tiny",
        "target_weights": "w",
        **known.fingerprint,
        "prompts": "question.jsonl",
        "prompts_sha256": "p",
        "questions": 12,
        "limit": None,
        "dtype": "fp32",
        "max_new_tokens": 512,
        "max_positions": 8192,
        "temperatures": [0.0],
        "passes": [[0.0, 0]],
        "asked": [["q0", "qa", 1]],
        "batch": 1,
        "repeats": 3,
        "stop_ids": list(known.stop_ids),
        "machine": {"cpu": "a processor", "cores": 2, "accelerator": None},
        "arms": ARMS,
        **changes,
    }


def answer_rows(id: str, task: str, chances: Mapping[str, float], *, seed: int = 0, **fields: Any) -> list[Row]:
    """An answer of every arm; each accepts drafted tokens with its chance, and all have the same tokens."""
    rng = random.Random(f"{id} {seed}")
    length, found = rng.randint(100, 180), []
    tokens, slow = [*some_tokens()[: length - 1], tiny_tokenizer().stop_ids[0]], rng.uniform(0.8, 1.2)
    prompt = rng.choice((30, 90, 300))
    for arm, facts in ARMS.items():
        emitted, accepted, left = [], [], length - 1
        while left:
            a = 0
            while a < facts["depth"] and rng.random() < chances[arm]:
                a += 1
            emitted.append(min(a + 1, left))
            accepted.append(a)
            left -= emitted[-1]
        seconds = tuple(len(emitted) * SECONDS[arm] * slow * rng.uniform(0.95, 1.05) for _ in range(3))
        about: dict[str, Any] = {"id": id, "task": task, "arm": arm, "prompt_tokens": prompt}
        about |= {"prompt_hash": id, "tokens": tuple(tokens), "finish": "stop", "group": f"from {id}"}
        about |= {"emitted": tuple(emitted), "accepted": tuple(accepted), "group_calls": len(emitted)}
        about |= {"drafted": (facts["nodes"] - 1,) * len(emitted), "levels": (facts["depth"],) * len(emitted)}
        about |= {"prefill_seconds": (0.01, 0.011, 0.012), "decode_seconds": seconds, "identical": True}
        about["wall_seconds"] = tuple(map(sum, zip(about["prefill_seconds"], seconds, strict=True)))
        found.append(Row(**{**about, **fields}))
    return found


def some_rows(per_task: int = 4, *, temperature: float = 0.0, tasks: Sequence[str] = TASKS) -> list[Row]:
    """Rows of several tasks, from easy to hard ones."""
    found = []
    for place, task in enumerate(tasks):
        for number in range(per_task):
            chance = 0.85 - 0.35 * place - 0.02 * number
            chances = {PLAIN: 0.0, "chain:3": chance, "wide": min(0.95, chance + 0.05)}
            found += answer_rows(f"{task[0]}{number}", task, chances, temperature=temperature)
    return found


def failed_rows(id: str, task: str, error: str = "is empty", **fields: Any) -> list[Row]:
    """A turn that no arm could answer."""
    return [Row(id=id, task=task, arm=arm, error=error, **fields) for arm in ARMS]


def write_rows(folder: Path, rows: Sequence[Row], **changes: Any) -> Path:
    """Writes a file of rows; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = {row.id: [row.id, row.task, 1 + max(r.turn for r in rows if r.id == row.id)] for row in rows}
    passes = sorted({(row.temperature, row.seed) for row in rows})
    named = {"asked": list(asked.values()), "passes": [list(one) for one in passes]} if rows else {}
    lines = [settings(**named | changes), *map(to_record, rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def bench_result(path: Path, **changes: Any) -> Path:
    """Writes a result of `bench decode` with the parts of rounds of two arms, and one that has none."""
    parts = {"draft_ms": 2.0, "target_ms": 10.0, "verify_ms": 0.5, "commit_ms": 0.5, "overhead_ms": -0.25}
    rows: list[dict[str, Any]] = [
        {"arm": "plain", "batch": 1, "tau": 1.0, "round_ms": 9.0, **{**parts, "draft_ms": 0.0}},
        {"arm": "chain:3", "batch": 1, "tau": 2.5, "round_ms": 12.75, **parts},
        {"arm": "wide", "batch": 1, "tau": 2.8, "round_ms": None, **dict.fromkeys(parts)},
    ]
    value = {"command": "bench decode", "machine": {"accelerator": None, "cpu": "a processor"}, "rows": rows}
    path.write_text(json.dumps({**value, **changes}), encoding="utf-8")
    return path


def lab_table(path: Path) -> Path:
    """Writes a result of `lab table` with trees for batches of 1 and 64."""
    rows = [
        {"batch": b, "nodes": n, "expected_tau": 1 + n / 10, "predicted_tokens_per_second": 100.0 * n}
        for b in (1, 64)
        for n in (4, 16)
    ]
    path.write_text(json.dumps({"command": "lab table", "rows": rows}), encoding="utf-8")
    return path


def table_of(folder: Path, words: str, **results: Mapping[str, Any]) -> list[str]:
    """Writes results as files of their names, and a document with a table; returns its lines, with one for the
    sentence below."""
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    document = folder / "page.md"
    document.write_text(f"<!-- table: {words} -->\n<!-- end -->\n", encoding="utf-8")
    renew(document, write=True)
    lines = document.read_text(encoding="utf-8").splitlines()[2:-2]
    end = lines.index("")
    return [*lines[:end], " ".join(lines[end + 1 :])]
