"""The list of `jaxspec bench device`: what is measured on an accelerator, in order, and in which process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from jaxspec.evaluation.measurements import Measurement
from jaxspec.targets.decoder import SHAPES
from jaxspec.trees import parse_tree

XLA_FLAGS = {
    "command_buffers=none": "--xla_gpu_enable_command_buffer=",
    "command_buffers=+WHILE": "--xla_gpu_enable_command_buffer=+WHILE",
    "triton_gemm=false": "--xla_gpu_enable_triton_gemm=false",
}
"""Settings of XLA that a process has from its start, by the name of the job that measures under them."""
PARTS = {
    1: "roofline",
    2: "the round",
    3: "attention and loop",
    4: "training",
    5: "a real target",
    6: "peers",
}
"""Number of a part -> its name."""
ATTENTION = ("jaxspec", "xla", "cudnn")
"""Implementations of attention to a cache: this project's, and `jax.nn.dot_product_attention`'s."""
TEXT_ATTENTION = ("xla", "cudnn")
"""Kernels of attention over training rows."""


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """Sizes of all measurements."""

    shape: str
    dtype: Literal["fp32", "bf16"]
    parts: tuple[int, ...] = tuple(PARTS)
    nodes: tuple[int, ...] = (1, 8, 16, 32, 64, 128, 256)
    prefixes: tuple[int, ...] = (512, 4096, 16384)
    batches: tuple[int, ...] = (1, 4, 16, 64)
    tree: str = "dynamic:64x6x10"
    tau: float = 4.5
    recipes: tuple[str, ...] = ("hass", "fspad", "eagle2")
    xla: tuple[str, ...] = tuple(XLA_FLAGS)
    rows: int = 4
    length: int = 2048
    target: str = "smollm2"
    answers: int = 256
    max_new_tokens: int = 128
    seed: int = 0
    repeat_seconds: float = 0.3
    """Seconds that a loop runs for one sample of its time."""

    @property
    def journal_settings(self) -> dict[str, Any]:
        """The settings that one folder has once; rows name all others."""
        return {"command": "bench device", "shape": self.shape, "dtype": self.dtype, "seed": self.seed}

    def measurements(self) -> list[Measurement]:
        """Returns all measurements of the parts, in order."""
        every = (
            *self._roofline(),
            *self._round(),
            *self._alternatives(),
            *self._training(),
            *self._real(),
            *self._peers(),
        )
        return [m for m in every if m.part in self.parts]

    def jobs(self) -> list[str]:
        """Returns the processes that measure, in order."""
        return list(dict.fromkeys(m.job for m in self.measurements()))

    @property
    def _compile_guess(self) -> float:
        """Seconds for which a program of the target's layers, one after another, may compile."""
        return 5 + 1.0 * SHAPES[self.shape].layers

    def _decode(
        self, part: int, kind: str, program: tuple[Any, ...] = (), job: str = "decode", **settings: Any
    ) -> Measurement:
        """Returns a measurement of decoding; the program serves all prefixes of one batch."""
        return Measurement(part, kind, settings, job, (settings["batch"], *program), self._compile_guess)

    def _roofline(self) -> Iterator[Measurement]:
        for kind in ("copy", "read", "matmul"):
            yield Measurement(1, kind, {}, "decode", guess=10)
        yield self._plain(1, self.batches[0], self.prefixes[0])

    def _plain(self, part: int, batch: int, prefix: int) -> Measurement:
        return self._decode(part, "plain", batch=batch, prefix=prefix)

    def _whole(self, part: int, batch: int, prefix: int) -> Measurement:
        return self._decode(part, "round", (self.tree,), batch=batch, prefix=prefix, tree=self.tree, tau=self.tau)

    def _verify(self, batch: int, prefix: int, nodes: int) -> Measurement:
        return self._decode(2, "verify", (nodes,), batch=batch, prefix=prefix, nodes=nodes)

    def _round(self) -> Iterator[Measurement]:
        """First all of the first batch and prefix; then further prefixes, which compile nothing; then batches."""
        first = self.prefixes[0]
        tree = parse_tree(self.tree).nodes
        for batch in self.batches:
            for prefix in self.prefixes:
                if (batch, prefix) != (self.batches[0], first):
                    yield self._plain(2, batch, prefix)
                for nodes in dict.fromkeys((1, tree)):
                    yield self._verify(batch, prefix, nodes)
                for kind in ("draft_level", "draft_extend") if parse_tree(self.tree).slots else ("draft_extend",):
                    yield self._decode(2, kind, (self.tree,), batch=batch, prefix=prefix, tree=self.tree)
                yield self._whole(2, batch, prefix)
                if batch == self.batches[0]:
                    rest = [n for n in self.nodes if n not in (1, tree)] if prefix == first else []
                    yield from (self._verify(batch, prefix, nodes) for nodes in rest)

    def _alternatives(self) -> Iterator[Measurement]:
        batch, first = self.batches[0], self.prefixes[0]
        nodes = parse_tree(self.tree).nodes
        for each in (1, nodes):
            yield self._decode(3, "scanned_layers", (each,), batch=batch, prefix=first, nodes=each)
        for prefix in self.prefixes:
            for name in ATTENTION:
                settings = {"implementation": name, "batch": batch, "prefix": prefix, "nodes": nodes}
                yield Measurement(3, "attention", settings, "decode", (name, prefix), 10)
        for name in TEXT_ATTENTION:
            settings = {"implementation": name, "rows": self.rows, "length": self.length}
            yield Measurement(3, "training_attention", settings, "decode", (name,), 20)
        for name in self.xla:
            for kind, settings in (("plain", {}), ("round", {"tree": self.tree, "tau": self.tau})):
                yield self._decode(3, kind, (), name, batch=batch, prefix=first, **settings, xla=name)

    def _training(self) -> Iterator[Measurement]:
        sizes = {"rows": self.rows, "length": self.length}
        for recipe in self.recipes:
            yield Measurement(4, "train_step", {"recipe": recipe, **sizes}, "train", (recipe,), self._compile_guess)
            for part in ("target", "drafter", "head_and_loss", "optimizer"):
                yield Measurement(
                    4, f"train_{part}", {"recipe": recipe, **sizes}, "train", (recipe,), 0.5 * self._compile_guess
                )
        for what in ("step", "target"):
            yield Measurement(4, f"torch_{what}", {"recipe": "eagle", **sizes}, "torch", (), 30)

    def _real(self) -> Iterator[Measurement]:
        chosen = {"target": self.target}
        batch = min(64, self.answers)
        yield Measurement(5, "regenerate", {**chosen, "batch": batch, "answers": self.answers}, "target", (), 90)
        yield Measurement(5, "train_head", chosen, "target", (), 60)
        for arm in ("plain", "speculative"):
            yield Measurement(5, f"decode_{arm}", {**chosen, "batch": 1}, "target", (), 40)

    def _peers(self) -> Iterator[Measurement]:
        for cache in ("static, compiled", "dynamic"):
            settings = {"peer": "transformers", "cache": cache, "batch": self.batches[0], "prefix": self.prefixes[0]}
            yield Measurement(6, "transformers", settings, "peers", (cache,), 90 if cache != "dynamic" else 30)
