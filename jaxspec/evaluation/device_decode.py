"""Decoding measured on a device: its rates, plain rounds, verification, draft levels, whole rounds, alternatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import ROOT, Array, Frontier
from jaxspec.decoding.rounds import DecodeState, Engine, Weights, decode_step, score, shared_tables
from jaxspec.evaluation import stand_ins
from jaxspec.evaluation.device_attention import AttentionBench
from jaxspec.evaluation.device_plan import DevicePlan
from jaxspec.evaluation.loops import Loop, LoopTime, compile_loop, repeating, time_loop
from jaxspec.evaluation.measurements import Figures, Measurement
from jaxspec.evaluation.timing import round_work, simulate
from jaxspec.planning.work import Work, frontier_widths, matmul_weights, target_work
from jaxspec.serving.loading import DTYPES, Models
from jaxspec.targets.decoder import Decoder
from jaxspec.trees import parse_tree

MOST_ROUNDS = 64
"""Rounds of one loop; the cache has room for the tokens that they add."""
MOST_ITERATIONS = 4096
COPY_BYTES = {"cpu": 2**28}
"""Bytes that the copy moves, far more than a cache holds, by platform; elsewhere 4 GiB."""
MATMUL_SIZE = {"cpu": 1536}
"""Rows of the square matmul, by platform; elsewhere 8,192."""
MEMORY_SHARE = 0.9
"""Share of a device's memory that weights and caches may take."""


class DoesNotFit(ValueError):
    """A measurement's weights and caches are more than the device's memory."""


def memory_limit() -> int | None:
    """Returns the bytes that this process may take on the device; None where it does not tell."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


class DecodeBench:
    """Measures decoding with random weights; weights, caches and programs are kept for the next measurement."""

    def __init__(self, plan: DevicePlan) -> None:
        self.plan = plan
        self.tree = parse_tree(plan.tree)
        self.loops: dict[Any, Loop] = {}
        self.held: tuple[int, DecodeState] | None = None
        self.attention = AttentionBench(plan)

    @functools.cached_property
    def models(self) -> Models:
        """The target and an EAGLE-2 head for it, accept lengths simulated."""
        models = stand_ins.stand_in_models(self.plan.shape, self.tree, dtype=DTYPES[self.plan.dtype])
        return simulate(models, tau_profile(self.plan.tau, self.tree.depth))

    def measure(self, m: Measurement) -> Figures:
        """Returns the figures of one measurement. Raises whatever it runs into."""
        s = m.settings
        if m.kind in ("copy", "read", "matmul"):
            return {"copy": self._copy, "read": self._read, "matmul": self._matmul}[m.kind]()
        if m.kind in ("attention", "training_attention"):
            self.held = None
            return self.attention.measure(m)
        state = self._state(s["batch"], s["prefix"])
        if m.kind in ("plain", "round"):
            return self._rounds(state, s, drafts=m.kind == "round")
        if m.kind == "draft_level":
            return self._level(state, s)
        if m.kind == "draft_extend":
            return self._extend(state, s)
        return self._verify(state, s, stacked=m.kind == "scanned_layers")

    # The rates of the device.

    def _copy(self) -> Figures:
        size = COPY_BYTES.get(jax.default_backend(), 2**32)
        array = jnp.ones(size // 4, jnp.float32)
        timed, _ = self._timed(("copy",), lambda _, x: x + 1, (), array)
        return figures(timed, Work(2.0 * size, 0))

    def _read(self) -> Figures:
        size = COPY_BYTES.get(jax.default_backend(), 2**32)
        array = jnp.ones((size // 2**16, 2**14), jnp.float32)
        step = repeating(lambda x, zero: jnp.sum(x + zero.astype(jnp.float32)))
        timed, _ = self._timed(("read",), step, array, jnp.int32(0))
        return figures(timed, Work(float(size), 0))

    def _matmul(self) -> Figures:
        size = MATMUL_SIZE.get(jax.default_backend(), 8192)
        dtype = DTYPES[self.plan.dtype]
        shape = jax.ShapeDtypeStruct((size, size), dtype)
        weight = stand_ins.fill(shape, (12 / size) ** 0.5)  # products stay as large as what goes in

        timed, _ = self._timed(("matmul",), lambda w, x: x @ w, weight, stand_ins.fill(shape, 1.0))
        return figures(timed, Work(3.0 * size**2 * jnp.dtype(dtype).itemsize, 2.0 * size**3)) | {"size": size}

    # Rounds and their parts.

    def _state(self, batch: int, prefix: int) -> DecodeState:
        """Returns the state of a batch, with `prefix` committed tokens a row; one batch is held at a time."""
        if self.held is None or self.held[0] != batch:
            self.held = None
            room = self._capacity(batch)
            slots = 1 + MOST_ROUNDS * self.models.engine.path
            state = stand_ins.stand_in_state(self.models, batch=batch, capacity=room, slots=slots)
            self.held = batch, jax.block_until_ready(state)
        _, state = self.held
        if prefix > state.cache.capacity - MOST_ROUNDS * self.models.engine.path:
            self._refuse(batch, prefix)
        return stand_ins.at_prefix(state, prefix)

    def _capacity(self, batch: int) -> int:
        """Returns the cache's slots a row: those of the longest prefix that the device's memory holds."""
        fits = [p for p in sorted(self.plan.prefixes) if self._needs(batch, p) <= self._limit]
        return (fits or [min(self.plan.prefixes)])[-1] + MOST_ROUNDS * self.models.engine.path

    @functools.cached_property
    def _limit(self) -> float:
        limit = memory_limit()
        return float("inf") if limit is None else MEMORY_SHARE * limit

    def _needs(self, batch: int, prefix: int) -> int:
        held = sum(a.nbytes for a in jax.tree.leaves(self.models.weights))
        capacity = prefix + MOST_ROUNDS * self.models.engine.path
        return held + stand_ins.cache_bytes(self.models, batch=batch, capacity=capacity)

    def _refuse(self, batch: int, prefix: int) -> None:
        raise DoesNotFit(
            f"weights and caches of {batch} rows of {prefix:,} tokens take {self._needs(batch, prefix) / 1e9:.1f} GB, "
            f"and {self._limit / 1e9:.1f} GB are to be had"
        )

    def _rounds(self, state: DecodeState, s: dict[str, Any], *, drafts: bool) -> Figures:
        """Times whole rounds in one loop, as `decode_rounds` runs them."""
        models = self.models if drafts else self.models.plain()
        engine, weights = models.engine, models.weights
        begin = state if drafts else stand_ins.plain_view(state)
        key = ("rounds", drafts, s["batch"])
        step = functools.partial(decode_step, engine)
        assert self.held is not None
        (batch, held), self.held = self.held, None  # the loop takes the cache over
        timed, end = self._timed(
            key, step, weights, begin, most=MOST_ROUNDS, rewind=lambda c: stand_ins.at_prefix(c, s["prefix"])
        )
        self.held = batch, end if drafts else held._replace(cache=end.cache)
        tokens = float(np.sum(np.asarray(end.produced_B))) / max(1, int(np.sum(np.asarray(end.calls_B))))
        found = figures(timed, round_work(models, s["batch"], s["prefix"]))
        return found | {"tokens_per_second": s["batch"] * tokens / timed.seconds, "tau": tokens}

    def _verify(self, state: DecodeState, s: dict[str, Any], *, stacked: bool) -> Figures:
        """Times the target's call on the nodes of a tree, LM head included."""
        engine, weights = Engine(self.models.plain().engine.target), Weights(self.models.weights.target)
        if stacked:
            engine, weights = self._scanned
        tree = stand_ins.stand_in_tree(s["batch"], s["nodes"], self.models.config.vocab)

        def verify(arguments: Any, zero: Array) -> Any:
            weights, state, tree = arguments
            scored = score(engine, weights, state, tree._replace(token_BN=tree.token_BN + zero))
            return scored.fresh, scored.logits_BNV

        given = (weights, stand_ins.plain_view(state), tree)
        timed, _ = self._timed(("verify", stacked, s["batch"], s["nodes"]), repeating(verify), given, jnp.int32(0))
        size = jnp.dtype(DTYPES[self.plan.dtype]).itemsize
        work = target_work(
            self.models.weights.target, self.models.config, batch=s["batch"], tokens=s["nodes"], prefix=s["prefix"],
            itemsize=size,
        )  # fmt: skip
        return figures(timed, work)

    @functools.cached_property
    def _scanned(self) -> tuple[Engine, Weights]:
        """The same target with stacked layers, which a scan runs."""
        dtype = DTYPES[self.plan.dtype]
        target = Decoder(self.models.config, stacked=True, dtype=dtype, param_dtype=dtype)
        shapes = jax.eval_shape(target.init_params, jax.random.key(0))
        return Engine(target), Weights(stand_ins.fill(shapes, stand_ins.WEIGHT_SCALE))

    def _level(self, state: DecodeState, s: dict[str, Any]) -> Figures:
        """Times the drafter's call on one level of the tree, the second that is drafted from nodes."""
        models, batch, width = self.models, s["batch"], self.width
        drafter: Any = models.engine.drafter
        shared = shared_tables(models.engine, models.weights)
        scratch = drafter.scratch(state.draft, self.tree.slots)
        slot = width if self.tree.slots >= 2 * width else 0
        visible_BWM = jnp.broadcast_to(
            jnp.arange(slot + width) == slot + jnp.arange(width)[:, None], (batch, width, slot + width)
        )
        parent_BW = jnp.full((batch, width), ROOT, jnp.int32)

        def level(arguments: Any, zero: Array) -> Any:
            params, shared, draft, scratch = arguments
            token_BW = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width)) + zero
            frontier = Frontier(token_BW, parent_BW, visible_BWM, 2, slot)
            return drafter.expand(params, shared, draft, scratch, frontier)

        given = (models.weights.drafter, shared, state.draft, scratch)
        timed, _ = self._timed(("level", batch), repeating(level), given, jnp.int32(0))
        return figures(timed, self._draft_work(batch * width, batch)) | {"width": width}

    def _extend(self, state: DecodeState, s: dict[str, Any]) -> Figures:
        """Times the drafter's call on an accepted path, as wide as it may be."""
        models, batch, path = self.models, s["batch"], self.tree.depth + 1
        drafter: Any = models.engine.drafter
        shared = shared_tables(models.engine, models.weights)
        shape = jax.ShapeDtypeStruct((batch, path, models.config.width), DTYPES[self.plan.dtype])

        def extend(arguments: Any, zero: Array) -> Any:
            params, shared, draft, features_BPD = arguments
            token_BP = jnp.broadcast_to(jnp.arange(path, dtype=jnp.int32), (batch, path)) + zero
            new, logits_BV = drafter.extend(params, shared, draft, token_BP, features_BPD, jnp.full(batch, path))
            return new.hidden_BD, logits_BV

        given = (models.weights.drafter, shared, state.draft, stand_ins.fill(shape, 1.0))
        timed, _ = self._timed(("extend", batch), repeating(extend), given, jnp.int32(0))
        return figures(timed, self._draft_work(batch * path, batch)) | {"path": path}

    @functools.cached_property
    def width(self) -> int:
        """Nodes of the widest level that are drafted from together."""
        return max(frontier_widths(self.tree, self.models.config.vocab), default=1)

    def _draft_work(self, tokens: int, scored: int) -> Work:
        """Returns the work of one call of the drafter: its weights and the LM head, attention left out."""
        models = self.models
        count, size = matmul_weights(models.weights.drafter)
        head = shared_tables(models.engine, models.weights).head_VD
        heads = scored * self.width if tokens == scored * self.width else scored
        return Work(float(size + head.nbytes), 2.0 * (count * tokens + head.size * heads))

    def _timed(
        self,
        key: Any,
        step: Callable[[Any, Any], Any],
        arguments: Any,
        carry: Any,
        *,
        most: int = MOST_ITERATIONS,
        rewind: Callable[[Any], Any] = lambda carry: carry,
    ) -> tuple[LoopTime, Any]:
        """Returns the time of an iteration of the loop named `key`, which is compiled once, and the last carry."""
        known = self.loops.get(key)
        loop = self.loops[key] = known or compile_loop(step, arguments, carry)
        timed, carry = time_loop(loop, arguments, carry, at_least=self.plan.repeat_seconds, most=most, rewind=rewind)
        return timed._replace(compile_seconds=0.0 if known else timed.compile_seconds), carry


def figures(timed: LoopTime, work: Work) -> Figures:
    """Returns the keys of a row: the time of an iteration, and the work a second."""
    return {
        "seconds": timed.seconds,
        "bytes": work.bytes,
        "flops": work.flops,
        "bytes_per_second": work.bytes / timed.seconds,
        "flops_per_second": work.flops / timed.seconds,
        "compile_seconds": timed.compile_seconds,
        "iterations": timed.iterations,
    }


def tau_profile(tau: float, depth: int) -> tuple[float, ...]:
    """Returns the one chance of every further token at which a tree of this depth gives `tau` tokens a round.

    Raises ValueError where it cannot.
    """
    if not 1 <= tau < depth + 1:
        raise ValueError(f"--tau is {tau:g}; a tree of depth {depth} gives 1 to {depth + 1} tokens a round")
    low, high = 0.0, 1.0
    for _ in range(60):
        chance = (low + high) / 2
        low, high = (chance, high) if sum(chance**i for i in range(depth + 1)) < tau else (low, chance)
    return (low,)
