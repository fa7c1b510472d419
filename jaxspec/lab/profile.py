"""Acceptance profiles: the ranks that a target's own text has among the tokens that a drafter would draft.

Under the rule `target-draw` with the likeliest children, a target's text is one fixed path whatever drafts for it. A
profile holds, for every place of such texts and every depth below it, the rank of the text's token among the drafted
ones, after the drafter has fed itself along the text. What any static tree would have had accepted is a look-up there.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.console.disk import writing
from jaxspec.console.results import json_text

MISSED = -1
"""Rank of a token that is not among the `K` likeliest children."""
BEYOND = -2
"""Rank at a depth behind the end of the text."""


class RoundCounts(NamedTuple):
    """Rounds of each prompt, decoded with a static tree and counted, in a profile of rates alone."""

    hits_PDK: np.ndarray
    """Rounds that kept the child of each depth, from 1 on, and rank."""
    turns_PDK: np.ndarray
    """Rounds in which it was that child's turn: the tree has it, its parent was kept, and no elder sibling was."""
    tokens_P: np.ndarray
    """New tokens, the one that prefill gives not counted."""
    calls_P: np.ndarray
    """Target calls, prefill not counted."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """Ranks and draft log-probabilities along texts; axes: start `T`, depth `D` from 1 on, rank `K`, prompt `P`.

    Start `t` is a place whose token is the root: the last one emitted. Starts of a prompt are consecutive, from the
    answer's first token to its last but one. Raises ValueError for arrays that do not go together.
    """

    prompt_T: np.ndarray
    """Index of the prompt that each start belongs to, not falling; int32."""
    rank_TD: np.ndarray
    """Rank from 0 of the text's token at each depth among its parent's children, `MISSED` or `BEYOND`; int16."""
    logp_TD: np.ndarray
    """Draft log-probability of that token given the text before it; NaN where the text has ended; float32."""
    top_TDK: np.ndarray
    """Log-probabilities of the `K` likeliest children there, falling along `K`; NaN where the text has ended; float16.
    `D` may be 0: not kept. Those of a one-pass drafter are the whole tree's: float32, and kept behind the end too."""
    entropy_TD: np.ndarray
    """Entropy of the draft distribution there, in nats; NaN where the text has ended; float16."""
    sources: tuple[str, ...]
    """Source of each prompt, `P` in all."""
    facts: dict[str, Any]
    """How it was made: `temperature`, `mode`, `rule`, `one_pass`, `target`, `drafter`, `prompts` (names), `hashes`,
    `ranks` (`K`), `kind` ("ranks" or "rates") and whatever else a reader needs; JSON."""
    counts: RoundCounts | None = None
    """Of a profile of rates alone: the counts behind them, prompt by prompt."""
    p_TK: np.ndarray | None = None
    """Probability that the target draws each of the `K` children of depth 1, by the temperature, top-k and top-p of the
    texts; float32. None where it is not known: of greedy texts, of rates, and in files of earlier versions."""

    def __post_init__(self) -> None:
        starts, depths = self.rank_TD.shape
        if not (self.prompt_T.shape == (starts,) and self.logp_TD.shape == self.entropy_TD.shape == (starts, depths)):
            raise ValueError(
                f"a profile of {starts} starts and {depths} depths holds arrays of other sizes: make it anew"
            )
        if starts and not 0 <= self.prompt_T.min() <= self.prompt_T.max() < len(self.sources):
            raise ValueError(f"a profile names prompts that its {len(self.sources)} sources do not have: make it anew")
        if np.any(np.diff(self.prompt_T) < 0):
            raise ValueError("a profile's starts are not in the order of their prompts: make it anew")
        if self.p_TK is not None and self.p_TK.shape != (starts, self.ranks):
            raise ValueError(f"a profile of {starts} starts holds the probabilities of others: make it anew")
        if self.counts is not None and {len(x) for x in self.counts} != {len(self.sources)}:
            raise ValueError(f"a profile counts rounds of other prompts than its {len(self.sources)}: make it anew")

    @property
    def ranks(self) -> int:
        """Children of a node whose ranks are known, `K`."""
        return int(self.facts["ranks"])

    @property
    def replayable(self) -> bool:
        """Returns whether it holds texts; one of `kind` "rates" holds `counts` and, among its facts, acceptance by
        depth and rank: `rates_DK` with intervals `lows_DK`, `highs_DK` and the turns `tries_DK`."""
        return self.facts.get("kind") != "rates"

    def of(self, prompts: np.ndarray) -> Profile:
        """Returns the profile of these prompts alone, in their order; `prompts` are indices, none twice."""
        places = [np.flatnonzero(self.prompt_T == p) for p in prompts]
        at = np.concatenate(places) if places else np.zeros(0, np.int64)
        return dataclasses.replace(
            self,
            prompt_T=np.repeat(np.arange(len(prompts), dtype=np.int32), [len(p) for p in places]),
            rank_TD=self.rank_TD[at],
            logp_TD=self.logp_TD[at],
            top_TDK=self.top_TDK[at],
            entropy_TD=self.entropy_TD[at],
            sources=tuple(self.sources[p] for p in prompts),
            counts=None if self.counts is None else RoundCounts(*(x[prompts] for x in self.counts)),
            p_TK=None if self.p_TK is None else self.p_TK[at],
        )

    def save(self, path: Path) -> None:
        """Writes one compressed `.npz` file with the facts as JSON among the arrays."""
        text = json_text({"format": FORMAT, "sources": self.sources, **self.facts})
        arrays = {n: getattr(self, n) for n in ARRAYS} | ({} if self.counts is None else self.counts._asdict())
        arrays |= {} if self.p_TK is None else {"p_TK": self.p_TK}
        with writing(path), path.open("wb") as file:
            np.savez_compressed(file, facts=np.frombuffer(text.encode(), np.uint8), **arrays)


def split_prompts(profile: Profile, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns the prompts that choose and those that report: halves of every source, drawn at random.

    Raises ValueError for a profile of one prompt.
    """
    if len(profile.sources) < 2:
        raise ValueError("a profile of one prompt cannot both choose a tree and report on it: profile more prompts")
    rng, halves = np.random.default_rng(seed), ([], [])
    turn = 0
    for source in dict.fromkeys(profile.sources):
        mine = rng.permutation([p for p, s in enumerate(profile.sources) if s == source])
        for prompt in mine:  # in turns over all sources, so that halves differ by one prompt at most
            halves[turn % 2].append(int(prompt))
            turn += 1
    return np.sort(halves[0]), np.sort(halves[1])


ARRAYS = ("prompt_T", "rank_TD", "logp_TD", "top_TDK", "entropy_TD")
FORMAT = "jaxspec profile 1"
DAMAGED = (KeyError, ValueError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""Errors of a file that is cut short, damaged or something else; a cut `.npz` may look like a pickle."""


def load_profile(path: Path) -> Profile:
    """Returns the profile of a file. Raises ValueError where it is none, or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            facts = json.loads(bytes(found["facts"]))
            arrays = {name: found[name] for name in ARRAYS}
            counted = [found[name] for name in RoundCounts._fields if name in found.files]
            p_TK = found["p_TK"] if "p_TK" in found.files else None
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such profile; make one with `jaxspec lab profile`") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except DAMAGED as error:  # whose words are about numpy's files, and no help
        problem = f"{path}: is no acceptance profile, or is damaged; make one with `jaxspec lab profile`"
        raise ValueError(problem) from error
    known = isinstance(facts, dict) and facts.pop("format", None) == FORMAT
    if not known or not isinstance(facts.get("ranks"), int) or not isinstance(facts.get("sources"), list):
        raise ValueError(f"{path}: is no acceptance profile of this version; make one with `jaxspec lab profile`")
    counts = RoundCounts(*counted) if len(counted) == len(RoundCounts._fields) else None
    return Profile(**arrays, sources=tuple(facts.pop("sources")), facts=facts, counts=counts, p_TK=p_TK)
