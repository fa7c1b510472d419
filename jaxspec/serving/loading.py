"""A target and its drafter, read from folders or made of random weights, matched and ready to decode."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import Drafter, DraftMode, Params, SharedTables, TreePolicy
from jaxspec.checkpoints.models import LoadedDrafter, load_drafter
from jaxspec.data.chat import NO_TEMPLATE, ChatTokenizer, TemplateChoice
from jaxspec.data.draft_vocab import load_maps
from jaxspec.decoding.requests import Request, Settings
from jaxspec.decoding.rounds import DraftVocab, Engine, Weights
from jaxspec.drafters import DRAFTERS, DraftLM, DraftLMConfig, Eagle, EagleConfig
from jaxspec.drafters.module import DrafterModule
from jaxspec.drafters.prompt_lookup import PromptLookup
from jaxspec.interchange.hf import load_target
from jaxspec.interchange.published import published_family, read_drafter
from jaxspec.interchange.target_folders import target_folder
from jaxspec.nn.matmul import lay_out
from jaxspec.nn.options import PLAIN
from jaxspec.parallel.agreement import say
from jaxspec.targets.decoder import SHAPES, Decoder, LlamaConfig
from jaxspec.trees import Policy, cut_tree, parse_tree, tree_kept
from jaxspec.verify import rule_named

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
DEFAULT_TREE = "dynamic:60x6x10"
"""EAGLE-2's own tree, for a drafter that was saved without one; cut to the depth that the drafter drafts."""

LOOKUP, DEFAULT_LOOKUP = "lookup", "lookup:7"
"""The drafter that has no folder, prompt lookup, and its tree where none is given."""


class Models(NamedTuple):
    """A target with its tokenizer, and perhaps a drafter with its tree, ready to decode."""

    engine: Engine
    weights: Weights
    tokenizer: ChatTokenizer
    config: LlamaConfig
    """The target's shape."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, as the model's and the tokenizer's files list them."""
        return tuple(sorted({*self.config.eos_ids, *self.tokenizer.stop_ids}))

    def request(self, tokens: np.ndarray, settings: Settings, key: Any = 0) -> Request:
        """Returns the request of a prompt whose answer also ends at the model's stop ids and its last position.

        Raises ValueError, a sentence without its subject, for a prompt that the target cannot read or has no position
        left to answer.
        """
        if not len(tokens):
            raise ValueError("is empty")
        if np.min(tokens) < 0 or np.max(tokens) >= self.config.vocab:
            raise ValueError(f"has a token outside the target's vocabulary of {self.config.vocab:,}")
        if settings.stop_ids and max(settings.stop_ids) >= self.config.vocab:
            raise ValueError(f"has a stop id outside the target's vocabulary of {self.config.vocab:,}")
        room = self.config.max_positions - len(tokens)
        if room < 1:
            raise ValueError(
                f"has {len(tokens):,} tokens, and the target has {self.config.max_positions:,} positions: shorten it"
            )
        stops = tuple(dict.fromkeys((*self.stop_ids, *settings.stop_ids)))
        budget = min(settings.max_new_tokens, room)
        return Request(tokens, dataclasses.replace(settings, max_new_tokens=budget, stop_ids=stops), key)

    def plain(self) -> Models:
        """Returns the target alone."""
        target = cast(Decoder, self.engine.target).clone(taps=())
        return self._replace(engine=Engine(target), weights=Weights(self.weights.target))

    def with_drafter(
        self, drafter: Drafter, params: Params, tree: TreePolicy, draft_vocab: Sequence[int] | None = None
    ) -> Models:
        """Returns the same target with a drafter that scores the tokens `draft_vocab` (None: all).

        Raises ValueError where the drafter's own LM head scores another number of tokens.
        """
        target, vocab = self.weights.target, None
        scored = self.config.vocab if draft_vocab is None else len(draft_vocab)
        if drafter.vocab is not None and drafter.vocab != scored:
            raise ValueError(
                f"the drafter's own LM head scores {drafter.vocab:,} tokens, not {scored:,}: it was made for another "
                "draft vocabulary, or for none"
            )
        if draft_vocab is not None:
            token_U = jnp.asarray(draft_vocab, jnp.int32)
            vocab = DraftVocab(token_U, self.engine.target.shared_tables(target).head_VD[token_U])
        reading = cast(Decoder, self.engine.target).clone(taps=drafter.taps)
        engine = Engine(reading, drafter_for_tree(drafter, tree), tree)  # which refuses what does not go together
        module, params = prepare(cast(DrafterModule, drafter), params)
        ready = drafter_for_tree(cast(Drafter, module), tree)
        return self._replace(engine=dataclasses.replace(engine, drafter=ready), weights=Weights(target, params, vocab))

    def with_prompt_lookup(self, tree: TreePolicy) -> Models:
        """Returns the target with prompt lookup as its only drafter."""
        engine = Engine(self.engine.target, drafter_for_tree(PromptLookup(), tree), tree)
        return self._replace(engine=engine, weights=Weights(self.weights.target))

    def with_tree(self, tree: TreePolicy) -> Models:
        """Returns the same models with another tree."""
        drafter = None if self.engine.drafter is None else drafter_for_tree(self.engine.drafter, tree)
        return self._replace(engine=dataclasses.replace(self.engine, drafter=drafter, tree=tree))

    def with_rule(self, mode: DraftMode, rule: str | None = None) -> Models:
        """Returns the same models with children chosen by `mode` and kept by `rule` (None: the usual one of the mode).

        Raises ValueError where the rule is not one for that mode or tree.
        """
        return self._replace(engine=dataclasses.replace(self.engine, mode=mode, rule=rule_named(rule, mode)))


def drafter_for_tree(drafter: Drafter, tree: TreePolicy) -> Drafter:
    """Returns `drafter`, with prompt lookup beside it where the tree has a branch for looked-up tokens.

    Raises ValueError where the tree has levels that the drafter beside it does not draft.
    """
    alone = drafter.head if isinstance(drafter, PromptLookup) else drafter
    if getattr(tree, "lookup", None) is None:
        return drafter if alone is None else alone
    drafted: TreePolicy | None = getattr(tree, "base", None)
    if drafted is not None and alone is None:
        raise ValueError(
            "the tree has drafted levels beside its looked-up branch: add a drafter, or take lookup:LENGTH"
        )
    if drafted is not None and alone is not None and alone.deepest is not None and drafted.depth > alone.deepest:
        raise ValueError(
            f"the tree is {drafted.depth} deep and the drafter drafts {alone.deepest} tokens ahead: take a tree of "
            f"depth {alone.deepest} or less"
        )
    return PromptLookup(alone)


Model = TypeVar("Model", Decoder, DrafterModule)


def prepare(module: Model, params: Params) -> tuple[Model, Params]:
    """Returns a model and its weights as this platform decodes with them: on CPUs in another layout, see `lay_out`."""
    if jax.default_backend() != "cpu":
        return module, params
    return module.clone(token_major=True), lay_out(params)


def random_models(shape: str, tree: TreePolicy, *, dtype: Any = jnp.float32, seed: int = 0) -> Models:
    """Returns a target of one of `decoder.SHAPES` and an EAGLE-2 head for it, of random weights and no tokenizer."""
    config = c = SHAPES[shape]
    target = Decoder(config, stacked=False, dtype=dtype, param_dtype=dtype)
    head = EagleConfig(c.width, c.heads, c.kv_heads, c.head_dim, c.mlp, c.rope_theta, c.rope_scaling, bias=False)
    drafter = Eagle(head, dtype=dtype)

    def weights(key: jax.Array) -> Weights:
        random = Weights(target.init_params(key), drafter.init_params(jax.random.fold_in(key, 1)))
        return jax.tree.map(lambda a: a.astype(dtype), random)

    drawn = jax.jit(weights)(jax.random.key(seed))
    target, params = prepare(target, drawn.target)
    return Models(Engine(target), Weights(params), cast(Any, None), config).with_drafter(drafter, drawn.drafter, tree)


def open_drafter(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    tokenizer: ChatTokenizer | None = None,
    target_layers: int | None = None,
    tables: Callable[[], SharedTables] | None = None,
) -> LoadedDrafter:
    """Returns the drafter in a folder: one of jaxspec's, a published head, or a whole LM in HuggingFace layout.

    `path` may also be a GGUF file of an LM, or the name of a bundled drafter.

    `target_layers` is for heads that read the default layers of their target, and `tables` for heads whose files hold
    copies of its embedding or LM head: with them they are compared, and what is left out is said. Raises ValueError as
    `load_drafter` and `interchange.published.read_drafter`, and where an LM's tokenizer, compared by vocabulary, is not
    `tokenizer`.
    """
    path = target_folder(str(path))
    if not (path / "config.json").is_file():
        return load_drafter(path, dtype=dtype)
    if published_family(path) != "lm":
        head = read_drafter(path, target_layers=target_layers, tables=tables)
        for note in head.notes:
            say(f"note: {path}: {note}")
        module = DRAFTERS[head.name].module(head.config, dtype=dtype)
        params = jax.tree.map(lambda a: jnp.asarray(a, dtype), head.params)
        return LoadedDrafter(head.name, module, params, {}, head.draft_vocab)
    return _draft_lm(path, dtype=dtype, tokenizer=tokenizer)


def _draft_lm(path: str | Path, *, dtype: Any, tokenizer: ChatTokenizer | None) -> LoadedDrafter:
    """Returns a whole LM as a drafter. Raises ValueError where its options or vocabulary are not those of one."""
    found = load_target(path, dtype=dtype, stacked=False)
    if tokenizer is not None:
        theirs = ChatTokenizer.load(path, NO_TEMPLATE).tokenizer.get_vocab()
        if theirs != tokenizer.tokenizer.get_vocab():
            raise ValueError(f"{path}: the draft model's tokenizer has another vocabulary than the target's")
    c = found.config
    if c.options != PLAIN or c.rope_scaling != c.drafter_rope:
        raise ValueError(
            f"{path}: a draft model may be a Llama, or of a family whose options are all Llama's; this one has others "
            "(windows, biases, norms or rotary positions)"
        )
    shape = DraftLMConfig(
        c.vocab, c.width, c.layers, c.heads, c.kv_heads, c.head_dim, c.mlp, c.rope_theta, c.rope_scaling, c.norm_eps,
        c.tied,
    )  # fmt: skip
    return LoadedDrafter("draft_lm", DraftLM(shape, dtype=dtype), found.params, {}, None)


def _usual_tree(head: LoadedDrafter) -> Policy:
    """Returns the tree that a drafter was saved with, or EAGLE-2's, as deep as the drafter drafts."""
    if kept := head.about.get("tree"):
        return tree_kept(kept)
    tree, deepest = parse_tree(DEFAULT_TREE), cast(Drafter, head.module).deepest
    return tree if deepest is None else cut_tree(tree, deepest)


def check_width(path: str | Path, module: Drafter, target: LlamaConfig) -> None:
    """Raises ValueError if a drafter reads features of another width than the target's."""
    width = cast(DrafterModule, module).feature_width
    if width not in (None, target.width):
        raise ValueError(
            f"{path}: the drafter reads features of width {width}, and the target's are {target.width} wide; it was "
            "made for another target"
        )


def load_models(
    target: str,
    *,
    drafter: str | Path | None = None,
    tree: str | None = None,
    draft_vocab: str | None = None,
    template: str | TemplateChoice | None = None,
    dtype: Any = jnp.float32,
) -> Models:
    """Returns the target of a HuggingFace folder (or `tiny`), with the drafter of a folder where one is given.

    `template` names or chooses the chat template, by default the folder's own; the rest is as for `add_drafter`.
    Children are the draft's likeliest tokens; `Models.with_rule` sets another way. Raises ValueError naming what is
    missing or does not match.
    """
    if drafter is None and tree is not None:
        raise ValueError(f"a tree ({tree}) needs a drafter: give one, or leave the tree out")
    folder = target_folder(target)
    tokenizer = ChatTokenizer.load(folder, template)
    loaded = load_target(folder, dtype=dtype, stacked=False)
    tokenizer.check_ids(loaded.config.vocab)
    module, params = prepare(loaded.module, loaded.params)
    plain = Models(Engine(module), Weights(params), tokenizer, loaded.config)
    return plain if drafter is None else add_drafter(plain, drafter, tree=tree, draft_vocab=draft_vocab, dtype=dtype)


def add_drafter(
    plain: Models,
    drafter: str | Path,
    *,
    tree: str | None = None,
    draft_vocab: str | None = None,
    dtype: Any = jnp.float32,
) -> Models:
    """Returns a loaded target with the drafter of a folder.

    The drafter `lookup` is prompt lookup. `tree` defaults to the one saved with the drafter, else to EAGLE-2's.
    `draft_vocab` is a file of maps (see `data.draft_vocab`), `none` for all tokens, or None for those saved with the
    drafter. Raises ValueError naming the folder and what does not fit.
    """
    if str(drafter) == LOOKUP:
        return plain.with_prompt_lookup(parse_tree(tree or DEFAULT_LOOKUP))
    target = functools.partial(plain.engine.target.shared_tables, plain.weights.target)
    layers = plain.config.layers
    head = open_drafter(drafter, dtype=dtype, tokenizer=plain.tokenizer, target_layers=layers, tables=target)
    check_width(drafter, head.module, plain.config)
    scored = head.draft_vocab
    if scored is not None and not (scored and 0 <= scored[0] and scored[-1] < plain.config.vocab):
        raise ValueError(
            f"{drafter}: its draft vocabulary is not part of the target's {plain.config.vocab} tokens; it was made for "
            "another target"
        )
    if draft_vocab is not None:
        scored = None if draft_vocab == "none" else load_maps(draft_vocab, plain.config.vocab).tolist()
    policy = parse_tree(tree) if tree else _usual_tree(head)
    if not tree and policy.nodes == 1:
        say(
            f"note: {drafter} was saved with the tree {policy.spec}, so it drafts nothing: give --tree chain:3 to draft"
        )
    try:
        return plain.with_drafter(head.module, head.params, policy, scored)
    except ValueError as error:
        raise ValueError(f"{drafter}: {error}") from error
