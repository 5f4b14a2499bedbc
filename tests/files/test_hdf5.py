"""HDF5 files are read with their own faults told by name, and nothing in one leads into another file."""

import h5py
import numpy as np
import pytest

from hpcfl.errors import CheckpointError
from hpcfl.files import hdf5, trees
from tests.support.disks import TREES


@pytest.mark.parametrize("way", ["external link", "soft link", "external link to a group", "kept in another file", "virtual dataset", "endless group"])
def test_nothing_leads_a_checkpoint_into_another_file(tmp_path, way):
    trees.write_trees(tmp_path / "other.h5", TREES)
    trees.write_trees(tmp_path / "file.h5", TREES[:1])
    with h5py.File(tmp_path / "file.h5", "r+") as file:
        server = file["server"]
        if way == "external link":
            server["more"] = h5py.ExternalLink("other.h5", "/server/w")
        elif way == "soft link":
            server["more"] = h5py.SoftLink("/server/w")
        elif way == "external link to a group":
            file["000001"] = h5py.ExternalLink("other.h5", "/000001")
        elif way == "kept in another file":
            server.create_dataset("more", (16,), np.uint8, external=[(str(tmp_path / "other.h5"), 0, 16)])
        elif way == "endless group":
            server["more"] = server
        else:
            layout = h5py.VirtualLayout((4000,), np.float32)
            layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "server/w", (4000,))
            server.create_virtual_dataset("more", layout)
    words = "deeper than" if way == "endless group" else f"{way.removesuffix(' to a group')}.*not followed"
    with pytest.raises(CheckpointError, match=words):
        trees.read_trees(tmp_path / "file.h5")


@pytest.fixture
def file(tmp_path):
    """A small file with an attribute, texts and a group."""
    with h5py.File(tmp_path / "small.h5", "w") as file:
        file.attrs.update(name=np.bytes_(b"own"), classes=3)
        file["rounds/loss"] = np.array([0.5, 0.25])
        file["rounds/phase"] = np.array(["train", "größe"], h5py.string_dtype())
        file["rounds/loss"].attrs["unit"] = "nats"
    return tmp_path / "small.h5"


def test_numbers_texts_and_attributes_come_back_as_python_has_them(file):
    with hdf5.reading(file, CheckpointError) as found:
        assert found.attributes == {"name": "own", "classes": 3} and found.members() == ["rounds"] and found.members("rounds") == ["loss", "phase"]
        loss, phase = found.datasets()
        assert found.values(loss).tolist() == [0.5, 0.25] and found.values(loss, slice(1, 2)).tolist() == [0.25]
        assert found.values(phase).tolist() == ["train", "größe"] and found.attribute(loss, "unit") == "nats" and found.attribute(phase, "unit") is None


@pytest.mark.parametrize(("ask", "said"), [
    (lambda found: found.dataset("rounds/other"), "small.h5: has no 'rounds/other'. Try again"),
    (lambda found: found.dataset("rounds"), "'rounds' is not an array"),
    (lambda found: found.members("rounds/loss"), "'rounds/loss' is no group"),
    (lambda found: found.dataset("rounds/loss/below"), "has no 'rounds/loss/below'")])
def test_what_is_not_there_is_told_with_its_path(ask, said, file):
    with hdf5.reading(file, CheckpointError, ". Try again") as found, pytest.raises(CheckpointError, match=said):
        ask(found)


@pytest.mark.parametrize("damage", ["missing", "emptied", "cut", "no HDF5"])
def test_a_file_that_cannot_be_opened_is_named_with_the_way_out(damage, file):
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"emptied": b"", "cut": content[:500], "no HDF5": b"nothing of the kind"}[damage])
    with pytest.raises(CheckpointError, match=r"small.h5: cannot be read as HDF5 \(.+\); it is missing, truncated or damaged. Try again"), \
            hdf5.reading(file, CheckpointError, ". Try again"):
        pass
