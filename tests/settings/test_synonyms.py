"""Synonyms: words of papers, other simulators and slips, and the setting or section that is told instead."""
import dataclasses

import pytest

from hpcfl.settings import sections, synonyms
from hpcfl.settings.synonyms import suggest_section, suggest_setting

KNOWN = {section: tuple(entry.name for entry in dataclasses.fields(kind)) if kind else ("name", "mu") for section, kind in sections.SECTIONS.items()}


def test_every_synonym_stands_for_a_setting_that_exists_and_for_one_alone():
    words = [word for others in (*synonyms.MEANT.values(), *synonyms.ABSENT.values()) for word in others.split()]
    assert len(set(words)) == len(words) and set(synonyms.SECTIONS) <= set(KNOWN)
    for setting in synonyms.MEANT:
        section, key = setting.split(".")
        assert key in KNOWN[section]


def test_a_synonym_is_written_as_words_are_compared():
    for word in " ".join((*synonyms.MEANT.values(), *synonyms.ABSENT.values())).split():
        assert word == word.lower().replace("_", "").replace("-", ""), f"{word} is never found"


@pytest.mark.parametrize(("setting", "words"), synonyms.MEANT.items())
def test_every_synonym_is_told_its_setting(setting, words):
    for word in words.split():
        assert suggest_setting(setting.split(".")[0], word, 1, {setting.split(".")[0]: ()}) == f"; did you mean '{setting}'?"


@pytest.mark.parametrize(("section", "key", "meant"), [
    ("training", "learning_rate", "training.lr"), ("federation", "join_ratio", "federation.participation"),
    ("federation", "fraction_fit", "federation.participation"), ("federation", "num_clients", "federation.clients"),
    ("training", "local_epochs", "training.epochs"), ("federation", "local_epochs", "training.epochs"),
    ("algorithm", "momentum", "training.momentum"), ("training", "BatchSize", "training.batch"), ("training", "weight-decay", "training.weight_decay"),
    ("run", "participation", "federation.participation"), ("training", "personal", "evaluation.personal")])
def test_a_key_of_another_simulator_or_section_is_told_what_it_is_called_here(section, key, meant):
    assert suggest_setting(section, key, 0.5, KNOWN) == f"; did you mean '{meant}'?"


@pytest.mark.parametrize(("section", "key", "told"), [
    ("training", "lr", "; did you mean 'training.lr'?"), ("training", "LR", "; did you mean 'training.lr'?"), ("checkpoint", "evry", "; did you mean 'every'?"),
    ("training", "scheduler", "; the learning rate is the same in all rounds: training.lr."),
    ("run", "output-dir", "; the run folder is named on the command line: --out DIR."), ("training", "xyzzy", ""), ("absent", "xyzzy", "")])
def test_the_own_section_comes_first_then_what_there_is_no_setting_for_then_slips(section, key, told):
    assert suggest_setting(section, key, 1, KNOWN) == told


def test_a_word_that_two_sections_have_is_told_both():
    assert suggest_setting("run", "every", 1, KNOWN) == "; did you mean 'evaluation.every' or 'checkpoint.every'?"


@pytest.mark.parametrize(("key", "value"), [("federation.dropout", 0.1), ("federation", {"dropout": 0.1})])
def test_a_key_with_a_sections_name_before_it_is_told_where_it_belongs(key, value):
    assert suggest_setting("federation", key, value, KNOWN) == "; did you mean 'dropout', without the name of its section?"
    assert suggest_setting("run", key, value, KNOWN) == "; did you mean 'dropout' in [federation]?"


@pytest.mark.parametrize(("name", "told"), [
    ("trainig", "; did you mean 'training'?"), ("optimizer", "; did you mean 'training'?"), ("Dataset", "; did you mean 'data'?"),
    ("server", "; did you mean 'federation'?"), ("eval", "; did you mean 'evaluation'?"), ("xyzzy", "")])
def test_a_section_that_does_not_exist_is_told_the_one_that_does(name, told):
    assert suggest_section(name, KNOWN) == told


@pytest.mark.parametrize(("section", "words"), synonyms.SECTIONS.items())
def test_every_word_for_a_section_is_told_that_one(section, words):
    for word in words.split():
        assert suggest_section(word, KNOWN) == f"; did you mean '{section}'?"
