"""Choices: what a job may name is what stands in the table that carries it out, and nowhere else."""
import ast
import inspect
from collections.abc import Mapping

import pytest

from hpcfl import algorithms
from hpcfl.algorithms import CONFIGS
from hpcfl.errors import JobError
from hpcfl.runs.choices import CHOICES
from hpcfl.settings import annotations, job, sections
from hpcfl.settings.fields import SettingType, Tabled
from hpcfl.wording import did_you_mean, nearest

OWNERS = {**{name: section for name, section in sections.SECTIONS.items() if section}, **CONFIGS}
TABLED: dict[str, Tabled] = {f"{owner}.{name}": field.metadata["kind"] for owner, section in OWNERS.items()
                             for name, field in section.__dataclass_fields__.items() if isinstance(field.metadata.get("kind"), Tabled)}
OPEN = {"data.name": "my_data", "models.names": "cnn5@0.75", "fml.meme": "cnn4@0.75"}     # names that are known only where they are looked up


def tables(kind: Tabled) -> list[Mapping[str, object]]:
    return [CHOICES[table] if isinstance(table, str) else table for table in kind.tables]


def kind(setting: str) -> SettingType:
    return TABLED[setting].among(CHOICES)


def given(setting: str, word: str) -> object:
    """A word as a job file gives it to a setting: alone or in a list."""
    return [word] if isinstance(default(setting), tuple) else word


def default(setting: str) -> object:
    owner, key = setting.split(".")
    return annotations.settings(OWNERS[owner], owner, CHOICES)[key].default


def resolved(setting: str, word: str) -> object:
    """What the setting of a job is that names the word."""
    owner, key = setting.split(".")
    section, method = ("algorithm", owner) if owner in CONFIGS else (owner, "fedavg")
    tables = {"algorithm": {"name": method}}
    tables.setdefault(section, {})[key] = given(setting, word)
    return getattr(getattr(job.resolve(tables, CHOICES), section), key)


def refusal(setting: str, word: str) -> str:
    with pytest.raises(JobError) as refused:
        resolved(setting, word)
    return str(refused.value)


def test_the_settings_that_tables_decide_are_those_known():
    assert {setting for setting in TABLED if setting.split(".")[0] not in CONFIGS} == {
        "run.compile", "data.name", "data.partition", "data.normalization", "models.names", "models.assignment", "models.size_schedule", "models.norm",
        "federation.server_rank", "federation.delay", "residency.location", "training.augment", "training.optimizer", "training.engine", "training.precision"}
    asked = {table for kind in TABLED.values() for table in kind.tables if isinstance(table, str)}
    assert asked == CHOICES.keys() - {"algorithm"}, "tables that no setting asks"


@pytest.mark.parametrize("setting", TABLED)
def test_a_job_accepts_every_name_of_the_table(setting):
    for table in tables(TABLED[setting]):
        for word in table:
            assert resolved(setting, word) in (word, (word,))


@pytest.mark.parametrize("setting", TABLED)
def test_a_name_that_is_added_to_the_table_is_accepted_and_printed(setting, monkeypatch):
    for number, table in enumerate(tables(TABLED[setting])):
        word = f"quite_new_{number}"
        if setting not in OPEN:
            assert "is not allowed" in refusal(setting, word)
        monkeypatch.setitem(table, word, None)
        assert resolved(setting, word) in (word, (word,)) and repr(word) in kind(setting).allowed and word in kind(setting).names


@pytest.mark.parametrize("setting", TABLED)
def test_what_a_job_accepts_beside_the_table_is_little_and_its_default_is_in_it(setting):
    known = {word for table in tables(TABLED[setting]) for word in table}
    beside = {"data.normalization": {"standard"}, "federation.delay": {"none"}, "training.engine": {"auto"}, "fedvtc.dm": {"off"}}
    assert set(kind(setting).names) - known == beside.get(setting, set())
    value = default(setting)
    assert set(value if isinstance(value, tuple) else [value]) <= set(kind(setting).names)


@pytest.mark.parametrize("setting", [setting for setting in TABLED if setting not in OPEN])
def test_an_unknown_name_is_told_all_there_are_and_the_nearest(setting):
    word = kind(setting).names[-1]
    slip = word[:-1] + "_" + word[-1]
    message, meant = refusal(setting, slip), nearest(slip, kind(setting).names)
    assert "is not allowed; wanted " in message and all(repr(name) in message for name in kind(setting).names)
    assert meant and f"did you mean '{meant}'?" in message


@pytest.mark.parametrize("setting", OPEN)
def test_an_open_name_passes_the_job_and_is_looked_up_by_the_world(setting):
    assert resolved(setting, OPEN[setting]) in (OPEN[setting], (OPEN[setting],))


@pytest.mark.parametrize("owner", OWNERS)
def test_no_setting_repeats_the_keys_of_a_table_of_its_own_file(owner):
    """A dict with exactly the words that a field lists would be the table that it should ask."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(OWNERS[owner])))
    listed = [frozenset(word.value for word in call.args) for call in ast.walk(tree)
              if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "choice" and all(isinstance(word, ast.Constant) for word in call.args)]
    keys = [frozenset(key.value for key in node.keys if isinstance(key, ast.Constant)) for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    assert not set(listed) & set(keys)


def test_the_table_of_methods_is_asked_too(monkeypatch):
    monkeypatch.setitem(algorithms.CONFIGS, "mine", CONFIGS["fedprox"])
    assert job.resolve({"algorithm": {"name": "mine", "mu": 0.5}}, CHOICES).algorithm.mu == 0.5


def test_the_nearest_word_is_meant_where_it_is_near_enough():
    known = ("sgd", "adam", "adamw")
    assert nearest("adan", known) == "adam" and nearest("xyz", known) == "" and nearest("adan", known, alike=0.99) == ""
    assert did_you_mean("a") == "; did you mean 'a'?" and did_you_mean("a", "b") == "; did you mean 'a' or 'b'?" and did_you_mean("") == did_you_mean() == ""
