"""Published heads against PyTorch modules written from the papers' equations, on the same files, in fp32."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from random_models import SIZE, write_target
from safetensors.numpy import load_file, save_file
from test_published import HEADS, LAYERS, SERVED, SHAPE, SOME, WIDTH, head

from jaxspec.base import SharedTables, UnrollInputs
from jaxspec.checkpoints.models import drafter_shape
from jaxspec.drafters import DRAFTERS
from jaxspec.interchange.eagle3 import eagle3_table, vocabulary_maps
from jaxspec.interchange.export import write
from jaxspec.interchange.layout import stored_tensors
from jaxspec.interchange.published import read_drafter

torch = pytest.importorskip("torch")
_, QUERIES, KEYS, CHANNELS, _ = SHAPE
ROWS, STEPS, EPS = 6, 3, 1e-5


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_target(tmp_path_factory.mktemp("target") / "target", layers=LAYERS))


def norm(w: Any, x: Any) -> Any:
    return w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def turn(x: Any, theta: float) -> Any:
    """Rotary positions of `[heads, length, channels]`, channel i with channel i + half."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def split_heads(w: dict[str, Any], name: str, x: Any, count: int) -> Any:
    """Queries, keys or values of each head, normed if there is a norm."""
    bias, scale = w.get(f"{name}_proj.bias", 0.0), w.get(f"{name}_norm.weight")
    out = (x @ w[f"{name}_proj.weight"].T + bias).view(len(x), count, CHANNELS).transpose(0, 1)
    return out if scale is None else norm(scale, out)


def attention(w: dict[str, Any], prefix: str, x: Any, theta: float) -> Any:
    """Causal grouped attention over `[length, width]`."""
    q, k, v = (
        split_heads(w, f"{prefix}self_attn.{n}", x, count)
        for n, count in zip("qkv", (QUERIES, KEYS, KEYS), strict=True)
    )
    q, k = turn(q, theta), turn(k, theta)
    k, v = (a.repeat_interleave(QUERIES // KEYS, 0) for a in (k, v))
    scores = (q @ k.transpose(1, 2)) / CHANNELS**0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1)
    return mixed @ w[f"{prefix}self_attn.o_proj.weight"].T + w.get(f"{prefix}self_attn.o_proj.bias", 0.0)


def mlp(w: dict[str, Any], prefix: str, x: Any) -> Any:
    gate, up, down = (w[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def eagle(w: dict[str, Any], embedding: Any, feature: Any, theta: float) -> tuple[Any, Any]:
    """The feature that is scored and the one that is passed on, of EAGLE-1/2, HASS and FSPAD heads."""
    fc = "fc.fc" if "fc.fc.weight" in w else "fc"
    s = torch.cat([embedding, feature], -1) @ w[f"{fc}.weight"].T + w.get(f"{fc}.bias", torch.zeros(WIDTH))
    if fc == "fc.fc":
        gate, up, down = (w[f"fc.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        inner = norm(w["fc.post_attention_layernorm.weight"], s)
        s = s + (torch.nn.functional.silu(embedding @ gate.T) * (inner @ up.T)) @ down.T
    a = s + attention(w, "layers.0.", s, theta)
    m = mlp(w, "layers.0.", norm(w["layers.0.post_attention_layernorm.weight"], a))
    if m.shape[-1] == WIDTH:
        return a + m, a + m
    return a + m[:, :WIDTH], a + m[:, WIDTH:]


def taken_in(w: dict[str, Any], taps: Any) -> Any:
    """The features of an EAGLE-3 head for three features of the target, with 3.1's norms if their tensors exist."""
    if "input_norm.weight" in w:
        taps = norm(w["input_norm.weight"], taps)
    if "fc_norm.0.weight" in w:
        taps = torch.cat([norm(w[f"fc_norm.{i}.weight"], tap) for i, tap in enumerate(taps.split(WIDTH, -1))], -1)
    return taps @ w["fc.weight"].T


def layer(w: dict[str, Any], prefix: str, stream: Any, seen: Any, theta: float) -> Any:
    a = stream + attention(w, prefix, seen, theta)
    return a + mlp(w, prefix, norm(w[f"{prefix}post_attention_layernorm.weight"], a))


def fused(w: dict[str, Any], prefix: str, embedding: Any, feature: Any) -> Any:
    """The input of the first layer's attention."""
    normed = norm(w[f"{prefix}hidden_norm.weight"], feature)
    return torch.cat([norm(w[f"{prefix}input_layernorm.weight"], embedding), normed], -1)


def eagle3(w: dict[str, Any], embedding: Any, stream: Any, theta: float) -> tuple[Any, Any]:
    out = layer(w, "midlayer.", stream, fused(w, "midlayer.", embedding, stream), theta)
    normed = norm(w["norm.weight"], out)
    return normed @ w["lm_head.weight"].T, normed if "fc_norm.0.weight" in w else out


def files_of(kind: str, target: str, out: Path) -> tuple[dict[str, Any], Any, Any]:
    """The tensors of an exported head for PyTorch, and our module and weights as imported from them."""
    if kind == "eagle3.1":
        write_newer(out)
    else:
        server = next(name for name in ("eagle", "vllm", "speculators") if name in SERVED[kind])
        write(server, out, head(kind), target)
    found = read_drafter(out)
    tensors = {name: torch.from_numpy(a) for name, a in load_file(out / "model.safetensors").items()}
    return tensors, DRAFTERS[found.name].module(found.config), found.params


def write_newer(out: Path) -> None:
    """A folder of EAGLE-3.1 with every norm there is, which nothing of ours writes, as its readers name them."""
    model = head("eagle3.1")
    config = drafter_shape("eagle3", model.config["shape"])
    tensors = stored_tensors(eagle3_table(config), dict(model.params))
    assert {"input_norm.weight", "fc_norm.2.weight", "midlayer.self_attn.k_proj.bias"} < tensors.keys()
    fields = {
        "hidden_size": WIDTH, "num_attention_heads": QUERIES, "num_key_value_heads": KEYS, "head_dim": CHANNELS,
        "intermediate_size": SHAPE[-1], "vocab_size": SIZE, "rms_norm_eps": EPS, "norm_before_fc": True,
        "fc_norm": True, "norm_output": True, "eagle_aux_hidden_state_layer_ids": list(config.taps),
    }  # fmt: skip
    out.mkdir()
    save_file({**tensors, **vocabulary_maps(SOME, SIZE)}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(fields))


def unrolled(module: Any, params: Any, shared: SharedTables, tokens: np.ndarray, features: np.ndarray) -> np.ndarray:
    at, mask = jnp.arange(ROWS)[None], jnp.tril(jnp.ones((1, ROWS, ROWS), bool))
    rows = UnrollInputs(jnp.asarray(tokens[None]), jnp.asarray(features[None]), at, mask)
    out = module.unroll(params, shared, rows, STEPS)
    return np.stack([module.logits(params, shared, out.hidden_TBLD[j], j)[0] for j in range(STEPS)])


@pytest.fixture(scope="module")
def text() -> tuple[np.ndarray, np.ndarray, SharedTables]:
    """Tokens, three features a position, and the target's tables: logits are as large as real ones, some tens."""
    draw = np.random.default_rng(7)
    embed, table = (jnp.asarray(scale * draw.normal(size=(SIZE, WIDTH)), jnp.float32) for scale in (1.0, 0.1))
    features = draw.normal(size=(ROWS, 3 * WIDTH)).astype(np.float32)
    return draw.integers(0, SIZE, ROWS), features, SharedTables(embed, table)


UNPUBLISHED = ("eagle3 of other layers", "eagle3 norm first", "eagle3 normed queries")
"""In layouts that their authors' code does not write."""


@pytest.mark.parametrize(
    "kind",
    [k for k in HEADS if k.split()[0] in ("eagle", "fspad", "eagle3", "eagle3.1") and k not in UNPUBLISHED],
)
def test_an_imported_head_drafts_as_the_equations_say(kind: str, target: str, text: Any, tmp_path: Path):
    tokens, features, shared = text
    weights, module, params = files_of(kind, target, tmp_path / "out")
    features = features if module.taps else features[:, :WIDTH]
    ours = unrolled(module, params, shared, tokens, features)
    embed, table = (torch.from_numpy(np.array(a)) for a in shared)
    embed = weights["embed_tokens.weight"] if "embed" in params else embed
    network = eagle3 if module.taps else eagle
    for row in range(ROWS - STEPS):
        # Sequential drafting from this row: pairs of the text, then of the head's own features.
        seen = torch.from_numpy(features[: row + 1])
        if module.taps:
            seen = taken_in(weights, seen)
        for step in range(STEPS):
            pairs = embed[torch.from_numpy(tokens[1 : row + step + 2])]
            scored, feature = network(weights, pairs, seen, module.config.rope_theta)
            logits = scored[-1] if module.taps else scored[-1] @ table.T
            np.testing.assert_allclose(ours[step, row], logits.numpy(), atol=1e-4, rtol=1e-4)
            seen = torch.cat([seen, feature[-1:]])


@pytest.mark.parametrize("kind", [k for k in HEADS if k.startswith("peagle")])
def test_an_imported_peagle_head_drafts_in_one_pass_as_the_equations_say(
    kind: str, target: str, text: Any, tmp_path: Path
):
    tokens, features, shared = text
    w, module, params = files_of(kind, target, tmp_path / "out")
    ours, c = unrolled(module, params, shared, tokens, features), module.config
    embed = w["embed_tokens.weight"] if "embed" in params else torch.from_numpy(np.array(shared.embed_VD))
    for row in range(ROWS):
        # The pairs up to this row, and behind them the masks, all causally.
        taps = torch.cat([torch.from_numpy(features[: row + 1]), w["mask_hidden"][0].expand(STEPS - 1, -1)])
        ids = [*np.append(tokens[1:], 0)[: row + 1], *[c.mask_token] * (STEPS - 1)]
        x, pairs = taken_in(w, taps), embed[torch.tensor(ids)]
        seen = fused(w, "layers.0.", pairs, x)
        x = layer(w, "layers.0.", seen[:, WIDTH:] if c.norm_before_residual else x, seen, c.rope_theta)
        for i in range(1, c.layers):
            x = layer(w, f"layers.{i}.", x, norm(w[f"layers.{i}.input_layernorm.weight"], x), c.rope_theta)
        logits = norm(w["norm.weight"], x) @ w["lm_head.weight"].T
        np.testing.assert_allclose(ours[:, row], logits[row:].numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["medusa", "medusa of two blocks"])
def test_imported_medusa_heads_are_residual_blocks(kind: str, target: str, text: Any, tmp_path: Path):
    tokens, features, shared = text
    weights, module, params = files_of(kind, target, tmp_path / "out")
    ours = unrolled(module, params, shared, tokens, features[:, :WIDTH])
    for i in range(STEPS):
        x = torch.from_numpy(features[:, :WIDTH])
        for j in range(module.config.layers):
            stem = f"blocks.{i}.layers.{j}"
            x = x + torch.nn.functional.silu(x @ weights[f"{stem}.weight"].T + weights[f"{stem}.bias"])
        table = weights.get(f"lm_heads.{i}.weight", torch.from_numpy(np.array(shared.head_VD)))
        np.testing.assert_allclose(ours[i], (x @ table.T).numpy(), atol=1e-4, rtol=1e-4)
