"""Manual: every setting is explained, as a job that reads back, as Markdown and as data."""
import dataclasses
import json
import sys
import tomllib
from subprocess import run as command

import pytest

from hpcfl import cli
from hpcfl.algorithms import CONFIGS
from hpcfl.errors import JobError
from hpcfl.runs.choices import CHOICES
from hpcfl.settings import job, manual
from hpcfl.settings.manual import PAPER, WIDTH
from hpcfl.settings.sections import SECTIONS
from tests.support.tiny_runs import tiny, write_job

BLOCKS = manual.blocks(CHOICES)
SETTINGS = {f"{block.method or block.section}.{key}": setting for block in BLOCKS for key, setting in block.settings.items()}


def printed(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["settings", *map(str, arguments)])
    return end.value.code


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_meaning_a_default_that_is_allowed_and_is_printed(name):
    setting = SETTINGS[name]
    assert setting.meaning and setting.kind.allowed and setting.meaning == " ".join(setting.meaning.split()).strip(".")
    if name != "algorithm.name":
        assert setting.kind.check(name, setting.default) == setting.default
    told = " ".join(manual.toml(manual.find(name, CHOICES)).replace("#", " ").split())
    for part in (setting.meaning, setting.kind.allowed, setting.unit):
        assert " ".join(part.split()) in told


def test_every_section_and_method_has_its_settings_in_order():
    assert [block.section for block in BLOCKS if not block.method] == list(SECTIONS) and [block.method for block in BLOCKS if block.method] == list(CONFIGS)
    for block in BLOCKS:
        section = CONFIGS[block.method] if block.method else SECTIONS[block.section]
        if section:
            assert list(block.settings) == [field.name for field in dataclasses.fields(section)]
        assert block.meaning or block.method, f"[{block.section}] is not explained"


@pytest.mark.parametrize("method", CONFIGS)
def test_what_is_printed_of_a_method_is_a_job_that_is_all_by_default(method):
    text = manual.toml(block for block in BLOCKS if block.method == method or block.section != "algorithm")
    assert job.resolve(tomllib.loads(text), CHOICES) == job.resolve({"algorithm": {"name": method}}, CHOICES)
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize("method", CONFIGS)
def test_a_job_with_comments_reads_back_equal(method):
    written = tiny(method, training={"augment": ["crop_flip"]}, residency={"folder": 'a "b" # c'})
    text = manual.commented(written, CHOICES)
    again = job.resolve(tomllib.loads(text), CHOICES)
    assert again == written and again.digest() == written.digest() and tomllib.loads(text) == tomllib.loads(written.to_toml())


def test_a_value_that_is_not_the_default_is_told_it():
    text = " ".join(manual.commented(tiny("fedavg", training={"lr": 0.25}), CHOICES).split())
    assert "lr = 0.25 # learning rate, the same in all rounds # (by default 0.05; a number above 0)" in text
    assert "momentum = 0.0 # momentum of sgd (a number of at least 0 and at most 1)" in text


@pytest.mark.parametrize(("what", "found"), [
    ("training", ["training/"]), ("fedprox", ["algorithm/fedprox"]), ("training.lr", ["training/"]), ("fedprox.mu", ["algorithm/fedprox"]),
    ("algorithm", ["algorithm/"]), ("algorithm.mu", ["algorithm/fedprox"]), ("lr", ["training/", "algorithm/feddf", "algorithm/ccvr"])])
def test_settings_are_found_by_section_method_and_key(what, found):
    assert [f"{block.section}/{block.method}" for block in manual.find(what, CHOICES)] == found


@pytest.mark.parametrize(("what", "meant"), [
    ("learning_rate", "did you mean 'training.lr'?"), ("gausian", "did you mean 'gaussian'?"), ("trainig", "did you mean 'training'?"),
    ("training.lrr", "did you mean 'lr'?"), ("fedvtc.alignmnt", "did you mean"), ("training.mu", "no section, method or setting"), ("", "no section")])
def test_what_is_no_setting_is_told_the_nearest_and_what_there_is(what, meant):
    with pytest.raises(JobError) as refused:
        manual.find(what, CHOICES)
    assert meant in str(refused.value) and "the sections run, data," in str(refused.value) and "the methods standalone, fedavg," in str(refused.value)


def test_lines_of_markdown_fit_into_a_paper():
    text = manual.markdown(BLOCKS, CHOICES)
    assert max(map(len, text.splitlines())) <= PAPER and text == text.strip("\n") and "\n\n\n" not in text
    assert "### `[algorithm]` of `heterofl`, `fedrolex`" in text and "`standalone`, `fedavg` let nothing be set." in text
    items = " ".join(text.split())
    for name, setting in SETTINGS.items():
        assert f"{setting.meaning} ({setting.kind.allowed}" in items, name


def test_settings_are_printed_as_a_job_and_as_data(capsys):
    assert printed() == 0
    assert tomllib.loads(capsys.readouterr().out).keys() == SECTIONS.keys()
    assert printed("fedprox", "--json") == 0
    mu, norm = json.loads(capsys.readouterr().out)["settings"]
    assert mu["setting"] == "algorithm.mu" and mu["algorithm"] == "fedprox" and mu["default"] == 0.01 and mu["allowed"] == "a number of at least 0"
    assert norm["names"] == ["squared", "code"] and norm["required"] is False
    assert printed("--json") == 0
    assert {(each["setting"], each["algorithm"]) for each in json.loads(capsys.readouterr().out)["settings"]} == {
        (f"{block.section}.{key}", block.method or None) for block in BLOCKS for key in block.settings}
    assert printed("--markdown") == 0 and capsys.readouterr().out == manual.markdown(BLOCKS, CHOICES) + "\n"
    assert printed("evaluation.every", "--markdown") == 0
    assert capsys.readouterr().out.splitlines()[::4] == ["### `[evaluation]`", "- `every = 1`: interval of evaluations; the last round of a phase is always "
                                                         "evaluated (a whole number of at least 1, in"]
    assert printed("trainig") == 2 and capsys.readouterr().err.startswith("hpcfl: 'trainig' is no section, method or setting; did you mean 'training'?")


def test_a_dry_run_prints_the_job_with_comments(tmp_path, capsys):
    written = tiny("fedprox")
    with pytest.raises(SystemExit) as end:
        cli.main(["run", str(write_job(tmp_path, written)), "--dry-run", "--alone"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and job.resolve(tomllib.loads(out), CHOICES) == written
    assert out.startswith(manual.commented(written, CHOICES) + "\n\n# phase rounds: 3 rounds of FedProx\n")


def test_settings_and_their_manual_are_there_without_torch():
    code = ("import sys, hpcfl.cli, hpcfl.settings.job, hpcfl.settings.manual, hpcfl.settings.sections; "
            "print([name for name in ('torch', 'numpy', 'mpi4py') if name in sys.modules])")
    assert command([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
