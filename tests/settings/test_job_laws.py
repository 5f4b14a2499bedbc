"""A job that is written out reads back equal, whatever allowed settings it has."""
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from hpcfl.runs.choices import CHOICES
from hpcfl.settings import fields, job
from tests.support.laws import LAW


@dataclass(frozen=True)
class Config:
    rate: float = fields.real(0.5, 0.0)
    steps: int = fields.integer(1, 0)
    kind: str = fields.choice("one", "two")
    on: bool = fields.flag(False)
    note: str = fields.text("")
    names: tuple[str, ...] = fields.words("a")
    plain: float | None = None


OFFERED = {**CHOICES, "algorithm": {"law": Config}}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
FOLDER = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/."), min_size=1, max_size=40)
POSITIVE, SHARE = st.floats(1e-9, 1e9), st.floats(0.0, 0.5)
SETTINGS = {
    "run": {"name": FOLDER, "seed": st.integers(0, 2 ** 40), "device": st.sampled_from(["auto", "cpu"]), "deterministic": st.booleans()},
    "data": {"name": TEXT, "alpha": POSITIVE, "test_fraction": SHARE, "partition": st.sampled_from(["iid", "dirichlet"])},
    "models": {"names": st.lists(TEXT, min_size=1, max_size=3), "sizes": st.lists(st.integers(0, 9), max_size=3).map(lambda found: found or [0]),
               "memory_mb": st.lists(POSITIVE, max_size=2)},
    "residency": {"folder": TEXT},
    "training": {"lr": POSITIVE, "batch": st.integers(1, 2 ** 31), "augment": st.sampled_from([[], ["crop_flip"], ["crop_flip", "mixup"]])},
    "algorithm": {"rate": st.floats(0.0, 1e300), "steps": st.integers(0, 2 ** 62), "kind": st.sampled_from(["one", "two"]), "on": st.booleans(),
                  "note": TEXT, "names": st.lists(TEXT, min_size=1, max_size=3), "plain": st.floats(-1e300, 1e300)}}
TABLES = st.fixed_dictionaries({"algorithm": st.fixed_dictionaries({"name": st.just("law")}, optional=SETTINGS["algorithm"])},
                               optional={name: st.fixed_dictionaries({}, optional=keys) for name, keys in SETTINGS.items() if name != "algorithm"})


@LAW
@given(tables=TABLES)
def test_a_job_that_is_written_out_reads_back_equal(tmp_path, tables):
    read, path = job.resolve(tables, OFFERED), tmp_path / "job.toml"
    path.write_text(read.to_toml(), encoding="utf-8")
    again = job.load(path, OFFERED)
    assert again == read and again.digest() == read.digest() and job.find_differences(again.tables(), read.tables()) == []
    assert job.recall(path, OFFERED) == read
