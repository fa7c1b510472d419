"""The flags that `jaxspec lab search`, `lab table`, `lab check` and `lab report` share."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from jaxspec.lab.candidates import GIB, MOST_SHAPES, Limits
from jaxspec.lab.cost_model import RoundCost, describe, grid, round_cost
from jaxspec.lab.costs import CostTable, load_costs
from jaxspec.lab.logged import with_texts
from jaxspec.lab.profile import Profile, load_profile
from jaxspec.lab.replay import check_replayable
from jaxspec.lab.search import Search


class Inputs(NamedTuple):
    """A profile and costs, as read from their files."""

    profile: Profile
    costs: CostTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitFlags:
    """The flags of a search but for its files."""

    max_nodes: int = 64
    """Most nodes of a tree, the root included."""
    max_depth: int | None = None
    """Most levels; default: all that the profile has."""
    max_branch: int | None = None
    """Most children of a node; 1 tries chains alone. Default: all ranks of the profile."""
    multiple: int = 1
    """Nodes, the root included, are a multiple of this, such as 8 on a TPU; plain decoding is tried in any case."""
    max_cache_gib: float | None = None
    """Most memory of the caches of target and drafter, all rows and a round's nodes together; default: what the weights
    leave of the device's memory, where the costs say both."""
    cache_bytes_per_token: int | None = None
    """Bytes of one token of one row in these caches; default: what the costs say."""
    shapes: int = MOST_SHAPES
    """Most shapes that are replayed."""
    seed: int = 0
    """Seed of the halves of the prompts: one chooses the tree, the other reports on it."""
    json: Path | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        for name in ("max_nodes", "max_branch", "multiple", "shapes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.max_depth is not None and self.max_depth < 0:
            raise ValueError(f"--max-depth is {self.max_depth}; it must be at least 0")
        if self.max_cache_gib is not None and not self.max_cache_gib > 0:
            raise ValueError(f"--max-cache-gib is {self.max_cache_gib}; it must be above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchFlags(LimitFlags):
    """The flags of a search in one profile with one file of costs; each verb adds its own."""

    profile: Path
    """Acceptance profile, as jaxspec lab profile writes it."""
    cost: Path
    """Costs, as jaxspec lab cost writes them."""

    @functools.cached_property
    def inputs(self) -> Inputs:
        """The files, read once. Raises ValueError naming the one that cannot be read."""
        profile, costs = load_profile(self.profile), load_costs(self.cost)
        try:
            profile = with_texts(profile, seed=self.seed)
            check_replayable(profile)
            return Inputs(profile, costs)
        except ValueError as error:
            raise ValueError(f"{self.profile}: {error}") from error

    @property
    def limits(self) -> Limits:
        """The limits of the trees.

        Raises ValueError where a limit of the caches lacks the bytes of a token, and where weights leave no memory.
        """
        profile, costs = self.inputs
        token = self.cache_bytes_per_token or costs.facts.get("cache_bytes_per_token")
        memory, weights = (costs.facts.get(name) for name in ("memory_bytes", "weights_bytes"))
        room = None if self.max_cache_gib is None else int(self.max_cache_gib * GIB)
        if room is not None and not token:
            raise ValueError(f"--max-cache-gib needs --cache-bytes-per-token: {self.cost} does not say it")
        if room is None and token and memory and weights:
            room = memory - weights
            if room < 1:
                raise ValueError(
                    f"{self.cost}: the weights take {weights / GIB:.4g} GiB, and {costs.facts.get('device')} holds "
                    f"{memory / GIB:.4g}: cost a larger device, or give --max-cache-gib as of a device with more memory"
                )
        depth = profile.rank_TD.shape[1] if self.max_depth is None else self.max_depth
        return Limits(self.max_nodes, depth, self.max_branch, self.multiple, room, token)

    def cost_at(self, batch: int, context: int) -> RoundCost:
        """Returns the cost of a batch and context for the profile's drafter. Raises ValueError as `round_cost`."""
        profile, costs = self.inputs
        return round_cost(costs, batch, context, one_pass=profile.facts.get("one_pass") or costs.facts.get("one_pass"))

    def refusal(self, batch: int, context: int, nodes: int = 1) -> str | None:
        """Returns why a batch and context is beyond the costs, or with so many nodes beyond the memory; None if not."""
        limits = self.limits
        try:
            limits.check_memory(self.cost_at(batch, context), nodes)
        except ValueError as problem:
            return str(problem)
        return None

    def search(self, cells: list[tuple[int, int]]) -> Search:
        """Returns the search at these batches and contexts. Raises ValueError for what costs or profile do not hold."""
        try:
            costs = [self.cost_at(batch, context) for batch, context in cells]
        except ValueError as error:
            raise ValueError(f"{self.cost}: {error}") from error
        return Search(self.inputs.profile, costs, self.limits, most=self.shapes, seed=self.seed)

    def made_from(self, search: Search) -> dict[str, Any]:
        """Returns what a tree or table was made from: files with their hashes, where they are from, and the limits."""
        profile, costs = self.inputs
        facts = ("target", "drafter", "temperature", "mode", "rule", "simulated_texts")
        return {
            "profile": {"file": self.profile.name, "sha256": digest(self.profile)}
            | {name: profile.facts.get(name) for name in facts},
            "costs": {"file": self.cost.name, "sha256": digest(self.cost)} | describe(costs),
            "limits": {
                "max_nodes": self.max_nodes,
                "max_depth": search.limits.depth,
                "max_branch": self.max_branch,
                "multiple": self.multiple,
                "max_cache_gib": search.limits.cache_bytes and search.limits.cache_bytes / GIB,
            },
            "seed": self.seed,
            "prompts_choosing": len(profile.sources) - len(search.reporting.sources),
            "prompts_reporting": len(search.reporting.sources),
            "shapes_tried": search.candidates.tried,
            "shapes_unpriced": search.candidates.unpriced,
        }

    @property
    def cost_grid(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Batches and contexts of the costs. Raises ValueError where they have no verification."""
        found = grid(self.inputs.costs)
        if not found[0]:
            raise ValueError(f"{self.cost}: the costs have no rows of the part verify: make them with jaxspec lab cost")
        return found


def digest(path: Path) -> str:
    """Returns the first 16 digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
