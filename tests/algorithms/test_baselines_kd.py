"""AvgKD and FML: their formulas in NumPy, what crosses the wire, what stays with a client; and what all baselines by averages and teachers share."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcfl import tree
from hpcfl.algorithms import avgkd
from hpcfl.algorithms.avgkd import AvgKD
from hpcfl.algorithms.fml import FML
from hpcfl.errors import JobError
from hpcfl.training.evaluate import bind
from hpcfl.training.turns import Modules
from hpcfl.tree import Tree
from tests.support.baselines import CLASSES, CLIENTS, FOUR, PUBLIC, built, images, kl, mean, models, sizes, softmax, went
from tests.support.in_memory import bits, finite, job, step, world


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


# AvgKD


@pytest.mark.parametrize("target", ["softmax", "mean"])
def test_targets_of_avgkd_put_the_label_and_all_predictions_together(target):
    found = world(job("avgkd", {"target": target}))
    shard, teachers = found.holdings[0].train, [built(found.problem, "cnn1", seed).float() for seed in range(3)]
    got = step(found, AvgKD).targets(shard, [bind(model, model.state_dict()) for model in teachers])
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
    seen, targets = [], AvgKD.targets

    def watched(self, shard, teachers):
        seen.append((shard, targets(self, shard, teachers)))
        return seen[-1][1]
    monkeypatch.setattr(AvgKD, "targets", watched)
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


# FML


def losses(found) -> tuple[Modules, Tree, np.ndarray, np.ndarray, np.ndarray]:
    """Two models, a batch, what each says of it, and its labels."""
    modules = Modules({"model": built(found.problem, "cnn1", 0), "meme": built(found.problem, "mlp2", 1)})
    x, y = images(found)
    return modules, {"x": x, "y": y}, *(softmax(each(x).numpy()) for each in (modules.model, modules.meme)), y.numpy()


def test_the_losses_of_fml_are_two_cross_entropies_and_two_divergences():
    found = world(job("fml", {"alpha": 0.3, "beta": 0.8}))
    modules, batch, private, meme, y = losses(found)
    value, measured = step(found, FML).loss(modules, batch, {})
    own = 0.3 * -np.log(private[np.arange(8), y]).mean() + 0.7 * kl(meme, private)
    common = 0.8 * -np.log(meme[np.arange(8), y]).mean() + 0.2 * kl(private, meme)
    assert float(measured["private_loss"]) == pytest.approx(own, rel=1e-10) and float(measured["meme_loss"]) == pytest.approx(common, rel=1e-10)
    assert float(value) == pytest.approx(own + common, rel=1e-10)


def test_each_model_of_fml_follows_its_own_loss_alone():
    found = world(job("fml", {"alpha": 0.3, "beta": 0.8}))
    modules, batch, private, meme, _ = losses(found)
    step(found, FML).loss(modules.requires_grad_(), batch, {})[0].backward()
    for module, teacher, weight in ((modules.model, meme, 0.3), (modules.meme, private, 0.8)):
        got = [parameter.grad.clone() for parameter in module.parameters()]
        module.zero_grad()
        student, q = module(batch["x"]).log_softmax(1), torch.from_numpy(teacher)
        (weight * F.nll_loss(student, batch["y"]) + (1 - weight) * (q * (q.log() - student)).sum(1).mean()).backward()
        for gradient, parameter in zip(got, module.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


def test_the_meme_is_the_mean_of_the_clients_memes_weighted_by_their_images():
    found = went("fml", {"meme": "cnn4"})
    for round_ in (1, 2):
        memes = [tree.part(found.state(client, round_), "meme") for client in range(CLIENTS)]
        server = found.states[round_].server
        assert {path.split("/")[0] for path in server} == {"meme"}
        for path, leaf in tree.select_floating(tree.part(server, "meme")).items():
            np.testing.assert_allclose(leaf.numpy(), mean([meme[path] for meme in memes], sizes(found)), rtol=1e-5, atol=1e-7)
    method = step(found.world, FML)
    global_models = method.global_models(method.publish(found.states[-1].server))
    assert {name: architecture for name, (architecture, _) in global_models.items()} == {"meme": "cnn4"}


def test_private_models_stay_private_and_a_round_moves_one_meme_each_way():
    found = went("fml")
    meme = found.world.problem.model("cnn4").state_dict()
    for account in found.accounts:
        assert set(account["down"].values()) == {tree.nbytes(meme)} and set(account["up"].values()) == {tree.nbytes(tree.select_floating(meme)) + 8}
    states = models({client: found.state(client) for client in range(CLIENTS)})
    assert bits(states[0]) != bits(states[2]) and found.world.problem.architectures[0] == found.world.problem.architectures[2]


def test_fml_whose_private_models_heed_labels_alone_is_standalone():
    found, plain = went("fml", {"alpha": 1.0}), went("standalone")
    for client, own in models({client: found.state(client) for client in range(CLIENTS)}).items():
        for path, leaf in tree.part(plain.state(client), "model").items():
            torch.testing.assert_close(own[path], leaf, rtol=1e-5, atol=1e-6)


def test_fml_whose_memes_heed_labels_alone_averages_them_as_fedavg(monkeypatch):
    plain = went("fedavg", models={"names": ["cnn1"]})
    monkeypatch.setattr(FML, "first", lambda self: tree.part(plain.states[0].server, "cnn1"))
    found = went("fml", {"beta": 1.0, "meme": "cnn1"})
    for path, leaf in tree.select_floating(tree.part(plain.states[-1].server, "cnn1")).items():
        torch.testing.assert_close(found.states[-1].server[f"meme/{path}"], leaf, rtol=1e-4, atol=1e-5)


def test_a_meme_that_is_not_in_the_zoo_is_refused():
    with pytest.raises(JobError, match="algorithm.meme: .*'cnnn4' is not in the zoo; did you mean 'cnn4'"):
        world(job("fml", {"meme": "cnnn4"}))
