"""The shape of the project: layers, the one file with mpi4py, declared dependencies, file lengths and top-level names."""
import ast
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = sorted((REPOSITORY / "hpcfl").rglob("*.py"))
LAYERS = (                                                         # a file imports only from its own layer and from those above it here
    {"errors", "tree", "streams", "kinds", "annotations", "synonyms", "places", "wording", "job", "flops"},
    {"comm", "ranks", "packing", "launchers", "statistics", "hdf5", "draft", "storage", "moments", "gaussian", "known"},
    {"data", "models", "generators", "maps", "resize"},
    {"losses", "matching", "group", "optimizers", "meter", "engines", "fit", "synthesise", "evaluate", "membership", "likeness", "latent"},
    {"algorithms"},
    {"placement", "conditions", "residency", "world", "finite", "delivery", "federation", "simulation", "examination", "pace", "averaging", "lock", "outlets", "starter", "checkpoint", "ledger", "metrics", "record", "recording", "trace", "console",
     "measures", "labels", "tables", "figures", "mosaics", "pictures", "page", "report", "inspect", "information", "audit", "audit_generator", "audit_images", "references", "watchdog", "lead",
     "signals", "launch", "slurm", "bench", "bench_clients", "bench_fedconv", "bench_gefl", "allotment", "probes", "shared_folder", "estimate",
     "finding", "verdicts", "verdicts_run", "doctor", "predict", "arguments", "cli", "__main__"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
TOP_LEVEL = {"setup.py", "hpcfl", "jobs", "tests", "slurm", "README.md", ".ci", "pyproject.toml", "LICENSE", ".gitignore"}
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow"}       # import name -> name in setup.py, where they differ
MODULES = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in FILES}


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


def component(module: str) -> str:
    """The name in LAYERS that a module of hpcfl belongs to; empty for the package itself."""
    return (module.split(".") + [""])[1]


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_file_imports_only_from_its_own_layer_and_those_below(path):
    name = component(".".join(path.relative_to(REPOSITORY).with_suffix("").parts)).removesuffix("__init__")
    assert name in LAYER or not name, f"{path.name} has no layer; give hpcfl/{name} a place in LAYERS"
    own = LAYER.get(name, -1)                                      # -1: the package itself, which imports nothing of hpcfl
    for module in imported(path):
        if module.split(".")[0] == "hpcfl" and component(module):
            assert LAYER[component(module)] <= own, f"layer {own} imports {module}, which is layer {LAYER[component(module)]}"


@pytest.mark.parametrize("name", sorted(LAYERS[0]))
def test_the_ground_layer_needs_python_numpy_and_torch_only(name):
    roots = {module.split(".")[0] for module in imported(REPOSITORY / "hpcfl" / f"{name}.py")}
    assert roots - sys.stdlib_module_names <= {"hpcfl", "numpy", "torch"}


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
    path.write_text("import os.path\nfrom hpcfl import tree, __version__\nfrom hpcfl.job import Job\n"
                    "def later():\n    from . import store\n    from ..streams import Stream\n")
    monkeypatch.setitem(globals(), "MODULES", MODULES | {"hpcfl.data.store"})
    assert imported(path) == {"os.path", "hpcfl", "hpcfl.tree", "hpcfl.job", "hpcfl.data.store", "hpcfl.streams"}
