"""Jobs: reading, defaults, overrides, round trip, and what a wrong file is told."""
import dataclasses
import tomllib
from dataclasses import dataclass

import pytest

from hpcfl.errors import JobError
from hpcfl.runs.choices import CHOICES
from hpcfl.settings import fields, job, manual, sections


@dataclass(frozen=True)
class Config:
    mu: float = fields.real(0.01, 0.0)
    names: tuple[str, ...] = fields.words("a")


@dataclass(frozen=True)
class Nothing:
    pass


CONFIGS = {"prox": Config, "standalone": Nothing}
OFFERED = {**CHOICES, "algorithm": CONFIGS}
TEXT = """
[run]
name = "first"
seed = 3
[models]
names = ["cnn1", "mlp"]
[training]
lr = 1
[algorithm]
name = "prox"
mu = 0.5
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(TEXT)
    return path


def refusal(tables):
    with pytest.raises(JobError) as refused:
        job.resolve(tables, OFFERED, "some.toml")
    return str(refused.value)


def test_a_file_overrides_defaults_and_leaves_the_rest(path):
    read = job.load(path, OFFERED)
    assert read.run == sections.Run(name="first", seed=3) and read.models == sections.Models(names=("cnn1", "mlp"))
    assert read.training == sections.Training(lr=1.0) and read.algorithm == Config(mu=0.5)
    assert read.data == sections.Data() and read.algorithm_name == "prox"


def test_a_job_needs_only_the_name_of_its_algorithm():
    assert job.resolve({"algorithm": {"name": "standalone"}}, OFFERED).federation == sections.Federation()


def test_a_resolved_job_reads_back_equal(path):
    read = job.load(path, OFFERED)
    again = job.resolve(tomllib.loads(read.to_toml()), OFFERED)
    assert again == read and again.digest() == read.digest()


@pytest.mark.parametrize("text", ['with "quotes"', "back\\slash", "new\nline", "größe", "= [x]",
                                  "\x7f\x80\x1f\t", "\u2028 \U0001f600", "'''", " # ", "x" * 9999])
def test_any_text_survives_the_round_trip(text):
    read = job.resolve({"residency": {"folder": text}, "algorithm": {"name": "prox", "names": [text]}}, OFFERED)
    again = job.resolve(tomllib.loads(read.to_toml()), OFFERED)
    assert again == read and again.residency.folder == text and again.algorithm.names == (text,)


@pytest.mark.parametrize("text", ["half a character \udc80", "a\0b"])
def test_text_that_no_file_takes_is_refused(text):
    for section, key, value in (("residency", "folder", text), ("data", "name", text), ("models", "names", ["cnn1", text]), ("run", "name", text)):
        assert f"{section}.{key}" in refusal({section: {key: value}, "algorithm": {"name": "prox"}})


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/../../b", "..", ".", "", "a//b", "a/", "new\nline", "\x7f", "\x85", "ß" * 101])
def test_a_run_is_not_named_out_of_its_folder(name):
    message = refusal({"run": {"name": name}, "algorithm": {"name": "prox"}})
    assert f"run.name = {name!r}" in message and "at most 200 bytes" in message


@pytest.mark.parametrize("name", ["größe", "a b", "study/first", "..x", "~", 'with "quotes"', "ß" * 100])
def test_a_name_that_stays_below_its_folder_is_taken(name):
    assert job.resolve({"run": {"name": name}, "algorithm": {"name": "prox"}}, OFFERED).run.name == name


def test_the_resolved_text_spells_out_every_default(path):
    tables = tomllib.loads(job.load(path, OFFERED).to_toml())
    assert set(tables) == set(sections.SECTIONS)
    for section, kind in {**sections.SECTIONS, "algorithm": Config}.items():
        assert {field.name for field in dataclasses.fields(kind)} <= set(tables[section])


@pytest.mark.parametrize("override", ["run.seed=4", "training.lr=0.5", "algorithm.mu=0.25", "data.partition=dirichlet"])
def test_any_other_setting_changes_the_digest(path, override):
    assert job.load(path, OFFERED, [override]).digest() != job.load(path, OFFERED).digest()


def test_another_algorithm_changes_the_digest():
    one, other = (job.resolve({"algorithm": {"name": name}}, OFFERED) for name in CONFIGS)
    assert one.digest() != other.digest()


def test_an_override_is_read_as_toml_or_as_a_bare_word(path):
    read = job.load(path, OFFERED, ["training.lr=1e-2", "models.names=['mlp']", "data.partition=dirichlet", 'run.name="x=y"', "run.compile = 'off'"])
    assert (read.training.lr, read.models.names, read.data.partition, read.run.name, read.run.compile) == (0.01, ("mlp",), "dirichlet", "x=y", "off")


def test_the_last_of_two_overrides_wins(path):
    assert job.load(path, OFFERED, ["run.seed=4", "run.seed=5"]).run.seed == 5


def test_a_setting_tried_with_another_method_keeps_what_that_method_knows(path):
    other = dataclasses.make_dataclass("Other", [("mu", float, fields.real(0.02, 0.0))], frozen=True)
    offered = OFFERED | {"algorithm": CONFIGS | {"other": other}}
    path.write_text(TEXT + 'names = ["b"]')
    assert job.load(path, offered, ["algorithm.name=other"]).tables()["algorithm"] == {"name": "other", "mu": 0.5}
    assert job.load(path, offered, ["algorithm.name=standalone"]).tables()["algorithm"] == {"name": "standalone"}


@pytest.mark.parametrize("text, overrides, key", [
    (TEXT, ["algorithm.mu=0.1", "algorithm.name=standalone"], "algorithm.mu"),
    (TEXT + "nu = 1", ["algorithm.name=standalone"], "algorithm.nu"),
    (TEXT + "names = ['b']", ["algorithm.name=prox", "algorithm.nu=1"], "algorithm.nu"),
], ids=["asked for", "unknown to both", "the same method"])
def test_other_keys_that_the_method_does_not_know_are_refused(path, text, overrides, key):
    path.write_text(text)
    with pytest.raises(JobError, match=f"unknown key {key}"):
        job.load(path, OFFERED, overrides)


@pytest.mark.parametrize("override", ["seed=4", "run.seed", "run.=4", ".seed=4", ""])
def test_a_malformed_override_is_shown_the_right_form(path, override):
    with pytest.raises(JobError, match="section.key=value"):
        job.load(path, OFFERED, [override])


def test_an_unknown_key_is_told_the_nearest_one_and_those_there_are():
    message = refusal({"checkpoint": {"evry": 2}, "algorithm": {"name": "prox"}})
    assert message == "some.toml: unknown key checkpoint.evry; did you mean 'every'? [checkpoint] has every, seconds, keep"
    assert "[algorithm] of prox has mu, names" in refusal({"algorithm": {"name": "prox", "xyzzy": 2}})
    assert "[algorithm] of standalone has no settings" in refusal({"algorithm": {"name": "standalone", "xyzzy": 2}})


def test_what_there_is_no_setting_for_is_said():
    assert "unknown key training.scheduler; the learning rate is the same in all rounds: training.lr. [training] has epochs" in refusal(
        {"training": {"scheduler": "cosine"}, "algorithm": {"name": "prox"}})


@pytest.mark.parametrize("table", [{"federation": {"dropout": 0.1}}, {"federation.dropout": 0.1}])
def test_a_key_with_its_sections_name_before_it_is_told_to_leave_that_out(table):
    assert "; did you mean 'dropout', without the name of its section? [federation] has" in refusal({"federation": table, "algorithm": {"name": "prox"}})
    assert "; did you mean 'dropout' in [federation]? [run] has" in refusal({"run": table, "algorithm": {"name": "prox"}})


def test_an_unknown_section_is_told_the_nearest_one_and_those_there_are():
    assert "[trainig]; did you mean 'training'? There are [run], [data]," in refusal({"trainig": {}, "algorithm": {"name": "prox"}})
    assert "[scheduler]; the learning rate is the same in all rounds: training.lr. There are [run]," in refusal({"scheduler": {"gamma": 1}})
    assert "[optimizer]; did you mean 'training'?" in refusal({"optimizer": {"lr": 1}, "algorithm": {"name": "prox"}})


def test_a_setting_before_the_first_section_is_told_where_it_belongs():
    assert "'lr' stands in no section; did you mean 'training.lr'?" in refusal({"lr": 0.1, "algorithm": {"name": "prox"}})


@pytest.mark.parametrize("content", [b"", b"# nothing yet\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_called_empty(path, content):
    path.write_bytes(content)
    with pytest.raises(JobError, match=r"job.toml: is empty; wanted at least a section \[algorithm\] with name = one of prox, standalone"):
        job.load(path, OFFERED)


@pytest.mark.parametrize("old, new", job.RENAMED.items())
def test_a_setting_that_was_renamed_is_refused_with_its_new_name(path, old, new):
    section, key = old.split(".")
    assert f"some.toml: {old} is called {new}" in refusal({section: {key: 1}, "algorithm": {"name": "prox"}})
    with pytest.raises(JobError, match=f"{old} is called {new}"):
        job.load(path, OFFERED, [f"{old}=1"])


def test_all_renamed_settings_of_a_file_are_named_at_once():
    message = refusal({"data": {"size": 32, "test": 0.0}, "clients": {"chunk": 3}, "algorithm": {"name": "prox"}})
    assert "data.size is called data.image_size, data.test is called data.test_fraction, clients.chunk is called residency.chunk" in message


def test_every_new_name_exists_and_no_old_one_does():
    for old, new in job.RENAMED.items():
        names = [f"{section}.{field.name}" for section, kind in sections.SECTIONS.items() if kind is not None for field in dataclasses.fields(kind)]
        assert new in names and old not in names


def test_a_job_recorded_under_old_names_is_recalled_as_it_was_meant(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('''[data]\nsize = 32\ntest = 0.2\nvalues = "unit"\n[models]\nfeatures = 8\n[federation]\nserver = "dedicated"
        [clients]\nresidency = "disk"\nchunk = 3\n[algorithm]\nname = "prox"\nmu = 0.5\n''')
    meant = {"data": {"image_size": 32, "test_fraction": 0.2, "normalization": "unit"}, "models": {"feature_size": 8},
             "federation": {"server_rank": "dedicated"}, "residency": {"location": "disk", "chunk": 3}, "algorithm": {"name": "prox", "mu": 0.5}}
    assert job.recall(path, OFFERED) == job.resolve(meant, OFFERED)


def test_what_is_recorded_today_is_recalled_unchanged(path):
    read = job.load(path, OFFERED)
    path.write_text(read.to_toml())
    assert job.recall(path, OFFERED) == read and job.find_differences(job.read_recorded(tomllib.loads(path.read_text())), read.tables()) == []


def test_a_job_that_was_recorded_with_comments_is_recalled_as_well(path):
    read = job.load(path, OFFERED)
    path.write_text(manual.commented(read, OFFERED))
    assert job.recall(path, OFFERED) == read == job.load(path, OFFERED)


def test_an_unknown_algorithm_is_told_which_there_are():
    message = refusal({"algorithm": {"name": "proxx"}})
    assert "'proxx'" in message and "did you mean 'prox'?" in message and "prox, standalone" in message


def test_a_job_without_an_algorithm_is_refused():
    assert "algorithm.name" in refusal({})


def test_a_wrong_value_names_file_key_value_and_what_is_allowed():
    message = refusal({"federation": {"participation": 1.5}, "algorithm": {"name": "prox"}})
    assert all(part in message for part in ("some.toml", "federation.participation", "1.5", "above 0 and at most 1"))


def test_a_key_of_another_algorithm_is_refused():
    assert "algorithm.mu" in refusal({"algorithm": {"name": "standalone", "mu": 0.1}})


def test_a_value_where_a_section_belongs_is_refused():
    assert "wanted a section [run]" in refusal({"run": 3, "algorithm": {"name": "prox"}})


@pytest.mark.parametrize("clients", [0, -1, 2.5])
def test_the_number_of_clients_is_a_number_and_not_left_to_the_ranks(clients):
    assert "federation.clients" in refusal({"federation": {"clients": clients}, "algorithm": {"name": "prox"}})
    assert job.resolve({"algorithm": {"name": "prox"}}, OFFERED).federation.clients == 10


def test_a_number_too_large_for_its_kind_is_refused():
    assert "training.lr = 1000" in refusal({"training": {"lr": 10 ** 400}, "algorithm": {"name": "prox"}})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(JobError, match="absent.toml: cannot read the job file: No such file"):
        job.load(tmp_path / "absent.toml", OFFERED)


@pytest.mark.parametrize("content", [b"[run\n", b"[run]\nseed = \n", b"[run]\nseed = " + b"9" * 5000, b"[run]\nseed = " + b"[" * 5000],
                         ids=["bracket", "value", "huge", "deep"])
def test_a_file_that_is_not_toml_is_named(path, content):
    path.write_bytes(content)
    with pytest.raises(JobError, match="job.toml: not a TOML file"):
        job.load(path, OFFERED)


@pytest.mark.parametrize("encode", [lambda text: b"\xef\xbb\xbf" + text.encode(), lambda text: text.replace("\n", "\r\n").encode()], ids=["mark", "CRLF"])
def test_a_byte_order_mark_and_other_line_ends_change_nothing(path, encode):
    wanted = job.load(path, OFFERED)
    path.write_bytes(encode(TEXT))
    assert job.load(path, OFFERED) == wanted


@pytest.mark.parametrize(("encoding", "told"), [("utf-16", "it is UTF-16, wanted UTF-8"), ("utf-16-be", "it is UTF-16 or binary"),
                                                ("utf-32", "it is UTF-32, wanted UTF-8"), ("latin-1", "byte 0xf6 in line 3 is no UTF-8")])
def test_a_file_in_another_encoding_is_told_which_is_wanted(path, encoding, told):
    path.write_bytes(TEXT.replace("first", "schön").encode(encoding))
    with pytest.raises(JobError, match=f"job.toml: not a TOML file: {told}.*save it as UTF-8"):
        job.load(path, OFFERED)


def test_differences_name_the_settings(path):
    one, other = (job.load(path, OFFERED, overrides).tables() for overrides in ([], ["run.seed=9", "algorithm.mu=0.75"]))
    assert job.find_differences(one, other) == ["algorithm.mu", "run.seed"]
    assert job.find_differences(one, one) == []


def test_differences_see_settings_that_only_one_side_has():
    one = job.resolve({"algorithm": {"name": "standalone"}}, OFFERED).tables()
    other = job.resolve({"algorithm": {"name": "prox"}}, OFFERED).tables()
    assert job.find_differences(one, other) == ["algorithm.mu", "algorithm.name", "algorithm.names"]


def test_a_job_cannot_be_changed_after_reading(path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.load(path, OFFERED).run.seed = 1
