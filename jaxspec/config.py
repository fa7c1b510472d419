"""Settings of an experiment as frozen dataclasses, and how an experiment is found, derived and resolved.

An experiment is a module of `configs/`, or a Python file anywhere, that holds one of these dataclasses as `config`.
"""

import ast
import dataclasses
import importlib
import importlib.util
import math
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from jaxspec.console.overrides import override as override_fields
from jaxspec.console.overrides import replace_fields, suggest
from jaxspec.data.chat import TemplateChoice
from jaxspec.data.chat_template import DATE, parse_variables
from jaxspec.data.turns import Thinking, TurnOptions
from jaxspec.distillation.objective import Objective
from jaxspec.distillation.optimizer import OptimizerKind
from jaxspec.drafters import DRAFTERS, DrafterOptions, options_of, refuse_unknown
from jaxspec.nn.remat import Remat
from jaxspec.targets.decoder import LlamaConfig

Config = TypeVar("Config")
Attention = Literal["auto", "xla", "splash", "cudnn"]
"""Attention over training rows: `splash` on a TPU, `cudnn` on an NVIDIA GPU, `xla` anywhere; `auto` takes the fastest
(`jaxspec.nn.kernels`)."""
Metric = Literal["loss", "simulated_tau", "simulated_tau_greedy", "expected_acceptance", "top1_agreement"]
"""Figures of an evaluation."""


class Range(NamedTuple):
    """The numbers that a field may be; None may always be."""

    text: str
    """The end of a sentence: "it must be ..."."""
    holds: Callable[[float], bool]


AT_LEAST_0 = Range("at least 0", lambda x: 0 <= x < math.inf)
AT_LEAST_1 = Range("at least 1", lambda x: 1 <= x < math.inf)
ABOVE_0 = Range("above 0", lambda x: 0 < x < math.inf)
BELOW_1 = Range("at least 0 and below 1", lambda x: 0 <= x < 1)
SHARE = Range("above 0 and below 1", lambda x: 0 < x < 1)
FRACTION = Range("from 0 to 1", lambda x: 0 <= x <= 1)
SEED = Range("from 0 to 2^32 - 1", lambda x: 0 <= x < 2**32)


def _check(config: Any, **ranges: Range) -> None:
    """Raises ValueError naming the first field whose number is outside its range, and the range."""
    for field, allowed in ranges.items():
        value = getattr(config, field)
        if value is not None and not allowed.holds(value):
            raise ValueError(f"field {field!r} cannot be {value!r}; it must be {allowed.text}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Conversations to train and to evaluate on, and the rows that they are packed into."""

    train: str
    """JSONL (also .gz) or ArrayRecord files, plain text (.txt, also .gz), folders or patterns of them, or folders that
    `jaxspec tokenize` wrote. Several are joined by commas. With weights, as in a.jsonl:0.7,b.jsonl:0.3, an epoch holds
    the first whole, and of each other one as much as gives it its share of the trained tokens."""
    eval: str
    """Held-out data, named as `train`, without weights."""
    length: int = 512
    """Tokens in a row. Longer conversations are cut, longer texts are divided."""
    batch: int = 16
    """Rows in a step, over all devices."""
    loss_on: Literal["all", "assistant"] = "all"
    """Tokens that are trained: all, or those of the assistant's turns."""
    limit: int | None = None
    """Most conversations read from each training file."""
    eval_limit: int | None = None
    """Most conversations read from each file of `eval`."""
    mix: str | None = None
    """Data mixed in against forgetting, usually the pretraining text. Named as `eval`."""
    mix_share: float = 0.1
    """Share of the trained tokens that come from `mix`, which is repeated if it is too small."""
    mix_loss_on: Literal["all", "assistant"] = "all"
    """As `loss_on`, for `mix`. Pretraining predicts every token, so `all` is the default."""
    template: str | None = None
    """Chat template: vicuna, llama-2-chat, llama-3, chatml, a file of Jinja, or `none` for a base model. None: that of
    the target's folder."""
    template_args: str | None = None
    """Values of the template's own variables, such as enable_thinking=false. A record's `chat_template_kwargs` go
    before them."""
    date: str = DATE
    """The day that templates are told which ask for it: one for all, so that the same text is the same tokens."""
    thinking: Thinking = "told"
    """`told`: the target thinks as the template's variables say, and answers that contradict them are left out.
    `record`: a turn with a thought is shown as with enable_thinking, one without as without it."""
    last_turn_only: bool = False
    """Train on the last answer of each conversation alone."""
    max_turns: int | None = None
    """Most answers of a conversation that are trained on, the first ones."""
    skip_bad: bool = False
    """Leave out, and count, records that cannot be used, instead of stopping at the first."""
    features: str | None = None
    """Folder that `jaxspec features` wrote, or several joined by commas. Its features are read, and the target's layers
    are not run."""
    top_k: int | None = None
    """Train on this many log-probabilities from `features`, the rest lumped into one, instead of on the LM head's."""
    workers: int | None = None
    """Processes that prepare batches; None: one thread. A resumed run may change it."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("batch", "limit", "eval_limit", "top_k", "workers", "max_turns"), AT_LEAST_1)
        _ = self.chat, self.turns
        # A row of one token has none to predict.
        _check(self, length=Range("at least 2", lambda x: x >= 2), mix_share=SHARE, **counts)

    @property
    def chat(self) -> TemplateChoice:
        """The chat template, as `ChatTokenizer.load` takes it."""
        return TemplateChoice(self.template, parse_variables(self.template_args), self.date)

    @property
    def turns(self) -> TurnOptions:
        """The options of which turns are trained on."""
        return TurnOptions(self.last_turn_only, self.max_turns, self.thinking)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, and its learning rate over the run; `steps` or `epochs` gives the length."""

    peak_lr: float
    """Learning rate after the warm-up."""
    kind: OptimizerKind = "adamw"
    """`muon` updates matrices; tables of tokens, norms and biases stay with Adam."""
    warmup_steps: int = 100
    """Steps in which the rate rises linearly to `peak_lr`."""
    steps: int | None = None
    """Updates in all, or None if `epochs` is given."""
    epochs: int | None = None
    """Passes over the training data, or None if `steps` is given."""
    weight_decay: float = 0.0
    """On matrices only."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = None
    """Largest norm of the whole gradient."""
    clip_value: float | None = None
    """Largest absolute value of a component of the gradient."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    final_lr_fraction: float = 0.0
    """Share of `peak_lr` that is left at the last step."""

    def __post_init__(self) -> None:
        _check(self, peak_lr=ABOVE_0, warmup_steps=AT_LEAST_0, steps=AT_LEAST_1, epochs=AT_LEAST_1)
        _check(self, weight_decay=AT_LEAST_0, b1=BELOW_1, b2=BELOW_1, eps=AT_LEAST_0)
        _check(self, clip_norm=ABOVE_0, clip_value=ABOVE_0, final_lr_fraction=FRACTION)
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of optimizer.steps and optimizer.epochs; set the other to none")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Place and times at which a run saves its state. The last step and the best evaluated one are always saved."""

    folder: str = "runs/{name}"
    """Folder of the run. `{name}` stands for the name of the config; see `resolve`."""
    save_every: int | None = 100
    """Steps between two saves; None: not by steps."""
    save_minutes: float | None = None
    """Minutes between two saves; None: not by time."""
    keep: int = 2
    """Last saved steps that are kept."""
    keep_best: int = 1
    """Best evaluated steps that are kept besides; 0: none, and an evaluation saves nothing."""
    best_by: Metric | None = None
    """Figure of the evaluation that decides; None: `simulated_tau` for a drafter, `loss` for pretraining."""
    export: Literal["last", "best"] = "last"
    """Step whose weights a finished run exports."""

    def __post_init__(self) -> None:
        _check(self, save_every=AT_LEAST_1, save_minutes=ABOVE_0, keep=AT_LEAST_1, keep_best=AT_LEAST_0)
        if self.export == "best" and not self.keep_best:
            raise ValueError("export=best needs keep_best to be at least 1")


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Services that get metrics besides `metrics.jsonl` and the TensorBoard files in the run's folder."""

    wandb: str | None = None
    """Weights & Biases project."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 takes what is left."""

    data: int = -1
    """Rows are split; weights are copied."""
    fsdp: int = 1
    """Rows and weights are split."""
    tensor: int = 1
    """Heads, MLP channels and the vocabulary are split."""
    slices: int = 1
    """TPU slices, joined by the data-centre network."""

    def __post_init__(self) -> None:
        left = Range("at least 1, or -1 for the devices that are left", lambda x: x >= 1 or x == -1)
        _check(self, data=left, fsdp=AT_LEAST_1, tensor=AT_LEAST_1, slices=AT_LEAST_1)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Training of a small language model from scratch: a target, or a draft LM with its target's tokenizer."""

    name: str
    """Names the run's folder and the run in lists."""
    model: LlamaConfig
    data: DataConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    export_folder: str = "{folder}/export"
    """HuggingFace folder of the finished model; `{folder}` stands for `checkpoint.folder`. Its tokenizer is trained
    there first, unless `tokenizer` is given."""
    tokenizer: str | None = None
    """HuggingFace folder whose tokenizer is taken, or `tiny` for that of the bundled target."""
    mesh: MeshConfig = MeshConfig()
    tracking: TrackingConfig = TrackingConfig()
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations. Weights and moments are fp32."""
    remat: Remat = "none"
    """Activations that the backward pass computes again instead of keeping; see `jaxspec.nn.remat.recompute`."""
    attention: Attention = "auto"
    query_block: int | None = 128
    """Queries that XLA attends together; see `jaxspec.nn.attention.attend_causal`."""
    loss_block: int = 64
    """Positions of every row whose logits exist at once."""
    eval_every: int = 500
    """Steps between two evaluations."""
    log_every: int = 10
    """Steps between two lines of `metrics.jsonl`."""

    def __post_init__(self) -> None:
        _check(self, seed=SEED, query_block=AT_LEAST_1, loss_block=AT_LEAST_1)
        _check(self, eval_every=AT_LEAST_1, log_every=AT_LEAST_1)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Training of a drafter on a frozen target."""

    name: str
    """Names the run's folder and the run in lists."""
    target: str
    """HuggingFace folder or GGUF file, `smollm2`, or `tiny` for the bundled target."""
    data: DataConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    export_folder: str = "{folder}/drafter"
    """Orbax folder of the finished drafter, for `jaxspec generate --drafter`; `{folder}` stands for
    `checkpoint.folder`."""
    drafter: str = "eagle"  # a name of jaxspec.drafters.DRAFTERS
    head: DrafterOptions | None = None
    """The drafter's shape, in its own options. None there follows the target."""
    init_from: str | None = None
    """Folder of a drafter whose training goes on, or `smollm2-head`, which comes with jaxspec; for `draft_lm` also a
    HuggingFace folder."""
    draft_vocab: str | None = None
    """File of the tokens that the drafter scores, as `jaxspec draft-vocab` writes it; None: all tokens."""
    objective: Objective = dataclasses.field(default_factory=Objective)
    """Losses, their weights and the draft steps."""
    mesh: MeshConfig = MeshConfig()
    compiler: Literal["jit", "shard_map", "pmap"] = "jit"
    """The transformation that divides the step over the mesh; see `jaxspec.distillation.compilers`."""
    tracking: TrackingConfig = TrackingConfig()
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and of the target. The drafter's master weights are fp32."""
    target_weights: Literal["same", "int8"] = "same"
    """Of the target's layers: `same` is in `dtype`; for `int8` see `jaxspec.nn.quantization`."""
    scan_layers: bool = False
    """Compile one layer of the target and run it in a loop. A deep target compiles sooner."""
    remat: Remat = "none"
    """Activations that the drafter's backward pass computes again; see `jaxspec.nn.remat.recompute`."""
    attention: Attention = "auto"
    query_block: int | None = 128
    """Queries that XLA attends together; see `jaxspec.nn.attention.attend_causal`."""
    eval_every: int = 500
    """Steps between two evaluations."""
    log_every: int = 10
    """Steps between two lines of `metrics.jsonl`."""

    def __post_init__(self) -> None:
        _check(self, seed=SEED, query_block=AT_LEAST_1, eval_every=AT_LEAST_1, log_every=AT_LEAST_1)
        if self.drafter in DRAFTERS:  # else whoever makes the drafter says so
            object.__setattr__(self, "head", options_of(self.drafter, self.head))


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Any:
    """Returns the config of an experiment, with `a.b=value` overrides applied, resolved.

    The experiment is named as its module in `configs/`, or by the path of a Python file. Raises ValueError naming the
    experiment, field or value that is wrong.
    """
    return resolve(override(_config_of(name_or_path), overrides))


def derive(base: str, **changes: Any) -> Any:
    """Returns the config of the experiment `base` with some fields replaced, for an experiment that starts from it.

    A dict replaces fields of a group and leaves its others alone; any other value replaces the field. Folders that
    `base` does not set follow the new `name`:

        config = derive("eagle2", name="mine", optimizer={"peak_lr": 1e-3, "epochs": 1})
    """
    return replace_fields(_config_of(base), changes)


def resolve(config: Config) -> Config:
    """Returns `config` with `{name}` and `{folder}` in its folders replaced by what they stand for, as `load` does."""
    if not isinstance(config, PretrainConfig | DistillConfig):
        return config
    folder = config.checkpoint.folder.replace("{name}", config.name)
    export = config.export_folder.replace("{name}", config.name).replace("{folder}", folder)
    checkpoint = dataclasses.replace(config.checkpoint, folder=folder)
    return dataclasses.replace(config, checkpoint=checkpoint, export_folder=export)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Returns `config` with each `a.b=value` applied in order, each value read by its field's type.

    `head.x=value` sets an option of the drafter that the overrides name, or else of the config's own drafter. A length
    in `optimizer.steps` replaces one in `optimizer.epochs`, and the other way round. Raises ValueError naming the
    override, field or value that is wrong.
    """
    given = {path: value for path, _, value in (item.partition("=") for item in overrides)}
    if isinstance(config, DistillConfig):
        options = [path.removeprefix("head.") for path in given if path.startswith("head.")]
        if options:
            name = given.get("drafter", config.drafter)
            refuse_unknown(name, options)
            config = dataclasses.replace(config, drafter=name)
    lengths = ("optimizer.steps", "optimizer.epochs")
    for length, other in (lengths, lengths[::-1]):
        if given.get(length, "none") != "none" and other not in given:
            overrides = [*overrides, f"{other}=none"]
    return override_fields(config, overrides)


def to_dict(config: Any) -> Any:
    """Returns `config` in JSON's types: dataclasses become dicts by field name, tuples become lists."""
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
    """Returns `saved`, the `to_dict` of a config of this class, with the fields that it lacks at their defaults.

    A file of an earlier version lacks the settings that came later. A missing field without a default stays missing.
    A drafter's options in such a file may hold those of all drafters, null where this drafter has no such option.
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
    """Returns the names of the experiments in `configs/`, sorted."""
    return sorted(_experiment_files())


def docstring(name_or_path: str) -> str:
    """Returns the docstring of an experiment's module, without running it; empty if it has none.

    Raises ValueError for an experiment that does not exist.
    """
    text = _experiment_file(name_or_path).read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(text, filename=name_or_path)) or ""


def _experiment_files() -> dict[str, Path]:
    package = importlib.import_module("jaxspec.configs")
    files = (path for folder in package.__path__ for path in Path(folder).glob("*.py"))
    return {path.stem: path for path in files if path.stem != "__init__"}


def _experiment_file(name_or_path: str) -> Path:
    if name_or_path.endswith(".py"):
        path = Path(name_or_path)
        if not path.is_file():
            raise ValueError(f"{path}: no such config file")
        return path
    files = _experiment_files()
    if name_or_path not in files:
        hint = suggest(name_or_path, sorted(files))
        raise ValueError(f"there is no config {name_or_path!r} (a file is named with its .py){hint}")
    return files[name_or_path]


def _config_of(name_or_path: str) -> Any:
    """Returns `config` of the experiment's module as it stands there."""
    config = getattr(_load_module(name_or_path), "config", None)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ValueError(f"{name_or_path}: has no dataclass instance called `config`")
    return config


def _load_module(name_or_path: str) -> types.ModuleType:
    path = _experiment_file(name_or_path)
    if not name_or_path.endswith(".py"):
        return importlib.import_module(f"jaxspec.configs.{name_or_path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
