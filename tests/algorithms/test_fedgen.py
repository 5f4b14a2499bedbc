"""FedGen: losses and the mean head in NumPy, what the generator learns, what it changes at clients, and what crosses the wire."""
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
from hpcfl.algorithms.shared_head import HEAD
from hpcfl.training.turns import Modules
from tests.support.feature_methods import CLASSES, CLIENTS, FEW, HEAD_BYTES, SIZE, shares, usual, went
from tests.support.gefl_doubles import watched
from tests.support.in_memory import bits, job, run, step, world

softmax = functools.partial(torch.softmax, dim=-1)


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
    generator, head = algorithm.build_generator().eval(), nn.Linear(SIZE, CLASSES)
    generator.load_state_dict(tree.part(server, "generator"))
    head.load_state_dict({path.removeprefix("head."): server[path] for path in HEAD})
    wished = server["has"].nonzero().flatten().repeat(20)
    made = generator(algorithm.draw_noise(len(wished), torch.Generator().manual_seed(1)), wished)
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
