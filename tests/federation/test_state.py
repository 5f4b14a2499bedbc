"""State: what a run is before its first round, and where in the plan each round lies."""
import torch

from hpcfl.federation.state import begin, schedule
from tests.support.in_memory import bits, job, world

PHASES = {"latent": "common", "finetune": "final"}


def test_rounds_are_numbered_inside_their_phase_and_over_all():
    found = world(job("fedvtc", PHASES, federation={"rounds": 3}))
    places = schedule(found)
    assert [(place.phase.name, place.round, place.last) for place in places] == [
        ("statistics", 0, True), ("rounds", 0, False), ("rounds", 1, False), ("rounds", 2, True), ("finetune", 0, True)]
    assert [place.row for place in places] == list(range(5)) and all(place.phase in found.plan for place in places)


def test_a_run_begins_with_every_client_once_and_nothing_downloaded():
    found = world(job("fedavg", federation={"clients": 5}))
    state = begin(found)
    assert sorted(client for group in state.groups for client in group.clients) == list(range(5))
    assert state.received == {client: {} for client in range(5)}
    assert (state.rows, state.version, state.versions) == (0, 0, {})
    assert {path.split("/")[0] for path in state.server} == {"mlp2", "cnn1"}


def test_the_beginning_follows_from_the_job_alone():
    torch.manual_seed(1)
    one = begin(world(job("fedavg")))
    torch.manual_seed(2)
    other = begin(world(job("fedavg")))
    assert bits(one.server) == bits(other.server) and [bits(group.state) for group in one.groups] == [bits(group.state) for group in other.groups]
