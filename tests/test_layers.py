"""The shape of the project: floors and circles, the one file with mpi4py, declared dependencies, file lengths, mirrored tests, top-level names."""
import ast
import re
import sys
from fnmatch import fnmatch

import pytest

from tests.support.house import REPOSITORY, House, room_of

HOUSE = House(REPOSITORY)
FILES = HOUSE.files
FLOORS = (                                                         # an import goes to a strictly lower floor, or stays in its package
    {"errors", "tree", "streams", "accounts", "wording"},
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
TOP_LEVEL = {"setup.py", "hpcfl", "jobs", "tests", "slurm", "README.md", "CITATION.cff", ".ci", "pyproject.toml", "LICENSE", ".gitignore"}
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow"}       # import name -> name in setup.py, where they differ


def declared() -> set[str]:
    """The distributions in install_requires of setup.py."""
    for node in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            return {re.match(r"[\w-]+", requirement).group() for requirement in ast.literal_eval(node.value)}
    raise LookupError("setup.py has no install_requires")


def third_party() -> set[str]:
    """The distributions that the files of hpcfl import."""
    roots = {name.split(".")[0] for names in HOUSE.imports.values() for name in names} - {"hpcfl"} - sys.stdlib_module_names
    return {DISTRIBUTIONS.get(root, root) for root in roots}


@pytest.mark.parametrize("module", [module for module in HOUSE.modules if "." in module])
def test_an_import_goes_down_or_stays_in_its_package(module):
    room = room_of(module)
    assert room in FLOOR, f"{module} has no floor; give hpcfl/{room} a place in FLOORS"
    for name in HOUSE.arrows[module]:
        other = room_of(name)
        if room != other and not {room, other} <= DOOR:
            assert FLOOR[other] < FLOOR[room], f"{room} is on floor {FLOOR[room]} and imports {name} of floor {FLOOR[other]}"


@pytest.mark.parametrize("module", [module for module in HOUSE.modules if room_of(module) == "algorithms"])
def test_a_method_is_written_against_the_contract(module):
    rooms = set(map(room_of, HOUSE.arrows[module]))
    assert rooms <= {"algorithms", "contract", "training", "latents", "models", "data", "generators", "resize", "tree", "streams"}


def test_no_circle_joins_two_files():
    assert HOUSE.circles() == []


def test_no_module_is_named_like_one_of_the_standard_library():
    assert {path.stem for path in FILES} & sys.stdlib_module_names - {"__init__", "__main__"} == set()


def test_a_report_is_made_without_torch():
    reached = set().union(*(HOUSE.reach(module) | {module} for module in HOUSE.modules if room_of(module) == "report"))
    assert [module for module in sorted(reached) if "torch" in {name.split(".")[0] for name in HOUSE.imports[module]}] == []


def test_exactly_one_file_imports_mpi4py():
    assert [module for module, names in HOUSE.imports.items() if "mpi4py" in {name.split(".")[0] for name in names}] == ["hpcfl.wire.ranks"]


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_module_has_its_tests_where_one_looks_for_them(path):
    below = path.relative_to(REPOSITORY / "hpcfl")
    assert below.name == "__main__.py" or (REPOSITORY / "tests" / below.parent / f"test_{below.name}").is_file()


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


def test_imports_are_found_in_every_form(tmp_path):
    for name, text in {"store.py": "import os.path\nfrom hpcfl import tree, __version__\nfrom hpcfl.settings.job import Job\n"
                                   "def later():\n    from . import store, archive\n    from ..streams import Stream\n", "archive.py": ""}.items():
        path = tmp_path / "hpcfl" / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "hpcfl" / "tree.py").write_text("")
    assert House(tmp_path).imported(tmp_path / "hpcfl/data/store.py") == {
        "os.path", "hpcfl", "hpcfl.tree", "hpcfl.settings.job", "hpcfl.data.store", "hpcfl.data.archive", "hpcfl.streams"}


def test_floors_and_circles_are_found(tmp_path):
    files = {"a/__init__": "", "a/one": "from hpcfl.b import two", "b/__init__": "", "b/two": "def late():\n    from hpcfl.c.three import x", "ground": "",
             "c/__init__": "", "c/three": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hpcfl.b.two import y\nfrom hpcfl import ground"}
    for name, text in files.items():
        path = tmp_path / "hpcfl" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    house = House(tmp_path)
    assert house.floors() == [{"ground"}, {"b", "c"}, {"a"}]
    assert house.circles() == [("hpcfl.b.two", "hpcfl.c.three"), ("hpcfl.c.three", "hpcfl.b.two")]
    assert house.draw().endswith("7 modules in 4 rooms on 3 floors, 4 arrows between rooms, 2 arrows of files on circles")
