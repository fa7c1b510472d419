"""Tokenized corpora on disk: the batches of memory, resumed to the byte, and damage that is named."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxspec.__main__ import main
from jaxspec.config import load
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import read_all, read_conversations
from jaxspec.data.corpus import join, tokenize_conversations
from jaxspec.data.packing import Mix, PackedBatches
from jaxspec.data.pipeline import iterate
from jaxspec.data.shards import Field, Shard, pack_record, unpack_record
from jaxspec.data.tokenized_corpus import CorpusSettings, StoredCorpus, is_complete, write_corpus
from jaxspec.data.tokenizer_training import train_bpe, write_tokenizer_folder
from jaxspec.parallel.mesh import make_mesh
from jaxspec.training.batches import read_data

LENGTH, BATCH = 40, 4
ONE = make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, 100 conversations of three sources, some of them odd, and their corpus in four shards."""
    folder = tmp_path_factory.mktemp("stored")
    write_tokenizer_folder(folder / "tokenizer", train_bpe(["some words to learn from"] * 3, size=270))
    lines = []
    for i in range(100):
        turns = [
            {"role": "user", "content": f"{i} ?"},
            {"role": "assistant", "content": "it is " + "so " * 4 * (i % 5)},
        ]
        if i % 30 == 7:
            turns = [{"role": "user", "content": "words " * 9}]
        lines.append(json.dumps({"id": f"talk-{i}", "source": "abc"[i % 3], "messages": turns}))
    (folder / "talks.jsonl").write_text("\n".join(lines))
    make(folder, "corpus")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatTokenizer:
    return ChatTokenizer.load(folder / "tokenizer")


def make(folder: Path, name: str, *, shard_documents: int = 30, **how) -> Path:
    tokenizer = ChatTokenizer.load(folder / "tokenizer")
    settings = CorpusSettings(LENGTH, shard_documents=shard_documents)
    list(write_corpus(folder / name, str(folder / "talks.jsonl"), tokenizer, settings, **how))
    return folder / name


def test_plain_text_on_disk_is_that_of_memory(folder: Path, tokenizer: ChatTokenizer, tmp_path: Path):
    texts = ["one text " * 40, "another", "", "the last of them " * 9]
    (tmp_path / "texts.txt").write_text("\f".join(texts))
    names = f"{tmp_path / 'texts.txt'},{folder / 'talks.jsonl'}"
    list(write_corpus(tmp_path / "corpus", names, tokenizer, CorpusSettings(LENGTH, shard_documents=2)))
    stored = StoredCorpus(tmp_path / "corpus")
    held = tokenize_conversations(read_all(names), tokenizer, length=LENGTH)
    assert stored.summary == held.summary and list(stored.ids) == list(held.ids)
    assert len(stored.ids) > 103 and np.array_equal(stored.keys, held.keys)
    assert {s: int((stored.source == i).sum()) for i, s in enumerate(stored.sources)}["texts"] == len(stored.ids) - 100


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
@pytest.mark.parametrize("rows", [None, (1,)])
def test_batches_from_disk_are_those_from_memory(folder: Path, tokenizer: ChatTokenizer, loss_on, rows):
    stored = StoredCorpus(folder / "corpus")
    held = tokenize_conversations(read_conversations(folder / "talks.jsonl"), tokenizer, length=LENGTH)
    assert stored.summary == held.summary and stored.summary.truncated and stored.summary.without_assistant
    assert list(stored.ids) == list(held.ids) and np.array_equal(stored.keys, held.keys)
    mixes = (Mix(100, 0.3),)
    pairs = [
        PackedBatches(join(*corpora), LENGTH, BATCH, seed=1, epochs=2, loss_on=loss_on, mixes=mixes, rows=rows)
        for corpora in ((held, held), (stored, held), (held, stored), (stored, stored))
    ]
    for i in range(len(pairs[0])):
        assert all(same(pairs[0][i], other[i]) for other in pairs[1:])


@pytest.mark.parametrize("done", [1, 3])
def test_a_stopped_run_ends_with_the_bytes_of_one_that_was_not(folder: Path, tokenizer: ChatTokenizer, done: int):
    out = folder / f"stopped-{done}"
    work = write_corpus(out, str(folder / "talks.jsonl"), tokenizer, CorpusSettings(LENGTH, shard_documents=30))
    for _ in range(done):
        next(work)
    work.close()
    assert [Shard(out, i).note() is not None for i in range(4)] == [i < done - 1 for i in range(4)]
    with pytest.raises(ValueError, match="not complete; give the jaxspec tokenize command that began it again"):
        StoredCorpus(out)
    make(folder, out.name)
    assert {k: v for k, v in digests(out).items() if not k.endswith(".draft")} == digests(folder / "corpus")


def test_parts_made_apart_are_the_whole(folder: Path):
    make(folder, "parts", part=(1, 2))
    assert not is_complete(folder / "parts")
    make(folder, "parts", part=(0, 2))
    assert digests(folder / "parts") == digests(folder / "corpus")


def test_a_damaged_file_is_named_when_it_is_read_and_made_anew_when_it_is_checked(folder: Path):
    out = make(folder, "damaged")
    path = out / "00001.array_record"
    content = bytearray(path.read_bytes())
    at = content.index(b"\x28\xb5\x2f\xfd")  # zstd
    content[at + 9] ^= 4
    path.write_bytes(content)
    corpus = StoredCorpus(out)
    corpus.read(range(30))
    with pytest.raises(ValueError, match=r"00001\.array_record: is damaged .* the same jaxspec tokenize command"):
        corpus.read(range(100))
    make(folder, "damaged")
    assert path.read_bytes() == content  # its size is right
    (out / "00002.array_record").write_bytes(b"")
    with pytest.raises(ValueError, match=r"00002\.array_record: is damaged \(its size is not the one noted\)"):
        StoredCorpus(out)
    make(folder, "damaged", verify=True)
    assert digests(out) == digests(folder / "corpus")


def test_a_run_is_not_gone_on_with_by_other_settings(folder: Path, tokenizer: ChatTokenizer, tmp_path: Path):
    with pytest.raises(ValueError, match=r"shard_documents was 30, is 20\): give another --out"):
        make(folder, "corpus", shard_documents=20)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files of something else"):
        list(write_corpus(tmp_path, str(folder / "talks.jsonl"), tokenizer, CorpusSettings(9)))
    with pytest.raises(ValueError, match=r"weights are for data\.train"):
        list(write_corpus(tmp_path, f"{folder / 'talks.jsonl'}:2", tokenizer, CorpusSettings(9)))
    with pytest.raises(ValueError, match="holds tokens or features, where conversations are needed"):
        read_conversations(folder / "corpus")


def test_a_limit_takes_the_first_documents(folder: Path):
    few = StoredCorpus(folder / "corpus", 31)
    assert list(few.ids) == [f"talk-{i}" for i in range(31)] and few.summary.documents == 31
    assert few.sources == ("a", "b", "c")


def test_training_reads_a_corpus_from_disk_and_refuses_that_of_another_tokenizer(folder: Path, tmp_path: Path):
    data = (f"data.train={folder / 'corpus'}", f"data.eval={folder / 'talks.jsonl'}", f"data.length={LENGTH}")
    tokenizer = ChatTokenizer.load(folder / "tokenizer")
    found = read_data(load("eagle2", data), tokenizer, ONE)
    held = read_data(load("eagle2", (data[0].replace("corpus", "talks.jsonl"), *data[1:])), tokenizer, ONE)
    assert same(found.train[3], held.train[3])
    assert found.keys() == held.keys() and found.keys()["documents"]["train"]["without_assistant"] == 4
    write_tokenizer_folder(tmp_path, train_bpe(["other words to learn from"] * 3, size=271))
    with pytest.raises(ValueError, match="was tokenized with another tokenizer than the target's"):
        read_data(load("eagle2", data), ChatTokenizer.load(tmp_path), ONE)


def test_a_corpus_is_tokenized_with_the_template_that_is_named(folder: Path, tokenizer: ChatTokenizer, tmp_path: Path):
    target = ["--target", str(folder / "tokenizer")]
    out = str(tmp_path / "out")
    assert main(["tokenize", str(folder / "talks.jsonl"), *target, "--template", "vicuna", "--out", out]) == 0
    corpus, vicuna = StoredCorpus(out), ChatTokenizer.load(folder / "tokenizer", "vicuna")
    corpus.check(vicuna)
    assert vicuna.decode(corpus.read([0])[0].tokens).startswith("A chat between")
    with pytest.raises(ValueError, match=r"another template than the target's; .* --target \(and --template\)"):
        corpus.check(tokenizer)


def test_weighted_files_make_their_shares_of_the_trained_tokens(folder: Path, tokenizer: ChatTokenizer):
    names = f"{folder / 'corpus'}:5,{folder / 'talks.jsonl'}:3,{folder / 'corpus'}:2"
    data = (f"data.train={names}", f"data.eval={folder / 'talks.jsonl'}", f"data.length={LENGTH}", "data.mix_share=0.2")
    found = read_data(load("eagle2", (*data, f"data.mix={folder / 'talks.jsonl'}")), tokenizer, ONE)
    tokens = np.zeros(4)
    for batch in (found.train[i] for i in range(len(found.train))):
        np.add.at(tokens, batch["documents"][batch["loss_mask"]] // 100, 1)
    np.testing.assert_allclose(tokens / tokens.sum(), [0.4, 0.24, 0.16, 0.2], atol=0.01)
    keys = found.keys()
    assert [round(part["share"], 2) for part in [*keys["weighted"], keys["mix"]]] == [0.24, 0.16, 0.2]
    with pytest.raises(ValueError, match=r"weights are for data\.train"):
        read_data(load("eagle2", (*data, f"data.mix={folder / 'talks.jsonl'}:2")), tokenizer, ONE)


def test_the_verb_reports_what_it_wrote(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.chdir(folder)
    words = ["tokenize", "talks.jsonl", "--out", "verb", "--target", "tokenizer", "--length", "40", "--json", "r.json"]
    assert main([*words, "--shard", "1/2"]) == 0
    assert "files of other parts are missing" in capfd.readouterr().err
    assert main(words) == 0
    written = json.loads(Path("r.json").read_text())
    assert written["documents"] == 100 and written["complete"] and written["sources"] == ["a", "b", "c"]
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--shard", "2/2"])
    assert "--shard is '2/2'" in capfd.readouterr().err


def test_records_hold_what_they_were_given():
    fields = (Field("a", "uint16", 1), Field("b", "bfloat16", 3), Field("c", "int8", 2))
    rng = np.random.default_rng(0)
    arrays = {f.name: rng.integers(0, 99, (5, f.width)).astype(f.kind) for f in fields}
    record = pack_record(fields, arrays, "ü".encode())
    assert len(record) == 5 * sum(f.size for f in fields) + 2
    found, tail = unpack_record(fields, record, 5)
    assert same(found, arrays) and tail.decode() == "ü"


def test_worker_processes_give_the_same_batches_and_resume_where_a_thread_stopped(folder: Path):
    batches = PackedBatches(StoredCorpus(folder / "corpus"), LENGTH, BATCH, epochs=2)
    running = iterate(batches)
    for _ in range(5):
        next(running)
    state = running.get_state()
    running.close()
    helped = iterate(batches, workers=2)
    helped.set_state(json.loads(json.dumps(state)))
    third = [next(helped) for _ in range(3)]
    state = helped.get_state()
    helped.close()
    alone = iterate(batches)
    alone.set_state(state)
    rest = [*third, *alone]
    alone.close()
    assert len(rest) == len(batches) - 5
    assert all(same(batch, batches[i]) for i, batch in enumerate(rest, 5))


def test_a_folder_in_which_nothing_is_finished_takes_other_settings(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The advice to skip bad records works in the folder that the advice was given for; edited data is other data."""
    path, out = tmp_path / "q.jsonl", tmp_path / "out"
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    path.write_text(f"{good}\n{{bad\n")
    words = ["tokenize", str(path), "--out", str(out), "--target", str(folder / "tokenizer")]
    assert main(words) == 1
    assert "line 2: is not JSON" in capsys.readouterr().err
    assert main([*words, "--skip-bad"]) == 0
    assert "1 records left out: not JSON" in capsys.readouterr().out
    assert main(["inspect", str(out), "--json", str(tmp_path / "held.json")]) == 0
    held = json.loads((tmp_path / "held.json").read_text())
    assert (held["documents"], held["records left out: not JSON"], held["format"]) == (1, 1, "jaxspec-corpus/1")
    path.write_text(path.read_text().replace('"b"', '"c"'))
    assert main([*words, "--skip-bad"]) == 1
    assert "contents was " in capsys.readouterr().err
    path.write_text("{bad\n")
    assert main([*words[:2], "--out", str(tmp_path / "none"), *words[4:], "--skip-bad"]) == 1
    assert "nothing is left to learn from: 1 records left out: not JSON" in capsys.readouterr().err
