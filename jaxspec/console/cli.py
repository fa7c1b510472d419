"""The command line of every program: flags become a frozen dataclass, exceptions become exit codes."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from jaxspec.console.wrong_flags import one_sentence

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_INTERRUPTED = 130  # 128 + SIGINT

Args = TypeVar("Args")
Positional = tyro.conf.Positional
"""Marks a field of flags that is given without its name: `Positional[str]`."""
Inline = tyro.conf.OmitArgPrefixes
"""Marks a field that holds flags of its own, which are given as if they were the outer ones."""


class Preempted(Exception):
    """The machine is being taken away and the state is saved; the same command resumes."""


class WrongUsage(ValueError):
    """Flags, or the environment variables that stand for them, do not fit together."""


def parse(argv: Sequence[str], args: type[Args], *, prog: str, description: str) -> Args:
    """Returns an instance of the frozen dataclass `args` filled from `argv`.

    The docstrings below its fields are the help text. Exits with 0 after `--help` and with 2, after one sentence, on
    wrong usage.
    """
    with one_sentence(args, argv, prog):
        return tyro.cli(args, args=list(argv), prog=prog, description=description)


def run(main: Callable[[list[str]], int], argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code of `main(argv)`; an expected failure becomes one sentence on stderr.

    Expected are `ValueError` and `OSError` (exit 1), `WrongUsage` (2), `Preempted` (75) and an interrupt (130).
    Anything else is a bug and keeps its traceback, as do `ValueError` and `OSError` under `JAXSPEC_TRACEBACK=1`. `argv`
    defaults to the command line, `prog` to the name of the running file.
    """
    argv = sys.argv[1:] if argv is None else argv
    prog = Path(sys.argv[0]).stem if prog is None else prog
    try:
        return main(list(argv))
    except (Exception, KeyboardInterrupt) as failure:
        known = verdict(failure)
        if known is None:
            raise
        code, reason = known
        sys.stderr.write(f"{prog}: {reason}\n")
        return code


def verdict(failure: BaseException) -> tuple[int, str] | None:
    """Returns exit code and sentence of an expected failure (see `run`); None for one that keeps its traceback."""
    match failure:
        case Preempted():
            reason = sentence(failure) or "stopped by preemption"
            return EXIT_PREEMPTED, f"{reason.rstrip('.')}; resume with the same command."
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, "interrupted."
        case WrongUsage():
            return EXIT_USAGE, sentence(failure)
        case ValueError() | OSError() if os.environ.get("JAXSPEC_TRACEBACK") != "1":
            return EXIT_FAILED, sentence(failure) or type(failure).__name__
    return None


def sentence(failure: BaseException) -> str:
    """Returns the message of an exception on one line, without the number of a system error."""
    if isinstance(failure, OSError) and failure.strerror and failure.filename is not None:
        return f"{failure.filename}: {failure.strerror}"
    return " ".join(str(failure).split())


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """While it is open, SIGTERM ends the work as an interrupt (Ctrl-C) does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def refuse_below_one(args: object, *names: str) -> None:
    """Raises ValueError naming the first of these flags that is given and less than 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
