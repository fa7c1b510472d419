"""Settings of experiments as frozen dataclasses, and how a config is found and overridden."""

import dataclasses
import difflib
import importlib
import importlib.util
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxspec.distillation.objective import Objective
from jaxspec.distillation.optimizer import OptimizerKind
from jaxspec.drafters import DRAFTERS, DrafterOptions, options_of, refuse_unknown
from jaxspec.nn.remat import Remat
from jaxspec.targets.decoder import LlamaConfig

Config = TypeVar("Config")
Attention = Literal["auto", "xla", "splash", "cudnn"]
"""Attention over training rows: a TPU's or NVIDIA's kernel, or XLA; `auto` takes the best (jaxspec.nn.kernels)."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Conversations to learn from and to be judged by."""

    # JSONL (also .gz) or ArrayRecord files, plain text (.txt, also .gz), folders or patterns of them, or folders that
    # `jaxspec tokenize` wrote; the union of several, joined by commas. With weights, a.jsonl:0.7,b.jsonl:0.3, an epoch
    # holds the first whole, and of the others what makes their share of the trained tokens.
    train: str
    eval: str  # likewise, without weights
    length: int = 512  # tokens in a row; longer conversations are cut, and longer texts divided
    batch: int = 16  # rows of a step, over all devices
    loss_on: Literal["all", "assistant"] = "all"
    limit: int | None = None  # read only so many conversations of each training file
    eval_limit: int | None = None
    mix: str | None = None  # as eval; mixed in against forgetting: what the model was pretrained on
    mix_share: float = 0.1  # of the trained tokens that are the mix's; its conversations are repeated if they are few
    mix_loss_on: Literal["all", "assistant"] = "all"  # pretraining predicts every token, and so does what recalls it
    # Chat template: vicuna, llama-2-chat, llama-3, chatml or a file of Jinja. None: the target folder's own.
    template: str | None = None
    features: str | None = None  # folder that `jaxspec features` wrote, read instead of running the target's layers
    top_k: int | None = (
        None  # learn from so many log-probabilities of that folder, the others as one, not from the head
    )
    workers: int | None = None  # processes that prepare batches; None: a thread. May change when a run is resumed

    def __post_init__(self) -> None:
        _require(self, "length", self.length > 1)
        _require(self, "batch", self.batch > 0)
        if not 0 < self.mix_share < 1:
            raise ValueError(f"mix_share is {self.mix_share:g}; it must be above 0 and below 1")
        _require(self, "top_k", self.top_k is None or self.top_k > 0)
        _require(self, "workers", self.workers is None or self.workers > 0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon with linear warm-up; `steps` or `epochs` says how long."""

    peak_lr: float
    kind: OptimizerKind = "adamw"
    warmup_steps: int = 100
    steps: int | None = None
    epochs: int | None = None
    weight_decay: float = 0.0  # on matrices; norms are exempt
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = None  # of the whole gradient
    clip_value: float | None = None  # of every component
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr_fraction: float = 0.0

    def __post_init__(self) -> None:
        _require(self, "peak_lr", self.peak_lr > 0 and math.isfinite(self.peak_lr))
        _require(self, "warmup_steps", self.warmup_steps >= 0)
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of optimizer.steps and optimizer.epochs; set the other to none")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Where a run leaves its state, and when. The last step is always saved, and one that evaluates best so far."""

    folder: str
    save_every: int | None = 100  # steps; none: not by steps
    save_minutes: float | None = None  # or whenever so much time has passed
    keep: int = 2  # of the last steps
    keep_best: int = 1  # of those that were evaluated, besides; 0: none, and an evaluation saves nothing
    best_by: (
        Literal["loss", "simulated_tau", "simulated_tau_greedy", "expected_acceptance", "top1_agreement"] | None
    ) = None  # figure of the evaluation; none: simulated_tau for a drafter, loss for pretraining
    export: Literal["last", "best"] = "last"  # the step whose weights a finished run exports

    def __post_init__(self) -> None:
        _require(self, "save_every", self.save_every is None or self.save_every > 0)
        _require(self, "save_minutes", self.save_minutes is None or self.save_minutes > 0)
        _require(self, "keep", self.keep > 0)
        _require(self, "keep_best", self.keep_best >= 0)
        if self.export == "best" and not self.keep_best:
            raise ValueError("export=best needs keep_best to be at least 1")


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides `metrics.jsonl` and TensorBoard files in the checkpoint folder."""

    wandb: str | None = None  # Weights & Biases project


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1  # TPU slices, joined by the data-centre network


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Training of a small language model from scratch: a target, or a draft LM with its target's tokenizer."""

    name: str
    model: LlamaConfig
    data: DataConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    export_folder: str  # HuggingFace folder of the result; its tokenizer is trained here first, unless one is named
    tokenizer: str | None = None  # HuggingFace folder whose tokenizer is taken, or "tiny" for the bundled target's
    mesh: MeshConfig = MeshConfig()
    tracking: TrackingConfig = TrackingConfig()
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; weights and moments are fp32
    remat: Remat = "none"  # what the backward pass computes again instead of keeping it; see jaxspec.nn.remat.recompute
    attention: Attention = "auto"
    query_block: int | None = 128  # queries that XLA attends together; see jaxspec.nn.attention.attend_causal
    loss_block: int = 64  # positions of every row whose logits exist together
    eval_every: int = 500
    log_every: int = 10


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Training of a drafter on a frozen target."""

    name: str
    target: str  # HuggingFace folder, or "tiny" for the bundled one
    data: DataConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    export_folder: str  # Orbax folder of the finished drafter, for `jaxspec generate --drafter`
    drafter: str = "eagle"  # a name of jaxspec.drafters.DRAFTERS
    head: DrafterOptions | None = None  # its shape, in its own options; what is none there follows the target
    init_from: str | None = None  # folder of a drafter to go on from; of draft_lm also a HuggingFace folder
    draft_vocab: str | None = None  # file of the tokens to score, as `jaxspec draft-vocab` writes it; None: all
    objective: Objective = dataclasses.field(default_factory=Objective)
    mesh: MeshConfig = MeshConfig()
    compiler: Literal["jit", "shard_map", "pmap"] = "jit"  # see jaxspec.distillation.compilers
    tracking: TrackingConfig = TrackingConfig()
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and of the target; masters are fp32
    target_weights: Literal["same", "int8"] = "same"  # of the target's layers: in dtype, or see jaxspec.nn.quantization
    scan_layers: bool = False  # the target as one layer's program run in turn: compiles sooner, if the target is deep
    remat: Remat = "none"  # what the drafter's backward pass computes again; see jaxspec.nn.remat.recompute
    attention: Attention = "auto"
    query_block: int | None = 128  # queries that XLA attends together; see jaxspec.nn.attention.attend_causal
    eval_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.drafter in DRAFTERS:  # else whoever makes the drafter says so
            object.__setattr__(self, "head", options_of(self.drafter, self.head))


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Any:
    """The `config` of an experiment, with `a.b=value` overrides applied.

    An experiment is a module of `configs/`, named without `.py`, or a path to a Python file; it holds a frozen
    dataclass called `config`. Raises ValueError naming the experiment, field or value that is wrong.
    """
    config = getattr(_load_module(name_or_path), "config", None)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ValueError(f"{name_or_path}: has no dataclass instance called `config`")
    return override(config, overrides)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `a.b=value` applied in order, each value read by its field's type."""
    tree: dict[str, Any] = {}
    for item in overrides:
        path, equals, value = item.partition("=")
        if not equals or not path:
            raise ValueError(f"override {item!r} is not of the form field=value")
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {item!r} follows one that sets {parent!r} as a whole")
        node[leaf] = value
    if isinstance(config, DistillConfig) and isinstance(tree.get("head"), dict):
        name = tree.get("drafter", config.drafter)
        refuse_unknown(name, tree["head"])
        # The fields of the drafter that the overrides name, and not of the one that the config names.
        config = dataclasses.replace(config, drafter=name)
    return _replace(config, tree, "")


def to_dict(config: Any) -> Any:
    """`config` in JSON's types: dataclasses become dicts with their fields' names, tuples lists."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise TypeError(f"a config cannot hold a {type(config).__name__}: {config!r}")


def completed(saved: dict[str, Any], config: Any) -> dict[str, Any]:
    """`saved`, what `to_dict` gave of a config of this class, with the fields it lacks at their defaults.

    Files of an earlier version lack the settings that came after it; a field without a default stays away. Of a
    drafter's options they may hold those of all drafters, none for what this drafter has not.
    """
    if isinstance(config, DrafterOptions):
        saved = {name: value for name, value in saved.items() if value is not None}
    result = dict(saved)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in saved:
            nested = dataclasses.is_dataclass(value) and isinstance(saved[field.name], dict)
            result[field.name] = completed(saved[field.name], value) if nested else saved[field.name]
        elif field.default is not dataclasses.MISSING:
            result[field.name] = to_dict(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            result[field.name] = to_dict(field.default_factory())
    return result


def experiments() -> list[str]:
    """Names of the experiments in `configs/`."""
    package = importlib.import_module("jaxspec.configs")
    return sorted(
        path.stem for folder in package.__path__ for path in Path(folder).glob("*.py") if path.stem != "__init__"
    )


def _load_module(name_or_path: str) -> types.ModuleType:
    if not name_or_path.endswith(".py"):
        if name_or_path not in experiments():
            raise ValueError(
                f"there is no config {name_or_path!r}{_hint(name_or_path, experiments())}; a file's name ends in .py"
            )
        return importlib.import_module(f"jaxspec.configs.{name_or_path}")
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _replace(config: Any, changes: dict[str, Any], prefix: str) -> Any:
    """`config` with `changes`: text for a leaf, a dict for a nested dataclass."""
    hints = typing.get_type_hints(type(config))
    names = [field.name for field in dataclasses.fields(config) if field.init]
    values = {}
    for name, change in changes.items():
        path = f"{prefix}{name}"
        if name not in names:
            raise ValueError(f"unknown field {path!r} in {type(config).__name__}{_hint(name, names)}")
        current = getattr(config, name)
        nested = dataclasses.is_dataclass(current)
        if isinstance(change, dict):
            if not nested:
                raise ValueError(
                    f"field {path!r} has no fields of its own, so {path}.{next(iter(change))} does not exist"
                )
            values[name] = _replace(current, change, f"{path}.")
        elif nested and change.lower() != "none":
            inner = ", ".join(field.name for field in dataclasses.fields(current))
            raise ValueError(f"field {path!r} is a group; set one of its fields: {inner}")
        else:
            values[name] = _read(change, hints[name], path)
    try:
        return dataclasses.replace(config, **values)
    except ValueError as error:
        raise ValueError(f"{prefix.rstrip('.') or 'config'}: {error}") from error


def _read(text: str, kind: Any, path: str) -> Any:
    """`text` as a value of the annotated type `kind`."""
    try:
        return _parse(text, kind)
    except ValueError:
        raise ValueError(f"field {path!r} cannot be {text!r}; it takes {_describe(kind)}") from None


def _parse(text: str, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if types.NoneType in arguments and text.lower() == "none":
            return None
        return _first(text, [a for a in arguments if a is not types.NoneType])
    if origin is Literal:
        return _choose(text, {str(a): a for a in arguments})
    if origin is tuple:
        items = [item.strip() for item in text.strip("()[]").split(",") if item.strip()]
        if len(items) == 1 and arguments[-1] is not Ellipsis:  # a pair within a list: top_k:10:1.0
            items = text.rsplit(":", len(arguments) - 1)
        kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(items):
            raise ValueError
        return tuple(_parse(item, k) for item, k in zip(items, kinds, strict=True))
    if kind is bool:
        return _choose(text.lower(), {"true": True, "false": False, "1": True, "0": False})
    if kind is int:
        number = float(text) if any(c in text for c in ".eE") else int(text)  # 1e6 is a whole number
        if number != int(number):
            raise ValueError
        return int(number)
    if kind in (float, str):
        return kind(text)
    raise ValueError


def _choose(text: str, values: dict[str, Any]) -> Any:
    if text not in values:
        raise ValueError
    return values[text]


def _first(text: str, kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        try:
            return _parse(text, kind)
        except ValueError:
            continue
    raise ValueError


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is types.NoneType else _describe(a) for a in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        if arguments[-1] is not Ellipsis:
            return ":".join(_describe(a).removeprefix("a ") for a in arguments)
        return f"values separated by commas, each {_describe(arguments[0])}"
    named = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return named.get(kind, f"a {getattr(kind, '__name__', kind)}, which the config file must set")


def _hint(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(names)}"


def _require(config: Any, field: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"field {field!r} cannot be {getattr(config, field)!r}")
