"""Complaints about flags as one sentence each: tyro prints boxes of several lines."""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import typing
from collections.abc import Iterator, Sequence

from jaxspec.console.overrides import suggest

COLOR = re.compile(r"\x1b\[[0-9;]*m")
RULE = re.compile(r"[-─]{5,}")
KINDS = {
    r"invalid literal for int\(\) with base 10: (.+)": "a whole number",
    r"could not convert string to float: (.+)": "a number",
}
"""Python's complaint about a value -> what the flag takes."""


@contextlib.contextmanager
def one_sentence(args: type, argv: Sequence[str], prog: str) -> Iterator[None]:
    """While tyro reads `argv` as the flags of the dataclass `args`: writes its complaint to stderr as one sentence."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if stop.code and said.getvalue():
            said = io.StringIO(f"{prog}: {sentence_of(said.getvalue(), args, argv, prog)}\n")
        raise
    finally:
        sys.stderr.write(said.getvalue())


def sentence_of(box: str, args: type, argv: Sequence[str], prog: str) -> str:
    """Returns what a box of tyro's says about `argv`, flags of the dataclass `args`; its own words if it is unknown."""
    first = (parts(box) or [[""]])[0]
    text = one_line(first)
    known = flags_of(args)
    for word in argv:
        name = word.partition("=")[0].removeprefix("--").replace("_", "-")
        if word.startswith("--") and name and not {name, name.removeprefix("no-")} & {*known}:
            return unknown_flag(word.partition("=")[0], known, prog)
    if found := re.match(r"Unrecognized options: ([^,\s]+)", text):
        return f"{found[1]!r} is one word too many: see {prog} --help"
    if first[0].startswith("Missing from "):
        return missing(first, prog)
    if found := re.fullmatch(r"Missing value for argument '(\S+)'. Expected .*", text):
        lacks = "needs a value" if found[1].startswith("-") else "is missing"
        return f"{found[1]} {lacks}: see {prog} --help"
    if found := re.fullmatch(r"invalid choice '(.*)' for argument '(\S+)'. Expected one of \((.*)\)[ .]*", text):
        choices = sorted(set(re.findall(r"'([^']*)'", found[3])) - {"None"})
        return f"{found[2]} cannot be {found[1]!r}{suggest(found[1], choices)}"
    if found := re.fullmatch(r"Error parsing (\S+): (.+)", text):
        return wrong_value(found[1], found[2])
    return f"{text.rstrip('.')}; see {prog} --help"


def parts(box: str) -> list[list[str]]:
    """Returns the lines between the rules of a box, with their indents and without frame and title.

    The frame is of spaces and hyphens where stdout is not in UTF-8.
    """
    lines = [line[2:].rstrip("│ ") for line in COLOR.sub("", box).splitlines() if line.strip() and line[0] not in "╭╰"]
    rules = [bool(RULE.fullmatch(line)) for line in (line.strip() for line in lines)]
    if rules[1:2] == [True] and "│" not in box:
        lines, rules = lines[2:], rules[2:]
    found: list[list[str]] = [[]]
    for line, rule in zip(lines, rules, strict=True):
        found = [*found, []] if rule else [*found[:-1], [*found[-1], line]]
    return [part for part in found if part]


def one_line(lines: Sequence[str]) -> str:
    """Returns lines joined by single spaces."""
    return " ".join(" ".join(lines).split())


def unknown_flag(flag: str, known: Sequence[str], prog: str) -> str:
    """Returns the sentence about a flag that is not one of the names `known`."""
    close = difflib.get_close_matches(flag.removeprefix("--").replace("_", "-"), known, n=2)
    hint = f"; did you mean {' or '.join(f'--{name}' for name in close)}?" if close else f": see {prog} --help"
    return f"there is no flag {flag}{hint}"


def missing(lines: Sequence[str], prog: str) -> str:
    """Returns the sentence about the first argument that a box lists as missing: its name, indented, then its help."""
    name = lines[1].split()[0] if len(lines) > 1 else ""
    rest = lines[2:]
    about = [line for i, line in enumerate(rest) if all(more.startswith(" " * 8) for more in rest[: i + 1])]
    told = one_line(about).removesuffix("(required)").strip().rstrip(".")
    subject = name if name.startswith("-") else "an argument"
    return f"{subject} is missing: {told}; see {prog} --help"


def wrong_value(subject: str, reason: str) -> str:
    """Returns the sentence about a value that a flag cannot have; a group of flags says itself which ones it means."""
    for pattern, kind in KINDS.items():
        if found := re.fullmatch(pattern, reason):
            return f"{subject} cannot be {found[1]}; it takes {kind}"
    return f"{subject}: {reason}" if subject.startswith("-") else reason


def groups_of(args: type) -> list[type]:
    """Returns a dataclass of flags and those that it holds."""
    hints = typing.get_type_hints(args)
    held = [hints[field.name] for field in dataclasses.fields(args)]
    return [args, *(group for kind in held if dataclasses.is_dataclass(kind) for group in groups_of(kind))]  # type: ignore[arg-type]


def flags_of(args: type) -> list[str]:
    """Returns the names of the flags that a dataclass stands for."""
    names = [field.name for group in groups_of(args) for field in dataclasses.fields(group)]
    return ["help", *(name.replace("_", "-") for name in names)]
