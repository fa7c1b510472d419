"""Hidden states that other projects dumped: imported in every layout, and trained from as online."""

import fcntl
import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from dump_toys import (
    ANSWER,
    COUNT,
    LAYERS,
    TAPS,
    Text,
    answered_texts,
    check_store,
    dump_pickles,
    dump_specforge,
    dump_speculators,
    dump_vllm,
    half,
    imported,
    write_foreign_target,
    write_normed_target,
)
from safetensors.numpy import load_file, save_file

from jaxspec.__main__ import main
from jaxspec.data import shards
from jaxspec.data.feature_store import FORMAT, FeatureStore
from jaxspec.data.tokenized_corpus import StoredCorpus
from jaxspec.interchange.target_folders import target_folder


def refused(capfd: pytest.CaptureFixture[str], dump: str, *flags: str, target: str = "target") -> str:
    """The sentence by which an import is refused; nothing is written."""
    capfd.readouterr()
    assert main(["import", "features", dump, "refused", "--target", target, *flags]) == 1
    assert not (Path("refused") / "contents.json").is_file()
    shutil.rmtree("refused", ignore_errors=True)
    return capfd.readouterr().err


def test_speculators_files_with_their_set(folder: Path, texts: list[Text]):
    dump_speculators(folder / "dump", texts)
    done = imported("dump", "--recompute", "yes")
    check_store(texts)
    finding = done["finding"]
    assert done["kind"] == "speculators" and done["layers"] == [*TAPS, LAYERS] and done["documents"] == COUNT
    assert finding["last_state"] == "before" and finding["of"] == "answers" and finding["agreement"] > 0.95
    assert done["answer_tokens"] == sum(int(text.mask_L.sum()) for text in texts) and done["held_out"] == 2
    about = shards.read_about(Path("out"), FORMAT)
    assert about["finding"] == finding and about["dtype"] == "bfloat16"
    assert set(about["relative_errors"]) == {"last", *(f"layer {tap}" for tap in TAPS)}
    assert max(about["relative_errors"].values()) < 1e-2
    assert done["train_with"].endswith("data.loss_on=assistant head.taps=2,4,5")
    words = ("--target", "target", "--out", "vocab.safetensors", "--json", "vocab.json")
    assert main(["draft-vocab", "out/train", *words]) == 0
    held = StoredCorpus("out/train").summary.documents
    assert json.loads(Path("vocab.json").read_text())["counted"] == held * ANSWER


def test_vllm_files_have_no_masks_and_their_answers_lack_the_last_state(folder: Path, texts: list[Text]):
    cut = [text._replace(states_LND=text.states_LND[:-1]) for text in texts]
    dump_vllm(folder / "dump", cut)
    done = imported("dump")
    short = [Text(t.tokens_L[:-1], t.mask_L[:-1], t.states_LND[:-1], t.features_LD[:-1]) for t in texts]
    check_store(short, masked=False)
    assert done["kind"] == "vllm" and done["finding"]["of"] == "all tokens" and "data.loss_on=all" in done["train_with"]


def test_states_may_come_before_the_tokens_axis(folder: Path, texts: list[Text]):
    for i, text in enumerate(texts):
        dump_vllm(folder / "dump", [text], f"r{i}", hidden_states=half(text.states_LND.swapaxes(0, 1).copy()))
    imported("dump")
    check_store(texts, masked=False)


@pytest.mark.parametrize(("behind", "pack"), [(True, False), (False, True)])
def test_specforge_files_whose_last_state_is_on_either_side_of_the_norm(
    folder: Path, texts: list[Text], behind: bool, pack: bool
):
    dump_specforge(folder / "dump", texts, behind=behind, pack=pack)
    done = imported("dump")
    check_store(texts)
    assert done["kind"] == "specforge" and done["finding"]["last_state"] == ("behind" if behind else "before")


def test_dspark_and_eagle_files(folder: Path, texts: list[Text]):
    both: list[dict[str, Any]] = [
        {"input_ids": t.tokens_L.astype(np.int64)[None], "loss_mask": t.mask_L.astype(np.int64)[None]} for t in texts
    ]
    eagle = [d | {"hidden_state": t.features_LD, "conversation_str": "a"} for d, t in zip(both, texts, strict=True)]
    dump_pickles(folder / "eagle", eagle)
    assert imported("eagle", "--store", "fp32")["taps"] == []
    check_store(texts, taps=False)
    states = [half(text.states_LND[:, :2]).reshape(1, len(text.tokens_L), -1) for text in texts]
    last = [half(text.features_LD)[None] for text in texts]
    dspark = [
        d | {"hidden_states": s, "target_last_hidden_states": f} for d, s, f in zip(both, states, last, strict=True)
    ]
    dump_pickles(folder / "dspark", dspark)
    done = imported("dspark", "--layers", "2,4", "--store", "int8", out="two")
    assert done["layers"] == [2, 4, LAYERS] and done["taps"] == [2, 4]
    assert {f.name for f in map(lambda f: shards.Field(*f), FeatureStore("two").about["fields"])} == {
        "features", "features_scale", "taps", "taps_scale",
    }  # fmt: skip


@pytest.mark.parametrize("behind", [True, False])
def test_of_a_trained_target_the_side_of_the_norm_is_found_where_cross_entropy_misleads(folder: Path, behind: bool):
    own = answered_texts(target_folder("tiny"), 8, (1, 3, 5))
    dump_specforge(folder / "dump", own, behind=behind)
    finding = imported("dump", "--layers", "1,3,5", target="tiny")["finding"]
    assert finding["last_state"] == ("behind" if behind else "before") and finding["agreement"] > 0.95
    assert behind or finding["cross_entropy_otherwise"] < finding["cross_entropy"]


# Refusals, and what is left out.


def test_states_that_are_not_the_targets_are_refused(
    folder: Path, texts: list[Text], capfd: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
):
    other = write_normed_target(tmp_path_factory.mktemp("other") / "target", layers=1)
    dump_speculators(folder / "dump", texts)
    assert "4 states of a token, and 0 layers are known" in refused(capfd, "dump", target=str(other))
    assert "is not what target computes (relative error" in refused(capfd, "dump", "--layers", "2,3,5,8")
    assert "its states enter layers 2, 3, 4, 5, and the last one" in refused(capfd, "dump", "--layers", "2,3,4,5")
    assert "layers (2, 2, 5, 8) must be different numbers" in refused(capfd, "dump", "--layers", "2,2,5,8")
    assert "the last of --layers must be 8" in refused(capfd, "dump", "--layers", "2,8,4,5")
    assert "holds 4 states of a token, and 3 layers are given" in refused(capfd, "dump", "--layers", "2,4,8")
    wrong = [text._replace(states_LND=text.states_LND[:, [0, 1, 3, 2]]) for text in texts]
    dump_speculators(folder / "wrong", wrong)
    said = refused(capfd, "wrong")
    assert "finds the next token of answers in" in said and "they are of another target or layer" in said


def test_last_states_that_cannot_be_told_apart_are_refused(
    folder: Path, texts: list[Text], capfd: pytest.CaptureFixture[str]
):
    dump_specforge(folder / "dump", texts[::2], behind=True)
    for i, path in enumerate(sorted(dump_specforge(folder / "more", texts[1::2], behind=False).glob("*/*"))):
        shutil.copy(path, folder / "dump" / "rows_0-5" / f"data_{100 + i}.ckpt")
    assert "cannot be told before or behind the final norm" in refused(capfd, "dump")


def test_the_state_entering_layer_0_is_the_embedding(
    folder: Path, texts: list[Text], capfd: pytest.CaptureFixture[str]
):
    found = answered_texts(folder / "target", 12, (0, 3))
    dump_vllm(folder / "dump", found)
    words = ("--layers", "0,3,8", "--recompute", "no")
    done = imported("dump", *words)
    assert done["taps"] == [0, 3]
    wrong = [text._replace(states_LND=text.states_LND[:, [1, 0, 2]]) for text in found]
    dump_vllm(folder / "wrong", wrong)
    assert "its state 0 is not the embedding of its tokens" in refused(capfd, "wrong", *words)


BROKEN = {
    "not finite": lambda t: t._replace(states_LND=np.where(np.arange(32) == 3, np.nan, t.states_LND)),
    "ids outside": lambda t: t._replace(tokens_L=np.append(t.tokens_L[:-1], 300)),
    "wrong shape": lambda t: t._replace(states_LND=t.states_LND[:, :, :31]),
}


@pytest.mark.parametrize("kind", [*BROKEN, "unreadable", "lacks a tensor", "wrong dtype", "wrong mask"])
def test_a_bad_document_stops_the_import_or_is_counted(
    folder: Path, texts: list[Text], kind: str, capfd: pytest.CaptureFixture[str]
):
    dump_vllm(folder / "dump", texts)
    bad = folder / "dump" / "cmpl-2-0.safetensors"
    if kind in BROKEN:
        dump_vllm(folder / "dump", [BROKEN[kind](texts[2])], "cmpl-2-0")
    elif kind == "unreadable":
        bad.write_bytes(bad.read_bytes()[:-40])
    elif kind == "wrong mask":
        mask = np.where(np.arange(len(texts[2].tokens_L)) == 3, 0.5, 1).astype(np.float32)
        dump_vllm(folder / "dump", [texts[2]], "cmpl-2-0", loss_mask=mask)
    elif kind == "wrong dtype":
        dump_vllm(folder / "dump", [texts[2]], "cmpl-2-0", hidden_states=np.zeros((9, 4, 32), np.int8))
    else:
        save_file({"hidden_states": np.zeros((9, 4, 32), np.float32)}, bad)
    said = refused(capfd, "dump")
    assert "cmpl-2-0.safetensors" in said and "--skip-bad leaves such documents out" in said
    done = imported("dump", "--skip-bad", "--shard-gb", "1e-6")  # a file a document, and one without any
    assert done["skipped"] == {kind: 1} and done["documents"] == COUNT - 1
    assert "cmpl-2-0.safetensors" in done["examples"][kind]
    assert f"left out, {kind}: 1 documents; the first: " in capfd.readouterr().err
    check_store([text for i, text in enumerate(texts) if i != 2], masked=False)


def test_token_ids_that_are_no_integers_are_refused_by_file_and_field(
    folder: Path, texts: list[Text], capfd: pytest.CaptureFixture[str]
):
    dump_vllm(folder / "dump", texts)
    dump_vllm(folder / "dump", texts[2:3], "cmpl-2-0", token_ids=texts[2].tokens_L.astype(np.float32))
    assert "cmpl-2-0.safetensors: token_ids is F32; token ids are integers: store them as I64" in refused(capfd, "dump")
    dump_pickles(folder / "eagle", [{"input_ids": half(t.tokens_L), "hidden_state": t.features_LD} for t in texts])
    assert "data_0.ckpt: input_ids is BF16; token ids are integers" in refused(capfd, "eagle")


def test_the_good_documents_of_a_dump_are_kept_wherever_the_bad_ones_lie(folder: Path, texts: list[Text]):
    dump_vllm(folder / "dump", texts[:12])
    spread = set(np.linspace(0, 11, 8).astype(int).tolist())
    for i in spread:
        bad = texts[i]._replace(states_LND=np.full_like(texts[i].states_LND, np.nan))
        dump_vllm(folder / "dump", [bad], f"cmpl-{i}-0")
    done = imported("dump", "--skip-bad")
    assert done["skipped"] == {"not finite": len(spread)} and done["documents"] == 12 - len(spread)
    check_store([text for i, text in enumerate(texts[:12]) if i not in spread], masked=False)


@pytest.mark.parametrize("name", ["{}.safetensors", "data_{}.ckpt", "data_{}.ckpt.gz"])
def test_files_that_cannot_be_read_are_named_with_the_reason(
    folder: Path, texts: list[Text], name: str, capfd: pytest.CaptureFixture[str]
):
    (folder / "dump").mkdir()
    for i in range(4):
        (folder / "dump" / name.format(i)).write_bytes(b"garbage of no kind")
    said = refused(capfd, "dump")
    first = sorted(path.name for path in (folder / "dump").iterdir())[0]
    assert "none of 4 files can be read; the first: " in said and first in said
    assert main(["inspect", "dump"]) == 1
    # Where others can be, they are a dump.
    if name == "{}.safetensors":
        dump_vllm(folder / "dump", texts)
        assert "is truncated or corrupt" in refused(capfd, "dump")
        assert imported("dump", "--skip-bad")["skipped"] == {"unreadable": 4}
        assert main(["inspect", "dump", "--json", "told.json"]) == 0
        assert json.loads(Path("told.json").read_text())["shapes"]["hidden_states"][1:] == [4, 32]


@pytest.mark.parametrize("pack", [False, True])
def test_a_pickled_document_with_a_flipped_bit_is_counted_too(
    folder: Path, texts: list[Text], pack: bool, capfd: pytest.CaptureFixture[str]
):
    dump_specforge(folder / "dump", texts, pack=pack)
    bad = next((folder / "dump").glob("*/data_2.ckpt*"))
    data = bytearray(gzip.decompress(bad.read_bytes()) if pack else bad.read_bytes())
    data[data.index(half(texts[2].features_LD).tobytes())] ^= 1
    bad.write_bytes(gzip.compress(bytes(data)) if pack else bytes(data))
    done = imported("dump", "--skip-bad")
    assert done["skipped"] == {"unreadable": 1} and done["documents"] == COUNT - 1
    said = refused(capfd, "dump", "--shard-gb", "1e-5")
    assert f"{bad.name} is truncated or corrupt" in said and "--skip-bad leaves such documents out" in said


def test_speculators_rows_must_be_those_of_the_files(
    folder: Path, texts: list[Text], capfd: pytest.CaptureFixture[str]
):
    dump_speculators(folder / "dump", texts)
    states = folder / "dump" / "hidden_states"
    (states / "hs_23.safetensors").unlink()
    shutil.copy(states / "hs_4.safetensors", states / "hs_99.safetensors")
    shutil.copy(states / "hs_5.safetensors", states / "hs_6.safetensors")
    assert "hs_6.safetensors: its token_ids are not the input_ids of row 6" in refused(capfd, "dump")
    done = imported("dump/hidden_states", "--skip-bad")
    assert done["skipped"] == {"no such row": 1, "other tokens": 1} and done["answer_tokens"]
    shutil.copytree(states, "apart")
    again = imported("apart", "--skip-bad", "--conversations", "dump", out="again")
    assert again["answer_tokens"] == done["answer_tokens"] and not imported("apart", out="none")["answer_tokens"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        assert "pyarrow is not installed: pip install pyarrow" in refused(capfd, "dump")
    (folder / "dump" / "state.json").write_text("{}")
    assert "no set of input_ids and loss_mask that datasets saved" in refused(capfd, "dump")


def test_files_in_use_are_left_out_and_an_import_goes_on_where_it_was(
    folder: Path, texts: list[Text], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    dump_vllm(folder / "dump", texts[:-1])
    (folder / "dump" / "cmpl-1-0.safetensors.lock").write_text("")  # its writer is done
    words = ("--shard-gb", "3e-5")
    dump_vllm(folder / "busy", texts[:1])
    with (folder / "busy" / "cmpl-0-0.safetensors.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "its 1 files are all in use by a writer" in refused(capfd, "busy")
    with (folder / "dump" / "cmpl-3-0.safetensors.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert imported("dump", "--count-only", *words)["in_use"] == 1 and not Path("out").exists()
        assert imported("dump", *words, "--shard", "0/2")["complete"] is False
    with pytest.raises(ValueError, match="is not complete; give the jaxspec import features command"):
        FeatureStore("out")
    dump_vllm(folder / "dump", texts[-1:], "later-{}")
    done = imported("dump", *words)
    assert done["complete"] and done["documents"] == COUNT - 2 and done["came_later"] == 2
    check_store([text for i, text in enumerate(texts[:-1]) if i != 3], masked=False)
    assert len(list(Path("out").glob("*.array_record"))) > 3
    before = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.array_record")}
    imported("dump", *words)
    assert before == {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.array_record")}
    capfd.readouterr()
    assert main(["import", "features", "dump", "out", "--target", "target", *words, "--length", "20"]) == 1
    assert "out: was begun with other settings (imported" in capfd.readouterr().err
    (folder / "dump" / "cmpl-5-0.safetensors").unlink()
    assert main(["import", "features", "dump", "out", "--target", "target", *words]) == 1
    assert "cmpl-5-0.safetensors was there when its import into out began" in capfd.readouterr().err


def test_documents_are_cut_and_the_disk_must_have_room(
    folder: Path, texts: list[Text], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    dump_specforge(folder / "dump", texts)
    done = imported("dump", "--length", "22", "--limit", "20", "--held-out", "1")
    assert done["truncated"] == sum(len(text.tokens_L) > 22 for text in texts[:20]) and done["longest"] == 22
    assert done["documents"] == 20 and done["held_out"] == 1
    monkeypatch.setattr(shards, "free_bytes", lambda _: 10**4)
    assert "do not fit into the 1e-05 GB that are free" in refused(capfd, "dump")


def test_dumps_that_no_drafter_is_trained_from_are_named(
    folder: Path, texts: list[Text], capfd: pytest.CaptureFixture[str]
):
    text = texts[0]
    flash = {"input_ids": text.tokens_L.astype(np.int64), "hidden_states": text.states_LND[None, :, 0]}
    dump_pickles(folder / "flash", [flash])
    (folder / "nemo").mkdir()
    (folder / "nemo" / "manifest.json").write_text(json.dumps({"version": 2}))
    save_file({"input_ids": text.tokens_L[None]}, folder / "nemo" / "shard-000000.safetensors")
    (folder / "empty").mkdir()
    assert "flash: holds offline DFlash files of SpecForge: they hold no last hidden state" in refused(capfd, "flash")
    assert "nemo: holds shards of NeMo Automodel: they hold no last hidden state" in refused(capfd, "nemo")
    assert "empty: holds no hidden states that are known" in refused(capfd, "empty")
    save_file({"fc": text.tokens_L}, folder / "empty" / "head.safetensors")
    assert "; head.safetensors holds fc" in refused(capfd, "empty")
    assert "absent: no such folder; give that of a dump" in refused(capfd, "absent")
    assert main(["inspect", "flash", "--json", "flash.json"]) == 0
    told = json.loads(Path("flash.json").read_text())
    assert told["family"] == "dflash" and told["importable"] is False and "no last hidden state" in told["refusal"]


def test_inspect_names_a_dump(folder: Path, texts: list[Text]):
    dump_speculators(folder / "dump", texts)
    assert main(["inspect", "dump", "--json", "dump.json"]) == 0
    told = json.loads(Path("dump.json").read_text())
    assert told["kind"] == "hidden states" and told["family"] == "speculators" and told["files"] == COUNT
    assert told["importable"] and told["loss_mask"] and told["shapes"]["hidden_states"][1:] == [4, 32]


def test_a_target_whose_logits_or_tables_are_not_read_is_refused(
    folder: Path, texts: list[Text], capfd: pytest.CaptureFixture[str]
):
    dump_specforge(folder / "dump", texts)
    write_foreign_target(folder / "scaled", folder / "target", logits_scaling=8.0)
    assert "logits_scaling=8.0 scales the logits" in refused(capfd, "dump", target="scaled")
    write_foreign_target(folder / "lost", folder / "target")
    (folder / "lost" / "model-00001-of-00002.safetensors").unlink()
    assert "model-00001-of-00002.safetensors holds language_model" in refused(capfd, "dump", target="lost")
    write_foreign_target(folder / "shapeless", folder / "target", intermediate_size=None)
    assert "has no field intermediate_size" in refused(capfd, "dump", target="shapeless")


@pytest.mark.parametrize("nested", [False, True])
def test_a_target_whose_layers_are_quantized_or_that_reads_images_is_none_that_is_run(
    folder: Path, texts: list[Text], nested: bool
):
    dump_specforge(folder / "dump", texts, behind=False)
    shutil.copytree(folder / "target", folder / "other")
    config = json.loads((folder / "other" / "config.json").read_text())
    if nested:
        config = {"model_type": "seeing", "architectures": ["SeeingModel"], "text_config": config}
    else:
        config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "other" / "config.json").write_text(json.dumps(config))
    done = imported("dump", target="other")
    assert done["documents"] == COUNT and shards.read_about(Path("out"), FORMAT)["relative_errors"] == {}
    check_store(texts)


def test_a_centred_norm_of_a_family_that_is_not_known_is_found(folder: Path, texts: list[Text]):
    place = write_foreign_target(folder / "foreign", folder / "target") / "model-00001-of-00002.safetensors"
    tables = load_file(place)
    tables["language_model.model.norm.weight"] -= 1
    save_file(tables, place)
    for behind in (False, True):
        dump_specforge(folder / f"dump{behind}", texts, behind=behind)
        assert imported(f"dump{behind}", target="foreign", out=f"out{behind}")["finding"]["centred"] is True
        check_store(texts, f"out{behind}")


def test_an_import_begun_again_before_anything_was_finished_examines_the_other_dump(
    folder: Path, texts: list[Text], monkeypatch: pytest.MonkeyPatch
):
    dump_vllm(folder / "first", texts[:4])
    dump_vllm(folder / "second", texts)
    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "seal", Mock(side_effect=KeyboardInterrupt))
        assert main(["import", "features", "first", "out", "--target", "target"]) == 130
    assert imported("second")["documents"] == len(texts)
    shutil.rmtree("out")
    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "seal", Mock(side_effect=KeyboardInterrupt))
        assert main(["import", "features", "second", "out", "--target", "target"]) == 130
    assert imported("second", "--limit", "5")["documents"] == 5
    shutil.rmtree("out")
    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "seal", Mock(side_effect=KeyboardInterrupt))
        assert main(["import", "features", "second", "out", "--target", "target", "--limit", "5"]) == 130
    assert imported("second")["documents"] == len(texts)
    assert "finding" in json.loads(Path("out/about.json").read_text())
    assert imported("second")["documents"] == len(texts)


def test_a_folder_that_does_not_say_where_the_last_state_lies_is_refused(
    folder: Path, texts: list[Text], capfd: pytest.CaptureFixture[str]
):
    dump_vllm(folder / "dump", texts[:4])
    imported("dump")
    about = json.loads(Path("out/about.json").read_text())
    Path("out/about.json").write_text(json.dumps({name: v for name, v in about.items() if name != "finding"}))
    assert main(["import", "features", "dump", "out", "--target", "target"]) == 1
    assert "out: does not say where the last state lies: import it anew, into another OUT" in capfd.readouterr().err
