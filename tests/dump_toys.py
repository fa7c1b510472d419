"""Hidden states of a tiny random target, dumped in the layouts of other projects and compared with what is imported."""

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from random_models import write_target
from safetensors.numpy import load_file, save_file

from jaxspec.__main__ import main
from jaxspec.base import Packed
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.corpus import key
from jaxspec.data.feature_store import FeatureStore
from jaxspec.data.tokenized_corpus import StoredCorpus
from jaxspec.interchange.hf import load_target, write_llama
from jaxspec.targets.decoder import Decoder

LAYERS, ANSWER = 8, 12
COUNT = 24
"""Documents of a dump."""
TAPS = (2, 4, 5)
"""EAGLE-3's default layers of a target of eight."""
TYPES = {np.float32: b"Float", np.dtype(ml_dtypes.bfloat16): b"BFloat16", np.int64: b"Long", np.int32: b"Int"}


class Text(NamedTuple):
    """A document as the target answers it: its states enter layers `TAPS` and, the last, the final norm."""

    tokens_L: np.ndarray
    mask_L: np.ndarray
    states_LND: np.ndarray
    """fp32 `[L, 4, D]`."""
    features_LD: np.ndarray
    """fp32, behind the final norm."""


def write_normed_target(folder: Path, *, layers: int = LAYERS) -> Path:
    """A random target whose final norm has weights that differ."""
    write_target(folder, layers=layers)
    _, params, config = load_target(folder, dtype=jnp.float32)
    params = jax.device_get(params)
    params["norm"] = np.random.default_rng(4).uniform(0.4, 2.0, config.width).astype(np.float32)
    write_llama(folder, params, config, dtype="float32")
    return folder


def answered_texts(folder: Path, count: int, taps: tuple[int, ...] = TAPS) -> list[Text]:
    """Prompts with the target's greedy answers, and its states."""
    tokenizer = ChatTokenizer.load(folder)
    asked = [tokenizer.encode_prompt([{"role": "user", "content": f"{i} and {i * i} make"}]) for i in range(count)]
    module, params, config = load_target(folder, dtype=jnp.float32)
    # A layer more, whose output nobody reads, so that the input of the layer behind the last one is a tap too.
    deeper = Decoder(config.__class__(**{**vars(config), "layers": config.layers + 1}), stacked=False)
    more = {**params, "layers": [*params["layers"], params["layers"][0]]}
    length = max(map(len, asked)) + ANSWER
    tokens_BL, ends = np.zeros((count, length), np.int32), np.asarray([len(tokens) for tokens in asked])
    for row, tokens in zip(tokens_BL, asked, strict=True):
        row[: len(tokens)] = tokens
    at, mask, rows = jnp.arange(length)[None].repeat(count, 0), Packed(jnp.ones_like(tokens_BL)), np.arange(count)
    answer = jax.jit(lambda tokens: jnp.argmax(module.logits(params, module.forward(params, tokens, at, mask)[0]), -1))
    for step in range(ANSWER):
        tokens_BL[rows, ends + step] = np.asarray(answer(tokens_BL))[rows, ends + step - 1]
    tapped = jax.jit(deeper.clone(taps=(*taps, config.layers)).forward)(more, tokens_BL, at, mask)
    states = np.asarray(tapped.taps_BLD).reshape(count, length, len(taps) + 1, -1)
    features = np.asarray(jax.jit(module.forward)(params, tokens_BL, at, mask).features_BLD)
    found = []
    for i, end in enumerate(ends + ANSWER):
        mask_L = np.arange(end) >= ends[i]
        found.append(Text(tokens_BL[i, :end], mask_L, states[i, :end], features[i, :end]))
    return found


def half(array: np.ndarray) -> np.ndarray:
    """The array in bf16."""
    return np.ascontiguousarray(array.astype(ml_dtypes.bfloat16))


def dump_vllm(folder: Path, texts: list[Text], name: str = "cmpl-{}-0", **changes: Any) -> Path:
    """A file of a request each, as vLLM's connector writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        tensors = {"hidden_states": half(text.states_LND), "token_ids": text.tokens_L.astype(np.int64)}
        save_file({**tensors, **changes}, folder / f"{name.format(i)}.safetensors")
    return folder


def dump_speculators(folder: Path, texts: list[Text]) -> Path:
    """Files `hs_N` below a set that looks as if `datasets` had saved it."""
    import pyarrow  # pyright: ignore[reportMissingImports]

    dump_vllm(folder / "hidden_states", texts, "hs_{}")
    table = pyarrow.table(
        {
            "input_ids": [text.tokens_L.tolist() for text in texts],
            "loss_mask": [text.mask_L.astype(int).tolist() for text in texts],
            "seq_len": [len(text.tokens_L) for text in texts],
        }
    )
    with pyarrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file:
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    return folder


def torch_bytes(tensors: Mapping[str, Any]) -> bytes:
    """A file of torch.save: a dict of tensors, other values as text."""
    program, parts = b"\x80\x02}", {}
    for number, (name, value) in enumerate(tensors.items()):
        program += _text(name)
        if isinstance(value, str):
            program += _text(value) + b"s"
            continue
        array = np.ascontiguousarray(value)
        kind = next(word for dtype, word in TYPES.items() if array.dtype == dtype)
        steps = [stride // array.itemsize for stride in array.strides]
        storage = b"(" + _text("storage") + b"ctorch\n" + kind + b"Storage\n" + _text(str(number)) + _text("cpu")
        storage += _number(array.size) + b"tQ"
        places = b"".join(b"(" + b"".join(map(_number, sizes)) + b"t" for sizes in (array.shape, steps))
        hooks = b"\x89ccollections\nOrderedDict\n)R"
        program += b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _number(0) + places + hooks + b"tRs"
        parts[str(number)] = array.tobytes()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("data_0/data.pkl", program + b".")
        for name, data in parts.items():
            archive.writestr(f"data_0/data/{name}", data)
    return packed.getvalue()


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _number(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def dump_specforge(folder: Path, texts: list[Text], *, behind: bool = True, group: int = 5, pack: bool = False) -> Path:
    """SpecForge's offline EAGLE-3 files, `group` in a folder; `pack` writes them through gzip."""
    for i, text in enumerate(texts):
        first, last = i // group * group, half(text.features_LD if behind else text.states_LND[:, -1])
        place = folder / f"rows_{first}-{first + group}"
        place.mkdir(parents=True, exist_ok=True)
        tensors = {
            "input_ids": text.tokens_L.astype(np.int64),
            "loss_mask": text.mask_L.astype(np.int64),
            "hidden_state": last[None],
            "aux_hidden_state": half(text.states_LND[:, :-1]).reshape(1, len(last), -1),
        }
        data = torch_bytes(tensors)
        path = place / f"data_{i}.ckpt{'.gz' * pack}"
        path.write_bytes(gzip.compress(data) if pack else data)
    return folder


def dump_pickles(folder: Path, documents: Sequence[Mapping[str, Any]]) -> Path:
    """Files `data_N.ckpt` of any tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, tensors in enumerate(documents):
        (folder / f"data_{i}.ckpt").write_bytes(torch_bytes(tensors))
    return folder


def write_foreign_target(folder: Path, source: Path, **fields: Any) -> Path:
    """A folder of a family that is not known, with the tables of `source` inside a larger model, and no layers."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["StrangeForConditionalGeneration"], "model_type": "strange"}
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    tensors, index = load_file(source / "model.safetensors"), {}
    wanted = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    tables = {f"language_model.{name}": tensors[name] for name in wanted}
    save_file(tables, folder / "model-00001-of-00002.safetensors")
    index = dict.fromkeys(tables, "model-00001-of-00002.safetensors")
    index["language_model.model.layers.0.strange.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def imported(dump: str, *flags: str, out: str = "out", target: str = "target") -> dict[str, Any]:
    """The result of an import that succeeds."""
    assert main(["import", "features", dump, out, "--target", target, *flags, "--json", "result.json"]) == 0
    return json.loads(Path("result.json").read_text())


def check_store(texts: list[Text], out: str = "out", *, masked: bool = True, taps: bool = True) -> None:
    """Every text is in one of the corpora, with its mask, and its features are the target's, within bf16."""
    store, seen = FeatureStore(out), {}
    for name in ("train", "eval"):
        corpus = StoredCorpus(Path(out) / name)
        for place, document in zip(store.find(corpus), corpus.read(range(len(corpus.lengths))), strict=True):
            record = store.read([int(place)], ["features", "taps"] if taps else ["features"])[0]
            seen[key(document.tokens)] = document, record
    assert len(seen) == len({key(text.tokens_L) for text in texts})
    for text in texts:
        document, record = seen[key(text.tokens_L)]
        np.testing.assert_array_equal(document.tokens, text.tokens_L)
        np.testing.assert_array_equal(document.assistant_mask, text.mask_L & masked)
        found = record["features"].astype(np.float32)
        np.testing.assert_allclose(found, text.features_LD, rtol=2e-2, atol=2e-2)
        if taps:
            wanted = half(text.states_LND[:, :-1]).reshape(len(text.tokens_L), -1)
            np.testing.assert_array_equal(record["taps"], wanted)
