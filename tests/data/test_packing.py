"""Packing and pipelines: nothing lost, everything reproducible, resume exact."""

import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.chat_template import ChatTemplate
from jaxspec.data.corpus import Corpus, fingerprint, join, tokenize_conversations
from jaxspec.data.messages import Conversation
from jaxspec.data.packing import Mix, PackedBatches, pack
from jaxspec.data.pipeline import iterate
from jaxspec.data.tokenizer_training import train_bpe, write_tokenizer_folder
from jaxspec.data.turns import NO_USER

LENGTH, BATCH = 32, 4


def make_corpus(count: int = 150, longest: int = LENGTH) -> Corpus:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, longest + 1, count)
    total = int(lengths.sum())
    return Corpus(
        tokens=rng.integers(1, 1000, total).astype(np.int32),
        assistant_mask=rng.random(total) < 0.5,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        source=(np.arange(count) % 3).astype(np.int32),
        sources=("a", "b", "c"),
        ids=tuple(f"doc-{i}" for i in range(count)),
        truncated=np.zeros(count, bool),
    )


def test_a_fingerprint_tells_corpora_apart_by_anything_that_training_sees():
    corpus = make_corpus()
    assert fingerprint(corpus) == fingerprint(make_corpus())
    changed = [
        corpus._replace(tokens=corpus.tokens + 1),
        corpus._replace(assistant_mask=~corpus.assistant_mask),
        corpus._replace(source=corpus.source[::-1]),
    ]
    assert len({fingerprint(c) for c in [corpus, *changed]}) == 4


def documents(batches: PackedBatches, epochs: int = 1) -> Counter:
    found: Counter = Counter()
    for i in range(len(batches)):
        batch = batches[i]
        for row in range(len(batch["tokens"])):
            for segment in range(1, batch["segments"][row].max() + 1):
                here = batch["segments"][row] == segment
                found[(int(batch["documents"][row, here][0]), tuple(batch["tokens"][row, here].tolist()))] += 1
    return found


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.randoms(use_true_random=False))
def test_packing_loses_nothing_and_overfills_nothing(lengths: list[int], random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    rows = pack(np.asarray(lengths), np.asarray(order), 50)
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(lengths)))
    assert all(sum(lengths[d] for d in row) <= 50 for row in rows)


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="more than a row of 8"):
        pack(np.asarray([9]), np.arange(1), 8)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_holds_every_document_whole_and_once(epochs: int, shuffle: bool):
    corpus = make_corpus()
    found = documents(PackedBatches(corpus, LENGTH, BATCH, epochs=epochs, shuffle=shuffle))
    wanted = {
        (d, tuple(corpus.tokens[corpus.offsets[d] : corpus.offsets[d + 1]].tolist())): epochs
        for d in range(len(corpus.ids))
    }
    assert found == wanted


MIX = (Mix(first=100, share=0.2),)


@pytest.mark.parametrize(("share", "loss_on"), [(0.1, "all"), (0.2, "assistant"), (0.8, "all")])
def test_a_mix_makes_its_share_of_the_trained_tokens_and_repeats_none_before_all_were_taken(share: float, loss_on):
    corpus, mix, epochs = make_corpus(), (Mix(100, share, loss_on),), 4
    batches = PackedBatches(corpus, LENGTH, BATCH, epochs=epochs, loss_on="assistant", mixes=mix)
    taken, own, theirs = Counter(), 0, 0
    for batch in (batches[i] for i in range(len(batches))):
        taken.update(batch["documents"][(batch["segments"] > 0) & (batch["positions"] == 0)].tolist())
        own += np.sum(batch["loss_mask"] & (batch["documents"] < 100))
        theirs += np.sum(batch["loss_mask"] & (batch["documents"] >= 100))
    assert all(taken[d] == epochs for d in range(100))
    times = [taken[d] for d in range(100, 150)]
    assert max(times) - min(times) <= 1
    assert 0 <= theirs - share / (1 - share) * own < LENGTH
    (found,) = batches.mixed
    assert found.held == 50 and abs(found.share - share) < 0.02
    assert ("are repeated" in str(found)) == (found.documents > 50) == (share == 0.8)


def test_what_is_a_target_can_differ_between_a_corpus_and_its_mix():
    corpus = make_corpus()
    batches = PackedBatches(corpus, LENGTH, BATCH, loss_on="assistant", mixes=(Mix(100, 0.4, "all"),))
    for i in range(len(batches)):
        batch = batches[i]
        place = corpus.offsets[batch["documents"]] + batch["positions"]
        wanted = (batch["documents"] >= 100) | corpus.assistant_mask[np.minimum(place, len(corpus.tokens) - 1)]
        assert np.array_equal(batch["loss_mask"], wanted & (batch["positions"] > 0) & (batch["documents"] >= 0))


def test_joined_corpora_keep_their_documents_and_sources():
    first, second = make_corpus(4), make_corpus(6)._replace(sources=("b", "d", "e"))
    both = join(first, second)
    assert list(both.ids) == [*first.ids, *second.ids] and both.summary.documents == 10
    named = [both.sources[i] for i in both.source]
    assert named == [c.sources[i] for c in (first, second) for i in c.source]
    for i in range(6):
        (mine, _), (theirs, _) = both.read([4 + i, 0])[0], second.read([i])[0]
        assert np.array_equal(mine, theirs)
    assert np.array_equal(both.keys, np.concatenate([first.keys, second.keys]))


def test_rows_are_well_filled():
    batches = PackedBatches(make_corpus(600, longest=LENGTH // 2), LENGTH, BATCH)
    assert np.mean([batches[i]["segments"] > 0 for i in range(len(batches) - 1)]) > 0.95


def test_positions_restart_and_masks_follow_the_document():
    corpus = make_corpus()
    batch = PackedBatches(corpus, LENGTH, BATCH, loss_on="assistant")[1]
    for row, column in np.argwhere(batch["segments"] > 0):
        document, position = batch["documents"][row, column], batch["positions"][row, column]
        assert batch["tokens"][row, column] == corpus.tokens[corpus.offsets[document] + position]
        assert batch["sources"][row, column] == corpus.source[document]
        wanted = position > 0 and corpus.assistant_mask[corpus.offsets[document] + position]
        assert batch["loss_mask"][row, column] == wanted


def test_padding_is_marked_everywhere():
    batch = PackedBatches(make_corpus(3), LENGTH, 64)[0]
    padding = batch["segments"] == 0
    assert padding.any()
    for name, value in {"tokens": 0, "positions": 0, "loss_mask": False, "documents": -1, "sources": -1}.items():
        assert (batch[name][padding] == value).all()


def test_with_loss_on_all_only_first_tokens_and_padding_are_no_targets():
    batch = PackedBatches(make_corpus(), LENGTH, BATCH, loss_on="all")[0]
    assert np.array_equal(batch["loss_mask"], batch["positions"] > 0)


def test_epochs_differ_and_seeds_reproduce():
    first, again = (PackedBatches(make_corpus(), LENGTH, BATCH, seed=3, epochs=None) for _ in range(2))
    later = first.batches_per_epoch + 1
    assert same(first[later], again[later])
    assert not same(first[0], first[later])
    assert not same(first[0], PackedBatches(make_corpus(), LENGTH, BATCH, seed=4)[0])


def test_a_batch_does_not_depend_on_which_came_before():
    whole = PackedBatches(make_corpus(), LENGTH, BATCH, epochs=4)
    last = len(whole) - 1
    assert same(
        [whole[i] for i in range(len(whole))][last], PackedBatches(make_corpus(), LENGTH, BATCH, epochs=4)[last]
    )


@pytest.mark.parametrize("mix", [(), MIX])
def test_some_rows_are_those_of_the_global_batch(mix: tuple[Mix, ...]):
    whole = PackedBatches(make_corpus(), LENGTH, BATCH, epochs=2, mixes=mix)
    some = PackedBatches(make_corpus(), LENGTH, BATCH, epochs=2, rows=(1, 3), mixes=mix)
    assert len(some) == len(whole)
    for i in range(len(whole)):
        assert same(some[i], {k: x[[1, 3]] for k, x in whole[i].items()})


@pytest.mark.parametrize(("stop", "mix"), [(0, ()), (1, ()), (7, ()), (20, ()), (20, MIX), (35, MIX)])
def test_resume_is_exact_through_json(stop: int, mix: tuple[Mix, ...]):
    batches = PackedBatches(make_corpus(), LENGTH, BATCH, epochs=2, mixes=mix)
    running = iterate(batches)
    for _ in range(stop):
        next(running)
    written = json.dumps(running.get_state())
    rest = list(running)
    resumed = iterate(PackedBatches(make_corpus(), LENGTH, BATCH, epochs=2, mixes=mix))
    resumed.set_state(json.loads(written))
    others = list(resumed)
    assert len(rest) == len(batches) - stop and len(written) < 1000
    assert all(same(a, b) for a, b in zip(rest, others, strict=True))
    running.close()
    resumed.close()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"length": 8}, "length is 8 but a document has 32 tokens"),
        ({"loss_on": "user"}, "loss_on is 'user'"),
        (
            {
                "corpus": make_corpus()._replace(assistant_mask=np.zeros(9999, bool)),
                "mixes": (Mix(9, 0.1, "assistant"),),
            },
            "mix",
        ),
    ],
)
def test_wrong_settings_are_named(change: dict, match: str):
    with pytest.raises(ValueError, match=match):
        PackedBatches(**{"corpus": make_corpus(), "length": LENGTH, "batch": BATCH} | change)


@pytest.mark.parametrize(
    ("settings", "match"),
    [((9, 0.0), "mix_share is 0.0"), ((9, 1.0), "mix_share is 1.0"), ((9, 0.1, "user"), "mix_loss_on is 'user'")],
)
def test_wrong_settings_of_a_mix_are_named(settings: tuple, match: str):
    with pytest.raises(ValueError, match=match):
        Mix(*settings)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer_folder(folder, train_bpe(["some words to learn from"] * 3, size=270))
    return ChatTokenizer.load(folder)


def talk(user: str, assistant: str, source: str = "s") -> Conversation:
    messages = ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})
    return Conversation(user[:3], source, messages)


def test_what_is_cut_or_odd_is_counted(chat: ChatTokenizer):
    monologue = Conversation("m", "s", ({"role": "user", "content": "only a user"},))
    corpus = tokenize_conversations(
        [talk("a", "b"), talk("a", "b" * 50), talk("a" * 50, "b"), monologue], chat, length=20
    )
    assert corpus.summary[2:] == (2, 2, 0) and corpus.summary.documents == 4
    assert corpus.lengths.max() == 20 and corpus.summary.tokens == len(corpus.tokens)
    assert str(corpus.summary).endswith("2 truncated, 2 without assistant")


@given(st.integers(3, 40), st.text("ab ", min_size=1, max_size=200))
def test_plain_text_is_divided_and_not_cut(chat: ChatTokenizer, length: int, text: str):
    corpus = tokenize_conversations([talk("a", "b" * 90), Conversation("t", "s", (), text=text)], chat, length=length)
    of_text = np.asarray(corpus.ids) == "t"
    assert of_text.tolist() == [False] + [True] * (len(corpus.ids) - 1)
    whole = [] if chat.bos_id is None else [chat.bos_id]
    pieces = corpus.read(np.flatnonzero(of_text).tolist())
    assert np.concatenate([p.tokens for p in pieces]).tolist() == [*whole, *chat.encode(text), chat.eos_id]
    assert all(len(p.tokens) == length for p in pieces[:-1]) and not any(p.assistant_mask.any() for p in pieces)
    assert corpus.summary.truncated == 1 and corpus.truncated[0]


def test_conversations_without_any_other_turn_are_counted_and_those_a_template_refuses_named(chat: ChatTokenizer):
    plain = ChatTemplate("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    continued = dataclasses.replace(chat, template=plain)
    monologue = Conversation("m", "s", ({"role": "assistant", "content": "words"},))
    corpus = tokenize_conversations([talk("a", "b"), monologue], continued, length=20)
    assert corpus.summary.without_assistant == 1 and corpus.counts[NO_USER] == 1
    refusing = ChatTemplate("{% if messages|length == 1 %}{{ raise_exception('no') }}{% endif %}")
    strict = dataclasses.replace(chat, template=refusing)
    with pytest.raises(ValueError, match="conversation 'm' of s: the chat template refused the messages: no"):
        tokenize_conversations([monologue], strict, length=20)


def test_conversations_go_through_grain_whole(chat: ChatTokenizer):
    talks = [talk(f"{i} ?", f"it is {i}", source="ab"[i % 2]) for i in range(20)]
    corpus = tokenize_conversations(talks, chat, length=64)
    iterator = iterate(PackedBatches(corpus, 64, batch=2, loss_on="assistant"))
    batches = list(iterator)
    iterator.close()
    said = [
        chat.decode(b["tokens"][r][b["loss_mask"][r] & (b["documents"][r] == d)])
        for b in batches
        for r in range(2)
        for d in np.unique(b["documents"][r])
        if d >= 0
    ]
    assert sorted(said) == sorted(f"it is {i}" for i in range(20))


def test_token_counts_are_those_of_the_batches_of_all_processes():
    whole = PackedBatches(make_corpus(), LENGTH, BATCH, seed=3, epochs=2)
    counts = [int(np.count_nonzero(whole[i]["segments"])) for i in range(len(whole))]
    half = PackedBatches(make_corpus(), LENGTH, BATCH, seed=3, epochs=2, rows=(0, 1))
    assert list(whole.token_counts()) == counts == list(half.token_counts())
    endless = PackedBatches(make_corpus(), LENGTH, BATCH, seed=3, epochs=None)
    assert list(itertools.islice(endless.token_counts(), len(counts) - 1)) == counts[:-1]
