"""Stored features: training reads from disk what the target would have made, to the bit where it is stored whole."""

import dataclasses
import functools
import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import DEFAULT, Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import write_target

from jaxspec.__main__ import main
from jaxspec.checkpoints.models import load_drafter
from jaxspec.config import DistillConfig, load
from jaxspec.data import shards
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.feature_store import FeatureStore, open_features, shorten
from jaxspec.data.pipeline import iterate
from jaxspec.data.target_outputs import Kind, Stored, grow, likeliest, lump, shrink, whole_of
from jaxspec.distillation.loss import batch_loss
from jaxspec.distillation.objective import Objective
from jaxspec.distillation.task import Batch, Frozen, Task
from jaxspec.interchange.hf import fingerprint, load_tables, load_target, write_llama
from jaxspec.losses import Scores, logit_loss
from jaxspec.parallel.mesh import batch_sharding, make_mesh
from jaxspec.training.batches import Data, place_rows, read_data
from jaxspec.training.distill import TrainingData, read_features
from jaxspec.training.recipes import usable_features
from jaxspec.training.resolve import attention_blocks, drafter_for

features: Any = importlib.import_module("jaxspec.train.features")

CONFIG = """
from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig

config = DistillConfig(
    name="toy",
    target="target",
    data=DataConfig("chats.jsonl", "held.jsonl", length=64, batch=8, loss_on="assistant"),
    optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2, epochs=2, clip_value=0.5),
    checkpoint=CheckpointConfig("run", save_every=3),
    export_folder="drafter",
)
"""
MIX = ("data.mix=mix.jsonl", "data.mix_share=0.3")
EAGLE3 = ("drafter=eagle3", "head.taps=0,1", *MIX)


def chats(first: int, count: int) -> str:
    lines = []
    for i in range(first, first + count):
        turns = [{"role": "user", "content": f"{i} and 2 make"}, {"role": "assistant", "content": f"{i + 2}, they say"}]
        lines.append(json.dumps({"id": str(i), "source": "toy", "messages": turns}))
    return "\n".join(lines)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, its data and config, and a store of everything: fp32, two taps, eight tokens."""
    home = tmp_path_factory.mktemp("features")
    write_target(home / "target", layers=2)
    for name, part in {"chats": (0, 60), "mix": (100, 20), "held": (55, 15)}.items():
        (home / f"{name}.jsonl").write_text(chats(*part))
    (home / "toy.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(features, "mesh_of", lambda _: ONE)  # the numbers of a row depend on how rows are spread
        assert main(["features", "toy.py", *EAGLE3, *STORE, "--out", "store", "--json", "store.json"]) == 0
    return home


ONE = make_mesh(devices=jax.devices()[:1])
STORE = ("--store", "fp32", "--top-k", "8", "--shard-gb", "2e-4")


@pytest.fixture
def folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def config(*changes: str) -> DistillConfig:
    return load("toy.py", changes)


def reading(*changes: str, taps: tuple[int, ...] = ()) -> tuple[Data, TrainingData]:
    """The data of a config online, and with stored features."""
    found = config(*changes)
    data = read_data(found, ChatTokenizer.load("target"), ONE)
    return data, read_features(found, data, taps)


def make_loss(found: DistillConfig, objective: Objective, target, frozen) -> tuple[Callable[..., Any], Any]:
    """The loss of weights on a host batch, and fresh weights."""
    drafter, _ = drafter_for(found, target.config)
    task = Task(target.clone(taps=drafter.taps, **attention_blocks(found, ONE)), drafter, objective)

    def loss(params, rows):
        sums = batch_loss(task, Frozen(frozen), params, rows, jax.random.key(1), learning=False)[1]
        return sums.mean_loss(objective)

    return loss, jax.jit(drafter.init_params)(jax.random.key(0), target.shared_tables(frozen))


def make_step(*arguments: Any) -> Callable[..., Any]:
    """One program from a host batch to loss and gradient."""
    loss, params = make_loss(*arguments)
    step = jax.jit(jax.value_and_grad(loss))
    return lambda batch: jax.device_get(step(params, place(batch)))


def place(batch: dict[str, np.ndarray]) -> Batch:
    """A whole batch on one device."""
    return place_rows(batch_sharding(ONE), cast(Any, SimpleNamespace(batch=len(batch["tokens"]), rows=None)), batch)


def assert_same(a, b, **tolerance: float) -> None:
    check = functools.partial(np.testing.assert_allclose, **tolerance) if tolerance else np.testing.assert_array_equal
    jax.tree.map(check, a, b)


def test_stored_whole_loss_and_gradient_are_those_of_training_online_to_the_bit(folder: Path):
    data, stored = reading(*EAGLE3, "data.features=store", taps=(0, 1))
    objective = Objective(weights=(("soft_cross_entropy", 1.0),), noise=0)
    whole, tables = load_target("target", dtype=jnp.float32), load_tables("target", dtype=jnp.float32)
    online = make_step(config(*EAGLE3), objective, whole.module, whole.params)
    offline = make_step(config(*EAGLE3), objective, *tables)
    assert_same(online(data.train[0]), offline(stored.train[0]))
    later = len(data.train) - 1  # packed anew, so that sums of rows are taken in another order
    assert_same(online(data.train[later]), offline(stored.train[later]), rtol=2e-3, atol=2e-5)


def test_stored_in_fewer_bits_the_loss_is_close(folder: Path):
    """And in fp32 it is the same, though the store has taps that this drafter does not read."""
    data, stored = reading(*MIX, "data.features=store")
    objective = Objective(noise=0)  # which the compiler may add to a feature where it makes it
    loss, weights = make_loss(config(), objective, *load_tables("target", dtype=jnp.float32))
    rows, loss = place(stored.eval[0]), jax.jit(loss)
    assert rows.stored is not None
    exact, features_BLD = loss(weights, rows), rows.stored.features_BLD
    online, _ = make_loss(config(), objective, *load_target("target", dtype=jnp.float32)[:2])
    assert exact == jax.jit(online)(weights, place(data.eval[0]))
    bounds: dict[Kind, float] = {"bf16": 2e-3, "int8": 1e-2}
    for kind, bound in bounds.items():
        small = grow(*shrink(features_BLD, kind), features_BLD.dtype)
        error = abs(loss(weights, rows._replace(stored=Stored(small))) - exact) / exact
        assert 0 < error < bound, kind


def test_with_the_whole_distributions_facts_stored_a_draft_vocabulary_learns_the_same(folder: Path):
    """Loss, gradient and measures, though the target scores the draft vocabulary alone."""
    _, stored = reading(*MIX, "data.features=store")
    found, (target, frozen) = config(), load_tables("target", dtype=jnp.float32)
    ids, rows = jnp.arange(0, target.config.vocab, 2), place(stored.train[0])
    assert rows.stored is not None
    whole = jax.jit(lambda features: whole_of(target, frozen, features))(rows.stored.features_BLD)
    drafter, _ = drafter_for(found, target.config)
    objective = Objective(weights=(("smooth_l1", 1.0), ("soft_cross_entropy", 0.1), ("tvd", 1.0)), steps=2)
    task, params = (
        Task(target, drafter, objective),
        drafter.init_params(jax.random.key(0), target.shared_tables(frozen)),
    )

    def loss(params: Any, rows: Batch) -> Any:
        return batch_loss(task, Frozen(frozen, ids), params, rows, jax.random.key(1), learning=True)

    step = jax.jit(jax.grad(loss, has_aux=True))
    without, with_facts = (
        jax.device_get(step(params, rows._replace(stored=rows.stored._replace(whole=w)))) for w in (None, whole)
    )
    assert_same(without, with_facts, rtol=1e-4, atol=1e-6)
    known = np.isin(whole.token_BL1[..., 0], ids)[rows.segments_BL > 0]
    assert 0.2 < np.mean(known) < 0.8  # both kinds of position are there


def test_a_store_holds_the_whole_distributions_facts_for_those_with_a_draft_vocabulary(folder: Path):
    found = config(*MIX, "data.features=store")
    data = read_data(found, ChatTokenizer.load("target"), ONE)
    batch = read_features(dataclasses.replace(found, draft_vocab="any"), data, ()).train[0]
    assert {"best_token", "log_total"} <= batch.keys() and "log_total" not in read_features(found, data, ()).train[0]
    target, frozen = load_tables("target", dtype=jnp.float32)
    real = batch["segments"] > 0
    logits = np.asarray(target.logits(frozen, jnp.asarray(batch["features"])))[real]
    np.testing.assert_array_equal(batch["best_token"][real][:, 0], np.argmax(logits, axis=-1))
    np.testing.assert_allclose(batch["log_total"][real][:, 0], np.log(np.sum(np.exp(logits), axis=-1)), rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 3])
def test_int8_is_half_a_step_away_at_most_and_bf16_an_eighth_bit(parts: int):
    rng = np.random.default_rng(0)
    x_BLD = jnp.asarray(rng.normal(size=(2, 5, 12)) * np.exp(rng.normal(size=(2, 5, 1))), jnp.float32).at[0, 0].set(0)
    steps, scale_BLY = shrink(x_BLD, "int8", parts)
    assert steps.dtype == jnp.int8 and scale_BLY is not None and scale_BLY.shape == (2, 5, parts)
    error = jnp.abs(grow(steps, scale_BLY, x_BLD.dtype) - x_BLD).reshape(2, 5, parts, -1)
    assert jnp.all(error <= scale_BLY[..., None] * 0.5001) and jnp.all(error[0, 0] == 0)
    half, none = shrink(x_BLD, "bf16", parts)
    assert none is None and jnp.all(jnp.abs(grow(half, None, x_BLD.dtype) - x_BLD) <= jnp.abs(x_BLD) * 2**-8)
    assert_same(grow(*shrink(x_BLD, "fp32", parts), x_BLD.dtype), x_BLD)


class Straight:
    """A target whose features are its logits."""

    def logits(self, params, features_BLD):
        return features_BLD


def test_the_likeliest_tokens_and_the_rest_are_the_whole_distribution():
    logits_BLV = 4 * np.random.default_rng(0).normal(size=(2, 5, 11)).astype(np.float32)
    wanted = logits_BLV - np.log(np.sum(np.exp(logits_BLV), axis=-1, keepdims=True))
    target: Any = Straight()
    found = jax.device_get(jax.jit(lambda x: likeliest(target, None, x, 3, chunk=2))(logits_BLV))
    lumped = jax.device_get(jax.jit(lump)(logits_BLV, found.token_BLR))
    nothing = jax.device_get(jax.jit(lambda x: likeliest(target, None, x, 11).rest_BL1)(logits_BLV))
    np.testing.assert_allclose(found.logp_BLR, np.sort(wanted, axis=-1)[..., ::-1][..., :3], rtol=1e-5, atol=1e-6)
    both = np.concatenate([found.logp_BLR, found.rest_BL1], axis=-1)
    np.testing.assert_allclose(np.sum(np.exp(both), axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(lumped, both, rtol=1e-5, atol=1e-6)
    assert np.all(nothing < -1e29)
    fewer = shorten({"top_tokens": found.token_BLR, "top_logp": found.logp_BLR, "rest": found.rest_BL1}, 1)
    np.testing.assert_allclose(np.exp(fewer["rest"]) + np.exp(found.logp_BLR[..., :1]), 1, rtol=1e-5)
    assert fewer["top_tokens"].shape == (2, 5, 1)


def test_losses_of_lumped_tokens_are_those_of_the_whole_distribution_but_for_the_rest():
    draft, target = (3 * jax.random.normal(jax.random.key(i), (64, 11)) for i in (1, 2))
    token = jnp.argsort(-target, axis=-1)
    logp = jnp.take_along_axis(jax.nn.log_softmax(target), token, axis=-1)
    nobody, key = jnp.zeros(64, int), jax.random.key(0)

    def lumped(draft, spec: str, count: int):
        rest = jax.nn.logsumexp(logp[:, count:], axis=-1, keepdims=True)
        scores = Scores(lump(draft, token[:, :count]), jnp.concatenate([logp[:, :count], rest], axis=-1), nobody, key)
        return jnp.sum(logit_loss(spec).parts(scores._replace(lumped=rest[:, 0])))

    def whole(draft, spec: str):
        return jnp.sum(logit_loss(spec).parts(Scores(draft, target, nobody, key)))

    @jax.jit
    def both(draft):
        cases = [("kl", 10), ("soft_cross_entropy", 10), ("top_k:3", 10), ("top_k:3", 3)]  # ten and the rest are all
        gradients = [(jax.grad(lumped)(draft, *case), jax.grad(whole)(draft, case[0])) for case in cases]
        few = jnp.stack([lumped(draft, "kl", count) for count in (2, 5, 10)])
        return gradients, few, jax.grad(lumped)(draft * 100, "kl", 2)

    gradients, few, far = jax.device_get(both(draft))
    for a, b in gradients:
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert 0 < few[0] < few[1] < few[2] and np.all(np.isfinite(far))
    np.testing.assert_allclose(few[2], whole(draft, "kl"), rtol=1e-4)


def test_training_from_the_likeliest_tokens_is_the_lumped_loss(folder: Path):
    """For `top_k` that is the loss of the whole distribution."""
    _, whole = reading(*MIX, "data.features=store")
    _, few = reading(*MIX, "data.features=store", "data.top_k=4")
    objective = Objective(weights=(("top_k:4", 1.0),), noise=0)
    loss, weights = make_loss(config(), objective, *load_tables("target", dtype=jnp.float32))
    lumped, exact = (jax.jit(loss)(weights, place(r.train[0])) for r in (few, whole))
    np.testing.assert_allclose(lumped, exact, rtol=1e-4)
    assert "top_tokens" not in few.eval[0] and few.train[0]["top_tokens"].dtype == np.int32


def test_processes_share_a_batch_and_workers_resume_it(folder: Path):
    data, stored = reading(*EAGLE3, "data.features=store", "data.top_k=3", taps=(0, 1))
    halves = [
        read_features(
            config("data.features=store", "data.top_k=3"),
            Data(dataclasses.replace(data.train, rows=rows), data.eval),
            (0, 1),
        ).train
        for rows in np.split(np.arange(data.train.batch), 2)
    ]
    whole = stored.train[2]
    assert whole.keys() == {*data.train[2], "features", "taps", "top_tokens", "top_logp", "rest"}
    assert_same(whole, {name: np.concatenate([half[2][name] for half in halves]) for name in whole})
    assert np.all(whole["features"][whole["segments"] == 0] == 0) and np.all(whole["features"][0, 0] != 0)
    ahead = iterate(stored.train, workers=2)
    ahead.set_state({"next_index": 2})
    assert_same(next(ahead), whole)
    ahead.close()


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.suffix != ".draft"}


def test_a_killed_run_goes_on_and_ends_with_the_bytes_of_one_that_was_not(folder: Path, monkeypatch, capfd):
    """Also: parts made apart, a damaged file, sizes that are said beforehand, and a disk that is too small."""
    monkeypatch.setattr(features, "mesh_of", lambda _: ONE)
    words = ["features", "toy.py", *EAGLE3, *STORE, "--out", "torn", "--json", "torn.json"]
    assert main([*words, "--count-only"]) == 0 and not Path("torn").exists()
    written, said = json.loads(Path("torn.json").read_text()), capfd.readouterr().err
    assert "1,642 tokens: 444 bytes a token (features 32 x float32, taps 64 x float32, top_tokens 8 x uint16" in said
    real = sum(p.stat().st_size for p in Path("store").glob("*.array_record"))
    assert written["shards"] == 3 and abs(written["total_bytes"] - real) < 3 * 2**16  # files grow in such blocks

    monkeypatch.setattr(shards, "free_bytes", lambda _: 10**6)
    assert main(words) == 1
    assert (
        "torn: 0.001131 GB do not fit into the 0.001 GB that are free; make room, store int8" in capfd.readouterr().err
    )
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(features, "mesh_of", lambda _: ONE)

    whole = shards.ShardWriter.seal
    interrupted = Mock(wraps=whole, side_effect=[DEFAULT, KeyboardInterrupt])
    monkeypatch.setattr(shards.ShardWriter, "seal", lambda writer, **note: interrupted(writer, **note))
    assert main(words) == 130
    assert [shards.Shard(Path("torn"), i).note() is not None for i in range(3)] == [True, False, False]
    with pytest.raises(ValueError, match="torn: 1 of 3 files are finished; give the jaxspec features command"):
        FeatureStore("torn")
    monkeypatch.setattr(shards.ShardWriter, "seal", whole)
    assert main([*words, "--shard", "1/2"]) == 0 and main([*words, "--shard", "0/2"]) == 0
    assert digests(Path("torn")) == digests(Path("store"))

    path = Path("torn/00001.array_record")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torn = FeatureStore("torn")
    with pytest.raises(ValueError, match=r"torn/00001\.array_record: is damaged .* the same jaxspec features command"):
        torn.read(range(len(torn._lengths)), ["features"])
    capfd.readouterr()
    assert main([*words, "--verify"]) == 0
    assert "torn/00001.array_record: is damaged, and will be made anew" in capfd.readouterr().err
    assert digests(Path("torn")) == digests(Path("store"))
    assert main([*words[:2], "data.length=48", *words[2:]]) == 1
    assert "torn: was begun with other settings " in capfd.readouterr().err


def test_what_was_stored_for_something_else_is_refused(folder: Path, tmp_path: Path):
    stored = ("data.features=store", *MIX)
    with pytest.raises(
        ValueError, match=r"was made with taps \[0, 1\], and this run has \[1\]; make the features again"
    ):
        reading(*stored, taps=(1,))
    with pytest.raises(ValueError, match="was made with dtype 'float32', and this run has 'bfloat16'"):
        reading(*stored, "dtype=bfloat16")
    (folder / "more.jsonl").write_text(chats(0, 75))
    with pytest.raises(
        ValueError, match=r"store: 5 of 95 documents are not stored; give jaxspec features the same data"
    ):
        reading(*stored, "data.train=more.jsonl")
    with pytest.raises(ValueError, match=r"holds 8 log-probabilities a token, and data\.top_k is 9"):
        reading(*stored, "data.top_k=9", "objective.step_decay=1")
    with pytest.raises(ValueError, match=r"data\.top_k is for stored features"):
        reading(*MIX, "data.top_k=4")
    _, params, shape = load_target("target", dtype=jnp.float32)
    params["layers"][1]["down"] += 1e-3
    write_llama(tmp_path / "target", jax.device_get(params), shape, dtype="float32")
    assert fingerprint(tmp_path / "target") != fingerprint("target")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weights": (("tvd", 1.0),)}, "loss 'tvd' needs all of the target's probabilities; choose from soft_cross"),
        ({"weights": (("top_k:5", 1.0),)}, "loss 'top_k:5' needs more of the target's tokens than 4"),
        (
            {"weights": (("kl", 1.0),), "position_weights": "cat"},
            "position_weights=cat needs the probability of the label",
        ),
    ],
)
def test_what_the_likeliest_tokens_cannot_teach_is_refused(folder: Path, changes: dict, match: str):
    found = config("data.features=store", "data.top_k=4", *MIX)
    found = dataclasses.replace(found, objective=Objective(**changes))
    data = read_data(found, ChatTokenizer.load("target"), ONE)
    with pytest.raises(ValueError, match=match):
        read_features(found, data, ())


def test_several_stores_are_read_as_one(folder: Path):
    """Of both halves of the data; a document that both hold is read once, and a store of another kind is refused."""
    lines = Path("chats.jsonl").read_text().splitlines(keepends=True)
    Path("first.jsonl").write_text("".join(lines[:35]))
    Path("second.jsonl").write_text("".join(lines[30:]))
    for name, kind in {"first": "fp32", "second": "fp32", "small": "int8"}.items():
        data = "second" if name == "small" else name
        words = [f"data.train={data}.jsonl", "--store", kind, "--out", f"{name}_store"]
        assert main(["features", "toy.py", *EAGLE3, *words]) == 0
    taps = open_features("store").taps
    (_, joined), (_, whole) = (
        reading(*EAGLE3, f"data.features={names}", taps=taps) for names in ("first_store, second_store", "store")
    )
    for index in range(len(whole.train)):
        one, other = whole.train[index], joined.train[index]
        for name in ("features", "taps"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="small_store: stores other arrays than first_store"):
        open_features("first_store,small_store")
    with pytest.raises(ValueError, match="documents are not stored"):
        reading(*EAGLE3, "data.features=first_store", taps=taps)


def test_a_comparison_uses_a_store_where_it_holds_what_a_recipe_reads(folder: Path):
    for changes in ((), ("drafter=eagle3", "head.taps=0,1")):
        assert usable_features(config(*changes), "target", "store") == "store"
    for changes in (MIX, ("drafter=eagle3", "head.taps=1")):
        assert usable_features(config(*changes), "target", "store") is None
    assert usable_features(config(), "target", None) is None


@pytest.mark.slow
def test_a_drafter_trained_offline_has_the_bits_of_one_trained_online(folder: Path, monkeypatch: pytest.MonkeyPatch):
    for place in ("jaxspec.train.features.mesh_of", "jaxspec.training.distill.mesh_of"):
        monkeypatch.setattr(place, lambda _: ONE)
    steps = ("optimizer.epochs=none", "optimizer.steps=3", "objective.steps=2", "objective.noise=0", *MIX)
    for name, more in {"on": (), "off": ("data.features=store",)}.items():
        places = (f"checkpoint.folder={name}", f"export_folder={name}_drafter")
        assert main(["train", "toy.py", *steps, *places, *more, "--json", f"{name}.json"]) == 0
    on, off = (json.loads(Path(f"{name}.json").read_text()) for name in ("on", "off"))
    assert on["eval"] == off["eval"] and on["loss"] == off["loss"]
    on, off = (load_drafter(f"{name}_drafter").params for name in ("on", "off"))
    assert_same(jax.device_get(on), jax.device_get(off))


def test_a_store_begun_again_before_anything_was_finished_has_the_index_of_the_new_plan(folder: Path, monkeypatch):
    monkeypatch.setattr(features, "mesh_of", lambda _: ONE)
    whole = shards.ShardWriter.seal
    monkeypatch.setattr(shards.ShardWriter, "seal", Mock(side_effect=KeyboardInterrupt))
    words = ["features", "toy.py", *MIX, *STORE, "--out", "anew"]
    assert main(words) == 130
    before = np.load("anew/index.npy")
    other = [*words[:2], "seed=5", *words[2:]]
    monkeypatch.setattr(shards.ShardWriter, "seal", whole)
    assert main(other) == 0
    assert not np.array_equal(np.load("anew/index.npy"), before)
    assert main([*other[:-1], "straight"]) == 0
    assert digests(Path("anew")) == digests(Path("straight"))
    np.testing.assert_array_equal(np.load("anew/index.npy"), np.load("straight/index.npy"))
