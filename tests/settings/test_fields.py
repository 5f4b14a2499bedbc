"""Kinds of settings: what they take, and what they say to the rest."""
import dataclasses
from dataclasses import dataclass

import pytest

from hpcfl.errors import JobError
from hpcfl.settings import fields

INFINITY, NAN = float("inf"), float("nan")
CASES = {                                                          # kind: (field, values that pass, values that do not)
    "integer": (fields.integer(3, 1), [1, 10**9], [0, -1, 1.0, "1", True, None, [1]]),
    "integer up to": (fields.integer(3, 1, 5), [1, 5], [0, 6]),
    "real": (fields.real(0.5, 0.0), [0, 0.0, 1e30], [-1e-9, INFINITY, NAN, "0.5", True, None]),
    "real up to": (fields.real(0.5, 0.0, 1.0), [0.0, 1.0], [1.0001]),
    "real above": (fields.real(0.5, 0.0, 1.0, above=True), [1e-9, 1], [0.0, 0, 1.0001]),
    "choice": (fields.choice("auto", "on", "off"), ["auto", "on", "off"], ["On", "", True, 1, ["on"]]),
    "choice of": (fields.choice_of("rule", "auto", "never"), ["auto", "never", "sgd", "adam"], ["lion", None, ["sgd"]]),
    "choice of a table": (fields.choice_of({"sum": 1, "mean": 2}, "mean"), ["sum", "mean"], ["auto", 1]),
    "name of": (fields.name_of("rule", "sgd", besides="your own"), ["sgd", "anything"], [1, None, ["sgd"]]),
    "names of": (fields.names_of("rule", "sgd", besides="your own"), [["sgd"], ("adam", "anything")], [[], "sgd", [1], None]),
    "flag": (fields.flag(False), [True, False], [0, 1, "true", None]),
    "text": (fields.text("run"), ["", "a b"], [1, None, ["a"]]),
    "words": (fields.words("cnn1"), [["a"], ("a", "b")], [[], "a", ["a", 1], None]),
    "selection": (fields.selection(("turn", "grow"), last=("mix", "cut")), [[], ["turn"], ("grow", "turn", "mix"), ["cut"]],
                  ["turn", ["tern"], ["turn", "turn"], ["mix", "turn"], ["mix", "cut"], [1], [["turn"]], None]),
    "integers": (fields.integers(1, low=1), [[3], [1, 2]], [[], [0], [1.0], [True], 1, "1"]),
    "reals": (fields.reals(), [[], [0.5, 2]], [[0.0], [-1.0], [True], [float("inf")], 1.0, ["1"]]),
}


TABLES = {"rule": {"sgd": None, "adam": None}}


def kind(name):
    return CASES[name][0].metadata["kind"].among(TABLES)


@pytest.mark.parametrize("name, value", [(name, value) for name, (_, good, _) in CASES.items() for value in good])
def test_an_allowed_value_passes_unchanged(name, value):
    kept = kind(name).check("section.key", value)
    assert (list(kept) if isinstance(value, (list, tuple)) else kept) == (list(value) if isinstance(value, (list, tuple)) else value)


@pytest.mark.parametrize("name, value", [(name, value) for name, (_, _, bad) in CASES.items() for value in bad])
def test_a_refusal_names_the_key_the_value_and_what_is_wanted(name, value):
    with pytest.raises(JobError) as refusal:
        kind(name).check("section.key", value)
    assert all(part in str(refusal.value) for part in ("section.key", repr(value), kind(name).allowed))


def test_a_word_that_is_not_known_is_told_the_nearest():
    with pytest.raises(JobError, match="'tern' is none of them, did you mean 'turn'"):
        kind("selection").check("section.key", ["grow", "tern"])
    with pytest.raises(JobError, match="wanted one of 'auto', 'never', 'sgd', 'adam'; did you mean 'sgd'?"):
        kind("choice of").check("section.key", "sdg")


def test_a_table_is_asked_anew_each_time(monkeypatch):
    assert kind("choice of").names == ("auto", "never", "sgd", "adam")
    monkeypatch.setitem(TABLES["rule"], "lion", None)
    assert kind("choice of").check("section.key", "lion") == "lion" and "'lion'" in kind("choice of").allowed


def test_a_table_that_the_door_does_not_hand_in_is_asked_for():
    with pytest.raises(KeyError, match="rule"):
        CASES["choice of"][0].metadata["kind"].among({})


def test_a_whole_number_becomes_a_real_one():
    assert isinstance(kind("real").check("key", 1), float)


def test_lists_become_tuples():
    assert kind("words").check("key", ["a", "b"]) == ("a", "b") and kind("integers").check("key", [1, 2]) == (1, 2)


@pytest.mark.parametrize("name, sentence", [
    ("integer", "a whole number of at least 1"), ("integer up to", "a whole number of at least 1 and at most 5"), ("real", "a number of at least 0"),
    ("real above", "a number above 0 and at most 1"), ("choice", "one of 'auto', 'on', 'off'"), ("flag", "true or false"),
    ("choice of", "one of 'auto', 'never', 'sgd', 'adam'"), ("choice of a table", "one of 'mean', 'sum'"),
    ("name of", "a name: 'sgd', 'adam', or your own"), ("names of", "a list of at least one name: 'sgd', 'adam', or your own"),
])
def test_what_is_allowed_is_a_sentence(name, sentence):
    assert kind(name).allowed == sentence


def test_a_setting_is_a_dataclass_field_with_its_default():
    @dataclass(frozen=True)
    class Settings:
        rounds: int = fields.integer(10, 1)
        names: tuple[str, ...] = fields.words("cnn1", "mlp")
    assert Settings() == Settings(rounds=10, names=("cnn1", "mlp"))


@pytest.mark.parametrize("name", CASES)
def test_the_default_is_allowed(name):
    @dataclass(frozen=True)
    class Settings:
        setting: object = CASES[name][0]
    default = dataclasses.fields(Settings)[0].default
    assert kind(name).check("key", default) == default
