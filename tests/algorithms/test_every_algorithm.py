"""FedAvg, FedProto, Standalone and the Gaussian discriminant against the formulas they stand for, in NumPy."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcfl import tree
from hpcfl.algorithms import CONFIGS, PLANS
from hpcfl.algorithms.fedavg import FedAvg
from hpcfl.algorithms.fedproto import FedProto, loss
from hpcfl.contract import Algorithm, ClientSite, Phase
from hpcfl.data.partition import Partition
from hpcfl.latents.moments import MODES
from hpcfl.models import fixed_maps
from hpcfl.training.evaluate import bind_model, count_correct, extract_features
from hpcfl.training.turns import Modules
from hpcfl.tree import Tree
from tests.support.in_memory import Run, bits, changed, finite, job, run, step, world

CLASSES, CLIENTS, SIZE = 10, 4, 6
FOUR = {"clients": CLIENTS, "rounds": 2}


def went(name: str, settings=None, **sections) -> Run:
    return run(world(job(name, settings, **({"federation": FOUR} | sections))))


def sizes(found: Run) -> list[int]:
    return [len(part) for part in found.world.split.train]


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
        assert {client: group.architecture for group in state.groups for client in group.clients} == \
            {client: found.world.problem.architecture(client, row) for client in range(3)}


# FedAvg


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


# FedProto


def test_prototypes_are_means_weighted_by_the_images_of_each_class():
    found = went("fedproto")
    labels, sums, counts = found.world.corpus.train_labels, np.zeros((CLASSES, SIZE)), np.zeros(CLASSES)
    for group in found.states[1].groups:
        for client in group.clients:
            z = extract_features(group, found.world.modules[group.architecture], client, found.world.holdings[client].train).double().numpy()
            y = labels[found.world.split.train[client]]
            np.add.at(sums, y, z)
            counts += np.bincount(y, minlength=CLASSES)
    server = found.states[1].server
    assert server["has"].bool().tolist() == (counts > 0).tolist()
    np.testing.assert_allclose(server["prototypes"].numpy(), sums / np.maximum(counts, 1)[:, None], rtol=1e-5, atol=1e-6)


def test_a_class_that_nobody_brought_keeps_its_prototype():
    found = went("fedproto", federation=FOUR | {"participation": 0.25, "rounds": 4}, data={"partition": "disjoint"})
    had, kept = np.zeros(CLASSES, bool), 0
    for place, before, after in zip(found.places, found.states, found.states[1:], strict=False):
        (client,) = found.world.cohort(place.phase, place.row)
        held = np.bincount(found.world.corpus.train_labels[found.world.split.train[client]], minlength=CLASSES) > 0
        old = torch.from_numpy(had & ~held)
        had, kept = had | held, kept + int(old.sum())
        assert after.server["has"].bool().tolist() == had.tolist()
        assert torch.equal(after.server["prototypes"][old], before.server["prototypes"][old])
        assert not after.server["prototypes"][torch.from_numpy(~had)].any()
    assert kept > 0


def test_the_loss_of_fedproto_is_cross_entropy_and_the_mean_squared_distance():
    found = went("fedproto")
    model, shard = found.world.modules["mlp2"]["model"].eval(), found.world.holdings[0].train
    x, y = shard.pixels(slice(0, 8)), shard.labels[:8]
    has, prototypes = torch.ones(CLASSES, dtype=torch.bool), torch.randn(CLASSES, SIZE)
    has[int(y[0])] = False
    with torch.no_grad():
        value, measured = loss(Modules({"model": model}), {"x": x, "y": y},
                               {"prototypes": prototypes, "has": has, "weight": torch.ones(SIZE), "strength": torch.tensor(0.3)})
        z = model.features(x)
        distances = [float((z[i] - prototypes[y[i]]).square().mean()) if has[y[i]] else 0.0 for i in range(8)]
        assert float(value) == pytest.approx(float(F.cross_entropy(model(x), y)) + 0.3 * np.mean(distances), rel=1e-5)
        assert float(measured["alignment"]) == pytest.approx(np.mean(distances), rel=1e-5)


def test_fedproto_sends_prototypes_and_counts_and_no_weight():
    found = went("fedproto")
    assert set(found.accounts[1]["up"].values()) == {4 * CLASSES * SIZE + 8 * CLASSES}
    assert set(found.accounts[1]["down"].values()) == {4 * CLASSES * SIZE + CLASSES}
    assert set(step(found.world, FedProto).publish(found.states[1].server)) == {"prototypes", "has"}


# Standalone


def test_standalone_trains_everybody_and_moves_nothing():
    found = went("standalone")
    assert all(changed(found.state(client, 0), found.state(client)) for client in range(CLIENTS))
    assert all(not sum(account[way].values()) for account in found.accounts for way in ("up", "down"))


def test_a_client_trains_alike_whoever_else_takes_part():
    together = went("standalone")
    subset = went("standalone", federation=FOUR | {"participation": 0.5})
    first = subset.world.cohort(subset.places[0].phase, 0)[0]
    assert bits(together.state(first, 1)) == bits(subset.state(first, 1))


# The Gaussian discriminant


def shrunk(covariance: np.ndarray, count: float, target: str, floor: float) -> np.ndarray:
    """OAS, then the floor (specification, 8.5)."""
    p, trace, square = len(covariance), np.trace(covariance), np.trace(covariance @ covariance)
    rho = min(1.0, ((1 - 2 / p) * square + trace ** 2) / ((count + 1 - 2 / p) * (square - trace ** 2 / p)))
    aim = trace / p * np.eye(p) if target == "iso" else np.diag(np.diag(covariance))
    return (1 - rho) * covariance + rho * aim + max(floor, 1e-6 * trace / p) * np.eye(p)


def densities(z: np.ndarray, y: np.ndarray, x: np.ndarray, mode: str, target: str, floor: float = 1e-4) -> np.ndarray:
    """log N(x; c^y, Sigma^y) but for a constant, of the Gaussians of pooled latents z, (len(x), CLASSES); -inf for a class without any."""
    kind, held = MODES[mode], [label for label in range(CLASSES) if (y == label).any()]
    means = {label: z[y == label].mean(0) for label in held}
    scatter = {label: (z[y == label] - means[label]).T @ (z[y == label] - means[label]) for label in held}
    pooled = sum(scatter.values()) / (len(z) - len(held))
    table = np.full((len(x), CLASSES), -np.inf)
    for label in held:
        count = len(z) if kind.shared else (y == label).sum()
        covariance = pooled if kind.shared else scatter[label] / count
        if kind.full:
            covariance = shrunk(covariance, count, target, floor)
        else:
            variances = np.diag(covariance)
            covariance = np.diag(np.maximum(np.full(len(variances), variances.mean()) if kind.isotropic else variances, floor))
        apart = x - means[label]
        table[:, label] = -0.5 * (apart * np.linalg.solve(covariance, apart.T).T).sum(1) - 0.5 * np.linalg.slogdet(covariance)[1]
    return table


def latents(found: Run, shard) -> np.ndarray:
    config, problem = found.world.job.algorithm, found.world.problem
    map_ = fixed_maps.build(config.common_map, problem.shape, config.common_size, problem.job.run.seed)
    return map_(problem.scale.to_symmetric(shard.pixels(slice(None)))).double().numpy()


def pooled(found: Run) -> tuple[np.ndarray, np.ndarray]:
    shards = [found.world.holdings[client].train for client in range(CLIENTS)]
    return np.concatenate([latents(found, shard) for shard in shards]), np.concatenate([shard.labels.numpy() for shard in shards])


@pytest.mark.parametrize("target", ["iso", "diag"])
@pytest.mark.parametrize("mode", MODES)
def test_the_discriminant_is_that_of_the_pooled_latents(mode, target):
    found = went("gaussian", {"common_size": 12, "covariance": mode, "shrink_target": target}, data={"fraction": 0.3})
    test = found.world.test
    want = densities(*pooled(found), latents(found, test), mode, target)
    for group in found.states[-1].groups:
        for client in group.clients:
            got = bind_model(group, found.world.modules[group.architecture], client)(test.pixels(slice(None))).double().numpy()
            np.testing.assert_allclose(got - got.max(1, keepdims=True), want - want.max(1, keepdims=True), rtol=1e-3, atol=1e-2)
            assert (got.argmax(1) == want.argmax(1)).mean() > 0.99
    assert (want.argmax(1) == test.labels.numpy()).mean() > 0.6, "a classifier that does not classify compares nothing"


@pytest.mark.parametrize("mode", MODES)
def test_a_class_that_nobody_has_is_never_predicted(mode):
    emptied, y = world(job("gaussian", {"common_size": 12, "covariance": mode}, federation=FOUR, data={"fraction": 0.3})), 3
    labels = emptied.corpus.train_labels
    parts = [tuple(part[labels[part] != y] for part in getattr(emptied.split, name)) for name in ("train", "validation", "test")]
    emptied.split = Partition(*parts, emptied.split.public, emptied.split.public_validation)
    found = run(emptied)
    assert finite(found.states[-1].server)
    group, test = found.states[-1].groups[0], emptied.test
    predict = bind_model(group, emptied.modules[group.architecture], group.clients[0])
    assert bool((predict(test.pixels(slice(None)))[:, y] == -torch.inf).all())
    right = count_correct(predict, test, CLASSES)
    assert int(right[y]) == 0 and int(right.sum()) > 0.5 * len(test)


def test_all_clients_have_the_same_discriminant_whatever_their_architecture():
    found = went("gaussian", {"common_size": 12})
    states = [bits(found.state(client)) for client in range(CLIENTS)]
    assert all(state == states[0] for state in states)
    assert len({found.world.problem.architectures[client] for client in range(CLIENTS)}) == 2
