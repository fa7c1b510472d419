"""Tests of the command line: verbs, flags, and the exit code of every kind of ending."""

import io
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import tyro

from jaxspec import __main__ as program
from jaxspec import __version__
from jaxspec.console import cli
from jaxspec.console.disk import REMEDIES
from jaxspec.console.wrong_flags import sentence_of


@dataclass(frozen=True)
class Group:
    process: int | None = None
    """A flag of a group."""

    def __post_init__(self) -> None:
        cli.refuse_below_one(self, "process")


@dataclass(frozen=True)
class Settings:
    config: tyro.conf.Positional[str]
    """Name of an experiment."""
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()
    """Settings to replace, as a.b=v."""
    json: str | None = None
    """File for the result."""
    seed: int = 2
    """Seed of all randomness."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of weights."""
    group: tyro.conf.OmitArgPrefixes[Group] = field(default_factory=Group)

    def __post_init__(self) -> None:
        if self.seed < 1:
            raise ValueError(
                f"--seed is {self.seed}; it must be at least 1, and this sentence is longer than one line of it"
            )


def parse(*argv: str) -> Settings:
    return cli.parse(argv, Settings, prog="jaxspec train", description="Distill.")


def ending(exception: BaseException | None = None):
    """Returns a verb that ends with `exception`."""

    def main(argv: list[str]) -> int:
        if exception is not None:
            raise exception
        return len(argv)

    return main


def test_help_lists_every_verb_and_loads_no_jax():
    code = (
        "import sys, jaxspec.__main__ as m; status = m.main(['--help'])\n"
        "raise SystemExit(status or ('jax' in sys.modules and 3))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert all(f"  {verb} " in shown.stdout for verb in program.VERBS)


def test_module_runs_as_a_program_and_exits_with_2_on_an_unknown_verb():
    shown = subprocess.run([sys.executable, "-m", "jaxspec", "generat"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 2
    assert shown.stderr == "jaxspec: there is no verb 'generat'; did you mean 'generate' or 'regenerate'?\n"


@pytest.mark.parametrize(
    ("argv", "hint"), [(["bench"], "'bench decode'"), (["bench", "decoed"], "'bench decode'"), (["zzz"], "--help")]
)
def test_unknown_verb_names_close_matches(argv, hint, capsys):
    assert program.main(argv) == 2
    assert hint in capsys.readouterr().err


def test_no_verb_is_wrong_usage(capsys):
    assert program.main([]) == 2
    assert "verbs:" in capsys.readouterr().err


def test_version(capsys):
    assert program.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxspec {__version__}\n"


def test_verb_of_two_words_receives_the_rest_and_returns_its_exit_code(monkeypatch):
    seen = []
    module = SimpleNamespace(main=lambda argv: seen.append(argv) or 7)
    monkeypatch.setattr(program.importlib, "import_module", {"jaxspec.infer.bench_decode": module}.__getitem__)
    assert program.main(["bench", "decode", "--batch", "4"]) == 7
    assert seen == [["--batch", "4"]]


@pytest.mark.parametrize(
    ("exception", "code", "said"),
    [
        (None, 0, ""),
        (ValueError("batch must be positive,\n  got 0"), 1, "jaxspec x: batch must be positive, got 0\n"),
        (FileNotFoundError(2, "No such file", "a.json"), 1, "jaxspec x: a.json: No such file\n"),
        (OSError("the disk is full"), 1, "jaxspec x: the disk is full\n"),
        (OSError(30, "Read-only file system", "a"), 1, f"jaxspec x: a: Read-only file system; {REMEDIES[30]}\n"),
        (ValueError(), 1, "jaxspec x: ValueError\n"),
        (KeyboardInterrupt(), 130, "jaxspec x: interrupted.\n"),
        (cli.Preempted("saved step 30"), 75, "jaxspec x: saved step 30; resume with the same command.\n"),
        (cli.Preempted(), 75, "jaxspec x: stopped by preemption; resume with the same command.\n"),
    ],
)
def test_every_ending_has_its_exit_code_and_sentence(exception, code, said, capsys):
    assert cli.run(ending(exception), [], prog="jaxspec x") == code
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        cli.run(ending(KeyError("layers")), [], prog="jaxspec x")


def test_traceback_of_a_failure_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("JAXSPEC_TRACEBACK", "1")
    with pytest.raises(ValueError, match="got 0"):
        cli.run(ending(ValueError("got 0")), [], prog="jaxspec x")


def test_run_takes_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train/distill.py", "one", "two"])
    assert cli.run(ending()) == 2


@pytest.mark.parametrize(
    "argv",
    [
        ("tiny", "model.depth=2", "seed=1", "--json", "out.json"),
        ("tiny", "--json", "out.json", "model.depth=2", "seed=1"),
        ("--json", "out.json", "tiny", "model.depth=2", "seed=1"),
    ],
)
def test_overrides_and_flags_come_in_any_order(argv):
    assert parse(*argv) == Settings("tiny", ("model.depth=2", "seed=1"), json="out.json")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ((), "an argument is missing: Name of an experiment; see jaxspec train --help"),
        (("tiny", "--sede", "1"), "there is no flag --sede; did you mean --seed?"),
        (("--sede=1",), "there is no flag --sede; did you mean --seed?"),
        (("tiny", "--qqqqq"), "there is no flag --qqqqq: see jaxspec train --help"),
        (("tiny", "--seed", "one"), "--seed cannot be 'one'; it takes a whole number"),
        (
            ("tiny", "--seed", "0"),
            "--seed is 0; it must be at least 1, and this sentence is longer than one line of it",
        ),
        (("tiny", "--json"), "--json needs a value: see jaxspec train --help"),
        (("tiny", "--dtype", "fp33"), "--dtype cannot be 'fp33'; did you mean fp32?"),
        (("tiny", "--dtype", "x"), "--dtype cannot be 'x'; there are bf16, fp32"),
        (("tiny", "--process", "0"), "--process is 0; it must be at least 1"),
    ],
)
def test_wrong_flags_exit_with_2_and_one_sentence(argv, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"jaxspec train: {sentence}\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_complaint_is_the_same_in_a_box_of_any_letters_and_colors(encoding, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setattr("tyro._fmtlib._FORCE_ANSI", True)
    with pytest.raises(SystemExit):
        parse("tiny", "--dtype", "x")
    assert capsys.readouterr().err == "jaxspec train: --dtype cannot be 'x'; there are bf16, fp32\n"


def test_a_complaint_of_unknown_form_keeps_its_words():
    lines = ["╭─ A title ────╮", "│ Something is │", "│ odd.         │", "│ ──────────── │", "│ See it all   │", "╰─"]
    assert sentence_of("\n".join(lines), Settings, [], "jaxspec x") == "Something is odd; see jaxspec x --help"


def test_help_of_a_verb_shows_the_docstrings_of_its_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "Seed of all randomness." in shown and "Distill." in shown and "jaxspec train" in shown


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("--out=~/a.jsonl", "--out={}/a.jsonl"),
        ("data.train=~/a.jsonl:0.7,~/b:0.3", "data.train={}/a.jsonl:0.7,{}/b:0.3"),
        ("what is ~/ in a path?", "what is ~/ in a path?"),
        ("--out=a~/b", "--out=a~/b"),
    ],
)
def test_home_is_expanded_where_a_shell_does_not(given: str, read: str):
    seen: list[list[str]] = []
    assert cli.run(lambda argv: seen.append(argv) or 0, [given], prog="p") == 0
    assert seen == [[read.replace("{}", str(Path.home()))]]


@pytest.mark.parametrize("word", ["gs://bucket/x", "--out=gs://bucket/x", "data.train=a.jsonl,s3://b/c.jsonl"])
def test_files_of_another_machine_are_refused(word: str, capsys: pytest.CaptureFixture[str]):
    assert cli.run(lambda argv: 0, [word], prog="p") == cli.EXIT_USAGE
    assert "is on another machine" in capsys.readouterr().err
    assert cli.run(lambda argv: 0, ["--endpoint=http://a:1/v1", "is gs://x a bucket?"], prog="p") == 0


def test_a_reader_that_leaves_costs_no_file(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from jaxspec.console import cli\n"
        "def main(argv):\n"
        "    for n in range(100_000):\n"
        "        sys.stdout.write(f'line {n}\\n')\n"
        "        sys.stdout.flush()\n"
        "    Path(argv[0]).write_text('done')\n"
        "    return 0\n"
        "raise SystemExit(cli.run(main))\n"
    )
    command = f"{shlex.quote(sys.executable)} {program} {tmp_path / 'file'} | head -2; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "line 0\nline 1\n", "")
    assert (tmp_path / "file").read_text() == "done"


@pytest.mark.parametrize("number", ["inf", "1e999"])
def test_a_flag_that_is_no_finite_number_is_one_sentence(number: str, capsys: pytest.CaptureFixture[str]):
    assert program.main(["features", "eagle2", "--out", "x", f"--shard-gb={number}"]) == cli.EXIT_USAGE
    assert "must be a finite number" in capsys.readouterr().err
    assert program.main(["configs", "eagle2", f"data.batch={number}"]) == 1
    assert "field 'data.batch' cannot be" in capsys.readouterr().err
