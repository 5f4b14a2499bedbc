"""A run is looked into as it was at its last checkpoint, and left as it is."""
import pytest
import torch

from hpcfl import tree
from hpcfl.errors import CheckpointError, JobError
from hpcfl.runs.revisit import revisit
from tests.support.faults import files
from tests.support.tiny_runs import carry_out, outcome, tiny


def test_the_state_is_that_of_the_last_checkpoint_and_no_byte_of_the_run_changes(tmp_path):
    job = tiny("standalone", federation={"rounds": 2}, residency={"location": "disk", "folder": str(tmp_path)})
    folder = carry_out(job, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    world, state = revisit(folder)
    assert state.rows == 2 and world.clients == 5 and sorted(client for group in state.groups for client in group.clients) == list(range(5))
    assert world.job.residency.folder == "", "the folder of its states may be on another machine"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(JobError, match="has no job.toml; wanted the folder of a run"):
        revisit(tmp_path)


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "job.toml").write_text(tiny("standalone").to_toml())
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        revisit(tmp_path)


def test_the_world_and_the_state_are_those_of_the_last_checkpoint(whole):
    job, _, folder = whole
    before = files(folder)
    world, state = revisit(folder)
    held = outcome(folder)
    assert world.job == job and state.rows == held.manifest["rows"] == 4 and files(folder) == before
    states = {client: own for group in state.groups for client, own in group.fetch().states().items()}
    assert states.keys() == held.clients.keys()
    for client, own in states.items():
        model = tree.part(held.clients[client], "model")
        assert model.keys() == tree.part(own, "model").keys() and all(torch.equal(leaf, own[f"model/{path}"]) for path, leaf in model.items())
