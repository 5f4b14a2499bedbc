"""FML: its two losses in NumPy, the averaged meme, what crosses the wire, and what stays with a client."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcfl import tree
from hpcfl.algorithms.fml import FML
from hpcfl.errors import JobError
from hpcfl.training.turns import Modules
from hpcfl.tree import Tree
from tests.support.baselines import CLIENTS, built, images, kl, mean, models, sizes, softmax, went
from tests.support.in_memory import bits, job, step, world


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
    monkeypatch.setattr(FML, "init_meme", lambda self: tree.part(plain.states[0].server, "cnn1"))
    found = went("fml", {"beta": 1.0, "meme": "cnn1"})
    for path, leaf in tree.select_floating(tree.part(plain.states[-1].server, "cnn1")).items():
        torch.testing.assert_close(found.states[-1].server[f"meme/{path}"], leaf, rtol=1e-4, atol=1e-5)


def test_a_meme_that_is_not_in_the_zoo_is_refused():
    with pytest.raises(JobError, match="algorithm.meme: .*'cnnn4' is not in the zoo; did you mean 'cnn4'"):
        world(job("fml", {"meme": "cnnn4"}))
