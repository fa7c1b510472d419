"""The objects that a config describes: mesh, optimizer, drafter, the distillation step."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxspec.base import Params
from jaxspec.config import DistillConfig, MeshConfig, OptimizerConfig, PretrainConfig
from jaxspec.distillation.compilers import Compiler
from jaxspec.distillation.optimizer import make_optimizer, make_schedule
from jaxspec.distillation.task import Task
from jaxspec.drafters import TargetShape, config_of, kind_named, options_of
from jaxspec.interchange.export import target_tables
from jaxspec.nn.kernels import choose_kernel
from jaxspec.parallel.mesh import make_mesh
from jaxspec.serving.loading import check_width, open_drafter
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.targets.tables import Tables


class InitialDrafter(NamedTuple):
    """A drafter before its training."""

    module: Any
    params: Params | None
    """The weights to go on from; None for fresh ones."""


class DistillStep(NamedTuple):
    """A distillation step as built from a config: all that decides its program."""

    task: Task
    """Target and drafter with the attention and recomputation of training."""
    optimizer: optax.GradientTransformation
    compiler: Compiler
    mesh: Mesh
    rows: tuple[int, int]
    """Rows of a batch, and tokens of a row."""
    int8_target: bool
    """Whether the target's layers are quantized."""


def build_step(
    config: DistillConfig, mesh: Mesh, target: Decoder | Tables, drafter: Any, steps: int | None = None
) -> DistillStep:
    """Returns the step that trains `drafter` on `target` over `steps` updates (None: the config's number, or 1,000).

    ValueError where the drafter drafts less deep than the objective says, or the mesh's devices cannot attend as the
    config says.
    """
    deepest, wanted = drafter.deepest, config.objective.steps
    if deepest is not None and wanted > deepest:
        raise ValueError(f"objective.steps is {wanted}, and this drafter drafts {deepest} tokens ahead: lower it")
    blocks = attention_blocks(config, mesh)
    task = Task(target.clone(**blocks, taps=drafter.taps), drafter.clone(**blocks), config.objective)
    optimizer = optimizer_of(config.optimizer, steps or config.optimizer.steps or 1000)
    rows = config.data.batch, config.data.length
    return DistillStep(task, optimizer, config.compiler, mesh, rows, config.target_weights == "int8")


def check_length(config: PretrainConfig | DistillConfig, shape: LlamaConfig) -> None:
    """Raises ValueError where the rows of a config are longer than the model of this shape has positions."""
    length, positions = config.data.length, shape.max_positions
    if length > positions:
        subject = "the model" if isinstance(config, PretrainConfig) else f"target {config.target}"
        raise ValueError(
            f"data.length is {length:,}, and {subject} has {positions:,} positions: give data.length={positions} or "
            "less"
        )


def takes_vocab(config: DistillConfig, target: LlamaConfig, scored: int) -> bool:
    """Returns whether the drafter that `config` names can score a vocabulary of so many tokens: a draft LM cannot.

    Raises ValueError where it does not fit together.
    """
    return initial_drafter(config, target, scored).module.vocab in (None, scored)


def drafter_for(config: DistillConfig, target: LlamaConfig, scored: int | None = None) -> InitialDrafter:
    """Returns the drafter that `config` names, see `initial_drafter`.

    Raises ValueError where that does not fit together, or its own LM head scores other tokens than it is to score.
    """
    found, wanted = initial_drafter(config, target, scored), scored or target.vocab
    own = found.module.vocab
    if own in (None, wanted):
        return found
    scores = f"its own LM head scores {own:,} tokens, and it is to score {wanted:,}"
    if config.init_from is not None:
        raise ValueError(f"{config.init_from}: {scores}; it was made for another tokenizer or draft vocabulary")
    if scored is not None:
        raise ValueError(f"drafter {config.drafter!r}: {scores}: leave draft_vocab out, or the option that sets it")
    return found


def initial_drafter(config: DistillConfig, target: LlamaConfig, scored: int | None = None) -> InitialDrafter:
    """Returns the drafter of `config.init_from`, or one layer of the target's shape with the changes of `config.head`.

    `scored` is the size of its draft vocabulary, which its own LM head follows where it is not fixed already. Raises
    ValueError where the rest does not fit together.
    """
    kind, head = kind_named(config.drafter), options_of(config.drafter, config.head)
    if config.init_from is not None:
        return _continued_drafter(config, config.init_from, target)
    shape = config_of(config.drafter, shape_to_follow(target, scored), head)
    return InitialDrafter(kind.module(shape, dtype=jnp.dtype(config.dtype)), None)


def shape_to_follow(target: LlamaConfig, scored: int | None) -> TargetShape:
    """Returns the shape of the target that a drafter's own follows; `scored` is the size of its draft vocabulary."""
    return TargetShape(
        width=target.width,
        heads=target.heads,
        kv_heads=target.kv_heads,
        head_dim=target.head_dim,
        mlp=target.mlp,
        rope_theta=target.rope_theta,
        rope_scaling=target.drafter_rope,
        norm_eps=target.norm_eps,
        layers=target.layers,
        vocab=target.vocab,
        scored=scored or target.vocab,
    )


def _continued_drafter(config: DistillConfig, folder: str, target: LlamaConfig) -> InitialDrafter:
    """The drafter of a folder, to be trained further."""
    head = options_of(config.drafter, config.head)
    if head.given:
        raise ValueError(f"head.{next(iter(head.given))} is that of {folder}: leave it out")
    tables = functools.cache(functools.partial(target_tables, config.target))
    found = open_drafter(folder, dtype=jnp.float32, target_layers=target.layers, tables=tables)
    if found.name != config.drafter:
        raise ValueError(f"{folder}: holds a drafter {found.name!r}, and the config says {config.drafter!r}")
    check_width(folder, found.module, target)
    return InitialDrafter(found.module.clone(dtype=jnp.dtype(config.dtype)), found.params)


def attention_blocks(config: PretrainConfig | DistillConfig, mesh: Mesh) -> dict[str, Any]:
    """Returns how the models attend over training rows, and what they keep of it: fields of `Decoder` and drafters.

    See `attention.attend_text` and `recompute`. ValueError where the mesh's devices cannot attend as the config says.
    """
    return {
        "kernel": choose_kernel(config.attention, mesh.devices.flat[0], config.dtype),
        "remat": config.remat,
        "query_block": config.query_block,
        "row_by_row": mesh.size == 1 and mesh.devices.flat[0].platform == "cpu",
    }


def mesh_of(c: MeshConfig) -> Mesh:
    """Returns the mesh that a config asks for."""
    return make_mesh(c.data, c.fsdp, c.tensor, slices=c.slices)


def optimizer_of(c: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer that a config describes, over `steps` updates."""
    rate = make_schedule(
        peak_lr=c.peak_lr,
        steps=steps,
        warmup_steps=c.warmup_steps,
        schedule=c.schedule,
        final_lr_fraction=c.final_lr_fraction,
    )
    return make_optimizer(
        rate,
        kind=c.kind,
        weight_decay=c.weight_decay,
        betas=(c.b1, c.b2),
        eps=c.eps,
        clip_norm=c.clip_norm,
        clip_value=c.clip_value,
    )
