"""The papers keep their word: their commands run, their examples work, and what they name is there."""
import argparse
import importlib.util
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import h5py
import pytest

import hpcfl
from hpcfl import accounts, cli, errors
from hpcfl.algorithms import CONFIGS, PLANS
from hpcfl.contract import Algorithm
from hpcfl.models.zoo import ENTRIES
from hpcfl.runs.choices import CHOICES
from hpcfl.settings.job import load, resolve
from hpcfl.settings.sections import SECTIONS
from hpcfl.wire.communicator import Communicator
from tests.support.tiny_runs import carry_out, tiny, undisturbed

REPOSITORY = Path(__file__).resolve().parent.parent
PAPERS = [REPOSITORY / name for name in ("README.md", "jobs/README.md", "slurm/README.md", "hpcfl/README.md", "tests/README.md", "hpcfl/CHANGELOG.md")]
MARKS = ("run", "network", "slurm", "gpu", "long")                 # of commands: carried out here; what the others need is not on every machine
LONGEST = 120
PLACES = re.compile(r"(?:hpcfl|jobs|tests|slurm|\.ci)/[\w./-]*")   # what is taken for a path, where it stands in quotes
OPERATORS = {"&&", "||", "|", ">", ";"}
METHODS = frozenset(PLANS)                                         # without those of examples
QUICK = {"fedvtc": ["algorithm.finetune_epochs=1", "algorithm.per_class=10", "algorithm.vtc_steps=1", "data.fraction=0.3"]}         # prints the same form


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    paper: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.paper.relative_to(REPOSITORY)}:{self.line}"

    def path(self) -> str:
        """The file that the block is, as its first line says; empty where it says none."""
        found = re.match(r"# ([\w/.-]+\.(?:py|toml))\b", self.text)
        return found[1] if found else ""


def blocks(*languages: str) -> list[Block]:
    """The blocks of all papers in these languages, in order."""
    found = []
    for paper in PAPERS:
        for match in re.finditer(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", paper.read_text(), re.MULTILINE):
            line = paper.read_text()[:match.start()].count("\n") + 1
            found.append(Block(paper, line, match[1], match[2], match[3]))
    return [block for block in found if block.language in languages]


def commands(text: str) -> list[list[str]]:
    """The words of each command in lines of a shell; comments are none, and what an operator joins are several."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((place for place, word in enumerate(words) if word in OPERATORS), len(words))
            found.append(words[:end])
            words = words[end + (2 if words[end:end + 1] == [">"] else 1):]
    return [words for words in found if words]


def arguments(words: list[str]) -> list[str] | None:
    """What hpcfl is given in a command, whoever starts it; None where it is another program."""
    program = next((place for place, word in enumerate(words) if word == "hpcfl"), None)
    return None if program is None or words[0] not in ("hpcfl", "mpirun", "srun") else words[program + 1:]


def parsed(words: list[str]) -> argparse.Namespace:
    return cli._parser().parse_args(words, argparse.Namespace(words=words))


def quoted(paper: Path) -> Iterator[str]:
    """What a paper has between single backticks."""
    text = re.sub(r"^```(?:.*\n)*?```$", "", paper.read_text(), flags=re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", text)


def masked(output: str) -> list[str]:
    """Lines whose numbers, which differ between machines, are all the same, and with them their plurals and the width of columns."""
    numbers = (re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?( thread)?s?", "#\\3", line) for line in output.strip().splitlines())
    return [re.sub(r"\s+", " ", re.sub(r"# (us|ms|min)\b", "# s", line)).strip() for line in numbers]


def imported(name: str, path: Path) -> ModuleType:
    """A file as the module of a name, which is known by it."""
    description = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module
    description.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Iterator[Path]:
    """A folder with every file that a paper shows whole; methods and models of them are known as their paper says."""
    folder, patches = tmp_path_factory.mktemp("examples"), pytest.MonkeyPatch()
    for block in filter(Block.path, blocks("python")):
        path = folder / block.path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        name = ".".join(Path(block.path()).with_suffix("").parts)
        if name.startswith("hpcfl."):
            patches.setitem(sys.modules, name, None)
        if name.startswith("hpcfl.algorithms."):
            module = imported(name, path)
            patches.setitem(PLANS, path.stem, module)
            patches.setitem(CONFIGS, path.stem, module.Config)
        if name.startswith("hpcfl.models."):
            row = re.search(r'`"(\w+)": (\w+)\(\)`', block.paper.read_text())
            patches.setitem(ENTRIES, row[1], getattr(imported(name, path), row[2])())
    yield folder
    patches.undo()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return carry_out(tiny("standalone"), tmp_path_factory.mktemp("papers") / "run")


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: str(paper.relative_to(REPOSITORY)))
def test_lines_are_short(paper):
    printed = {line for block in blocks("text") for line in block.text.splitlines()}                 # by hpcfl, and shown as it is
    assert [number for number, line in enumerate(paper.read_text().splitlines(), 1) if len(line) > LONGEST and line not in printed] == []


def test_the_first_paper_is_read_in_five_minutes():
    assert len(PAPERS[0].read_text().splitlines()) <= 145


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands_say_what_they_need(block):
    assert block.mark in MARKS, f"{block}: ```sh {block.mark}; wanted one of {', '.join(MARKS)}"


@pytest.mark.parametrize("block", [block for block in blocks("sh") if any(map(arguments, commands(block.text)))], ids=str)
def test_commands_are_understood(block, examples):
    for words in filter(None, map(arguments, commands(block.text))):
        given = parsed(words)
        if getattr(given, "job", None):
            load(REPOSITORY / given.job, CHOICES, given.set)


@pytest.mark.parametrize("block", [block for block in blocks("sh") if not all(map(arguments, commands(block.text)))], ids=str)
def test_other_programs_are_there(block):
    for words in commands(block.text):
        if arguments(words) is None:
            assert words[0] in ("python", "mpirun", "sbatch", "export") or (REPOSITORY / words[0]).is_file(), f"{block}: {words[0]}"


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: str(paper.relative_to(REPOSITORY)))
def test_commands_do_what_they_say(paper, examples, tmp_path, monkeypatch, capsys):
    for name in ("jobs", "slurm"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for path in examples.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "150")
    if paper != PAPERS[0]:                                         # what it reports, another paper has carried out
        carry_out(tiny("standalone"), tmp_path / "runs" / "one")
        carry_out(tiny("standalone", run={"seed": 1}), tmp_path / "runs" / "other")
    text = ""
    for block in blocks("sh", "text"):
        if block.paper == paper and block.language == "text":
            assert masked(text.replace(f"{tmp_path}/", "")) == masked(block.text), f"{block}: this is not what the command above it prints"
        if block.paper == paper and block.mark == "run":
            text = "".join(printed(words, capsys) for words in commands(block.text))


def printed(words: list[str], capsys: pytest.CaptureFixture) -> str:
    """What a command that succeeds prints."""
    if words[:3] == ["python", "-m", "pytest"]:
        subprocess.run([sys.executable, *words[1:], "-p", "no:cacheprovider"], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL, timeout=120)
        return ""
    if words[0] == "python":
        subprocess.run([sys.executable, *words[1:]], check=True, timeout=60)
        return ""
    given = arguments(words)
    if given[0] == "run" and "--dry-run" not in given:
        method = load(given[1], CHOICES, parsed(given).set).algorithm_name
        given += [word for setting in QUICK.get(method, []) for word in ("--set", setting)]
    with undisturbed(), pytest.raises(SystemExit) as end:
        cli.main(given)
    output = capsys.readouterr()
    assert end.value.code == 0, f"{shlex.join(words)}: {output.err}"
    return output.out


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_examples_are_whole_files(block):
    assert block.path(), f"{block}: wanted the file's name in a comment in the first line"


@pytest.mark.parametrize("block", [block for block in blocks("python") if Path(block.path()).name.startswith("test_")], ids=str)
def test_examples_of_tests_pass(block, examples):
    tests = {name: test for name, test in runpy.run_path(str(examples / block.path())).items() if name.startswith("test_")}
    assert tests
    for test in tests.values():
        test()


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_examples_of_jobs_are_jobs(block):
    shown = tomllib.loads(block.text)
    if not block.path():
        resolve(shown, CHOICES)
        return
    whole = tomllib.loads((REPOSITORY / block.path()).read_text())
    assert {section: {key: whole[section].get(key) for key in table} for section, table in shown.items()} == shown


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: str(paper.relative_to(REPOSITORY)))
def test_files_that_are_named_exist(paper):
    links = [paper.parent / link for link in re.findall(r"\]\(([^)#:]+)\)", paper.read_text())]
    words = [word for span in quoted(paper) for word in span.split()]
    named = [REPOSITORY / word for word in words if PLACES.fullmatch(word)]
    modules = [REPOSITORY.joinpath(*word.split(".")) for word in words if re.fullmatch(r"hpcfl(\.[a-z_0-9]+)+", word)]
    shown = [REPOSITORY / block.path() for block in blocks("python")]
    assert [path for path in links + named if not path.exists() and path not in shown] == []
    assert [path for path in modules if not path.is_dir() and not path.with_suffix(".py").exists()] == []


def test_settings_that_are_named_exist():
    keys = {f"{section}.{key}" for section, kind in SECTIONS.items() if kind for key in kind.__dataclass_fields__}
    keys |= {f"algorithm.{key}" for config in CONFIGS.values() for key in config.__dataclass_fields__} | {"algorithm.name"}
    setting = re.compile(rf"(?:^|--set |['\"])((?:{'|'.join(SECTIONS)})\.[a-z_]+)(?=[= ]|$)")
    assert {found for paper in PAPERS for words in quoted(paper) for found in setting.findall(words)} - keys == set()


def test_jobs_that_are_named_with_settings_can_be_carried_out():
    for paper in PAPERS:
        for words in quoted(paper):
            if found := re.fullmatch(r"(?:hpcfl run )?(jobs/[\w-]+\.toml)((?: --set \S+)+)", words):
                settings = [setting for setting in shlex.split(found[2]) if setting != "--set" and not setting.endswith("=")]
                load(REPOSITORY / found[1], CHOICES, settings)


# What must be listed whole


def test_every_job_is_in_the_index():
    text = (REPOSITORY / "jobs" / "README.md").read_text().partition("\n## The jobs\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"\| `([\w-]+\.toml)`", text)) == {path.name for path in (REPOSITORY / "jobs").glob("*.toml")}


def test_every_method_is_in_the_first_papers_table():
    text = PAPERS[0].read_text().partition("\n## Methods\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `")))) == METHODS


def test_every_command_is_in_the_first_papers_table():
    text = PAPERS[0].read_text().partition("\n## Commands\n")[2].partition("\n## ")[0]
    listed = next(action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
    assert set(re.findall(r"^\| `hpcfl (\w+)", text, re.MULTILINE)) == set(listed)


def test_every_exit_code_is_listed():
    text = (REPOSITORY / "jobs" / "README.md").read_text()
    codes = {kind.exit_code for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.HpcflError)}
    assert set(map(int, re.findall(r"^\| (\d+) \|", text, re.MULTILINE))) == codes - {errors.HpcflError.exit_code} | {0}


def test_every_verb_is_listed_as_it_is_called():
    text = (REPOSITORY / "hpcfl" / "README.md").read_text()
    for name, given in re.findall(r"^\| `(\w+)\((.*)\)` \|", text, re.MULTILINE):
        assert ", ".join(inspect.signature(getattr(Algorithm, name)).parameters) == f"self, {given}"


def test_every_package_has_a_floor_in_the_table():
    table = (REPOSITORY / "hpcfl" / "README.md").read_text().partition("\n## Words\n")[0]
    assert sorted(re.findall(r"`hpcfl/(\w+)/`(?=[^\n]*\|)", "\n".join(line for line in table.splitlines() if line.startswith("| ")))) == sorted(
        path.parent.name for path in (REPOSITORY / "hpcfl").glob("*/__init__.py"))


def test_every_dataset_of_a_record_is_in_the_schema(finished):
    rows = re.findall(r"^\| ((?:`[^`]+`,? ?)+)\|", (REPOSITORY / "hpcfl" / "README.md").read_text().partition("\n### metrics.h5\n")[2], re.MULTILINE)
    patterns = [re.sub(r"<\w+>", "[^/]+", re.sub(r"\{([^}]*)\}", lambda found: f"({found[1].replace(',', '|')})", name))
                for row in rows for name in re.findall(r"`([^`]+)`", row)]
    names = [name for name in accounts.SHAPES if "/" in name]       # also what this run has none of
    with h5py.File(finished / "metrics.h5") as file:
        file.visititems(lambda name, entry: names.append(name) if isinstance(entry, h5py.Dataset) else None)
    assert [name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []


def test_every_kind_of_seconds_is_named():
    text = re.search(r"^\* \*\*Seconds\*\* are of ((?:.|\n)*?)\n\* ", (REPOSITORY / "hpcfl" / "README.md").read_text(), re.MULTILINE)[1]
    assert set(accounts.SECONDS) - set(re.findall(r"\w+", text)) == set()


def test_every_file_of_a_run_folder_is_listed(finished):
    text = (REPOSITORY / "hpcfl" / "README.md").read_text().partition("\n## What a run leaves behind\n")[2]
    listed = set(re.findall(r"^\| `([\w.]+)/?` \|", text, re.MULTILINE))
    assert {path.name for path in finished.iterdir()} <= listed


def test_every_mark_and_every_helper_of_the_tests_is_listed():
    text = (REPOSITORY / "tests" / "README.md").read_text()
    marks = set(re.findall(r'"markers", "(\w+)', (REPOSITORY / "tests" / "conftest.py").read_text())) | {"mpi"}
    assert set(re.findall(r"^\| `(\w+)` \| ", text.partition("| mark | ")[2].partition("\n\n")[0], re.MULTILINE)) == marks
    helpers = {path.name for path in (REPOSITORY / "tests" / "support").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"^\| `tests/support/(\w+\.py)`", text, re.MULTILINE)) == helpers


def test_the_limit_of_a_suite_is_the_scripts():
    limit = re.search(r"HPCFL_TEST_LIMIT_S:-(\d+)", (REPOSITORY / "tests" / "run").read_text())[1]
    assert f"`HPCFL_TEST_LIMIT_S` ({limit})" in (REPOSITORY / "tests" / "README.md").read_text()


def test_the_picture_of_a_round_speaks_the_codes_own_words():
    texts = ElementTree.parse(REPOSITORY / "hpcfl" / "round.svg").iter("{http://www.w3.org/2000/svg}text")
    verbs = {text.text for text in texts if text.get("class") == "verb"} - {"evaluate", "record", "checkpoint"}
    assert all(hasattr(Algorithm, verb) or hasattr(Communicator, verb) for verb in verbs) and {"publish", "train", "combine", "aggregate", "refine"} <= verbs


def test_the_version_is_the_same_everywhere(finished):
    written = json.loads(next(finished.glob("checkpoints/*/manifest.json")).read_text())["format"]
    with h5py.File(finished / "metrics.h5") as file:
        recorded = file.attrs["schema"]
    changes = (REPOSITORY / "hpcfl" / "CHANGELOG.md").read_text()
    assert re.search(r"^## (.+)$", changes, re.MULTILINE)[1] == hpcfl.__version__
    assert f"Formats: checkpoints {written}, `metrics.h5` {recorded}." in changes
    assert f"\nversion: {hpcfl.__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()
