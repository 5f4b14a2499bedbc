"""Which architecture a client has in which round: size classes, schedules, memory budgets."""
import pytest

from hpcfl.errors import JobError
from hpcfl.models import zoo
from hpcfl.models.sizes import Sizes
from hpcfl.settings.job import Models
from tests.support.in_memory import job, world

MEMORY = {"w1": 100e6, "w1@0.5": 40e6, "w1@0.25": 10e6}


def sizes(clients: int = 4, **settings) -> Sizes:
    return Sizes(Models(names=("w1",), **settings), clients, 7, lambda name: MEMORY.get(name, 1e6))


def test_a_size_class_shrinks_every_width_by_a_power_of_the_ratio():
    fixed = sizes(sizes=(0, 1, 2))
    assert [fixed.architecture(client, 0) for client in range(4)] == ["w1", "w1@0.75", "w1@0.5625", "w1"]
    assert fixed.architecture(1, 0) == fixed.architecture(1, 9) and fixed.every == ("w1", "w1@0.5625", "w1@0.75")
    assert sizes(sizes=(3,), clients=1).every == ("w1@0.421875",)


def test_a_class_shrinks_a_width_that_the_name_has_already():
    assert Sizes(Models(names=("w1@0.5", "cnn1"), sizes=(1, 0)), 2, 0, len).every == ("cnn1", "w1@0.375")


def named(clients: int, names: int = 10, **settings) -> list[str]:
    found = Sizes(Models(names=tuple(f"cnn{number}" for number in range(1, names + 1)), **settings), clients, 0, len)
    return [found.architecture(client, 0) for client in range(clients)]


def test_names_go_round_the_clients_unless_blocks_are_asked_for():
    assert named(5, 2) == named(5, 2, assignment="cyclic") == ["cnn1", "cnn2", "cnn1", "cnn2", "cnn1"]


@pytest.mark.parametrize("clients, block, last", [(10, 1, 1), (50, 5, 5), (57, 5, 12), (19, 1, 10)])
def test_blocks_are_equal_and_contiguous_and_the_last_name_takes_the_rest(clients, block, last):
    wanted = [f"cnn{number}" for number in range(1, 10) for _ in range(block)] + ["cnn10"] * last
    assert named(clients, assignment="blocks") == wanted and len(wanted) == clients


@pytest.mark.parametrize("schedule", ["fixed", "rotate"])
def test_every_round_finds_its_architectures_under_blocks_too(schedule):
    blocks = Sizes(Models(names=("cnn1", "cnn2"), assignment="blocks", sizes=(0, 1), size_schedule=schedule), 5, 0, len)
    met = {blocks.architecture(client, row) for client in range(5) for row in range(4)}
    assert tuple(sorted(met)) == blocks.every == ("cnn1", "cnn1@0.75", "cnn2", "cnn2@0.75")


def test_sizes_and_budgets_go_round_the_clients_whatever_the_names_do():
    assert named(4, 2, assignment="blocks", sizes=(0, 1)) == ["cnn1", "cnn1@0.75", "cnn2", "cnn2@0.75"]
    budgets = Sizes(Models(names=("w1", "cnn1"), assignment="blocks", memory_mb=(100.0, 40.0), shrinkage=0.5), 4, 0, lambda name: MEMORY.get(name, 1e6))
    assert [budgets.architecture(client, 0) for client in range(4)] == ["w1", "w1@0.5", "cnn1", "cnn1"]


def test_blocks_need_a_client_for_every_name():
    with pytest.raises(JobError, match=r"each of the M = 10 models\.names .* K = 9 clients.* federation\.clients to at least 10.* 'cyclic'"):
        named(9, assignment="blocks")
    with pytest.raises(JobError, match=r"M = 4 models\.names .* K = 3 clients"):
        world(job("fedavg", models={"names": ["cnn1", "cnn2", "cnn3", "mlp2"], "assignment": "blocks"}))


def test_rotation_moves_every_entry_on_by_a_client_each_round():
    moving = sizes(sizes=(0, 1), size_schedule="rotate")
    assert [[moving.architecture(client, row) for client in range(2)] for row in range(3)] == [["w1", "w1@0.75"], ["w1@0.75", "w1"], ["w1", "w1@0.75"]]


def test_drawn_classes_follow_from_seed_client_and_round_alone():
    one, other = (sizes(sizes=(0, 1, 2), size_schedule="random") for _ in range(2))
    table = [[one.architecture(client, row) for client in range(4)] for row in range(8)]
    assert table == [[other.architecture(client, row) for client in range(4)] for row in range(8)]
    assert len({tuple(row) for row in table}) > 4 and {name for row in table for name in row} == set(one.every) == {"w1", "w1@0.75", "w1@0.5625"}


def test_a_memory_budget_gives_the_largest_size_that_fits():
    budgets = sizes(memory_mb=(100.0, 99.9, 40.0, 10.0), shrinkage=0.5)
    assert [budgets.architecture(client, 0) for client in range(4)] == ["w1", "w1@0.5", "w1@0.5", "w1@0.25"]


def test_a_budget_that_nothing_fits_names_the_smallest_and_what_it_needs():
    with pytest.raises(JobError, match=r"no size of 'w1' trains in 0\.01 MB, even w1@\S+ needs 1\.00 MB; raise the budget"):
        sizes(memory_mb=(0.01,), shrinkage=0.5).architecture(0, 0)


def test_budgets_are_measured_on_the_jobs_own_batches():
    small, large = (world(job("fedavg", models={"names": ["cnn5"], "memory_mb": [0.5]}, training={"batch": batch})).problem.architectures[0]
                    for batch in (4, 64))
    assert zoo.split_name(small)[1] > zoo.split_name(large)[1]


def test_a_model_that_cannot_be_built_says_why():
    with pytest.raises(JobError, match="wanted at least"):
        world(job("fedavg", models={"names": ["w1"], "memory_mb": [50.0]}))
