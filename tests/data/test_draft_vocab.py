"""Draft vocabularies: what is counted, the maps that travel, and the verb that makes them."""

import json

import numpy as np
import pytest
from random_models import write_target
from safetensors.numpy import load_file, save_file

from jaxspec.__main__ import main
from jaxspec.data.corpus import Corpus
from jaxspec.data.draft_vocab import (
    Frequencies,
    count_halves,
    count_tokens,
    load_maps,
    save_maps,
    together,
    unseen_coverage,
)


def corpus(tokens: list[int], spoken: list[bool]) -> Corpus:
    n = len(tokens)
    return Corpus(
        np.array(tokens, np.int32), np.array(spoken), np.array([0, n]), np.zeros(1, np.int32), ("",), ("a",),
        np.zeros(1, bool),
    )  # fmt: skip


def test_the_commonest_tokens_are_the_assistants_in_ascending_order():
    found = count_tokens(corpus([7, 7, 7, 3, 3, 9, 5, 5, 1, 1, 1, 1], [True] * 8 + [False] * 4), 12)
    assert found.commonest(3).tolist() == [3, 5, 7] and found.commonest(1).tolist() == [7]
    assert found.commonest(99).tolist() == [3, 5, 7, 9]
    assert found.coverage(found.commonest(3)) == 7 / 8


def test_coverage_of_unseen_answers_is_that_of_tokens_chosen_by_the_other_documents():
    texts = [[1, 1, 1, 2], [2, 2, 3], [1, 4, 4], [2, 5]]
    tokens, ends = np.concatenate(texts), np.cumsum([0, *map(len, texts)])
    each = (np.zeros(4, np.int32), ("",), ("a", "b", "c", "d"), np.zeros(4, bool))
    halves = count_halves(Corpus(tokens.astype(np.int32), np.ones(len(tokens), bool), ends, *each), 8)
    assert [half.times_V[1:6].tolist() for half in halves] == [[4, 1, 0, 2, 0], [0, 3, 1, 0, 1]]
    assert together(halves).times_V.tolist() == np.bincount(tokens, minlength=8).tolist()
    assert unseen_coverage(halves, 1) == (1 * 1 + 0) / 12  # 2 of the first half, 1 of the second
    assert unseen_coverage(halves, 2) == ((1 + 0) + 0) / 12 and unseen_coverage(halves, 9) == (1 + 3) / 12
    assert unseen_coverage((halves[0], Frequencies(np.zeros(8, np.int64))), 2) is None


def test_ties_go_to_the_lower_id():
    assert Frequencies(np.array([0, 2, 5, 2, 2])).commonest(2).tolist() == [1, 2]


def test_maps_are_offsets_and_a_mask_and_come_back(tmp_path):
    tokens, path = np.array([1, 4, 5, 9], np.int32), tmp_path / "new" / "v.safetensors"
    save_maps(path, tokens, 12)
    stored = load_file(str(path))
    assert stored["d2t"].tolist() == [1, 3, 3, 6] and np.flatnonzero(stored["t2d"]).tolist() == tokens.tolist()
    assert load_maps(path, 12).tolist() == tokens.tolist()
    assert [p.name for p in path.parent.iterdir()] == ["v.safetensors"]


def test_maps_that_cannot_be_are_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    with pytest.raises(ValueError, match="no such file; `jaxspec draft-vocab` makes one"):
        load_maps(path, 12)
    save_maps(path, np.array([1, 4]), 12)
    with pytest.raises(ValueError, match="t2d is for 12 tokens, and the target has 13"):
        load_maps(path, 13)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_maps(path, 12)
    save_file({"d2t": np.array([1, 3])}, str(path))
    with pytest.raises(ValueError, match="has no tensor 't2d'"):
        load_maps(path, 12)
    save_file({"d2t": np.array([1, 3]), "t2d": np.arange(12) < 2}, str(path))
    with pytest.raises(ValueError, match="do not name the same tokens"):
        load_maps(path, 12)


def test_the_verb_counts_answers_and_writes_the_maps(tmp_path, capsys):
    target, data, out = write_target(tmp_path / "t"), tmp_path / "data.jsonl", tmp_path / "v.safetensors"
    turns = [{"role": "user", "content": "how much is 2 and 3?"}, {"role": "assistant", "content": "5 and 5 and 5"}]
    data.write_text(json.dumps({"id": "a", "messages": turns}))
    flags = ["--target", str(target), "--out", str(out), "--json", str(tmp_path / "r.json")]
    assert main(["draft-vocab", str(data), "--size", "2", *flags]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["size"] == 2 == len(load_maps(out, result["vocab"])) and 0 < result["coverage"] < 1
    assert main(["draft-vocab", str(data), "--size", "5000", *flags]) == 0
    assert "only" in capsys.readouterr().err
    data.write_text(json.dumps({"id": "a", "messages": turns[:1]}))
    assert main(["draft-vocab", str(data), *flags]) == 1
    assert "no assistant turn" in capsys.readouterr().err


def test_of_a_tokenized_folder_all_is_counted_whatever_turns_it_has(tmp_path, capsys):
    target, data, out = write_target(tmp_path / "t"), tmp_path / "data.jsonl", tmp_path / "v.safetensors"
    turn = [{"role": "user", "content": "how much is 2 and 3?"}, {"role": "assistant", "content": "5 and 5 and 5"}]
    data.write_text(json.dumps({"id": "a", "messages": 2 * turn}))
    corpus, flags = str(tmp_path / "tokens"), ["--target", str(target)]
    assert main(["tokenize", str(data), *flags, "--out", corpus, "--last-turn-only"]) == 0
    assert main(["draft-vocab", corpus, *flags, "--out", str(out), "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["counted"] > 0
    for more in (["--length", "8"], ["--skip-bad"]):
        assert main(["draft-vocab", corpus, *flags, "--out", str(out), *more]) == 1
        assert "is tokenized: leave them out" in capsys.readouterr().err
