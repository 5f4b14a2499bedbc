"""Examination: each different model is asked about the official test set once, by every rank's share where all hold it, and everybody gets what is his."""
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from hpcfl import tree
from hpcfl.algorithms.fedavg import FedAvg
from hpcfl.errors import LayoutError
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.world import World
from hpcfl.runs import examination
from hpcfl.runs.examination import Examination
from hpcfl.training.evaluate import count_correct
from hpcfl.training.group import Group
from hpcfl.wire.communicator import Alone, Communicator, connect
from tests.support.tiny_runs import carry_out, outcome, tiny

ALL = {"participation": 1.0, "clients": 6, "rounds": 2}
ONE = {"names": ["mlp2"]}


@pytest.fixture
def passes(monkeypatch) -> Iterator[Counter]:
    """Images that models were asked about, by how many a whole shard has; the passes of a world are those over its test set."""
    asked: Counter = Counter()

    def counted(predict: Callable, shard, classes, batch, first=0, every=1):
        asked[len(shard)] += 1
        return count_correct(predict, shard, classes, batch, first, every)
    monkeypatch.setattr(examination, "count_correct", counted)
    return asked


def examined(case: str = "fedavg", **changes) -> tuple[Examination, World]:
    world = World(tiny(case, **{"models": ONE, "federation": ALL} | changes), Communicator(Alone()), torch.device("cpu"))
    return Examination(world, Ledger(torch.device("cpu"))), world


def stacked(world: World, seeds: list[int]) -> Group:
    """Clients 0, 1, ... with a model by seed."""
    models = {}
    for seed in seeds:
        torch.manual_seed(seed)
        models[seed] = world.problem.structure("mlp2").state_dict() | {path: torch.randn_like(leaf) for path, leaf in
                                                                        world.problem.structure("mlp2").state_dict().items() if leaf.is_floating_point()}
    return Group("mlp2", tuple(range(len(seeds))), tree.join(model=tree.stack([models[seed] for seed in seeds])))


def test_a_round_of_fedavg_asks_each_local_model_and_the_average_once(passes, tmp_path):
    folder = carry_out(tiny("fedavg", models=ONE, federation=ALL, evaluation={"every": 1}), tmp_path / "run")
    images = int(outcome(folder).metrics["evaluation/generalization_count"].sum())
    assert passes[images] == 2 * (6 + 1)


def test_equal_rows_are_asked_once_and_each_client_gets_the_answers_of_its_own_model(passes):
    exam, world = examined()
    seeds = [1, 2, 1, 3, 2, 1]
    found = exam.count_of_clients([stacked(world, seeds)])
    assert passes[len(world.test)] == 3
    for client in range(len(seeds)):
        alone, _ = examined()
        wanted = alone.count_of_clients([stacked(world, seeds).select([client])])[client]
        assert all((found[client][name] == wanted[name]).all() for name in wanted) and found[client].keys() == wanted.keys()
    assert len({found[client]["generalization_correct"].tobytes() for client in (0, 1, 3)}) == 3, "three models that answer alike show nothing"


def test_models_are_known_across_groups_and_stages(passes):
    exam, world = examined()
    whole = stacked(world, [1, 1, 2, 2, 1, 2])
    first = exam.count_of_clients([whole.select([0, 1]), whole.select([2, 3]), whole.select([4, 5])])
    assert passes[len(world.test)] == 2
    swapped = stacked(world, [2, 1, 1, 2, 2, 1])
    then = exam.count_of_clients([swapped])
    assert passes[len(world.test)] == 2, "models that somebody held a stage ago were asked again"
    assert (then[0]["generalization_correct"] == first[2]["generalization_correct"]).all()
    fresh = examined()[0].count_of_clients([swapped])
    assert all((then[client][name] == fresh[client][name]).all() for client in range(6) for name in fresh[client]), "parts of its own are each client's"


def test_a_client_that_keeps_its_model_is_not_asked_about_its_own_parts_again(passes):
    exam, world = examined()
    exam.count_of_clients([stacked(world, [1, 2, 3, 4, 5, 6])])
    before = passes.total()
    exam.count_of_clients([stacked(world, [1, 2, 3, 4, 5, 7])])
    assert passes.total() - before == 3, "the test set, the validation part and the personal part of client 5"


def test_a_model_that_is_equal_to_rounding_is_another(passes):
    exam, world = examined()
    group = stacked(world, [1, 1])
    path, leaf = next((path, leaf) for path, leaf in group.state.items() if leaf.is_floating_point())
    nudged = leaf.clone()
    nudged[1].view(-1)[0] = torch.nextafter(nudged[1].view(-1)[0], torch.tensor(torch.inf))
    exam.count_of_clients([replace(group, state=group.state | {path: nudged})])
    assert passes[len(world.test)] == 2


def test_answers_are_those_of_asking_everybody(tmp_path, monkeypatch):
    """The record of a run is the same, bit for bit, where every model has a name of its own."""
    job = tiny("fedavg", models={"names": ["mlp2", "cnn1"]}, federation=ALL | {"participation": 0.5}, evaluation={"every": 1, "batch": 50})
    once = outcome(carry_out(job, tmp_path / "once")).metrics
    numbers = iter(range(10**6))
    monkeypatch.setattr(tree, "fingerprints", lambda stacked: [str(next(numbers)) for _ in range(len(next(iter(stacked.values()))))])
    each = outcome(carry_out(job, tmp_path / "each")).metrics
    told = [name for name in once if name.startswith("evaluation/")]
    assert len(told) > 5 and all(np.array_equal(once[name], each[name]) for name in told)


def test_names_go_by_bits_types_and_paths():
    rows = {"a": torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, 1.0]]), "b": torch.tensor([1, 1, 1]), "none": torch.zeros(3, 0),
            "half": torch.zeros(3, 2).bfloat16(),
            "flag": torch.tensor([True, True, True])}
    names = tree.fingerprints(rows)
    assert names[0] == names[2] != names[1]
    assert tree.fingerprints(rows | {"a": rows["a"].double()})[0] != names[0] and tree.fingerprints(rows | {"c": rows["b"]})[0] != names[0]
    assert tree.fingerprints({path: leaf.t().contiguous().t() if leaf.dim() == 2 else leaf for path, leaf in rows.items()}) == names, "strides are no bits"


@pytest.mark.mpi(min_size=2)
def test_ranks_share_the_asking_of_a_model_of_the_federation_and_their_clients_need_no_more(passes):
    comm = connect()
    world = World(tiny("fedavg", models=ONE, federation=ALL, evaluation={"batch": 20}), comm, torch.device("cpu"))
    exam, alone = Examination(world, Ledger(torch.device("cpu"))), examined(evaluation={"batch": 20})[0]
    model = tree.row(stacked(world, [1]).part("model"), 0)
    wanted = alone.count_of_federation({"mlp2": ("mlp2", model, 0, 1)})["mlp2"]
    if comm.rank == 0:
        lone = exam.count_of_federation({"mlp2": ("mlp2", model, comm.rank, comm.size), "lone": ("mlp2", model, 0, 1)})
    else:
        lone = exam.count_of_federation({"mlp2": ("mlp2", model, comm.rank, comm.size)})
    assert (lone["mlp2"] == wanted).all() and (lone["lone"] == wanted).all() and wanted.sum() > 0
    before = passes[len(world.test)]
    own = exam.count_of_clients([Group("mlp2", world.mine, tree.join(model=tree.repeat(model, len(world.mine))))])
    assert passes[len(world.test)] == before and all((answers["generalization_correct"] == wanted).all() for answers in own.values())


def test_models_that_no_step_touched_are_not_evaluated_again(tmp_path, monkeypatch):
    evaluated, asked = [], Examination._ask
    monkeypatch.setattr(Examination, "_ask", lambda self, group, known: evaluated.extend(group.clients) or asked(self, group, known))
    folder = carry_out(tiny("fedvtc", federation={"participation": 1.0, "rounds": 1}, evaluation={"every": 1}), tmp_path / "run")
    metrics = outcome(folder).metrics
    assert [stage.decode() for stage in metrics["evaluation/stage"]] == ["end", "before_refine", "end"]
    assert sorted(evaluated) == sorted([*range(5)] * 2), "after the round and after fine-tuning, not before it"
    assert (metrics["evaluation/generalization_correct"][0] == metrics["evaluation/generalization_correct"][1]).all()


def test_a_global_model_that_is_not_of_its_architecture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(FedAvg, "global_models", lambda self, message: {"odd": ("mlp2", tree.part(message, "cnn1"))})
    with pytest.raises(LayoutError, match="global model 'odd': '.*' is in only one of it and mlp2"):
        carry_out(tiny("fedavg"), tmp_path / "run")
