"""The rules of the house: imports point one way, every package is shipped, the library stays a library."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxspec.__main__ import VERBS

ROOT = Path(__file__).resolve().parents[1]

# A module may import from lower floors and from its own package. Modules of one floor do not see each other.
FLOORS = (
    {"jaxspec"},  # jaxspec/__init__.py
    {"base", "bundled", "flops", "hlo", "chips"},
    {"sharding"},
    {"cache", "kernels", "quantization", "sampling"},
    {"attention", "layers", "stored"},
    {"requests", "card", "event_file"},
    {"targets", "drafters", "losses", "trees"},
    {"verify"},
    {"objective"},
    {"judging"},
    {"data", "decode", "distill", "checkpoint", "interchange", "cost", "report", "optimizer", "pretraining"},
    {"generation", "loading", "comparison", "compilers", "tracking", "piecewise"},
    {"config", "serving", "identity", "aot", "figures", "exports", "timing", "peers"},
    {"regeneration", "imports"},
    {"cli", "flags", "configs"},
    {"launch"},
    {"corpora"},
    {"training"},
    {"distillation"},
    {"recipes", "measurement", "planning"},
    {"train", "infer"},
    {"__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
PROGRAMS = {"train", "infer", "configs"}  # nothing imports them; __main__ and config find them by name


def sources() -> dict[str, Path]:
    """Returns every module of the distribution: dotted name (packages as `name.__init__`) -> file."""
    found = {}
    for top in ("jaxspec", *PROGRAMS):
        prefix = () if top == "jaxspec" else ("jaxspec",)
        for path in sorted((ROOT / top).rglob("*.py")):
            found[".".join((*prefix, *path.relative_to(ROOT).with_suffix("").parts))] = path
    return found


SOURCES = sources()
TESTS = sorted((ROOT / "tests").glob("*.py"))
LIBRARY = [name for name in SOURCES if name.split(".")[1] not in {*PROGRAMS, "cli", "__main__"}]


def room(module: str) -> str:
    """Returns the room of a dotted module: the word after `jaxspec`, and `jaxspec` for the package itself."""
    words = module.split(".")
    return "jaxspec" if len(words) == 1 or words[1] == "__init__" else words[1]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(module: str, tree: ast.Module) -> Iterator[str]:
    """Yields the dotted name of everything `module` imports, wherever in the file, relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*package, *filter(None, [node.module])])
            for alias in node.names:
                submodule = origin == "jaxspec" and alias.name in FLOOR
                yield f"{origin}.{alias.name}" if submodule else origin


def complaints(module: str, tree: ast.Module) -> list[str]:
    """Returns one sentence for every import of `module` that does not point to a lower floor."""
    here, found = room(module), []
    for imported in imports(module, tree):
        there = room(imported)
        if imported.split(".")[0] in PROGRAMS:
            found.append(f"{module} imports {imported}, whose name is jaxspec.{imported}")
        if imported.split(".")[0] != "jaxspec" or (there == here and here != "jaxspec"):
            continue
        if there in PROGRAMS:
            found.append(f"{module} imports {imported}: nothing imports a program or an experiment")
        elif FLOOR[there] >= FLOOR[here]:
            found.append(f"{module} (floor {FLOOR[here]}) imports {imported} (floor {FLOOR[there]})")
    return found


def test_every_module_has_a_floor():
    assert {room(module) for module in SOURCES} <= FLOOR.keys()


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_to_lower_floors(module: str):
    assert not complaints(module, tree_of(SOURCES[module]))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("jaxspec.base", "import jaxspec.decoding.rounds"),
        ("jaxspec.nn.decoder_layer", "from jaxspec import stored"),
        ("jaxspec.drafters.eagle", "from jaxspec.targets.llama import Llama"),
        ("jaxspec.drafters.eagle", "from ..targets import llama"),
        ("jaxspec.console.cli", "def late():\n  from jaxspec.train import distill"),
        ("jaxspec.infer.generate", "from jaxspec.train import distill"),
        ("jaxspec.infer.generate", "from train import distill"),
        ("jaxspec.__init__", "from jaxspec.base import Tree"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_found(module: str, line: str):
    assert len(complaints(module, ast.parse(line))) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("jaxspec.drafters.eagle", "from jaxspec.nn.decoder_layer import rms_norm"),
        ("jaxspec.drafters.__init__", "from jaxspec.drafters.eagle import Eagle"),
        ("jaxspec.drafters.eagle", "from .medusa import Medusa"),
        ("jaxspec.console.results", "from jaxspec import __version__"),
        ("jaxspec.configs.tiny", "from jaxspec.config import Experiment"),
        ("jaxspec.train.distill", "from jaxspec import cli, report"),
    ],
)
def test_an_import_that_points_down_or_stays_at_home_is_allowed(module: str, line: str):
    assert not complaints(module, ast.parse(line))


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
