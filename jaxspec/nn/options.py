"""The options by which a family of decoders departs from Llama."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
    """Departures of a decoder from Llama's. An option at its default leaves no trace in a program."""

    windows: tuple[int | None, ...] = ()
    """Tokens that a query of each layer sees at most, its own included; None: all. Empty: all, in every layer."""
    local_theta: float | None = None
    """Base of the rotary frequencies of layers with a window, which are not scaled; None: as in the others."""
    rotary: int | None = None
    """Number of a head's channels that are rotated, from the first; None: all."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias."""
    out_bias: bool = False
    """Whether attention's output has a bias."""
    qk_norm: bool = False
    """Whether RMS norms over the channels of every query and key stand before their rotation."""
    norms_behind: bool = False
    """Whether attention and MLP each have a norm behind them too."""
    centred_norms: bool = False
    """Whether norms multiply by `1 + weight`, in fp32."""
    activation: str = "silu"
    """Activation of the MLP; one of `ACTIVATIONS`."""
    score_scale: float | None = None
    """Factor of attention scores; None: `1 / sqrt(C)`."""
    score_cap: float | None = None
    """Attention scores become `cap * tanh(score / cap)`; None: they stay as they are."""
    logit_cap: float | None = None
    """Logits become `cap * tanh(logit / cap)`; None: they stay as they are."""
    embed_scale: float = 1.0
    """Factor of embeddings, rounded to the activations' dtype."""
    experts: int = 0
    """MLPs of a layer, of which a router chooses some for every token; 0: one MLP and no router."""
    chosen: int = 0
    """Experts of each token."""
    expert_mlp: int = 0
    """Inner width of each expert."""
    renormalize: bool = True
    """Whether the chosen experts' weights sum to 1; else they are their part of a softmax over all."""


PLAIN = Options()
