"""FedGH, FedTGP and FedGen, whose clients share what they know in the space of features, against their formulas in NumPy; what CCVR has in common."""
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpcfl import tree
from hpcfl.algorithms import fedgen
from hpcfl.algorithms.fedgen import FeatureGenerator, FedGen, client_loss, diversity_loss, ensemble_teacher, weighted_teacher
from hpcfl.algorithms.fedtgp import FedTGP, GlobalPrototypes, compute_margin, contrastive_loss
from hpcfl.algorithms.shared_head import HEAD, take_head
from hpcfl.errors import JobError
from hpcfl.training.turns import Modules
from hpcfl.tree import Tree
from hpcfl.wire.uplink import Uploads
from tests.support.feature_methods import CLASSES, CLIENTS, FEW, FOUR, HEAD_BYTES, SIZE, features_of, labels_of, server_site, shares, usual, went
from tests.support.gefl_doubles import watched
from tests.support.in_memory import Run, bits, changed, finite, job, run, step, world

METHODS = pytest.mark.parametrize("name", FEW)
softmax = functools.partial(torch.softmax, dim=-1)


def prototypes_of(found: Run, position: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean features of each client's classes, (n, p), and the classes, client after client."""
    rows, classes = [], []
    for client in range(CLIENTS):
        z, y = features_of(found, client, position), labels_of(found, client)
        for label in np.unique(y):
            rows.append(z[y == label].mean(0))
            classes.append(label)
    return np.stack(rows), np.array(classes)


@METHODS
def test_both_engines_train_alike(name):
    one, other = (went(name, training={"engine": engine})[0].states[-1].server for engine in ("sequential", "vmap"))
    assert one.keys() == other.keys() and finite(one)
    for path in one:
        torch.testing.assert_close(one[path], other[path], rtol=1e-3, atol=1e-4)


@METHODS
def test_features_of_different_sizes_have_nothing_to_share(name):
    with pytest.raises(JobError, match="models.feature_size = 0"):
        went(name, models={"feature_size": 0})


@pytest.mark.parametrize("name", ["fedgh", "fedgen"])
def test_only_heads_are_common_and_all_clients_end_with_the_same(name):
    found, before = usual(name)
    for client in range(CLIENTS):
        own = tree.part(found.state(client), "model")
        assert bits(take_head(own)) == bits(take_head(found.states[-1].server))
        assert changed(before[-1][client], found.state(client)) == {"model/head"}
    (one, other) = (tree.part(found.state(client), "model") for client in (0, 2))              # of one architecture, with extractors of their own
    assert all(not torch.equal(one[path], other[path]) for path in one if path.endswith("weight") and path not in HEAD)


# FedGH


def descended(head: Tree, z: np.ndarray, y: np.ndarray, lr: float, order) -> dict[str, np.ndarray]:
    """SGD of CE(W z + b, y) by hand, one step for each array of indices in `order`."""
    weight, bias = (head[path].double().numpy().copy() for path in HEAD)
    for chosen in order:
        logits = z[chosen] @ weight.T + bias
        error = np.exp(logits - logits.max(1, keepdims=True))
        error = (error / error.sum(1, keepdims=True) - np.eye(CLASSES)[y[chosen]]) / len(chosen)
        weight, bias = weight - lr * error.T @ z[chosen], bias - lr * error.sum(0)
    return dict(zip(HEAD, (weight, bias), strict=True))


@pytest.mark.parametrize(("batch", "passes"), [(1, 1), (4, 2)])
def test_the_global_header_descends_on_the_mean_features_of_each_clients_classes(batch, passes):
    found, _ = went("fedgh", {"server_batch": batch, "server_epochs": passes})
    z, y = prototypes_of(found, 1)
    generator = server_site(found).stream("pairs").torch()
    order = [chosen.numpy() for _ in range(passes) for chosen in torch.randperm(len(y), generator=generator).split(batch)]
    want = descended(found.states[0].server, z, y, 0.1, order)
    for path in HEAD:
        np.testing.assert_allclose(found.states[1].server[path].numpy(), want[path], rtol=1e-4, atol=1e-6)


def test_clients_of_fedgh_begin_a_round_with_the_global_header():
    found, before = went("fedgh", training={"lr": 1e-30})
    for client in range(CLIENTS):
        assert bits(take_head(tree.part(before[0][client], "model"))) == bits(take_head(found.states[0].server))
        assert bits(take_head(tree.part(before[1][client], "model"))) == bits(take_head(found.states[1].server))


def test_a_client_of_fedgh_pays_for_the_header_and_its_own_classes():
    found, _ = usual("fedgh")
    for client in range(CLIENTS):
        held = len(np.unique(labels_of(found, client)))
        assert [account["up"][client] for account in found.accounts] == [held * (4 * SIZE + 4)] * 2
        assert [account["down"][client] for account in found.accounts] == [2 * HEAD_BYTES, HEAD_BYTES]
    assert len({found.accounts[0]["up"][client] for client in range(CLIENTS)}) > 1


# FedTGP


def test_the_margin_is_the_largest_distance_to_the_nearest_or_to_the_furthest_class():
    means = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 4.0], [11.0, 0.0]])                    # classes at (1, 0), (1, 4) and (11, 0)
    classes = torch.tensor([3, 3, 5, 7])
    assert float(compute_margin(means, classes, "nearest", 100.0)) == pytest.approx(10.0)              # nearest: 4, 4 and 10
    assert float(compute_margin(means, classes, "furthest", 100.0)) == pytest.approx(math.hypot(10, 4))
    assert float(compute_margin(means, classes, "nearest", 2.5)) == 2.5
    assert [float(compute_margin(means[:2], classes[:2], rule, 100.0)) for rule in ("nearest", "furthest")] == [0.0, 0.0]


def test_the_contrastive_loss_keeps_ones_own_prototype_nearer_by_the_margin():
    torch.manual_seed(0)
    network, z, y = GlobalPrototypes(CLASSES, SIZE), torch.randn(5, SIZE), torch.tensor([0, 3, 3, 9, 1])
    got = contrastive_loss(Modules({"prototypes": network}), {"z": z, "y": y}, {"margin": torch.tensor(0.7)})
    centres, terms = network().detach().double().numpy(), []
    for row, label in zip(z.double().numpy(), y.tolist(), strict=True):
        distances = np.sqrt(((row - centres) ** 2).sum(1))
        others = np.exp(-np.delete(distances, label)).sum()
        own = np.exp(-(distances[label] + 0.7))
        terms.append(-np.log(own / (own + others)))
    assert float(got.detach()) == pytest.approx(np.mean(terms), rel=1e-5)


def test_the_contrastive_loss_has_a_slope_where_a_prototype_is_met():
    network = GlobalPrototypes(CLASSES, SIZE)
    loss = contrastive_loss(Modules({"prototypes": network}), {"z": network()[2:3].detach(), "y": torch.tensor([2])}, {"margin": torch.tensor(1.0)})
    loss.backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in network.parameters())


def test_trained_prototypes_lie_next_to_those_of_their_own_class():
    found, _ = went("fedtgp", {"server_epochs": 200, "server_lr": 0.05})
    z, noise = 2 * torch.eye(CLASSES, SIZE)[:SIZE], 0.1 * torch.randn(2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    uploads = Uploads({client: {"means": z + noise[client], "classes": torch.arange(SIZE, dtype=torch.int32)} for client in range(2)})
    server = step(found.world, FedTGP).aggregate(found.states[0].server, {"prototypes": uploads}, server_site(found))
    assert torch.cdist(z, server["prototypes"]).argmin(1).tolist() == list(range(SIZE))
    assert server["has"].tolist() == [1] * SIZE + [0] * (CLASSES - SIZE)
    network = GlobalPrototypes(CLASSES, SIZE)
    network.load_state_dict(tree.part(server, "network"))
    torch.testing.assert_close(network().detach(), server["prototypes"])


def test_one_step_of_the_server_follows_the_gradient():
    found, _ = went("fedtgp", {"server_epochs": 1, "server_batch": 1000, "server_lr": 0.5})
    z, y = (torch.from_numpy(array) for array in prototypes_of(found, 1))
    network = GlobalPrototypes(CLASSES, SIZE).double()
    network.load_state_dict(tree.part(found.states[0].server, "network"))
    delta = compute_margin(z, y, "nearest", 100.0)
    logits = -torch.cdist(z, network()) - delta * F.one_hot(y, CLASSES)
    gradients = torch.autograd.grad(F.cross_entropy(logits, y), list(network.parameters()))
    for (path, parameter), gradient in zip(network.named_parameters(), gradients, strict=True):
        want = (parameter - 0.5 * gradient).detach().numpy()
        np.testing.assert_allclose(found.states[1].server[f"network/{path}"].numpy(), want, rtol=1e-4, atol=1e-5)
    assert found.accounts[0]["notes"]["margin"] == pytest.approx(float(delta), rel=1e-4)


def test_fedtgp_without_strength_trains_everybody_alone():
    found, _ = went("fedtgp", {"strength": 0.0})
    alone = run(world(job("standalone", federation=FOUR)))
    for client in range(CLIENTS):
        for path, leaf in alone.state(client).items():
            torch.testing.assert_close(found.state(client)[path], leaf, rtol=1e-5, atol=1e-6)
    guided, _ = usual("fedtgp")
    assert bits(guided.state(0, 1)) == bits(found.state(0, 1))                                  # nothing is known in the first round
    assert bits(guided.state(0, 2)) != bits(found.state(0, 2))


def test_fedtgp_sends_prototypes_and_no_weight():
    found, _ = usual("fedtgp")
    for client in range(CLIENTS):
        assert found.accounts[1]["up"][client] == len(np.unique(labels_of(found, client))) * (4 * SIZE + 4)
        assert found.accounts[1]["down"][client] == 4 * CLASSES * SIZE + CLASSES
    assert set(step(found.world, FedTGP).publish(found.states[-1].server)) == {"prototypes", "has"}


def test_only_classes_that_somebody_brought_have_a_global_prototype():
    found, _ = went("fedtgp", federation=FOUR | {"participation": 0.25, "rounds": 3}, data={"partition": "disjoint"})
    had = np.zeros(CLASSES, bool)
    for place, state in zip(found.places, found.states[1:], strict=True):
        (client,) = found.world.cohort(place.phase, place.row)
        had[np.unique(labels_of(found, client))] = True
        assert state.server["has"].bool().tolist() == had.tolist()
    assert not had.all()


# FedGen


def test_each_head_teaches_by_its_share_of_the_images_of_a_class():
    torch.manual_seed(0)
    logits, y, counts = torch.randn(3, 5, CLASSES), torch.tensor([0, 1, 1, 7, 9]), torch.randint(0, 5, (3, CLASSES)) + 1
    share = counts / counts.sum(0)
    by_hand = np.mean([sum(-float(share[k, y[i]]) * math.log(float(softmax(logits[k, i])[y[i]])) for k in range(3)) for i in range(5)])
    assert float(weighted_teacher(logits, y, share)) == pytest.approx(by_hand, rel=1e-5)
    mean = np.mean([-math.log(float(softmax(logits[:, i].mean(0))[y[i]])) for i in range(5)])
    assert float(ensemble_teacher(logits, y, share)) == pytest.approx(mean, rel=1e-5)


def test_diversity_is_low_where_different_noise_gives_different_features():
    torch.manual_seed(0)
    noise, z = torch.randn(4, 3), torch.randn(4, SIZE)
    products = [float((noise[i] - noise[j]).square().mean() * (z[i] - z[j]).abs().mean()) for i in range(4) for j in range(4)]
    assert float(diversity_loss(noise, z)) == pytest.approx(math.exp(-np.mean(products)), rel=1e-5)
    assert float(diversity_loss(noise, z[:1].expand(4, -1))) == 1.0


def test_the_loss_of_a_client_adds_generated_features_and_what_the_head_makes_of_them():
    found, _ = usual("fedgen")
    model, shard = found.world.modules["mlp2"]["model"].eval(), found.world.holdings[0].train
    x, y = shard.pixels(slice(0, 8)), shard.labels[:8]
    torch.manual_seed(0)
    wished, z_wished, z = torch.tensor([1, 2, 2]), torch.randn(3, SIZE), torch.randn(8, SIZE)
    has = torch.ones(CLASSES, dtype=torch.bool)
    has[int(y[0])] = False
    value, measured = client_loss(Modules({"model": model}), {"x": x, "y": y, "wished": wished, "z_wished": z_wished, "z": z},
                                  {"alpha": torch.tensor(0.5), "beta": torch.tensor(2.0), "has": has})
    with torch.no_grad():
        p, q = softmax(model.head(z)).double(), softmax(model(x)).double()
        rows = [float((p[i] * (p[i] / q[i]).log()).sum()) if has[y[i]] else 0.0 for i in range(8)]
        want = float(F.cross_entropy(model(x), y)) + 0.5 * float(F.cross_entropy(model.head(z_wished), wished)) + 2.0 * np.mean(rows)
    assert float(value.detach()) == pytest.approx(want, rel=1e-5)
    assert float(measured["latent"].detach()) == pytest.approx(np.mean(rows), rel=1e-4)


def test_nothing_flows_back_into_the_teacher_of_a_client():
    model, x, z = nn.Module(), torch.randn(4, 3), torch.randn(4, 3)
    model.head = nn.Linear(3, CLASSES)
    model.forward = lambda x: x @ torch.ones(3, CLASSES)                                        # a classifier that does not use the head
    batch = {"x": x, "y": torch.arange(4), "wished": torch.arange(4), "z_wished": z, "z": z}
    context = {"alpha": torch.tensor(0.0), "beta": torch.tensor(1.0), "has": torch.ones(CLASSES, dtype=torch.bool)}
    client_loss(Modules({"model": model}), batch, context)[0].backward()
    assert not model.head.weight.grad.any()


def test_the_common_head_is_the_mean_of_the_clients_weighted_by_their_images():
    found, before = usual("fedgen")
    for path in HEAD:
        rows = np.stack([before[0][client][f"model/{path}"].double().numpy() for client in range(CLIENTS)])
        np.testing.assert_allclose(found.states[1].server[path].numpy(), np.tensordot(shares(found, range(CLIENTS)), rows, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"teacher": "ensemble", "noise": "uniform"}])
def test_the_generator_learns_features_that_the_heads_take_for_the_wished_class(settings):
    found, _ = went("fedgen", {"server_steps": 300, "server_lr": 0.01, "hidden": 32, "server_decay": 0.0} | settings)
    algorithm, server = step(found.world, FedGen), found.states[-1].server
    generator, head = algorithm.generator().eval(), nn.Linear(SIZE, CLASSES)
    generator.load_state_dict(tree.part(server, "generator"))
    head.load_state_dict({path.removeprefix("head."): server[path] for path in HEAD})
    wished = server["has"].nonzero().flatten().repeat(20)
    made = generator(algorithm.noise(len(wished), torch.Generator().manual_seed(1)), wished)
    assert float((head(made).argmax(1) == wished).float().mean()) > 0.8
    assert found.accounts[1]["notes"]["generator_teacher"] < found.accounts[0]["notes"]["generator_teacher"]


def test_a_generator_without_weight_changes_no_model():
    runs = [went("fedgen", {"alpha": 0.0, "beta": 0.0, "server_steps": steps})[0] for steps in (1, 4)]
    assert bits(tree.part(runs[0].states[-1].server, "generator")) != bits(tree.part(runs[1].states[-1].server, "generator"))
    assert all(bits(runs[0].state(client)) == bits(runs[1].state(client)) for client in range(CLIENTS))
    assert bits(usual("fedgen")[0].state(0)) != bits(runs[1].state(0))


def test_the_optimiser_of_the_generator_goes_on_from_round_to_round_and_stays_at_the_server():
    found, _ = usual("fedgen")
    steps = {float(leaf) for path, leaf in found.states[-1].server.items() if "/step/" in path}
    assert steps == {2.0 * FEW["fedgen"]["server_steps"]}
    assert not any("optimizer" in path for path in step(found.world, FedGen).publish(found.states[-1].server))


def test_classes_that_nobody_has_are_never_wished_for(monkeypatch):
    calls = watched(monkeypatch)
    found = run(world(job("fedgen", FEW["fedgen"], data={"fraction": 0.005, "partition": "iid"}, federation={"clients": 2, "rounds": 2})))
    present = set(np.flatnonzero(found.world.split.counts(found.world.corpus.train_labels, CLASSES).sum(0)).tolist())
    assert 1 < len(present) < CLASSES
    batches = [batch for call in calls for client in call.before.clients for batch in call.batches(client)]
    assert set(torch.cat([batch["wished"] for batch in batches if "wished" in batch]).tolist()) == present


def test_labels_are_drawn_evenly():
    drawn = fedgen.draw_labels(torch.tensor([2, 5]), 400, torch.Generator().manual_seed(0))
    assert drawn.unique().tolist() == [2, 5] and 150 < int((drawn == 2).sum()) < 250


def test_a_client_of_fedgen_pays_for_the_head_and_for_a_generator_that_knows_something():
    found, _ = usual("fedgen")
    generator = FeatureGenerator(CLASSES, SIZE, 32, 8)
    known = HEAD_BYTES + CLASSES + tree.nbytes(tree.select_floating(generator.state_dict()))
    for client in range(CLIENTS):
        assert [account["up"][client] for account in found.accounts] == [HEAD_BYTES + 8 * CLASSES] * 2
        assert [account["down"][client] for account in found.accounts] == [HEAD_BYTES + CLASSES + known, known]
