"""PyTorch beside JAX on a device: EAGLE's training step, and `transformers` decoding, with random weights."""

from __future__ import annotations

import functools
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxspec.evaluation.device_plan import DevicePlan
from jaxspec.evaluation.measurements import Figures, Measurement
from jaxspec.targets.decoder import SHAPES, LlamaConfig

SAMPLES = 3
NEW_TOKENS = 32
"""Tokens of a short answer; a long one has twice as many, and their difference is decoding alone."""


class PeerBench:
    """Measures PyTorch in a process of its own, where JAX holds no memory of the device.

    Raises ImportError without torch and transformers, and whatever a measurement runs into.
    """

    def __init__(self, plan: DevicePlan) -> None:
        self.plan = plan

    def measure(self, m: Measurement) -> Figures:
        """Returns the figures of one measurement."""
        if m.kind == "transformers":
            return self._generate(m.settings)
        target, head = self._training
        rows, length = m.settings["rows"], m.settings["length"]
        tokens = self._tokens(rows, length)
        run = functools.partial(_read, target, tokens) if m.kind == "torch_target" else functools.partial(head, tokens)
        seconds = self._median(run)
        return {"seconds": seconds, "tokens_per_second": rows * length / seconds} | self._versions

    @property
    def _versions(self) -> Figures:
        return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}

    @property
    def _device(self) -> str:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def _dtype(self) -> Any:
        import torch

        return torch.bfloat16 if self.plan.dtype == "bf16" else torch.float32

    def _tokens(self, rows: int, length: int) -> Any:
        import torch

        vocab = SHAPES[self.plan.shape].vocab
        return torch.arange(rows * length, device=self._device).reshape(rows, length) * 7 % vocab

    @functools.cached_property
    def _target(self) -> Any:
        """A Llama of the plan's shape, with `transformers`' own random weights and PyTorch's fused attention."""
        import torch
        import transformers

        fields: dict[str, Any] = llama_fields(SHAPES[self.plan.shape]) | {"attn_implementation": "sdpa"}
        config = transformers.LlamaConfig(**fields)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        try:
            with torch.device(self._device):
                return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    @functools.cached_property
    def _training(self) -> tuple[Any, Callable[[Any], Any]]:
        return self._target, eagle_step(self._target, self._device)

    def _median(self, run: Callable[[], Any]) -> float:
        """Returns the median seconds of `run`, whose result the device has finished; a first one is not counted."""
        samples = []
        for _ in range(SAMPLES + 1):
            self._wait()
            started = time.perf_counter()
            run()
            self._wait()
            samples.append(time.perf_counter() - started)
        return float(np.median(samples[1:]))

    def _wait(self) -> None:
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()

    def _generate(self, s: dict[str, Any]) -> Figures:
        """Times greedy answers of two lengths: the seconds of a token are their difference."""
        static = {"cache_implementation": "static"} if s["cache"] != "dynamic" else {}
        tokens = self._tokens(s["batch"], s["prefix"])
        long, short = (
            self._median(functools.partial(_answer, self._target, tokens, new, static))
            for new in (2 * NEW_TOKENS, NEW_TOKENS)
        )
        seconds = max(1e-9, (long - short) / NEW_TOKENS)
        compiled = bool(static) and self._device == "cuda"
        return {"seconds": seconds, "tokens_per_second": s["batch"] / seconds, "compiled": compiled} | self._versions


def llama_fields(c: LlamaConfig) -> dict[str, Any]:
    """Returns the fields of a shape as `transformers` names them; its rotary scaling, which costs nothing, is left."""
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "max_position_embeddings": c.max_positions,
    }


def _read(target: Any, tokens: Any) -> Any:
    import torch

    with torch.no_grad():
        return target.model(input_ids=tokens, use_cache=False).last_hidden_state


def _answer(target: Any, tokens: Any, new: int, static: dict[str, str]) -> Any:
    import torch

    lengths = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    with torch.inference_mode():
        return target.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **lengths, **static
        )


def eagle_step(target: Any, device: str) -> Callable[[Any], Any]:
    """Returns EAGLE-1's update as its trainer does it (arXiv 2401.15077): `tokens -> loss`, the target run each time.

    A fusion layer and one decoder layer without its first norm, SmoothL1 on features with weight 1, soft cross-entropy
    on all logits at once with weight 0.1, values clipped to 0.5, AdamW on fp32 masters, matmuls in the target's dtype.
    """
    import torch
    from torch.nn import functional
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    c, dtype = target.config, target.lm_head.weight.dtype
    with torch.device(device):
        fusion = torch.nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False, dtype=torch.float32)
        layer: Any = LlamaDecoderLayer(c, 0).float()
    layer.input_layernorm = torch.nn.Identity()
    weights = [*fusion.parameters(), *layer.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=3e-5, betas=(0.9, 0.95), fused=device == "cuda")

    def step(tokens: Any) -> Any:
        features = _read(target, tokens)
        positions = torch.arange(tokens.shape[1], device=device)[None]
        turn = target.model.rotary_emb(features, positions)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            pair = torch.cat([target.model.embed_tokens(tokens[:, 1:]), features[:, :-1]], dim=-1)
            out = layer(fusion(pair), position_embeddings=tuple(t[:, :-1] for t in turn))
            out = out[0] if isinstance(out, tuple) else out
            with torch.no_grad():
                wanted = functional.softmax(target.lm_head(features[:, 1:]).float(), dim=-1)
            drafted = functional.log_softmax(target.lm_head(out.to(dtype)).float(), dim=-1)
        loss = functional.smooth_l1_loss(out.float(), features[:, 1:].float())
        loss = loss - 0.1 * (wanted * drafted).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_value_(weights, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step
