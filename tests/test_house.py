"""The rules of the house: imports point one way, every package is shipped, the library stays a library."""

import ast
import functools
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from house_order import LAYER, LAYERS, SHELVES

from jaxspec.__main__ import VERBS

ROOT = Path(__file__).resolve().parents[1]

PROGRAMS = {"train", "infer", "configs"}  # nothing imports them; __main__ and config find them by name

MOST_LOOSE_MODULES = 4
MOST_LAYERS = 14
MOST_LINES = 450
MOST_FUNCTION_LINES = 60
MOST_ARGUMENTS = 7
DEEPEST_NESTING = 1


def sources() -> dict[str, Path]:
    """Returns every module of the distribution: dotted name (packages as `name.__init__`) -> file."""
    found = {}
    for top in ("jaxspec", *sorted(PROGRAMS)):
        prefix = () if top == "jaxspec" else ("jaxspec",)
        for path in sorted((ROOT / top).rglob("*.py")):
            found[".".join((*prefix, *path.relative_to(ROOT).with_suffix("").parts))] = path
    return found


SOURCES = sources()
TESTS = sorted((ROOT / "tests").rglob("*.py"))
LIBRARY = [name for name in SOURCES if name.split(".")[1] not in {*PROGRAMS, "console", "__main__"}]


def package(module: str) -> str:
    """Returns the package of a dotted module: the word after `jaxspec`, and `jaxspec` for the top itself."""
    words = module.split(".")
    return "jaxspec" if len(words) == 1 or words[1] == "__init__" else words[1]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """Returns the syntax of a file, parsed once."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(module: str, tree: ast.Module) -> Iterator[str]:
    """Yields the dotted module of everything `module` imports, wherever in the file, relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join([*(module.split(".")[: -node.level] if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                submodule = whole in SOURCES or f"{whole}.__init__" in SOURCES
                yield whole if submodule else origin


def shelf(module: str) -> int:
    """Returns the place of a module in its package's own order; that of an `__init__` is above all."""
    shelves, name = SHELVES[package(module)], module.split(".")[2]
    return next((number for number, names in enumerate(shelves) if name in names), len(shelves))


def complaints(module: str, tree: ast.Module) -> list[str]:
    """Returns one sentence for every import of `module` that does not point to a lower layer or shelf."""
    here, found = package(module), []
    for imported in imports(module, tree):
        there = package(imported)
        if imported.split(".")[0] in PROGRAMS:
            found.append(f"{module} imports {imported}, whose name is jaxspec.{imported}")
        if imported.split(".")[0] != "jaxspec" or imported == "jaxspec":
            continue
        if there in PROGRAMS:
            found.append(f"{module} imports {imported}: nothing imports a program or an experiment")
        elif here == "jaxspec" or LAYER[there] > LAYER[here] or (LAYER[there] == LAYER[here] and there != here):
            found.append(f"{module} imports {imported}, which is not of a lower layer")
        elif here == there and module.count(".") > 1 < imported.count(".") and shelf(imported) >= shelf(module):
            found.append(f"{module} imports {imported}, which is not of a lower shelf")
        elif here == there and imported.count(".") == 1:
            found.append(f"{module} imports its own package: name the module")
    return found


def test_every_module_has_a_layer_and_every_module_of_a_package_a_shelf():
    assert {package(module) for module in SOURCES} - {"jaxspec"} <= LAYER.keys()
    assert len(LAYERS) <= MOST_LAYERS
    for name, shelves in SHELVES.items():
        listed = sorted(module for shelf in shelves for module in shelf)
        there = sorted(m.split(".")[2] for m in SOURCES if package(m) == name and not m.endswith("__init__"))
        assert listed == there, name


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_to_lower_layers_and_shelves(module: str):
    assert not complaints(module, tree_of(SOURCES[module]))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("jaxspec.base", "import jaxspec.decoding.rounds"),
        ("jaxspec.nn.mlp", "from jaxspec.data import target_outputs"),
        ("jaxspec.nn.mlp", "from jaxspec.nn.decoder_layer import decoder_layer"),
        ("jaxspec.drafters.eagle", "from jaxspec.targets.decoder import Llama"),
        ("jaxspec.drafters.eagle", "from ..targets import decoder"),
        ("jaxspec.drafters.one_layer", "from jaxspec.drafters.eagle import Eagle"),
        ("jaxspec.console.cli", "def late():\n  from jaxspec.train import distill"),
        ("jaxspec.infer.generate", "from jaxspec.train import distill"),
        ("jaxspec.infer.generate", "from train import distill"),
        ("jaxspec.train.distill", "from jaxspec.train import pretrain"),
        ("jaxspec.__init__", "from jaxspec.base import Tree"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_found(module: str, line: str):
    assert len(complaints(module, ast.parse(line))) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("jaxspec.drafters.eagle", "from jaxspec.nn.norm import rms_norm"),
        ("jaxspec.drafters.__init__", "from jaxspec.drafters.eagle import Eagle"),
        ("jaxspec.drafters.eagle", "from .recurrent import Recurrent"),
        ("jaxspec.console.results", "from jaxspec import __version__"),
        ("jaxspec.configs.tiny", "from jaxspec.config import Experiment"),
        ("jaxspec.train.distill", "from jaxspec.console import cli, results"),
    ],
)
def test_an_import_that_points_down_is_allowed(module: str, line: str):
    assert not complaints(module, ast.parse(line))


@pytest.mark.parametrize("module", SOURCES)
def test_configs_are_resolved_at_the_door(module: str):
    """Only programs, experiments and `training`, whose job it is, know configs; the library gets built objects."""
    if package(module) not in {"config", "training", *PROGRAMS}:
        assert "jaxspec.config" not in set(imports(module, tree_of(SOURCES[module])))


class Function(NamedTuple):
    """A function as the measures see it."""

    place: str
    lines: int
    arguments: int
    """All but `self` and `cls`."""
    depth: int
    """Functions around it."""


def functions(path: Path) -> Iterator[Function]:
    """Yields every function of a file, those in functions too."""

    def below(node: ast.AST, depth: int) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if inside:
                args = child.args
                names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
                count = len(names) - (names[:1] in (["self"], ["cls"]))
                lines = (child.end_lineno or child.lineno) - child.lineno + 1
                yield Function(f"{path.relative_to(ROOT)}:{child.name}", lines, count, depth)
            yield from below(child, depth + inside)

    return below(tree_of(path), 0)


FUNCTIONS = [function for path in (*SOURCES.values(), *TESTS) for function in functions(path)]
LINES = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in (*SOURCES.values(), *TESTS)}


def test_the_measures_of_the_house(capsys: pytest.CaptureFixture[str]):
    loose = sorted(m for m in SOURCES if m.count(".") == 1 and package(m) not in {"jaxspec", *PROGRAMS})
    nested = [function for function in FUNCTIONS if function.depth]
    with capsys.disabled():
        print(
            f"\n{len(loose)} loose modules, {len(LAYERS)} layers, {len(SOURCES)} modules, longest file "
            f"{max(LINES.values())} lines, longest function {max(f.lines for f in FUNCTIONS)} lines, most arguments "
            f"{max(f.arguments for f in FUNCTIONS)}, {len(nested)} nested functions of {len(FUNCTIONS)}, deepest "
            f"{max(f.depth for f in FUNCTIONS)}",
            file=sys.stderr,  # the output of a worker of pytest-xdist goes nowhere
        )
    assert len(loose) <= MOST_LOOSE_MODULES
    assert not {place: lines for place, lines in LINES.items() if lines > MOST_LINES}
    assert not [f for f in FUNCTIONS if f.lines > MOST_FUNCTION_LINES]
    assert not [f for f in FUNCTIONS if f.arguments > MOST_ARGUMENTS]
    assert not [f for f in FUNCTIONS if f.depth > DEEPEST_NESTING]


def test_no_two_classes_share_a_name():
    """But for the command lines of the programs."""
    places: dict[str, list[str]] = {}
    for module, path in SOURCES.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef) and node.name != "Args":
                places.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}


def test_every_package_on_disk_is_shipped():
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = [name.removesuffix(".__init__") for name in SOURCES if name.endswith(".__init__")]
    assert sorted(shipped) == sorted(on_disk)


def test_every_folder_with_modules_is_a_package():
    assert all((path.parent / "__init__.py").exists() for path in SOURCES.values())


@pytest.mark.parametrize("module", LIBRARY)
def test_the_library_reads_no_command_line_and_prints_nothing(module: str):
    tree = tree_of(SOURCES[module])
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "print" not in called
    assert not {"argparse", "tyro"} & {imported.split(".")[0] for imported in imports(module, tree)}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_module_with_a_main(verb: str):
    body = tree_of(SOURCES[VERBS[verb].module]).body
    assert "main" in [node.name for node in body if isinstance(node, ast.FunctionDef)]


def test_every_module_is_named_after_what_it_is_about():
    vague = {"utils", "util", "common", "helpers", "misc", "core"}
    assert not [module for module in SOURCES if vague & set(module.split("."))]


@pytest.mark.parametrize("path", [*SOURCES.values(), *TESTS], ids=lambda path: path.name)
def test_no_except_is_bare(path: Path):
    handlers = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ExceptHandler)]
    assert all(handler.type is not None for handler in handlers)


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_says_what_it_is(module: str):
    assert ast.get_docstring(tree_of(SOURCES[module]))


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Yields the docstrings of a module, its classes and functions, and the strings below fields and constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value.strip()


def test_the_first_words_of_every_docstring_are_read():
    tree = ast.parse('"""A."""\nX = 1\n"""B."""\nclass C:\n    """D."""\n    x: int\n    """E."""\ndef f(): "F."')
    assert sorted(docstrings(tree)) == ["A.", "B.", "D.", "E.", "F."]


def test_no_docstring_begins_with_what():
    """A docstring begins with its subject."""
    begun = [(module, text) for module, path in SOURCES.items() for text in docstrings(tree_of(path))]
    assert not [(module, text) for module, text in begun if text.startswith("What ")]


QUESTIONS = ("What", "Whether", "Where", "Which", "How", "Who", "When", "Why")


@pytest.mark.parametrize("path", [*SOURCES.values(), *TESTS], ids=lambda path: path.name)
def test_no_docstring_of_a_module_class_or_function_begins_with_a_question_word(path: Path):
    nodes = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    texts = [ast.get_docstring(node) or "" for node in nodes]
    assert not [text for text in texts if text.split(" ")[0] in QUESTIONS]
