"""A run folder is looked into as it was at its last checkpoint, and stays as it is."""
import pytest
import torch

from hpcfl import tree
from hpcfl.errors import CheckpointError, JobError
from hpcfl.runs.revisit import revisit
from tests.support.faults import files
from tests.support.tiny_runs import carry_out, outcome, tiny, write_job


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


def test_the_folder_for_client_states_of_the_machine_that_ran_it_is_not_needed(tmp_path):
    (tmp_path / "scratch").mkdir()
    job = tiny("standalone", residency={"location": "disk", "folder": str(tmp_path / "scratch")})
    folder = carry_out(job, tmp_path / "run")
    (tmp_path / "scratch").rmdir()
    assert revisit(folder)[1].rows == 3


def test_what_is_no_run_or_has_no_checkpoint_is_told(tmp_path):
    with pytest.raises(JobError, match="has no job.toml; wanted the folder of a run"):
        revisit(tmp_path)
    write_job(tmp_path, tiny("standalone"))
    with pytest.raises(CheckpointError, match="has no checkpoint yet; run the job for at least checkpoint.every rounds"):
        revisit(tmp_path)
