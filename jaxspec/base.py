"""The legend of dimension letters and every contract: what a target, a drafter and a tree are to each other.

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
| `E` | expanded nodes: the root, then one a draft scratch slot | `U` | tokens of a draft vocabulary |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax

Array = jax.Array
Params = Any
"""A nested dict of arrays."""

ROOT = -1
"""Parent (or draft slot) sentinel: the parent is the root's own context, not a drafted node."""


class KVCache(NamedTuple):
    """Keys and values of committed tokens. Keys are stored channel-major: both products then read contiguous rows."""

    k_YBKCS: Array
    v_YBKSC: Array

    @property
    def capacity(self) -> int:
        """Slots a row has; one committed token takes one."""
        return self.k_YBKCS.shape[-1]


class Packed(NamedTuple):
    """Which tokens of packed rows see each other, in place of a mask: causally, those of one document."""

    segments_BL: Array
    """1, 2, .. for the documents of a row; 0 on padding, whose tokens see only themselves."""


Mask = Array | Packed
"""`[B, L, M]`, or what says the same."""


class TargetOutput(NamedTuple):
    """What a target returns for `L` tokens: the input of its LM head, and the keys and values it computed."""

    features_BLD: Array
    """Hidden states after the final norm: `logits = features @ head.T` (EAGLE section 3.1; what drafters read)."""
    fresh: KVCache | None
    """The call's own keys and values, `S = L`. The caller commits the rows it accepts; None when not asked for."""
    taps_BLD: Array | None = None
    """Hidden states entering some layers, side by side on the last axis, for drafters that read these (EAGLE-3)."""

    @property
    def read_BLD(self) -> Array:
        """What the target's drafter reads: the taps, where there are any, else the features."""
        return self.features_BLD if self.taps_BLD is None else self.taps_BLD


class SharedTables(NamedTuple):
    """The target's frozen tables that a drafter uses and does not own."""

    embed_VD: Array
    head_VD: Array
    """The rows to score: of a draft vocabulary, where the drafter has one."""


class Frontier(NamedTuple):
    """One level of the tree, to be drafted from in one call."""

    token_BW: Array
    """The nodes' own tokens."""
    parent_BW: Array
    """Scratch slot of each node's parent; `ROOT` for children of the root."""
    visible_BWM: Array
    """Which of the `M` scratch slots up to this level's last each node sees: its drafted ancestors and itself."""
    depth: int
    """Depth of these nodes; the root has 0."""
    slot: int
    """First scratch slot of this level; the level takes `W` slots from here, so `M = slot + W`."""


DraftMode = Literal["topk", "sample", "swor"]
"""How a node's children come about: its likeliest tokens; independent draws from the draft's distribution; draws from
it without replacement. Siblings stand in the order of their draws."""
DRAFT_MODES: tuple[DraftMode, ...] = ("topk", "sample", "swor")


class Children(NamedTuple):
    """The children of one level's nodes, in the order of their draws."""

    token_BWR: Array
    logp_BWR: Array
    """Draft log-probability of each; -inf for one drawn before."""
    left_BWR: Array
    """Upper bound on `logp` known before the draw, falling along `R`; -inf where nothing is left to draw."""
    distribution_BWV: Array | None = None
    """What they were drawn from; None where they are the likeliest in every row."""
    random_B: Array | None = None
    """Rows whose children were drawn; those of the others are the likeliest, whatever the distribution."""


ChooseChildren = Callable[[Array, int, int], Children]
"""`(logits_BWV, children a node, scratch slot of the first node or ROOT) -> Children`."""


class DraftDistributions(NamedTuple):
    """What a tree's children were drawn from."""

    distribution_BEV: Array
    """Sums to 1."""
    row_BN: Array
    """Which of the `E` distributions each node's children came from; any for a node without."""
    random_B: Array
    """As `Children`'s."""


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
    """None where children are the likeliest tokens."""


DraftLogits = Callable[[Any, Frontier], tuple[Array, Any]]
"""`(scratch, frontier) -> (logits_BWV of the frontier's children, scratch)`."""


@runtime_checkable
class TreePolicy(Protocol):
    """Decides which nodes are drafted. A frozen, hashable dataclass: static to `jit`."""

    @property
    def nodes(self) -> int:
        """Nodes `N` of every tree it grows, root and padding included."""
        ...

    @property
    def depth(self) -> int:
        """Greatest depth `T` a node can have."""
        ...

    @property
    def slots(self) -> int:
        """Draft scratch slots it fills: nodes that are expanded."""
        ...

    @property
    def modes(self) -> tuple[DraftMode, ...]:
        """How the children of its nodes may be chosen."""
        ...

    def grow(
        self, draft: DraftLogits, choose: ChooseChildren, scratch: Any, root_logits_BV: Array, root_token_B: Array
    ) -> Tree:
        """The tree below `root_token_B`, whose children have the draft logits `root_logits_BV`."""
        ...


class Target(Protocol):
    """A frozen LM. One call serves prefill, plain decoding and tree verification; only the mask differs."""

    def forward(
        self,
        params: Params,
        tokens_BL: Array,
        positions_BL: Array,
        mask_BLM: Mask,
        prefix: tuple[KVCache, Array] | None = None,
        *,
        keep_kv: bool = False,
    ) -> TargetOutput:
        """Features (and fresh keys and values) of `L` tokens that see the committed prefix and, by mask, each other."""
        ...

    def logits(self, params: Params, features_BLD: Array) -> Array:
        """fp32 next-token logits `[B, L, V]` of features."""
        ...

    def shared_tables(self, params: Params) -> SharedTables:
        """The embedding and LM head that drafters share."""
        ...

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A zeroed cache for `batch` rows of `capacity` tokens."""
        ...


class UnrollInputs(NamedTuple):
    """Packed documents as a drafter is trained on them."""

    tokens_BL: Array
    features_BLD: Array
    """What the drafter reads of the target at each token: `TargetOutput.read_BLD`."""
    positions_BL: Array
    """From 0 in each document."""
    mask_BLM: Mask
    """Which tokens see each other."""
    keys_B: Array | None = None
    """A key a row, for drafters that train on a random part of the positions; None computes all."""


class Unrolled(NamedTuple):
    """`T` draft steps from every position. Row `i` at step `j` has read the tokens up to `x_{i+j+1}`."""

    hidden_TBLD: Array
    """What the drafter's logits are made of; they predict `x_{i+j+2}`."""
    features_TBLD: Array | None = None
    """What should equal the target's feature `f_{i+j+1}`; None where nothing should."""
    kept_TBL: Array | None = None
    """Which of them were computed; None: all."""


class Drafter(Protocol):
    """A trainable head as the engine sees it: `extend` is the root, `expand` one level of the tree."""

    @property
    def deepest(self) -> int | None:
        """The greatest depth a node it drafts can have; None without a limit."""
        ...

    @property
    def one_pass(self) -> bool:
        """Whether one pass drafts all depths; else each depth takes one."""
        ...

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target whose inputs it reads; empty where it reads the target's features, or nothing."""
        ...

    @property
    def vocab(self) -> int | None:
        """Tokens that its own LM head scores; None where it borrows the target's."""
        ...

    def init_state(self, params: Params, shared: SharedTables, first_B: Array, capacity: int) -> Any:
        """Per-row state for contexts of up to `capacity` tokens that begin with `first`, which no pair will carry.

        A pytree of `KVCache`s and of arrays that have the batch axis first.
        """
        ...

    def extend(
        self, params: Params, shared: SharedTables, state: Any, tokens_BL: Array, features_BLD: Array, count_B: Array
    ) -> tuple[Any, Array]:
        """Take in what the target just read and return the draft logits `[B, V]` of the new root's children.

        Row `l` pairs what the drafter reads of the target at some position with the token at the *next* one; the last
        of the `count_B` pairs carries the root token. Rows with count 0 keep their state.
        """
        ...

    def scratch(self, state: Any, slots: int) -> Any:
        """Working memory of one tree; thrown away after the round."""
        ...

    def expand(
        self, params: Params, shared: SharedTables, state: Any, scratch: Any, frontier: Frontier
    ) -> tuple[Array, Any]:
        """Draft logits `[B, W, V]` of the children of a level's nodes; writes their slots of the scratch."""
        ...


class Learner(Drafter, Protocol):
    """A drafter as training sees it."""

    def init_params(self, key: Array, shared: SharedTables | None = None) -> Params:
        """Fresh weights; some begin as copies of the target's tables, where these are given."""
        ...

    def unroll(self, params: Params, shared: SharedTables, inputs: UnrollInputs, steps: int) -> Unrolled:
        """`steps` draft steps from every position at once: HASS's harmonized context alignment, row layout.

        Row `i` at step `j` is what drafting from `f_i` puts out after reading `x_{i+1} .. x_{i+j+1}`; it predicts
        `f_{i+j+1}` and the token after. Rows whose tokens run past their document are garbage for the loss mask to
        drop.
        """
        ...

    def logits(self, params: Params, shared: SharedTables, hidden_BLD: Array, step: int) -> Array:
        """fp32 logits `[B, L, V]` of the unrolled outputs of one step."""
        ...
