"""A whole run that takes a blink: a two-layer regression, on any mesh and any number of processes.

As a program: `toy_run.py FOLDER STEPS DATA FSDP TENSOR [COORDINATOR RANK PROCESSES]`.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, SupportsIndex, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxspec.checkpoints.runs import BestMetric
from jaxspec.config import CheckpointConfig, load
from jaxspec.parallel.mesh import batch_sharding, make_mesh
from jaxspec.training.loop import Recipe, RunResult, run

ROWS = 8
SHAPES = ((16, 32), (32, 16))


class State(NamedTuple):
    params: Any
    optimizer: Any


class Draws:
    """Batch `n` is drawn from seed `n`; a process takes its share of the rows."""

    corpus = SimpleNamespace(ids=[])

    def __len__(self) -> int:
        return 1000

    def token_count(self, index: int) -> int:
        return ROWS

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        share = ROWS // jax.process_count()
        x = np.random.default_rng(index.__index__()).normal(size=(ROWS, 16)).astype(np.float32)
        x = x[jax.process_index() * share :][:share]
        return {"x": x, "segments": np.ones((share, 1), np.int32), "documents": np.full((share, 1), -1)}


def loss(p: Any, x: jax.Array) -> jax.Array:
    """Returns the mean square of the regression's errors."""
    return jnp.mean((jax.nn.relu(x @ p["up"]) @ p["down"] * p["norm"] - jnp.sin(x)) ** 2)


def train(folder: Path, steps: int, mesh: jax.sharding.Mesh, **checkpoint: Any) -> RunResult:
    """Train in `folder` up to `steps`, from where it stands; every step's loss is in `metrics.jsonl`."""
    optimizer = optax.adamw(1e-2)

    def init() -> State:
        keys = jax.random.split(jax.random.key(0))
        up, down = (0.1 * jax.random.normal(key, shape) for key, shape in zip(keys, SHAPES, strict=True))
        params = {"up": up, "down": down, "norm": jnp.ones(16)}
        return State(params, optimizer.init(params))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: State, x: jax.Array) -> tuple[State, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(state.params, x)
        change, moments = optimizer.update(gradient, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, change), moments), value

    def step(state: State, batch: Any) -> tuple[State, jax.Array]:
        return update(state, jax.make_array_from_process_local_data(batch_sharding(mesh), batch["x"]))

    best_metric = BestMetric("loss", rising=False)
    recipe = Recipe("toy", init, step, lambda _: {"loss": 1.0}, cast(Any, Draws()), steps, (), (best_metric,), {})
    kept = CheckpointConfig(str(folder), **{"save_every": 2, **checkpoint})
    config = dataclasses.replace(load("tiny"), checkpoint=kept, log_every=1)
    return run(recipe, config, mesh)


def train_alone(folder: Path, steps: int, devices: int) -> None:
    """The same as a whole process, saved at every step: with its first devices so many virtual ones."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    train(folder, steps, make_mesh(devices), save_every=1)


if __name__ == "__main__":
    folder, steps, *words = sys.argv[1:]
    data, fsdp, tensor = map(int, words[:3])
    if words[3:]:
        jax.distributed.initialize(words[3], num_processes=int(words[5]), process_id=int(words[4]))
    train(Path(folder), int(steps), make_mesh(data, fsdp, tensor))
