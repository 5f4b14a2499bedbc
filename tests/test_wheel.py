"""The wheel: built, installed in an environment of its own and imported; everything of hpcfl is in it, and nothing else."""
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import hpcfl

REPOSITORY = Path(__file__).resolve().parent.parent
IMPORT_ALL = """
import importlib, pkgutil, hpcfl
for each in pkgutil.walk_packages(hpcfl.__path__, "hpcfl."):
    if not each.name.endswith("__main__"):
        importlib.import_module(each.name)
print(hpcfl.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a program that must end well."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the sources, so that nothing of an earlier build gets into it. Skips where pip is missing."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"{sys.executable} has no pip to build a wheel with")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("hpcfl", "tests"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", built, source, cwd=built)
    found, = built.glob("hpcfl-*.whl")
    return found


def test_all_of_hpcfl_is_in_the_wheel_and_nothing_else(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    papers = {".md"}
    wanted = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "hpcfl").rglob("*")
              if path.is_file() and path.suffix not in papers and "__pycache__" not in path.parts}
    assert inside == wanted and "hpcfl/py.typed" in inside


def test_what_the_wheel_installs_runs_without_the_repository(wheel, tmp_path):
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]         # torch and the like, which nobody downloads twice
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    assert run(home / "bin" / "hpcfl", "--version", cwd=tmp_path) == f"hpcfl {hpcfl.__version__}\n"
    assert Path(run(python, "-I", "-c", IMPORT_ALL, cwd=tmp_path).strip()).is_relative_to(home)
