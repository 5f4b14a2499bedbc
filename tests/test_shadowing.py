"""Python started in any folder of hpcfl finds torch and numpy: no module there is called like one that these ask for."""
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "hpcfl"
FOLDERS = sorted({path.parent for path in PACKAGE.rglob("*.py")})
ASKED = """
import sys

class Recorder:
    names = set()

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        cls.names |= set() if path else {name}

sys.meta_path.insert(0, Recorder)
import numpy, torch
print(*Recorder.names)
"""


@functools.cache
def asked() -> frozenset[str]:
    """Names outside of packages that importing torch and numpy asks for, those that are not installed included."""
    return frozenset(subprocess.run([sys.executable, "-c", ASKED], cwd="/", capture_output=True, text=True, check=True, timeout=240).stdout.split())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(PACKAGE.parent)))
def test_no_module_hides_what_torch_and_numpy_import(folder):
    names = {path.stem for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}
    assert {"torch", "numpy", "typing_extensions"} <= asked() and names & (asked() | sys.stdlib_module_names) - {"__main__"} == set()


@pytest.mark.parametrize("folder", ["hpcfl", "hpcfl/doctor"])
def test_torch_and_numpy_are_found_from_inside(folder):
    subprocess.run([sys.executable, "-c", "import numpy, torch; torch.zeros(1)"], cwd=PACKAGE.parent / folder, check=True, timeout=240)
