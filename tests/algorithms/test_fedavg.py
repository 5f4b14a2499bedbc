"""FedAvg within each architecture: the weighted mean in NumPy, when clients have it, and what its kin share with it."""
import numpy as np
import pytest
import torch

from hpcfl import tree
from hpcfl.algorithms.fedavg import FedAvg
from hpcfl.contract import ClientSite
from hpcfl.tree import Tree
from tests.support.baselines import CLIENTS, FOUR, PUBLIC, sizes, went
from tests.support.in_memory import Run, bits, changed, finite, job, run, step, world


def local_models() -> tuple[Run, list[dict[int, Tree]]]:
    """A FedAvg run, and of each round what the clients had before they took over the average."""
    before: list[dict[int, Tree]] = []

    def keep(state, place):
        before.append({client: own for group in state.groups for client, own in group.states().items()})
    return run(world(job("fedavg", federation=FOUR)), keep), before


def test_fedavg_gives_each_architecture_the_mean_of_its_clients_weighted_by_their_images():
    found, before = local_models()
    for architecture in ("mlp2", "cnn1"):
        clients = [client for client in range(CLIENTS) if found.world.problem.architectures[client] == architecture]
        shares = np.array([sizes(found)[client] for client in clients], float)
        server = tree.part(found.states[1].server, architecture)
        assert len(clients) == 2 and any("running_var" in path for path in server) == (architecture == "cnn1")
        for path, leaf in tree.select_floating(server).items():
            rows = np.stack([tree.part(before[0][client], "model")[path].double().numpy() for client in clients])
            np.testing.assert_allclose(leaf.numpy(), np.tensordot(shares / shares.sum(), rows, 1), rtol=1e-5, atol=1e-7)
            assert leaf.dtype == torch.float32


def test_fedavg_carries_integer_buffers_and_does_not_average_them():
    found, before = local_models()
    server, (path,) = found.states[-1].server, [path for path in found.states[-1].server if path.endswith("num_batches_tracked")]
    assert server[path].dtype == torch.int64 and int(server[path]) == 0
    assert int(before[-1][1]["model/" + path.removeprefix("cnn1/")]) == -(-sizes(found)[1] // 16)       # batches of the last round


def test_fedavg_clients_end_each_round_with_the_average():
    found = went("fedavg")
    for client in range(CLIENTS):
        average = tree.part(found.states[-1].server, found.world.problem.architectures[client])
        assert bits(tree.part(found.state(client), "model")) == bits(average)


def test_every_round_of_fedavg_begins_with_what_the_server_has(monkeypatch):
    begun, train_model = [], ClientSite.train_model

    def watched(self, group, *arguments, **options):
        begun.append((self.round, group))
        return train_model(self, group, *arguments, **options)
    monkeypatch.setattr(ClientSite, "train_model", watched)
    found = went("fedavg")
    for round_, group in begun:
        wanted = bits(tree.part(found.states[round_].server, group.architecture))
        assert all(bits(tree.row(group.part("model"), index)) == wanted for index in range(2))
    assert len(begun) == 4


def test_the_global_models_of_fedavg_are_the_averages_of_its_architectures():
    found = went("fedavg", federation=FOUR | {"participation": 0.5})
    average = step(found.world, FedAvg)
    models = average.global_models(average.publish(found.states[-1].server))
    assert {name: architecture for name, (architecture, _) in models.items()} == {"mlp2": "mlp2", "cnn1": "cnn1"}
    assert all(bits(model) == bits(tree.part(found.states[-1].server, name)) for name, (_, model) in models.items())


def test_an_architecture_without_a_client_in_the_cohort_keeps_its_model():
    found = went("fedavg", federation=FOUR | {"participation": 0.25})
    (client,) = found.world.cohort(found.places[0].phase, 0)
    assert {path.split("/")[0] for path in changed(found.states[0].server, found.states[1].server)} == {found.world.problem.architectures[client]}


def test_a_client_of_fedavg_pays_for_its_own_architecture_only():
    found = went("fedavg")
    for client in range(CLIENTS):
        model = tree.part(found.states[0].server, found.world.problem.architectures[client])
        assert [account["down"][client] for account in found.accounts] == [2 * tree.nbytes(model), tree.nbytes(model)]   # the start, then each average
        assert found.accounts[0]["up"][client] == tree.nbytes(tree.select_floating(model)) + 8                  # and its number of images


@pytest.mark.parametrize(("name", "settings"), [
    ("fedprox", {}), ("fedprox", {"norm": "code"}), ("lg_fedavg", {}), ("avgkd", {}), ("avgkd", {"target": "mean"}), ("fml", {}),
    ("feddf", {"lr": 1e-5}), ("feddf", {"lr": 1e-5, "ensemble": "probabilities", "teachers": "architectures"})])
def test_clients_trained_together_end_where_clients_trained_one_by_one_do(name, settings):
    one, together = (went(name, settings, training={"engine": engine}) for engine in ("sequential", "vmap"))
    assert finite(one.states[-1].server)
    for client in range(CLIENTS):
        for path, leaf in one.state(client).items():
            torch.testing.assert_close(together.state(client)[path], leaf, rtol=1e-3, atol=1e-4)
    assert one.accounts[1]["up"] == together.accounts[1]["up"]


@pytest.mark.parametrize("name", ["fedprox", "feddf"])
def test_models_travel_as_in_fedavg(name):
    found, plain = went(name), went("fedavg", data=PUBLIC if name == "feddf" else {})
    for ours, theirs in zip(found.accounts, plain.accounts, strict=True):
        assert ours["up"] == theirs["up"] and ours["down"] == theirs["down"]
