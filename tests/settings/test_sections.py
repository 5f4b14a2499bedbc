"""Sections: what a job without a word is, the bounds of what it may say, and the tables that decide the rest."""
import dataclasses

import pytest

from hpcfl.errors import JobError
from hpcfl.runs.choices import CHOICES
from hpcfl.settings import annotations, sections
from hpcfl.settings.fields import Tabled
from hpcfl.settings.job import Job

SECTIONS = {name: kind for name, kind in sections.SECTIONS.items() if kind is not None}
SETTINGS = {f"{section}.{key}": setting for section, kind in SECTIONS.items() for key, setting in annotations.settings(kind, section, CHOICES).items()}


def tables_of(kind: type) -> set[str]:
    """What the tables are of that decide what a section's settings may be."""
    kinds = [entry.metadata["kind"] for entry in dataclasses.fields(kind)]
    return {table for each in kinds if isinstance(each, Tabled) for table in each.tables if isinstance(table, str)}


def test_a_job_has_every_section_in_order_and_that_of_its_algorithm_alone_is_open():
    assert [entry.name for entry in dataclasses.fields(Job)] == [*sections.SECTIONS, "algorithm_name"]
    assert sections.SECTIONS.keys() - SECTIONS.keys() == {"algorithm"}


@pytest.mark.parametrize("kind", SECTIONS.values(), ids=SECTIONS)
def test_a_section_says_what_it_is_and_stays_as_it_was_read(kind):
    read = kind()
    assert kind.__doc__.endswith(".") and "(" not in kind.__doc__, "the words of a person, not those that dataclass writes by itself"
    for entry in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(read, entry.name, getattr(read, entry.name))
    assert {read: "a key"}[kind()] == "a key"


@pytest.mark.parametrize("name", SETTINGS)
def test_every_default_is_a_value_that_a_file_may_hold(name):
    section, key = name.split(".")
    default = SETTINGS[name].default
    assert SETTINGS[name].kind.check(name, default) == default == getattr(SECTIONS[section](), key)


@pytest.mark.parametrize("kind", SECTIONS.values(), ids=SECTIONS)
def test_what_a_table_decides_has_a_table(kind):
    assert tables_of(kind) <= CHOICES.keys()


def test_every_table_decides_something():
    assert set().union(*map(tables_of, SECTIONS.values())) == CHOICES.keys() - {"algorithm"}


@pytest.mark.parametrize(("name", "least", "most", "below", "beyond"), [
    ("data.fraction", 1e-9, 1.0, 0.0, 1.1), ("data.validation_fraction", 0.0, 0.5, -0.1, 0.51), ("data.test_fraction", 0.0, 0.5, -0.1, 0.51),
    ("data.public_fraction", 0.0, 0.9, -0.1, 1.0), ("data.alpha", 1e-9, 1e9, 0.0, float("inf")), ("models.shrinkage", 1e-9, 1.0, 0.0, 1.1),
    ("federation.participation", 1e-9, 1.0, 0.0, 1.1), ("federation.dropout", 0.0, 1.0, -0.1, 1.1), ("training.lr", 1e-9, 1e9, 0.0, float("inf")),
    ("training.momentum", 0.0, 1.0, -0.1, 1.1), ("federation.clients", 1, 10 ** 6, 0, 1.5), ("training.batch", 1, 10 ** 6, 0, 1.5),
    ("checkpoint.keep", 1, 10 ** 6, 0, 1.5), ("evaluation.every", 1, 10 ** 6, 0, 1.5), ("run.threads", 0, 10 ** 6, -1, 1.5),
    ("checkpoint.seconds", 0.0, 1e9, -1.0, float("inf")), ("timeouts.collective", 0.0, 1e9, -1.0, float("inf"))])
def test_a_number_has_its_bounds(name, least, most, below, beyond):
    kind = SETTINGS[name].kind
    assert kind.check(name, least) == least and kind.check(name, most) == most
    for wrong in (below, beyond):
        with pytest.raises(JobError, match=f"{name} = {wrong} is not allowed; wanted a"):
            kind.check(name, wrong)


@pytest.mark.parametrize(("name", "some"), [
    ("run.device", {"auto", "cpu", "cuda"}), ("run.compile", {"auto"}), ("data.partition", {"iid", "dirichlet", "shards", "lognormal"}),
    ("data.normalization", {"symmetric", "unit", "standard"}), ("models.assignment", {"cyclic", "blocks"}), ("models.norm", {"batch", "group"}),
    ("federation.server_rank", {"shared", "dedicated"}), ("federation.delay", {"none", "lognormal"}), ("residency.location", {"device", "host", "disk"}),
    ("training.optimizer", {"sgd", "adam"}), ("training.engine", {"auto", "sequential", "vmap"})])
def test_the_words_that_meanings_speak_of_are_taken_and_no_others(name, some):
    kind = SETTINGS[name].kind
    assert {kind.check(name, word) for word in some} == some <= set(kind.names)
    with pytest.raises(JobError, match=f"{name} = 'nothing like it' is not allowed; wanted one of"):
        kind.check(name, "nothing like it")


@pytest.mark.parametrize(("name", "known"), [("data.name", "digits"), ("models.names", "cnn1")])
def test_data_and_models_may_also_be_of_ones_own(name, known):
    kind = SETTINGS[name].kind
    own = "mine" if name == "data.name" else ("mine", "cnn5@0.75")
    assert known in kind.names and kind.check(name, own) == own and "or " in kind.allowed
