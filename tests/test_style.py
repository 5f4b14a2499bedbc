"""The style of the whole repository: ruff's rules, the types as mypy reads them, and a reason at every place where one of both is to look away."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
STRICT = ("settings", "files", "wire", "contract")                 # what others build on: nothing is suppressed there
SUPPRESSED = 20                                                    # places at most in all other packages
LOOKS_AWAY = re.compile(r"# type: ignore|# noqa|# mypy:|(?<![\w.])cast\(")
REASON = re.compile(r"# (?:type: ignore\[[a-z-]+(?:, [a-z-]+)*\]|noqa: [A-Z0-9, ]+)  # \S")
FILES = sorted((REPOSITORY / "hpcfl").rglob("*.py"))


def complaints_of(*tool: str) -> str:
    """What a module that is run as a program has to say of the repository; empty where it is content."""
    done = subprocess.run([sys.executable, "-m", *tool], cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def places(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    """Every line of some files in which a pattern is found."""
    return [f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}" for path in files
            for number, line in enumerate(path.read_text().splitlines(), start=1) if pattern.search(line)]


def test_ruff_has_nothing_to_say():
    assert complaints_of("ruff", "check", "--quiet", "--output-format=concise", ".") == ""


def test_the_types_fit():
    assert complaints_of("mypy") == ""


def test_settings_files_wire_and_contract_suppress_nothing():
    strict = [path for path in FILES if path.relative_to(REPOSITORY).parts[1] in STRICT]
    assert [place for place in places(LOOKS_AWAY, strict) if "noqa" not in place] == []


def test_few_places_are_suppressed():
    assert len([place for place in places(LOOKS_AWAY, FILES) if "noqa" not in place]) <= SUPPRESSED


@pytest.mark.parametrize("folder", ["hpcfl", "tests"])
def test_who_looks_away_says_from_what_and_why(folder):
    files = [path for path in sorted((REPOSITORY / folder).rglob("*.py")) if path != Path(__file__)]
    told = places(re.compile(r"# (?:type: ignore|noqa)"), files)
    assert [place for place in told if not REASON.search(place)] == []
