"""How the layers of a family of decoders depart from Llama's."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
    """Where a decoder departs from Llama's; each as it stands here leaves no trace in a program."""

    windows: tuple[int | None, ...] = ()
    """For each layer how many tokens, its own included, a query sees at most; None: all. Empty: all, in every layer."""
    local_theta: float | None = None
    """Base of the rotary frequencies, unscaled, of layers with a window; None: as in the others."""
    rotary: int | None = None
    """So many channels of a head are rotated, from the first; None: all."""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    """RMS norms over the channels of every query and key, before they are rotated."""
    norms_behind: bool = False
    """Attention and MLP each have a norm of their own behind them too."""
    centred_norms: bool = False
    """Norms multiply by `1 + weight`, in fp32."""
    activation: str = "silu"
    """Of the MLP; one of `ACTIVATIONS`."""
    score_scale: float | None = None
    """Of attention scores, instead of `1 / sqrt(C)`."""
    score_cap: float | None = None
    """Attention scores become `cap * tanh(score / cap)`."""
    logit_cap: float | None = None
    """Logits likewise."""
    embed_scale: float = 1.0
    """What embeddings are multiplied by, rounded to the activations' dtype."""
    experts: int = 0
    """MLPs of a layer, of which a router chooses for every token; 0: one MLP and no router."""
    chosen: int = 0
    expert_mlp: int = 0
    """Inner width of each expert."""
    renormalize: bool = True
    """The chosen experts' weights sum to 1; else they are their part of a softmax over all."""


PLAIN = Options()
