"""Checks of dumped hidden states against the target's embedding, final norm and LM head, and against its layers.

A dump does not say whether its last state lies before or behind the final norm. A state behind it, divided by the
norm's weight, has a root mean square of one at every token, and one before it has not: that decides. Cross entropy does
not: read without the norm, states before it may be the sharper, and tell the target's greedy text better. The greedy
tokens of the LM head must then be the text's own in most places, or the states are of another target, layer or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import Packed
from jaxspec.interchange.dumps import DumpedDocument
from jaxspec.interchange.hf import load_target, read_tables, stored_dtype
from jaxspec.interchange.hf_config import read_config, read_table_config
from jaxspec.interchange.hf_layout import weight_shapes
from jaxspec.interchange.weight_files import shards
from jaxspec.targets.decoder import LlamaConfig
from jaxspec.targets.tables import Tables

UNIT = 0.03
"""Largest distance from one of the root mean square of a normed state divided by the norm's weight."""
NEARLY_ALL = 0.98
"""Share of the tokens that must be on one side of `UNIT`."""
GREEDY = 0.05
"""Greedy agreement by which the reading that was not chosen may be better."""
TIES = (0.02, 0.01)
"""Greedy agreements, and cross entropies in nats, that are closer than this do not tell two norms apart."""
LEAST = {"answers": 0.6, "all tokens": 0.3}
"""Least greedy agreement with the text of a target's answers, and with text where its user's words are among them."""
USUAL = 0.8
"""Greedy agreement with a target's own answers that its last states seldom miss, and those of a lower layer often."""
ERROR = 2e-2
"""Largest relative error of a state that is computed again, for states in bf16."""
PLACES = 512
"""Tokens whose distribution is computed."""
AFFORDABLE = 10**9
"""Parameters of a target whose layers are run for the check unless it is told otherwise."""


class TargetTables(NamedTuple):
    """The parts of a target that its stored features are read with."""

    config: LlamaConfig
    params: dict[str, Any]
    """`embed`, and `head` unless tied, in the dtype they are stored in."""
    norm_D: np.ndarray
    """fp32."""
    centred: tuple[bool, ...]
    """The kinds of final norm that it may have, as `Options.centred_norms`; two for a family that is not known."""

    def logits(self, features_PD: np.ndarray) -> np.ndarray:
        """fp32 logits `[P, V]` of features."""
        return np.asarray(Tables(self.config).logits(self.params, jnp.asarray(features_PD, jnp.float32)[None])[0])

    def normed(self, states_LD: np.ndarray, centred: bool) -> np.ndarray:
        """Returns fp32 `[L, D]`: states behind the final norm."""
        wide = states_LD.astype(np.float32)
        wide *= 1 / np.sqrt(np.mean(np.square(wide), axis=-1, keepdims=True) + self.config.norm_eps)
        return wide * self._factor(centred)

    def unit_share(self, states_LD: np.ndarray, centred: bool) -> float:
        """Returns the share of tokens whose state has root mean square one when the norm's weight is divided out."""
        factor = np.abs(self._factor(centred))
        # Channels with hardly any weight hold rounding errors alone.
        held = factor > 1e-3 * np.median(factor)
        bare = states_LD.astype(np.float32)[:, held] / factor[held]
        return float(np.mean(np.abs(np.sqrt(np.mean(np.square(bare), axis=-1)) - 1) < UNIT))

    def _factor(self, centred: bool) -> np.ndarray:
        return self.norm_D + 1 if centred else self.norm_D


def load_target_tables(folder: Path) -> TargetTables:
    """Reads embedding, final norm and LM head of the target in a folder; raises as `hf.load_tables`."""
    config = read_table_config(folder)
    try:
        centred: tuple[bool, ...] = (read_config(folder).options.centred_norms,)
    except ValueError:
        centred = (False, True)
    params = read_tables(folder, config, ("embed", "head"), stored_dtype(folder))
    return TargetTables(config, params, np.asarray(read_tables(folder, config, ("norm",), "float32")["norm"]), centred)


class Finding(NamedTuple):
    """The place of a dump's last state, and the figures that tell it."""

    last_state: str
    """`before` or `behind` the final norm."""
    centred: bool
    """Whether the norm multiplies by `1 + weight`."""
    unit_share: float
    """See `TargetTables.unit_share`."""
    cross_entropy: float
    """Of the next token, in nats."""
    cross_entropy_otherwise: float
    """Of the next token if the last state is read as the other kind."""
    agreement: float
    """Share of the places where the LM head's greedy token is the text's next one."""
    agreement_otherwise: float
    places: int
    """Tokens that the three before are means over."""
    of: str
    """`answers`, or `all tokens` where the dump does not say which are the answers'."""

    def features(self, target: TargetTables, states_LD: np.ndarray) -> np.ndarray:
        """Returns the features `[L, D]`: last states behind the final norm."""
        return states_LD if self.last_state == "behind" else target.normed(states_LD, self.centred)


class _Score(NamedTuple):
    """The next tokens of a text under features."""

    entropy: float
    agreement: float


def find_last_state(target: TargetTables, sample: Sequence[DumpedDocument], least: float | None, name: str) -> Finding:
    """Returns where the last state of a dump, called `name`, lies; see the module's docstring.

    Raises ValueError where some states lie before the final norm and others behind it, where two norms fit alike, or
    where the greedy tokens agree with the text in less than the share `least` (None: that of `LEAST`).
    """
    states_ND = np.concatenate([document.states_LND[:, -1] for document in sample])
    unit = {centred: target.unit_share(states_ND, centred) for centred in target.centred}
    best = max(unit, key=lambda centred: unit[centred])
    if 1 - NEARLY_ALL < unit[best] < NEARLY_ALL:
        raise ValueError(
            f"{name}: its last states cannot be told before or behind the final norm: {unit[best]:.0%} of them are "
            "normed; give a folder that was dumped in one way, with the target that dumped it"
        )
    places_PD, tokens_P, of = _places(sample)
    raw = _score(target, places_PD, tokens_P)
    normed = {centred: _score(target, target.normed(places_PD, centred), tokens_P) for centred in target.centred}
    behind = unit[best] >= NEARLY_ALL
    centred = best if behind else _better_norm(normed, name)
    chosen, other = (raw, normed[centred]) if behind else (normed[centred], raw)
    found = Finding(
        "behind" if behind else "before", centred, unit[best], chosen.entropy, other.entropy,
        chosen.agreement, other.agreement, len(tokens_P), of,
    )  # fmt: skip
    _refuse_mismatch(found, LEAST[of] if least is None else least, name)
    return found


def _better_norm(normed: dict[bool, _Score], name: str) -> bool:
    """Returns the kind of norm behind which the last states tell the text better; raises ValueError for a tie."""
    if len(normed) == 1:
        return next(iter(normed))
    plain, centred = normed[False], normed[True]
    # Of text that the target wrote greedily the wrong norm may have the lower cross entropy, for it may be the sharper.
    if abs(plain.agreement - centred.agreement) >= TIES[0]:
        return centred.agreement > plain.agreement
    if abs(plain.entropy - centred.entropy) < TIES[1]:
        raise ValueError(
            f"{name}: the target's final norm multiplies by its weight or by 1 + weight, and both fit its last states "
            "alike; dump them behind the norm"
        )
    return centred.entropy < plain.entropy


def _refuse_mismatch(found: Finding, least: float, name: str) -> None:
    if found.agreement < least:
        raise ValueError(
            f"{name}: the target's LM head, given its last states ({found.last_state} the final norm), finds the next "
            f"token of {found.of} in {found.agreement:.0%} of {found.places:,} places, less than {least:.0%}: they are "
            "of another target or layer (give --target and --layers as they were dumped with), or the text is not the "
            "target's own (then lower --agreement)"
        )
    if found.agreement_otherwise > found.agreement + GREEDY:
        raise ValueError(
            f"{name}: its last states look as if {found.last_state} the final norm, and tell the next token in "
            f"{found.agreement:.0%} of the places as such but in {found.agreement_otherwise:.0%} otherwise; give the "
            "--target that dumped them"
        )


def _places(sample: Sequence[DumpedDocument]) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns last states `[P, D]` of up to `PLACES` tokens, the tokens after them, and whose they are."""
    told = any(document.mask_L is not None and document.mask_L[1:].any() for document in sample)
    states, tokens = [], []
    for document in sample:
        if told and document.mask_L is None:
            continue
        mask_L = document.mask_L if told else None
        wanted_L = np.ones(len(document.tokens_L), bool) if mask_L is None else mask_L
        at = np.flatnonzero(wanted_L[1:])[: max(1, PLACES // len(sample))]
        states.append(document.states_LND[at, -1])
        tokens.append(document.tokens_L[at + 1])
    return np.concatenate(states), np.concatenate(tokens), "answers" if told else "all tokens"


def _score(target: TargetTables, features_PD: np.ndarray, tokens_P: np.ndarray) -> _Score:
    entropy, right = 0.0, 0
    for first in range(0, len(tokens_P), 64):
        tokens = tokens_P[first : first + 64]
        logits_PV = target.logits(features_PD[first : first + 64]).astype(np.float64)
        top_P1 = logits_PV.max(axis=-1, keepdims=True)
        whole_P = np.log(np.sum(np.exp(logits_PV - top_P1), axis=-1)) + top_P1[:, 0]
        entropy += float(np.sum(whole_P - logits_PV[np.arange(len(tokens)), tokens]))
        right += int(np.sum(logits_PV.argmax(axis=-1) == tokens))
    return _Score(entropy / max(1, len(tokens_P)), right / max(1, len(tokens_P)))


def check_embedding(target: TargetTables, document: DumpedDocument, name: str) -> float:
    """Returns the relative error of a document's first state as the embedding of its tokens.

    Raises ValueError above `ERROR`: the state entering layer 0 is the embedding.
    """
    rows_LD = np.asarray(target.params["embed"][jnp.asarray(document.tokens_L)], np.float32)
    error = _error(document.states_LND[:, 0], rows_LD * target.config.options.embed_scale)
    if not error <= ERROR:
        raise ValueError(
            f"{name}: its state 0 is not the embedding of its tokens (relative error {error:.2g}): it is of another "
            "target, or the layers are others; give --target and --layers as they were dumped with"
        )
    return error


def _error(found_LD: np.ndarray, wanted_LD: np.ndarray) -> float:
    """Returns the median over tokens of the relative error of a state."""
    # Not of all numbers together: the first token's state may be a thousand times larger than the others'.
    found, wanted = found_LD.astype(np.float32), wanted_LD.astype(np.float32)
    errors_L = np.linalg.norm(found - wanted, axis=-1) / np.maximum(np.linalg.norm(wanted, axis=-1), 1e-30)
    return float(np.median(errors_L))


def is_affordable(folder: Path) -> bool:
    """Returns whether the target in a folder can be run here and is small enough to be, for a check."""
    try:
        config = read_config(folder)
        if (folder / "config.json").is_file():
            shards(folder)
    except (ValueError, OSError):
        return False
    return sum(int(np.prod(weight.shape)) for weight in jax.tree.leaves(weight_shapes(config, True))) <= AFFORDABLE


def recompute(
    folder: Path, document: DumpedDocument, layers: Sequence[int], features_LD: np.ndarray
) -> dict[str, float]:
    """Runs the target over the first tokens of a document; returns the relative error of each state by its name.

    `layers` are the layers that the states before the last enter. The target runs in fp32. Raises ValueError as
    `load_target`, and for an error above `ERROR`.
    """
    loaded = load_target(folder, dtype=jnp.float32)
    tokens_BL = jnp.asarray(document.tokens_L[:256], jnp.int32)[None]
    length = tokens_BL.shape[1]
    run = jax.jit(loaded.module.clone(taps=tuple(layers)).forward)
    out = run(loaded.params, tokens_BL, jnp.arange(length)[None], Packed(jnp.ones_like(tokens_BL)))
    errors = {"last": _error(features_LD[:length], np.asarray(out.features_BLD[0]))}
    taps_BLND = None if out.taps_BLD is None else out.taps_BLD.reshape(1, length, len(layers), -1)
    for place, layer in enumerate(layers):
        assert taps_BLND is not None
        errors[f"layer {layer}"] = _error(document.states_LND[:length, place], np.asarray(taps_BLND[0, :, place]))
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else np.inf)
    if not errors[worst] <= ERROR:
        state = "last state" if worst == "last" else f"state entering {worst}"
        raise ValueError(
            f"its {state} is not what {folder} computes (relative error {errors[worst]:.2g}, allowed {ERROR:g}): it is "
            "of another target or other layers; give --target and --layers as they were dumped with, or --recompute no"
        )
    return errors
