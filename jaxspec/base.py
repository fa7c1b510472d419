"""The legend of dimension letters, and the contracts between target, drafter, tree and engine.

Arrays of two or more axes carry their axes as a suffix (`logits_BLV`); einsum strings use the same letters.

| letter | axis | letter | axis |
|---|---|---|---|
| `B` | batch row | `K` | key-value heads |
| `L` | tokens in one call | `G` | query heads a key-value head serves |
| `M` | keys computed in the same call (or draft scratch slots) | `C` | channels of one head |
| `S` | cache slots | `J` | `G + 2`: queries, key and value of one group |
| `D` | model width | `F` | MLP width |
| `V` | vocabulary | `Y` | layers |
| `N` | tree nodes, root included | `W` | frontier: nodes drafted together |
| `T` | tree depth or draft steps | `P` | `T + 1`: nodes of a deepest path, root included |
| `R` | stop ids of a row; children of a node | `O` | output slots |
| `E` | expanded nodes: the root, then one per draft scratch slot | `U` | tokens of a draft vocabulary |
| `A` | tokens of all rows in one axis, without padding | | |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax

Array = jax.Array
Params = Any
"""A nested dict of arrays."""

ROOT = -1
"""Stands for the parent, or its scratch slot, where that is the root and not a drafted node."""


class KVCache(NamedTuple):
    """Keys and values of committed tokens."""

    # Keys are stored channel-major, so that both of attention's products read contiguous rows.

    k_YBKCS: Array
    v_YBKSC: Array

    @property
    def capacity(self) -> int:
        """Slots of a row; a committed token takes one."""
        return self.k_YBKCS.shape[-1]


class TokenMajorCache(NamedTuple):
    """Keys and values of committed tokens, the keys token by token as the values.

    A CPU writes a token's key to a few neighbouring cache lines there, and to one a channel in a `KVCache`.
    """

    k_YBKSC: Array
    v_YBKSC: Array

    @property
    def capacity(self) -> int:
        """Slots of a row; a committed token takes one."""
        return self.v_YBKSC.shape[-2]


Cache = KVCache | TokenMajorCache


class Packed(NamedTuple):
    """Mask of packed rows: a token sees itself and the tokens before it in its own document.

    It takes the place of an array `[B, L, L]`, so that kernels can attend without one.
    """

    segments_BL: Array
    """Numbers 1, 2, .. of the documents of a row; 0 on padding, whose tokens see only themselves."""


class Ragged(NamedTuple):
    """Mask of tokens of several rows in one axis `A`, as many of each row as it has: matmuls then see no padding.

    It takes the place of an array `[B, L, L]`. Attention, where each row has a prefix of its own, takes the tokens as
    `[B, N]` (`nn.ragged`).
    """

    mask_BNN: Array
    """Tokens of its row that each one sees."""
    from_A: Array
    """Place `b * N + n` of each token in `[B, N]`; behind the last token any."""
    place_BN: Array
    """Place of each row's tokens in `A`. Any where there is none: no token may see that one."""


Mask = Array | Packed | Ragged
"""Which keys each token sees: an array `[B, L, M]`, `Packed` or `Ragged`."""


class TargetOutput(NamedTuple):
    """A target's output for `L` tokens: the input of its LM head, and the keys and values it computed."""

    features_BLD: Array
    """Hidden states after the final norm, `logits = features @ head.T`: the features of EAGLE."""
    fresh: KVCache | None
    """The call's own keys and values, `S = L`, of which the caller commits what it accepts; None if not asked for."""
    taps_BLD: Array | None = None
    """Auxiliary hidden states (EAGLE-3): the inputs of some layers, side by side on the last axis."""

    @property
    def read_BLD(self) -> Array:
        """Hidden states that the drafter reads: the auxiliary ones where there are any, else the features."""
        return self.features_BLD if self.taps_BLD is None else self.taps_BLD


class SharedTables(NamedTuple):
    """The target's frozen embedding and LM head, which a drafter uses and does not own."""

    embed_VD: Array
    head_VD: Array
    """Rows of the LM head to score with: those of the draft vocabulary, where the drafter has one."""


class Lookup(NamedTuple):
    """The newest tokens of each row, where the row's text holds them once more (prompt lookup)."""

    tokens_BS: Array
    """The text, prompt first; the newest token is the root."""
    length_B: Array
    at_B: Array
    """Index of the token that stood behind the earlier place."""
    match_B: Array
    """Tokens up to the newest that are the same there; 0: there is no such place."""


class Frontier(NamedTuple):
    """Nodes of one level of the tree, whose children are drafted in one call."""

    token_BW: Array
    """The nodes' own tokens."""
    parent_BW: Array
    """Scratch slot of each node's parent; `ROOT` for children of the root."""
    visible_BWM: Array
    """Which of the scratch slots up to this level's last each node sees: those of its ancestors and its own."""
    depth: int
    """Depth of these nodes; the root has 0."""
    slot: int
    """First scratch slot of this level. The level takes `W` slots from here, so `M = slot + W`."""


DraftMode = Literal["topk", "sample", "swor"]
"""How a node's children are chosen: `topk` takes its likeliest tokens, `sample` independent draws from the draft's
distribution, `swor` draws without replacement. Siblings stand in the order of their draws."""
DRAFT_MODES: tuple[DraftMode, ...] = ("topk", "sample", "swor")


class Children(NamedTuple):
    """The children of one level's nodes, in the order of their draws."""

    token_BWR: Array
    logp_BWR: Array
    """Draft log-probability of each child; -inf for a token that an elder sibling has."""
    bound_BWR: Array
    """Upper bound on `logp` that was known before the draw: log of the probability that elder siblings left. It falls
    along `R`; -inf where nothing is left to draw. For likeliest children it is `logp`."""
    distribution_BWV: Array | None = None
    """Distribution that the first child of each node was drawn from; None where no row draws."""
    random_B: Array | None = None
    """Rows whose children were drawn; those of the others are the likeliest tokens. None where no row draws."""


ChooseChildren = Callable[[Array, int, int], Children]
"""`(logits_BWV, children a node, scratch slot of the first node or ROOT) -> Children`."""


class DraftDistributions(NamedTuple):
    """Draft distributions of a tree's expanded nodes, which rejection rules test the children against."""

    distribution_BEV: Array
    """Distribution of the first child of each expanded node; sums to 1."""
    row_BN: Array
    """Index among the `E` of each node's distribution; any number for a node without children."""
    random_B: Array
    """Rows whose children were drawn, as in `Children`."""


class Tree(NamedTuple):
    """A draft tree in fixed arrays. Node 0 is the root; a parent always stands before its children."""

    token_BN: Array
    parent_BN: Array
    """Node index of the parent; `ROOT` for node 0 and for padding."""
    depth_BN: Array
    score_BN: Array
    """Cumulative draft log-probability of the path to the node; 0 at the root, -inf on padding."""
    valid_BN: Array
    ancestors_BNN: Array
    """`[b, n, m]`: node `m` is `n` or an ancestor of `n`. The attention mask among the tree's nodes."""
    distributions: DraftDistributions | None = None
    """None where no row draws its children."""


DraftLogits = Callable[[Any, Frontier], tuple[Array, Any]]
"""`(scratch, frontier) -> (logits_BWV of the frontier's children, scratch)`."""


@runtime_checkable
class TreePolicy(Protocol):
    """Decides which nodes are drafted. A frozen, hashable dataclass, static to `jit`."""

    @property
    def nodes(self) -> int:
        """Nodes `N` of every tree it grows, root and padding included."""
        ...

    @property
    def depth(self) -> int:
        """Greatest depth `T` of a node."""
        ...

    @property
    def slots(self) -> int:
        """Draft scratch slots it fills, one for each expanded node but the root."""
        ...

    @property
    def modes(self) -> tuple[DraftMode, ...]:
        """Draft modes by which the children of its nodes may be chosen."""
        ...

    def grow(
        self, draft: DraftLogits, choose: ChooseChildren, scratch: Any, root_logits_BV: Array, root_token_B: Array
    ) -> Tree:
        """Returns the tree below `root_token_B`, whose children have the draft logits `root_logits_BV`.

        `draft` is called once a level with the scratch it returned last, `choose` once for every call of it and once
        for the root.
        """
        ...


class Target(Protocol):
    """A frozen LM. One call serves prefill, plain decoding and tree verification; only the mask differs."""

    def forward(
        self,
        params: Params,
        tokens_BL: Array,
        positions_BL: Array,
        mask_BLM: Mask,
        prefix: tuple[Cache, Array] | None = None,
        *,
        keep_kv: bool = False,
    ) -> TargetOutput:
        """Returns features `[B, L, D]` of `L` tokens at absolute positions, and with `keep_kv` their keys and values.

        The tokens see each other by `mask_BLM`. `prefix` is the cache and each row's committed tokens `[B]`, all of
        which every token of the row sees. Under a `Ragged` mask, which needs a prefix, tokens and positions are
        `[1, A]`, features `[1, A, D]`, and keys and values those of `[B, N]`.
        """
        ...

    def logits(self, params: Params, features_BLD: Array) -> Array:
        """fp32 next-token logits `[B, L, V]` of features. `params` may be `scoring(params)` alone."""
        ...

    def scoring(self, params: Params) -> Params:
        """The subtree of the weights that `logits` reads: the LM head."""
        ...

    def shared_tables(self, params: Params) -> SharedTables:
        """Returns the embedding and the LM head, which drafters share."""
        ...

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """Returns a zeroed cache for `batch` rows of `capacity` tokens."""
        ...


class UnrollInputs(NamedTuple):
    """Packed documents as a drafter is trained on them."""

    tokens_BL: Array
    features_BLD: Array
    """Hidden states of the target that the drafter reads at each token: `TargetOutput.read_BLD`."""
    positions_BL: Array
    """From 0 in each document."""
    mask_BLM: Mask
    """Which tokens see each other."""
    keys_B: Array | None = None
    """A key a row, for drafters that train on a random part of the positions; None computes all."""


class Unrolled(NamedTuple):
    """Outputs of `T` draft steps from every position. Row `i` at step `j` has read the tokens up to `x_{i+j+1}`."""

    hidden_TBLD: Array
    """Inputs of the drafter's LM head; their logits predict `x_{i+j+2}`."""
    features_TBLD: Array | None = None
    """Drafted features, trained towards the target's `f_{i+j+1}`; None where the drafter has none."""
    kept_TBL: Array | None = None
    """Which outputs were computed; None: all."""


class Drafter(Protocol):
    """A drafter as the engine sees it: `extend` drafts the root's children, `expand` those of one level."""

    @property
    def deepest(self) -> int | None:
        """Greatest depth of a node that it can draft; None without a limit."""
        ...

    @property
    def one_pass(self) -> bool:
        """Returns whether one pass drafts all depths; else each depth takes a pass."""
        ...

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target whose inputs it reads; empty where it reads the features, or nothing of the target."""
        ...

    @property
    def vocab(self) -> int | None:
        """Tokens that its own LM head scores; None where it uses the target's head."""
        ...

    def init_state(self, params: Params, shared: SharedTables, first_B: Array, capacity: int) -> Any:
        """Returns the state of empty contexts of up to `capacity` tokens, whose first token is `first_B`.

        The first token is the next of no other, so no pair of `extend` carries it. The state is a pytree of `KVCache`s
        and of arrays with the batch axis first.
        """
        ...

    def extend(
        self, params: Params, shared: SharedTables, state: Any, tokens_BL: Array, features_BLD: Array, count_B: Array
    ) -> tuple[Any, Array]:
        """Reads pairs that the target has committed; returns the state and the logits `[B, V]` of the root's children.

        Pair `l` is the target's hidden state at a position (`TargetOutput.read_BLD`) and the token at the *next* one.
        The last of a row's `count_B` pairs carries the root token. Rows with count 0 keep their state.
        """
        ...

    def scratch(self, state: Any, slots: int) -> Any:
        """Returns the working memory of one tree, with `slots` slots; it is dropped after the round."""
        ...

    def expand(
        self, params: Params, shared: SharedTables, state: Any, scratch: Any, frontier: Frontier
    ) -> tuple[Array, Any]:
        """Returns the draft logits `[B, W, V]` of the children of a level's nodes, and the scratch with their slots."""
        ...


class Learner(Drafter, Protocol):
    """A drafter as training sees it: it is unrolled over whole texts, and its outputs are scored."""

    def init_params(self, key: Array, shared: SharedTables | None = None) -> Params:
        """Returns fresh weights; some begin as copies of the target's tables, where `shared` is given."""
        ...

    def unroll(self, params: Params, shared: SharedTables, inputs: UnrollInputs, steps: int) -> Unrolled:
        """`steps` draft steps from every position at once: HASS's harmonized context alignment, row layout.

        Row `i` at step `j` is what drafting from `f_i` puts out after reading `x_{i+1} .. x_{i+j+1}`; it predicts
        `f_{i+j+1}` and the token after. Rows whose tokens run past their document are garbage for the loss mask to
        drop.
        """
        ...

    def scoring(self, params: Params) -> Params:
        """The subtree of the weights that `logits` reads; empty for drafters that score by the target's LM head."""
        ...

    def logits(self, params: Params, shared: SharedTables, hidden_BLD: Array, step: int) -> Array:
        """fp32 logits `[B, L, V]` of the unrolled outputs of one step.

        Reads of `params` what `scoring` returns, of `shared` the head at most (not that if `vocab` is not None).
        """
        ...
