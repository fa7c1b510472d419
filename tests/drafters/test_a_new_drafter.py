"""A drafter written outside the library, as one module and one line of the table, goes through all that the verbs do.

It reads the target's newest feature and predicts one token, by a matrix, a norm and a bias of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import write_target

from jaxspec.__main__ import main
from jaxspec.base import Array, Frontier, Params, SharedTables, Unrolled, UnrollInputs
from jaxspec.checkpoints.manifest import conventions, read_manifest
from jaxspec.checkpoints.models import load_drafter
from jaxspec.config import load
from jaxspec.distillation.compilers import lower_step
from jaxspec.distillation.optimizer import make_optimizer
from jaxspec.drafters import DRAFTERS, DrafterKind
from jaxspec.drafters.module import DrafterModule, DrafterOptions, TargetShape, at_newest
from jaxspec.nn.lm_head import score_tokens
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.weights import BIAS, NORM, Shape, Weight, declare, uniform
from jaxspec.parallel.mesh import make_mesh, shardings
from jaxspec.planning.plan import abstract_arguments, target_shape

plan: Any = importlib.import_module("jaxspec.train.plan")

# What stands from here to `NAME` is the drafter's one file.

WEIGHTS = declare(
    {"leap": Weight(uniform(), ("width", "mlp"), (-2,)), "leap_norm": NORM, "leap_bias": BIAS},
    {"leap": "norm(feature @ leap + leap_bias) is scored under the target's LM head"},
)


@dataclasses.dataclass(frozen=True)
class LeapOptions(DrafterOptions):
    """Options of a leap; None follows the target."""

    steps_ahead: int | None = None
    biased: bool | None = None

    def follow(self, target: TargetShape) -> dict[str, Any]:
        """The features' width."""
        return {"width": target.width}


@dataclasses.dataclass(frozen=True)
class LeapConfig:
    """The shape of a leap."""

    width: int
    steps_ahead: int = 1
    biased: bool = True

    def shapes(self) -> dict[str, Shape]:
        """Returns the shape of every weight."""
        shapes: dict[str, Shape] = {"leap": (self.width, self.width), "leap_norm": (self.width,)}
        return shapes | ({"leap_bias": (self.width,)} if self.biased else {})


class LeapState(NamedTuple):
    """The output at a row's newest feature."""

    hidden_BD: Array


class Leap(DrafterModule):
    """The drafter: every node's children are those of the root."""

    config: LeapConfig

    declarations: ClassVar[dict[str, Weight]] = WEIGHTS

    def leap(self, features_BLD: Array) -> Array:
        """Returns the hidden states that are scored, of features."""
        w = self.weights
        out = features_BLD.astype(self.dtype) @ w["leap"].astype(self.dtype)
        return rms_norm(out + w["leap_bias"].astype(self.dtype) if self.config.biased else out, w["leap_norm"], 1e-5)

    def _unroll(self, shared: SharedTables, inputs: UnrollInputs, steps: int) -> Unrolled:
        return Unrolled(jnp.stack([self.leap(inputs.features_BLD)] * steps))

    def logits(self, params: Params, shared: SharedTables, hidden_BLD: Array, step: int = 0) -> Array:
        return score_tokens(hidden_BLD, shared.head_VD)

    def init_state(self, params: Params, shared: SharedTables, first_B: Array, capacity: int) -> LeapState:
        return LeapState(jnp.zeros((first_B.shape[0], self.config.width), self.dtype))

    def extend(
        self, params: Params, shared: SharedTables, state: Any, tokens_BL: Array, features_BLD: Array, count_B: Array
    ) -> tuple[LeapState, Array]:
        hidden: Any = self.apply({"params": params}, features_BLD, method="leap")
        state = LeapState(at_newest(hidden, count_B, state.hidden_BD))
        return state, self.logits(params, shared, state.hidden_BD[:, None])[:, 0]

    def scratch(self, state: LeapState, slots: int) -> LeapState:
        return state

    def expand(
        self, params: Params, shared: SharedTables, state: LeapState, scratch: LeapState, frontier: Frontier
    ) -> tuple[Array, LeapState]:
        logits_B1V = self.logits(params, shared, scratch.hidden_BD[:, None])
        return jnp.broadcast_to(logits_B1V, (*frontier.token_BW.shape, logits_B1V.shape[-1])), scratch


NAME = "leap"
CONFIG = """
from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, MeshConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective

config = DistillConfig(
    name="leap",
    target="target",
    data=DataConfig("chats.jsonl", "chats.jsonl", length=64, batch=8, loss_on="assistant", eval_limit=8),
    optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2, steps=6, weight_decay=0.01),
    objective=Objective(weights=(("soft_cross_entropy", 1.0),)),
    checkpoint=CheckpointConfig("whole", save_every=3, keep=9),
    export_folder="whole_drafter",
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    drafter="leap",
    eval_every=100,
)
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory: a target, its conversations, a config, and a run with its drafter in `whole`."""
    path = tmp_path_factory.mktemp("leap")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setitem(DRAFTERS, NAME, DrafterKind(Leap, LeapConfig, LeapOptions))  # the one line
        patch.setattr("jaxspec.training.distill.EVAL_STEPS", 1)
        write_target(path / "target")
        lines = []
        for i in range(60):
            words = ((f"{i} and 2 make", "user"), (f"{i + 2}, they say", "assistant"))
            lines.append({"id": str(i), "messages": [{"role": role, "content": text} for text, role in words]})
        (path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (path / "toy.py").write_text(CONFIG)
        assert main(["train", "toy.py", "--json", "whole.json"]) == 0
        yield path


def told(*words: str) -> dict[str, Any]:
    """Returns the JSON that a verb writes."""
    assert main([*words, "--json", "told.json"]) == 0
    return json.loads(Path("told.json").read_text())


def test_it_learns_on_a_mesh_by_the_axes_and_the_groups_that_it_declares(folder: Path):
    assert json.loads((folder / "whole.json").read_text())["steps"] == 6
    found, module = load_drafter("whole_drafter"), Leap(LeapConfig(32))
    assert (found.name, found.module) == (NAME, module)
    fresh = module.init_params(jax.random.key(0))
    assert {name: w.shape for name, w in found.params.items()} == module.config.shapes() | {}
    assert bool(jnp.any(found.params["leap_bias"] != 0)) and bool(jnp.any(found.params["leap_norm"] != 1))
    placed = shardings(make_mesh(2, 2, 2), fresh)
    assert tuple(placed["leap"].spec) == ("fsdp", "tensor") and not placed["leap_norm"].spec
    muon = make_optimizer(lambda _: jnp.asarray(1e-2), kind="muon")
    moved: Any = muon.update(fresh, muon.init(fresh), fresh)[0]
    singular = np.linalg.svd(moved["leap"] / (0.2e-2 * 32**0.5), compute_uv=False)
    assert np.quantile(singular, 0.1) > 0.5 and singular.max() < 1.3  # orthogonal, but for directions nearly lost
    decays = make_optimizer(lambda _: jnp.asarray(1e-2), weight_decay=0.1)
    moved = decays.update(jax.tree.map(jnp.zeros_like, fresh), decays.init(fresh), fresh)[0]
    assert {name for name, move in moved.items() if bool(jnp.any(move != 0))} == {"leap"}


def test_a_run_that_stops_and_goes_on_ends_with_the_bits_of_one_that_does_not(folder: Path, monkeypatch):
    words = ("train", "toy.py", "checkpoint.folder=torn", "export_folder=torn_drafter")
    monkeypatch.setattr("jaxspec.training.loop.termination_notice", lambda: StopAt(3))
    assert main([*words]) != 0
    monkeypatch.undo()
    assert told(*words)["resumed_from"] == 3
    torn, whole = (load_drafter(name).params for name in ("torn_drafter", "whole_drafter"))
    jax.tree.map(np.testing.assert_array_equal, torn, whole)


class StopAt:
    """A termination notice that comes at a step."""

    def __init__(self, step: int):
        self.step = step

    def __enter__(self):
        return lambda step: step == self.step

    def __exit__(self, *_: object) -> None:
        """Nothing is to be put back."""


def test_it_decodes_the_targets_own_text(folder: Path):
    words = ("generate", "1 and 2 make", "--target", "target", "--max-new-tokens", "12")
    plain = told(*words)["rows"][0]["token_ids"]
    assert told(*words, "--drafter", "whole_drafter", "--tree", "dynamic:8x3x3")["rows"][0]["token_ids"] == plain
    assert told(*words, "--drafter", "whole_drafter", "--tree", "chain:2")["rows"][0]["token_ids"] == plain


def test_it_is_exported_and_described_with_what_it_declares(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["export", "whole", "exported", "--to", "orbax"]) == 0
    ours, theirs = (load_drafter(name) for name in ("whole_drafter", "exported"))
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    manifest = read_manifest(folder / "exported")
    assert manifest["arrays"]["leap"]["axes"] == ["width", "mlp"] and manifest["arrays"]["leap_norm"]["axes"] == [None]
    assert manifest["conventions"] == conventions() and "LM head" in manifest["conventions"]["leap"]
    facts = told("inspect", "exported")
    assert facts["shapes"]["leap"] == [32, 32]
    assert main(["export", "whole", "served", "--to", "vllm", "--target", "target"]) == 1
    assert "vllm cannot serve leap: it has no layout for such a drafter" in capfd.readouterr().err


def test_its_options_are_those_of_the_command_line(folder: Path):
    assert load("toy.py", ["head.steps_ahead=3"]).head == LeapOptions(steps_ahead=3)
    assert load("eagle2", ["drafter=leap", "head.biased=false"]).head == LeapOptions(biased=False)
    with pytest.raises(ValueError, match=r"head\.tokens is nothing that drafter 'leap' has; it has steps_ahead"):
        load("toy.py", ["head.tokens=3"])


def test_its_step_is_planned_without_its_weights(folder: Path):
    config, mesh = load("toy.py"), make_mesh(2, 2, 2)
    step = plan.build_abstract(config, target_shape("target"), mesh, None)
    arguments = abstract_arguments(step, None)
    state = arguments[1]
    assert tuple(state.params["leap"].sharding.spec) == ("fsdp", "tensor")
    assert "leap" in str(jax.tree_util.tree_leaves_with_path(state.optimizer))
    lowered = lower_step("jit", mesh, step.task, step.optimizer, *arguments)
    assert "sharding" in lowered.as_text()


@pytest.mark.slow
def test_it_is_planned_for_a_slice(folder: Path):
    """By libtpu, which compiles for a minute."""
    found = told("plan", "toy.py", "target=tiny", "mesh.data=-1", "mesh.tensor=1", "--topology", "v6e:2x2")
    assert found["fits"]
