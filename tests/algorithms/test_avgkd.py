"""AvgKD: its targets and its loss in NumPy, who teaches whom from which round on, and what that costs."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcfl import tree
from hpcfl.algorithms import avgkd
from hpcfl.algorithms.avgkd import AvgKD
from hpcfl.training.evaluate import bind
from hpcfl.training.turns import Modules
from tests.support.baselines import CLASSES, CLIENTS, FOUR, built, images, softmax, went
from tests.support.in_memory import bits, job, step, world


@pytest.mark.parametrize("target", ["softmax", "mean"])
def test_targets_of_avgkd_put_the_label_and_all_predictions_together(target):
    found = world(job("avgkd", {"target": target}))
    shard, teachers = found.holdings[0].train, [built(found.problem, "cnn1", seed).float() for seed in range(3)]
    got = step(found, AvgKD).mix_targets(shard, [bind(model, model.state_dict()) for model in teachers])
    with torch.no_grad():
        total = np.eye(CLASSES)[shard.labels.numpy()] + sum(softmax(model(shard.pixels()).double().numpy()) for model in teachers)
    np.testing.assert_allclose(got.numpy(), softmax(total) if target == "softmax" else total / 4, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.sum(1).numpy(), 1.0, rtol=1e-5)


def test_the_loss_of_avgkd_is_cross_entropy_with_a_soft_target():
    found = world(job("avgkd"))
    model, (x, y) = built(found.problem, "cnn1", 0), images(found)
    target = softmax(np.random.default_rng(0).normal(size=(8, CLASSES)))
    value = avgkd.soft_cross_entropy(Modules({"model": model}), {"x": x, "target": torch.from_numpy(target)}, {})
    assert float(value) == pytest.approx(-(target * np.log(softmax(model(x).numpy()))).sum(1).mean(), rel=1e-10)
    hard = avgkd.soft_cross_entropy(Modules({"model": model}), {"x": x, "target": F.one_hot(y, CLASSES).double()}, {})
    assert float(hard) == pytest.approx(float(F.cross_entropy(model(x), y)), rel=1e-10)


def test_avgkd_begins_as_fedavg_and_teaches_from_the_second_round_on(monkeypatch):
    seen, targets = [], AvgKD.mix_targets

    def watched(self, shard, teachers):
        seen.append((shard, targets(self, shard, teachers)))
        return seen[-1][1]
    monkeypatch.setattr(AvgKD, "mix_targets", watched)
    found, plain = went("avgkd"), went("fedavg")
    assert {path: leaf for path, leaf in bits(found.states[1].server).items() if not path.startswith("trained/")} == bits(plain.states[1].server)
    assert bits(found.state(0)) != bits(plain.state(0)) and len(seen) == CLIENTS
    for shard, got in seen:
        (client,) = (client for client, held in found.world.holdings.items() if held.train is shard)
        other = {"mlp2": "cnn1", "cnn1": "mlp2"}[found.world.problem.architectures[client]]
        teacher = found.world.problem.model(other).eval()
        teacher.load_state_dict(tree.part(found.states[1].server, other))
        with torch.no_grad():
            want = softmax(np.eye(CLASSES)[shard.labels.numpy()] + softmax(teacher(shard.pixels()).double().numpy()))
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)


def test_the_downlink_of_avgkd_counts_all_models_that_teach():
    found = went("avgkd")
    own = {name: tree.nbytes(found.world.problem.model(name).state_dict()) for name in ("mlp2", "cnn1")}
    for client, name in enumerate(found.world.problem.architectures):
        begin, each = own[name] + sum(own.values()), sum(own.values())                              # the start and the first set, then every new set
        assert [account["down"][client] for account in found.accounts] == [begin, each]
        assert found.accounts[1]["up"][client] == tree.nbytes(tree.select_floating(found.world.problem.model(name).state_dict())) + 8


def test_an_architecture_that_nobody_has_trained_yet_teaches_nobody():
    found = went("avgkd", federation=FOUR | {"participation": 0.25, "rounds": 1})
    (client,) = found.world.cohort(found.places[0].phase, 0)
    trained = found.world.problem.architectures[client]
    other = {"mlp2": "cnn1", "cnn1": "mlp2"}[trained]
    kd = step(found.world, AvgKD)
    message = kd.publish(found.states[-1].server)
    assert {path.split("/")[0] for path in kd.receive(message, trained)} == {trained}
    assert {path.split("/")[0] for path in kd.receive(message, other)} == {trained, other}


def test_avgkd_of_one_architecture_is_fedavg():
    one = {"models": {"names": ["cnn1"]}}
    found, plain = went("avgkd", **one), went("fedavg", **one)
    for client in range(CLIENTS):
        assert bits(found.state(client)) == bits(plain.state(client))
