"""Jobs: reading, defaults, overrides, round trip, and what a wrong file is told."""
import dataclasses
import tomllib
from dataclasses import dataclass

import pytest

from hpcfl import job, kinds
from hpcfl.errors import JobError


@dataclass(frozen=True)
class Config:
    mu: float = kinds.real(0.01, 0.0)
    names: tuple[str, ...] = kinds.words("a")


@dataclass(frozen=True)
class Nothing:
    pass


CONFIGS = {"prox": Config, "standalone": Nothing}
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
        job.resolve(tables, CONFIGS, "some.toml")
    return str(refused.value)


def test_a_file_overrides_defaults_and_leaves_the_rest(path):
    read = job.load(path, CONFIGS)
    assert read.run == job.Run(name="first", seed=3) and read.models == job.Models(names=("cnn1", "mlp")) and read.training == job.Training(lr=1.0)
    assert read.algorithm == Config(mu=0.5)
    assert read.data == job.Data() and read.algorithm_name == "prox"


def test_a_job_needs_only_the_name_of_its_algorithm():
    assert job.resolve({"algorithm": {"name": "standalone"}}, CONFIGS).federation == job.Federation()


def test_every_default_is_a_value_that_a_file_may_hold():
    for section, kind in {**job.SECTIONS, "algorithm": Config}.items():
        for field in dataclasses.fields(kind):
            field.metadata["kind"].check(f"{section}.{field.name}", field.default)


def test_a_resolved_job_reads_back_equal(path):
    read = job.load(path, CONFIGS)
    again = job.resolve(tomllib.loads(read.to_toml()), CONFIGS)
    assert again == read and again.digest() == read.digest()


@pytest.mark.parametrize("name", ['with "quotes"', "back\\slash", "new\nline", "größe", "= [x]"])
def test_any_text_survives_the_round_trip(name):
    read = job.resolve({"run": {"name": name}, "algorithm": {"name": "standalone"}}, CONFIGS)
    assert job.resolve(tomllib.loads(read.to_toml()), CONFIGS).run.name == name


def test_the_resolved_text_spells_out_every_default(path):
    tables = tomllib.loads(job.load(path, CONFIGS).to_toml())
    assert set(tables) == set(job.SECTIONS)
    for section, kind in {**job.SECTIONS, "algorithm": Config}.items():
        assert {field.name for field in dataclasses.fields(kind)} <= set(tables[section])


@pytest.mark.parametrize("override", ["run.seed=4", "training.lr=0.5", "algorithm.mu=0.25", "data.partition=dirichlet"])
def test_any_other_setting_changes_the_digest(path, override):
    assert job.load(path, CONFIGS, [override]).digest() != job.load(path, CONFIGS).digest()


def test_another_algorithm_changes_the_digest():
    one, other = (job.resolve({"algorithm": {"name": name}}, CONFIGS) for name in CONFIGS)
    assert one.digest() != other.digest()


def test_an_override_is_read_as_toml_or_as_a_bare_word(path):
    read = job.load(path, CONFIGS, ["training.lr=1e-2", "models.names=['mlp']", "data.partition=dirichlet", 'run.name="x=y"', "run.compile = 'off'"])
    assert (read.training.lr, read.models.names, read.data.partition, read.run.name, read.run.compile) == (0.01, ("mlp",), "dirichlet", "x=y", "off")


def test_the_last_of_two_overrides_wins(path):
    assert job.load(path, CONFIGS, ["run.seed=4", "run.seed=5"]).run.seed == 5


def test_a_setting_tried_with_another_method_keeps_what_that_method_knows(path):
    configs = CONFIGS | {"other": dataclasses.make_dataclass("Other", [("mu", float, kinds.real(0.02, 0.0))], frozen=True)}
    path.write_text(TEXT + 'names = ["b"]')
    assert job.load(path, configs, ["algorithm.name=other"]).tables()["algorithm"] == {"name": "other", "mu": 0.5}
    assert job.load(path, configs, ["algorithm.name=standalone"]).tables()["algorithm"] == {"name": "standalone"}


@pytest.mark.parametrize("text, overrides, key", [
    (TEXT, ["algorithm.mu=0.1", "algorithm.name=standalone"], "algorithm.mu"),
    (TEXT + "nu = 1", ["algorithm.name=standalone"], "algorithm.nu"),
    (TEXT + "names = ['b']", ["algorithm.name=prox", "algorithm.nu=1"], "algorithm.nu"),
], ids=["asked for", "unknown to both", "the same method"])
def test_other_keys_that_the_method_does_not_know_are_refused(path, text, overrides, key):
    path.write_text(text)
    with pytest.raises(JobError, match=f"unknown key {key}"):
        job.load(path, CONFIGS, overrides)


@pytest.mark.parametrize("override", ["seed=4", "run.seed", "run.=4", ".seed=4", ""])
def test_a_malformed_override_is_shown_the_right_form(path, override):
    with pytest.raises(JobError, match="section.key=value"):
        job.load(path, CONFIGS, [override])


def test_an_unknown_key_is_told_the_nearest_one():
    message = refusal({"training": {"learning_rate": 1, "epoch": 2}, "algorithm": {"name": "prox"}})
    assert "some.toml" in message and "training.learning_rate" in message
    assert "did you mean 'epochs'?" in refusal({"training": {"epoch": 2}, "algorithm": {"name": "prox"}})


def test_an_unknown_section_is_told_the_nearest_one():
    assert "[trainig]; did you mean 'training'?" in refusal({"trainig": {}, "algorithm": {"name": "prox"}})


@pytest.mark.parametrize("old, new", job.RENAMED.items())
def test_a_setting_that_was_renamed_is_refused_with_its_new_name(path, old, new):
    section, key = old.split(".")
    assert f"some.toml: {old} is called {new}" in refusal({section: {key: 1}, "algorithm": {"name": "prox"}})
    with pytest.raises(JobError, match=f"{old} is called {new}"):
        job.load(path, CONFIGS, [f"{old}=1"])


def test_all_renamed_settings_of_a_file_are_named_at_once():
    message = refusal({"data": {"size": 32, "test": 0.0}, "clients": {"chunk": 3}, "algorithm": {"name": "prox"}})
    assert "data.size is called data.image_size, data.test is called data.test_fraction, clients.chunk is called residency.chunk" in message


def test_every_new_name_exists_and_no_old_one_does():
    for old, new in job.RENAMED.items():
        names = [f"{section}.{field.name}" for section, kind in job.SECTIONS.items() if kind is not None for field in dataclasses.fields(kind)]
        assert new in names and old not in names


def test_a_job_recorded_under_old_names_is_recalled_as_it_was_meant(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('''[data]\nsize = 32\ntest = 0.2\nvalues = "unit"\n[models]\nfeatures = 8\n[federation]\nserver = "dedicated"
        [clients]\nresidency = "disk"\nchunk = 3\n[algorithm]\nname = "prox"\nmu = 0.5\n''')
    meant = {"data": {"image_size": 32, "test_fraction": 0.2, "normalization": "unit"}, "models": {"feature_size": 8},
             "federation": {"server_rank": "dedicated"}, "residency": {"location": "disk", "chunk": 3}, "algorithm": {"name": "prox", "mu": 0.5}}
    assert job.recall(path, CONFIGS) == job.resolve(meant, CONFIGS)


def test_what_is_recorded_today_is_recalled_unchanged(path):
    read = job.load(path, CONFIGS)
    path.write_text(read.to_toml())
    assert job.recall(path, CONFIGS) == read and job.differences(job.recorded(tomllib.loads(path.read_text())), read.tables()) == []


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


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(JobError, match="absent.toml: cannot read the job file: No such file"):
        job.load(tmp_path / "absent.toml", CONFIGS)


@pytest.mark.parametrize("content", [b"[run\n", b"[run]\nseed = \n", b"\xff\xfe"], ids=["bracket", "value", "bytes"])
def test_a_file_that_is_not_toml_is_named(path, content):
    path.write_bytes(content)
    with pytest.raises(JobError, match="job.toml: not a TOML file"):
        job.load(path, CONFIGS)


def test_differences_name_the_settings(path):
    one, other = (job.load(path, CONFIGS, overrides).tables() for overrides in ([], ["run.seed=9", "algorithm.mu=0.75"]))
    assert job.differences(one, other) == ["algorithm.mu", "run.seed"]
    assert job.differences(one, one) == []


def test_differences_see_settings_that_only_one_side_has():
    one = job.resolve({"algorithm": {"name": "standalone"}}, CONFIGS).tables()
    other = job.resolve({"algorithm": {"name": "prox"}}, CONFIGS).tables()
    assert job.differences(one, other) == ["algorithm.mu", "algorithm.name", "algorithm.names"]


def test_a_job_cannot_be_changed_after_reading(path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.load(path, CONFIGS).run.seed = 1
