"""What holds for every method of PLANS: a config, a plan of steps, and clients that change their size."""
import pytest

from hpcfl.algorithms import CONFIGS, PLANS
from hpcfl.contract import Algorithm, Phase
from tests.support.in_memory import finite, job, run, world


@pytest.mark.parametrize("name", PLANS)
def test_every_algorithm_has_a_config_and_a_plan_of_steps(name):
    built = world(job(name))
    assert type(built.job.algorithm) is CONFIGS[name]
    assert built.plan and all(isinstance(phase, Phase) and phase.rounds >= 1 and phase.steps for phase in built.plan)
    assert all(isinstance(each, Algorithm) for phase in built.plan for each in phase.steps)
    assert len({phase.name for phase in built.plan}) == len(built.plan), "two phases of one name would share their random streams"


@pytest.mark.parametrize("name", ["standalone", "fedavg", "heterofl", "fedrolex", "fedvtc"])
def test_clients_may_change_their_size_from_round_to_round(name):
    found = run(world(job(name, models={"names": ["cnn2_bn"], "sizes": [0, 1, 2, 3], "size_schedule": "rotate", "feature_size": 6})))
    assert len(found.states) > 3 and all(finite(found.state(client)) for client in range(3))
    for row, state in enumerate(found.states[1:]):
        assert {client: group.architecture for group in state.groups for client in group.clients} == {
            client: found.world.problem.architecture(client, row) for client in range(3)}
