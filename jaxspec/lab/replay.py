"""Replay of static trees on a profile: the target calls that decoding would make, by look-ups alone.

Candidates below a node that follows the text depend on its path only. So a round at start `t` accepts the longest
prefix of the text's ranks there whose path is a node of the tree, and the next round begins `1 + accepted` further on.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxspec.evaluation.statistics import Counts
from jaxspec.lab.forest import Forest, Shape, make_forest
from jaxspec.lab.profile import Profile

WALKERS = 1 << 16
"""Pairs of a shape and a prompt that are replayed side by side."""
CELLS = 1 << 23
"""Most accept lengths, one a shape and node, that are held at a time."""


def check_replayable(profile: Profile) -> None:
    """Raises ValueError for texts of another rule than `target-draw`, which depend on what is drafted.

    Simulated ranks are drawn from rates of a rule, and replayed under any.
    """
    rule = profile.facts.get("rule", "target-draw")
    if rule != "target-draw" and profile.facts.get("kind") != "simulated":
        raise ValueError(
            f"the profile is of the rule {rule}, under which the text depends on what is drafted, so trees cannot be "
            "replayed on it: make one with --rule target-draw"
        )


def bounds(profile: Profile) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first start of each prompt, and the one behind its last; `[P]` each."""
    ends = np.searchsorted(profile.prompt_T, np.arange(len(profile.sources)), side="right")
    return np.concatenate([[0], ends[:-1]]).astype(np.int64), ends.astype(np.int64)


def tokens_of(profile: Profile) -> np.ndarray:
    """Returns `[P]`: the tokens that rounds emit, whatever the tree: all of an answer but its first."""
    first_P, end_P = bounds(profile)
    return end_P - first_P


def place_starts(profile: Profile, forest: Forest) -> np.ndarray:
    """Returns `[T]`: the deepest node of the forest that lies on the text behind each start.

    Raises ValueError for a profile that cannot be replayed, and for nodes of depths or ranks that it does not know.
    """
    check_replayable(profile)
    depths, deepest = profile.rank_TD.shape[1], int(forest.depth_U.max(initial=0))
    if deepest > depths:
        raise ValueError(f"a tree {deepest} deep cannot be replayed on a profile of {depths} depths: make a deeper one")
    widest = int(forest.rank_U.max(initial=-1))
    if widest >= profile.ranks:
        raise ValueError(
            f"a tree with a child of rank {widest} cannot be replayed on a profile of ranks 0 to {profile.ranks - 1}: "
            "make one with more ranks"
        )
    node_T = np.zeros(len(profile.rank_TD), np.int32)
    alive_T = np.ones(len(node_T), bool)
    child_UR = forest.child_UR
    for depth in range(deepest):
        # Ranks that no shape has, MISSED and BEYOND all read the last column, which holds no child.
        rank_T = profile.rank_TD[:, depth].astype(np.int64)
        rank_T[(rank_T < 0) | (rank_T > widest)] = -1
        below_T = child_UR[node_T, rank_T]
        alive_T &= below_T >= 0
        node_T = np.where(alive_T, below_T, node_T)
    return node_T


def replay_calls(profile: Profile, forest: Forest) -> np.ndarray:
    """Returns `[S, P]`, int32: the target calls of each shape on each prompt. Raises as `place_starts`."""
    node_T, (first_P, end_P) = place_starts(profile, forest), bounds(profile)
    shapes, prompts = len(forest.shapes), len(first_P)
    calls_SP = np.zeros((shapes, prompts), np.int32)
    step = max(1, min(WALKERS // max(prompts, 1), CELLS // len(forest.parent_U)))
    for begin in range(0, shapes, step):
        end = min(begin + step, shapes)
        calls_SP[begin:end] = _walk_all(forest.lengths(begin, end), node_T, first_P, end_P)
    return calls_SP


def _walk_all(length_SU: np.ndarray, node_T: np.ndarray, first_P: np.ndarray, end_P: np.ndarray) -> np.ndarray:
    """Returns `[S, P]`: the rounds of each shape on each prompt, all walking through their texts side by side."""
    shapes, nodes = length_SU.shape
    calls = np.zeros(shapes * len(first_P), np.int32)
    at, end = np.tile(first_P, shapes), np.tile(end_P, shapes)
    row = np.repeat(np.arange(shapes) * nodes, len(first_P))
    walker = np.flatnonzero(at < end)  # an answer of one token takes no round
    at, end, row, flat = at[walker], end[walker], row[walker], length_SU.ravel()
    rounds = 0
    while walker.size:
        rounds += 1
        at = at + 1 + flat[row + node_T[at]]
        live = at < end
        if not live.all():
            calls[walker[~live]] = rounds
            at, end, row, walker = at[live], end[live], row[live], walker[live]
    return calls.reshape(shapes, len(first_P))


def rounds_of(profile: Profile, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Returns the starts at which rounds of this tree begin, and the tokens that each accepts. Raises as `replay`."""
    if profile.facts.get("mode", "topk") != "topk":
        _check_in_turn(shape, str(profile.facts["mode"]))
    forest = make_forest([shape])
    length_T = forest.lengths(0, 1)[0][place_starts(profile, forest)].astype(np.int64)
    at = walk_rounds(profile, length_T)
    return at, length_T[at]


def walk_rounds(profile: Profile, length_T: np.ndarray) -> np.ndarray:
    """Returns the starts at which rounds begin where a round at start `t` accepts `length[t]` tokens."""
    at = np.concatenate([np.zeros(0, np.int64), *_walk(length_T, *bounds(profile))])
    at.sort()
    return at


def walk_calls(profile: Profile, length_ST: np.ndarray) -> np.ndarray:
    """Returns `[S, P]`, int32: the target calls on each prompt of trees whose rounds accept these lengths."""
    return _walk_all(length_ST, np.arange(length_ST.shape[1]), *bounds(profile))


def _check_in_turn(shape: Shape, mode: str) -> None:
    """Raises ValueError for a tree that leaves ranks out, whose children would be other draws than the profile's."""
    known = set(shape)
    for path in shape:
        if path[-1] and (*path[:-1], path[-1] - 1) not in known:
            raise ValueError(
                f"the profile is of the draft mode {mode}, whose children are drawn in turn: tree path {path} needs "
                "the ranks before it"
            )


def _walk(length_T: np.ndarray, first_P: np.ndarray, end_P: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the starts of the first rounds of all prompts, then those of the second ones, and so on."""
    at, end = first_P[first_P < end_P], end_P[first_P < end_P]
    while at.size:
        yield at
        at = at + 1 + length_T[at]
        at, end = at[at < end], end[at < end]


def replay(profile: Profile, shape: Shape) -> Counts:
    """Returns tokens, target calls and accept histogram of each prompt, as decoding by this tree would count them.

    In its last round a decoding may accept tokens past the end of its answer; a replay does not count them. Raises
    ValueError for a profile of another rule than `target-draw`, and a tree deeper or wider than the profile.
    """
    at, accepted = rounds_of(profile, shape)
    return count_rounds(profile, at, accepted, max((len(path) for path in shape), default=0))


def count_rounds(profile: Profile, at: np.ndarray, accepted: np.ndarray, deepest: int) -> Counts:
    """Returns tokens, target calls and accept histogram of each prompt from the starts and lengths of all rounds."""
    prompts, most = len(profile.sources), deepest + 1
    place = profile.prompt_T[at].astype(np.int64) * most + accepted
    histogram_PA = np.bincount(place, minlength=prompts * most).reshape(prompts, most)
    return Counts(tokens_of(profile), histogram_PA.sum(1), histogram_PA)


def node_shares(profile: Profile, shape: Shape) -> dict[tuple[int, ...], float]:
    """Returns the share of rounds that accept each node of the tree, 1 for the root; they sum to tokens per round.

    The sum is above tau by the tokens past the ends of answers, which rounds accept and answers do not hold.
    """
    at, accepted = rounds_of(profile, shape)
    kept: dict[tuple[int, ...], float] = {(): 1.0}
    for path in shape:
        follows = accepted >= len(path)
        for depth, rank in enumerate(path):
            follows &= profile.rank_TD[at, depth] == rank
        kept[path] = float(follows.mean()) if at.size else 0.0
    return kept
