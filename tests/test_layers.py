"""The shape of the project: layers, the one file with mpi4py, declared dependencies, file lengths and top-level names."""
import ast
import functools
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = sorted((REPOSITORY / "hpcfl").rglob("*.py"))
FLOORS = (                                                         # an import goes to a strictly lower floor, or stays in its package
    {"errors", "tree", "streams", "wording"},
    {"settings", "wire", "files"},
    {"models", "data", "report"},
    {"training", "generators", "resize"},
    {"contract", "latents"},
    {"algorithms"},
    {"federation"},
    {"runs"},
    {"bench", "doctor", "analysis"},
    {"cli", "__main__", "arguments"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS, start=1) for name in names}
DOOR = FLOORS[-1]                                                  # files of one room, though they have no folder
TOP_LEVEL = {"setup.py", "hpcfl", "jobs", "tests", "slurm", "README.md", ".ci", "pyproject.toml", "LICENSE", ".gitignore"}
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow"}       # import name -> name in setup.py, where they differ
MODULES = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in FILES}


@functools.cache
def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    package = path.relative_to(REPOSITORY).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                names.add(name if name in MODULES else base)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("find_spec"):
            names.add(ast.literal_eval(node.args[0]))              # looked up for its files instead of imported for its code
    return names


def module_of(path: Path) -> str:
    """The dotted name of a file's module."""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def file_of(module: str) -> Path:
    """The file of a module."""
    path = REPOSITORY.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def component(module: str) -> str:
    """The name in FLOORS that a module of hpcfl belongs to; empty for the package itself."""
    return [*module.split("."), ""][1]


def declared() -> set[str]:
    """The distributions in install_requires of setup.py."""
    for node in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            return {re.match(r"[\w-]+", requirement).group() for requirement in ast.literal_eval(node.value)}
    raise LookupError("setup.py has no install_requires")


def third_party() -> set[str]:
    """The distributions that the files of hpcfl import."""
    roots = {name.split(".")[0] for path in FILES for name in imported(path)} - {"hpcfl"} - sys.stdlib_module_names
    return {DISTRIBUTIONS.get(root, root) for root in roots}


@functools.cache
def arrows() -> dict[str, set[str]]:
    """Module -> the modules of hpcfl that its file imports, anywhere in it; the package itself left out."""
    return {module_of(path): {name for name in imported(path) if name in MODULES and "." in name} - {module_of(path)} for path in FILES}


def circles() -> list[tuple[str, str]]:
    """The arrows that lie on a circle of files."""
    graph = arrows()

    def reached(start: str) -> set[str]:
        found, todo = set(), [start]
        while todo:
            new = graph[todo.pop()] - found
            found |= new
            todo += new
        return found
    behind = {module: reached(module) for module in graph}
    return sorted((module, other) for module, others in graph.items() for other in others if module in behind[other])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_an_import_goes_down_or_stays_in_its_package(path):
    room = component(module_of(path))
    assert room in FLOOR or not room, f"{path.name} has no floor; give hpcfl/{room} a place in FLOORS"
    for module in imported(path):
        other = component(module)
        if module.split(".")[0] == "hpcfl" and other and room != other and not {room, other} <= DOOR:
            assert FLOOR[other] < FLOOR.get(room, 0), f"{room} is on floor {FLOOR.get(room, 0)} and imports {module} of floor {FLOOR[other]}"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "algorithms"], ids=lambda path: path.name)
def test_a_method_is_written_against_the_contract(path):
    rooms = {component(name) for name in imported(path) if name in MODULES and "." in name}
    assert rooms <= {"algorithms", "contract", "training", "latents", "models", "data", "generators", "resize", "tree", "streams"}


def test_no_circle_joins_two_files():
    assert circles() == []


def test_no_module_is_named_like_one_of_the_standard_library():
    assert {path.stem for path in FILES} & sys.stdlib_module_names - {"__init__", "__main__"} == set()


def test_a_report_is_made_without_torch():
    reached, todo = set(), {module for module in arrows() if component(module) == "report"}
    while todo:
        reached |= todo
        todo = {name for module in todo for name in arrows()[module]} - reached
    assert [name for name in sorted(reached) if "torch" in {each.split(".")[0] for each in imported(file_of(name))}] == []


def test_exactly_one_file_imports_mpi4py():
    assert [path.name for path in FILES if any(name.split(".")[0] == "mpi4py" for name in imported(path))] == ["ranks.py"]


def test_every_import_is_declared_in_setup_py():
    assert third_party() - declared() == set()


def test_every_declared_dependency_is_imported():
    assert declared() - third_party() == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_file_stays_readable_in_one_go(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_file_begins_by_saying_what_it_does(path):
    text = path.read_text()
    assert not text or ast.get_docstring(ast.parse(text)), f"{path.name} has no docstring"


def test_only_the_agreed_names_stand_at_the_top_level():
    ignored = [line.rstrip("/") for line in (REPOSITORY / ".gitignore").read_text().split()]
    names = {entry.name for entry in REPOSITORY.iterdir()} - {".git"}
    assert {name for name in names if not any(fnmatch(name, pattern) for pattern in ignored)} <= TOP_LEVEL


def test_imports_are_found_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "REPOSITORY", tmp_path)
    path = tmp_path / "hpcfl" / "data" / "store.py"
    path.parent.mkdir(parents=True)
    path.write_text("import os.path\nfrom hpcfl import tree, __version__\nfrom hpcfl.settings.job import Job\n"
                    "def later():\n    from . import store\n    from ..streams import Stream\n")
    monkeypatch.setitem(globals(), "MODULES", MODULES | {"hpcfl.data.store"})
    assert imported(path) == {"os.path", "hpcfl", "hpcfl.tree", "hpcfl.settings.job", "hpcfl.data.store", "hpcfl.streams"}
