"""The command line of every program: flags become a frozen dataclass, exceptions become exit codes."""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from jaxspec.console.disk import REMEDIES

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_INTERRUPTED = 130  # 128 + SIGINT

Args = TypeVar("Args")


class Preempted(Exception):
    """The machine is being taken away and the state is saved; the same command resumes."""


class WrongUsage(ValueError):
    """Flags, or the environment variables that stand for them, do not fit together."""


def parse(argv: Sequence[str], args: type[Args], *, prog: str, description: str) -> Args:
    """Returns an instance of the frozen dataclass `args` filled from `argv`.

    The docstrings below its fields are the help text. Exits with 0 after `--help` and with 2, after one sentence, on
    wrong usage.
    """
    # Machines with accelerators are often without it: flags that are texts and numbers are read all the same.
    try:
        import tyro

        from jaxspec.console.wrong_flags import one_sentence
    except ModuleNotFoundError:
        return _parse_plain(argv, args, prog=prog, description=description)
    with one_sentence(args, argv, prog):
        found = tyro.cli(args, args=list(argv), prog=prog, description=description)
        _refuse_not_finite(found)
        return found


def _parse_plain(argv: Sequence[str], args: type[Args], *, prog: str, description: str) -> Args:
    """Returns what `parse` does for flags with one value each, by the standard library and without their help text."""
    hints = typing.get_type_hints(args)
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    for field in dataclasses.fields(args):  # type: ignore[arg-type]
        reader, choices = _plain_type(hints[field.name], field.name)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=reader,
            choices=choices,
            required=field.default is dataclasses.MISSING,
            default=argparse.SUPPRESS,
            help=f"default: {field.default}",
        )
    try:
        found = args(**vars(parser.parse_args(list(argv))))
        _refuse_not_finite(found)
        return found
    except ValueError as error:
        parser.error(sentence(error))


def _refuse_not_finite(args: Any) -> None:
    """Raises WrongUsage naming the first flag that is infinite or no number: no flag has a use for either."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise WrongUsage(f"--{field.name.replace('_', '-')} is {number}; it must be a finite number")


def _plain_type(hint: Any, name: str) -> tuple[Callable[[str], Any], tuple[Any, ...] | None]:
    """Returns the reader of a flag's text, and the values that it may have (None: any)."""
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if typing.get_origin(hint) is typing.Literal:
        return str, typing.get_args(hint)
    if hint not in (str, int, float):
        raise WrongUsage(f"--{name.replace('_', '-')} is read by the package tyro, which is not installed")
    return hint, None


def run(main: Callable[[list[str]], int], argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code of `main(argv)`; an expected failure becomes one sentence on stderr.

    Expected are `ValueError` and `OSError` (exit 1), `WrongUsage` (2), `Preempted` (75) and an interrupt (130).
    Anything else is a bug and keeps its traceback, as do `ValueError` and `OSError` under `JAXSPEC_TRACEBACK=1`. `argv`
    defaults to the command line, `prog` to the name of the running file.
    """
    argv = sys.argv[1:] if argv is None else argv
    prog = Path(sys.argv[0]).stem if prog is None else prog
    try:
        with _reader_may_leave():
            return main([_local(word) for word in argv])
    except (Exception, KeyboardInterrupt) as failure:
        known = verdict(failure)
        if known is None:
            raise
        code, reason = known
        sys.stderr.write(f"{prog}: {reason}\n")
        return code


class _Unread:
    """Standard output whose reader may leave, as `head` does: what is written after that is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except BrokenPipeError:
            # Whatever the buffer still holds goes nowhere too, also when the interpreter ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Goes on without standard output when nobody reads it any more: files are still written."""
    before = sys.stdout
    sys.stdout = unread = _Unread(before)  # type: ignore[assignment]
    try:
        yield
    finally:
        unread.flush()
        sys.stdout = before


_NAMED = re.compile(r"(?P<name>--[\w.-]+|[A-Za-z_][\w.]*)=(?P<value>.+)", re.DOTALL)
"""A flag or a setting with its value in one word, which shells do not expand."""
_HOME = re.compile(r"(^|,)~(?=/)")
_REMOTE = re.compile(r"\A(gs|gcs|s3|hdfs|abfss?|file)://\S+\Z")


def _local(word: str) -> str:
    """Returns a word of a command line with `~` expanded in the value behind a name.

    Raises WrongUsage for a file of another machine.
    """
    named = _NAMED.fullmatch(word)
    value = word if named is None else named["value"]
    for path in value.split(","):
        if _REMOTE.match(path.strip()):
            raise WrongUsage(
                f"{path.strip()} is on another machine, and files are read and written on this one: mount the bucket "
                "(docs/tpu.md says how) and give the path in it"
            )
    if named is None:
        # Shells expand a word's beginning alone; a sentence is no list of files.
        return word if any(map(str.isspace, word)) else _HOME.sub(lambda found: found[1] + str(Path.home()), word)
    return f"{named['name']}={_HOME.sub(lambda found: found[1] + str(Path.home()), value)}"


def verdict(failure: BaseException) -> tuple[int, str] | None:
    """Returns exit code and sentence of an expected failure (see `run`); None for one that keeps its traceback."""
    match failure:
        case Preempted():
            reason = sentence(failure) or "stopped by preemption"
            return EXIT_PREEMPTED, f"{reason.rstrip('.')}; resume with the same command."
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, f"{str(failure) or 'interrupted'}."
        case WrongUsage():
            return EXIT_USAGE, sentence(failure)
        case ValueError() | OSError() if os.environ.get("JAXSPEC_TRACEBACK") != "1":
            return EXIT_FAILED, sentence(failure) or type(failure).__name__
    return None


def sentence(failure: BaseException) -> str:
    """Returns the message of an exception on one line, without the number of a system error."""
    if isinstance(failure, OSError) and failure.strerror and failure.filename is not None:
        remedy = REMEDIES.get(failure.errno or 0)
        return f"{failure.filename}: {failure.strerror}" + (f"; {remedy}" if remedy else "")
    return " ".join(str(failure).split())


@contextlib.contextmanager
def sigterm_interrupts(kept: str = "") -> Iterator[None]:
    """While it is open, SIGTERM ends the work as an interrupt (Ctrl-C) does; `kept` says what is not lost."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {kept}" if kept else "") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def refuse_below_one(args: object, *names: str) -> None:
    """Raises ValueError naming the first of these flags that is given and less than 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def sizes(flag: str, text: str) -> tuple[int, ...]:
    """Returns the numbers of a flag's list, each once, in their order. Raises ValueError for any below 1."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"{flag} is {text!r}; give whole numbers of at least 1, joined by commas")
    return tuple(dict.fromkeys(map(int, words)))


def seeds(flag: str, text: str) -> tuple[int, ...]:
    """Returns the seeds of a flag's list. Raises ValueError for what is no whole number, or stands twice."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(map(int, filter(str.isdecimal, words)))) < len(words):
        raise ValueError(f"{flag} is {text!r}; it must be different whole numbers such as 0,1,2")
    return tuple(map(int, words))
