"""Models of which only the shape is known: weights are abstract, so nobody needs them to price a round."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxspec.base import Params
from jaxspec.decoding.rounds import DraftVocab, Engine, Weights
from jaxspec.drafters.module import DrafterModule
from jaxspec.evaluation.stand_ins import WEIGHT_SCALE, fill
from jaxspec.lab.round_parts import reference_tree
from jaxspec.nn.matmul import lay_out
from jaxspec.nn.options import Options
from jaxspec.serving.loading import Models
from jaxspec.targets.decoder import SHAPES, Decoder, DecoderConfig, LlamaConfig

_QWEN3 = functools.partial(
    DecoderConfig, 151936, head_dim=128, rope_theta=1e6, norm_eps=1e-6, max_positions=40960, family="qwen3"
)
_MIXED = Options(qk_norm=True, experts=128, chosen=8, expert_mlp=768)
LAB_SHAPES: dict[str, LlamaConfig] = {
    **SHAPES,
    "qwen3-8b": _QWEN3(width=4096, layers=36, heads=32, kv_heads=8, mlp=12288, options=Options(qk_norm=True)),
    "qwen3-32b": _QWEN3(width=5120, layers=64, heads=64, kv_heads=8, mlp=25600, options=Options(qk_norm=True)),
    "qwen3-30b-a3b": _QWEN3(width=2048, layers=48, heads=32, kv_heads=4, mlp=6144, family="qwen3_moe", options=_MIXED),
}
"""Shapes to price without weights: those of `decoder.SHAPES`, and of Qwen3 by its config.json files."""


def abstract_models(
    shape: LlamaConfig, drafter: Any, *, dtype: Any, scored: int | None = None, for_cpu: bool = False
) -> Models:
    """Returns a target of a shape with a drafter (None: without one), weights as `ShapeDtypeStruct`s, no tokenizer.

    `scored` is the size of the drafter's vocabulary, None for all tokens. `for_cpu` lays weights out as CPUs decode
    with them. The tree is `reference_tree`.
    """
    target = Decoder(shape, stacked=False, dtype=dtype, param_dtype=dtype, token_major=for_cpu)
    if drafter is None:
        weights = jax.eval_shape(lambda: Weights(_laid(target.init_params(jax.random.key(0)), for_cpu)))
        return Models(Engine(target), weights, cast(Any, None), shape)
    layout: dict[str, Any] = {"token_major": True} if for_cpu else {}
    drafter = cast(DrafterModule, drafter).clone(dtype=dtype, **layout)
    target = target.clone(taps=drafter.taps)

    def init() -> Weights:
        key = jax.random.key(0)
        params = target.init_params(key)
        shared = target.shared_tables(params)
        token_U = None if scored is None else jnp.arange(scored)
        vocab = None if token_U is None else DraftVocab(token_U, shared.head_VD[token_U])
        drafting = jax.tree.map(lambda a: a.astype(dtype), drafter.init_params(key, shared))
        return Weights(_laid(params, for_cpu), _laid(drafting, for_cpu), vocab)

    weights = jax.eval_shape(init)
    return Models(Engine(target, drafter, reference_tree(drafter.deepest)), weights, cast(Any, None), shape)


def _laid(params: Params, for_cpu: bool) -> Params:
    return lay_out(params) if for_cpu else params


def filled(models: Models) -> Models:
    """Returns models with weights that stand in for those that are abstract."""
    weights = fill(models.weights, WEIGHT_SCALE)
    vocab = weights.vocab
    if vocab is not None:
        vocab = vocab._replace(token_U=jnp.arange(len(vocab.token_U), dtype=vocab.token_U.dtype))
    return models._replace(weights=weights._replace(vocab=vocab))


def with_layers(shape: LlamaConfig, layers: int) -> LlamaConfig:
    """Returns the shape with its first `layers` layers alone."""
    changes: dict[str, Any] = {"layers": layers}
    if shape.options.windows:
        changes["options"] = dataclasses.replace(shape.options, windows=shape.options.windows[:layers])
    return dataclasses.replace(shape, **changes)


def shortened(models: Models, layers: int) -> Models:
    """Returns abstract models whose target has its first `layers` layers alone.

    Auxiliary hidden states are then those of the layers that are left: as many, and as wide.
    """
    engine, shape = models.engine, with_layers(models.config, layers)
    target = cast(Decoder, engine.target)
    target = target.clone(config=shape, taps=tuple(min(tap, layers - 1) for tap in target.taps))
    params = {**models.weights.target, "layers": models.weights.target["layers"][:layers]}
    return models._replace(
        engine=dataclasses.replace(engine, target=target),
        weights=models.weights._replace(target=params),
        config=shape,
    )


def layer_period(shape: LlamaConfig) -> int:
    """Returns after how many layers the kinds of layers repeat; all of them where they do not."""
    windows = shape.options.windows
    periods = (n for n in range(1, shape.layers) if all(w == windows[i % n] for i, w in enumerate(windows)))
    return next(periods, shape.layers)
