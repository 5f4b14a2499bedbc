"""The accounts are those that a run keeps: every name that is booked, and the axes of every dataset of metrics.h5."""
import h5py
import pytest

from hpcfl import accounts
from tests.support.tiny_runs import carry_out, tiny


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The run folder of a method with all kinds of records, and its datasets' shapes."""
    folder = carry_out(tiny("fedvtc", federation={"rounds": 2}), tmp_path_factory.mktemp("accounts") / "run")
    shapes: dict[str, tuple[int, ...]] = {}
    with h5py.File(folder / "metrics.h5") as file:
        file.visititems(lambda name, each: shapes.update({name: each.shape}) if isinstance(each, h5py.Dataset) else None)
    return shapes


def test_every_dataset_has_the_axes_that_are_written_down(recorded):
    sizes = {"K": {5}, "C": {10}, "R": {len_ for name, (len_, *_) in recorded.items() if name == "rounds/phase"}}
    for name, shape in recorded.items():
        letters = accounts.SHAPES.get(name, accounts.SHAPES.get(name.split("/")[0]))
        assert letters, f"{name} is in no line of SHAPES"
        assert len(shape) <= len(letters), name
        for letter, size in zip(letters, shape, strict=False):
            assert sizes.setdefault(letter, {size}) == {size} or letter == ".", f"axis {letter} of {name} is {size}, elsewhere {sizes[letter]}"


def test_what_must_be_there_is_recorded(recorded):
    assert set(accounts.REQUIRED) <= recorded.keys() and set(accounts.GROWING.values()) <= recorded.keys()
    assert set(accounts.ROW.values()) <= set(accounts.GROWING.values())


def test_seconds_and_bytes_are_recorded_under_their_names(recorded):
    kinds = {group: {name.partition("/")[2] for name in recorded if name.startswith(f"{group}/")} for group in ("seconds", "wire")}
    assert kinds["seconds"] == set(accounts.SECONDS) and kinds["wire"] >= set(accounts.EXCHANGES)
