"""LG-FedAvg: who averages what, what crosses the wire, and what stays with its client."""
import numpy as np
import pytest
import torch

from hpcfl import tree
from hpcfl.algorithms.lg_fedavg import LgFedAvg
from hpcfl.errors import JobError
from tests.support.baselines import CLASSES, CLIENTS, FOUR, before_average, mean, models, sizes, went
from tests.support.in_memory import bits, job, step, world


def test_the_extractor_is_averaged_over_all_clients_and_the_rest_within_each_architecture():
    found, before = before_average("lg_fedavg")
    server, architectures = found.states[1].server, found.world.problem.architectures
    assert set(architectures) == {"cnn1", "cnn2_bn"}
    for architecture in set(architectures):
        clients = [client for client in range(CLIENTS) if architectures[client] == architecture]
        for path in tree.select_floating(before[0][clients[0]]):
            members = range(CLIENTS) if path.startswith("extractor.") else clients
            got = server[f"{'common' if path.startswith('extractor.') else architecture}/{path}"]
            want = mean([before[0][client][path] for client in members], sizes(found)[list(members)])
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-7)
    assert any("running_var" in path for path in tree.part(server, "common"))


def test_all_models_of_lg_fedavg_have_one_extractor_from_the_first_round_on():
    found = went("lg_fedavg", federation=FOUR | {"participation": 0.25})
    lg = step(found.world, LgFedAvg)
    for state in found.states:
        whole = lg.global_models(lg.publish(state.server))
        assert {name: own for name, (own, _) in whole.items()} == {"cnn1": "cnn1", "cnn2_bn": "cnn2_bn"}
        parts = [{path: leaf for path, leaf in model.items() if path.startswith("extractor.")} for _, model in whole.values()]
        assert parts[0] and bits(parts[0]) == bits(parts[1])
        assert all(model.keys() == found.world.problem.model(name).state_dict().keys() for name, (_, model) in whole.items())


def test_an_architecture_without_a_client_in_the_cohort_gets_the_new_extractor_and_keeps_the_rest():
    found = went("lg_fedavg", federation=FOUR | {"participation": 0.25, "rounds": 1})
    (client,) = found.world.cohort(found.places[0].phase, 0)
    before, after = (bits(state.server) for state in found.states)
    assert {path.split("/")[0] for path in before if before[path] != after[path]} == {"common", found.world.problem.architectures[client]}


def test_a_client_of_lg_fedavg_pays_for_one_model_and_says_once_how_many_images_it_has():
    found = went("lg_fedavg")
    for client in range(CLIENTS):
        model = found.world.problem.model(found.world.problem.architectures[client]).state_dict()
        assert [account["down"][client] for account in found.accounts] == [2 * tree.nbytes(model), tree.nbytes(model)]
        assert found.accounts[0]["up"][client] == tree.nbytes(tree.select_floating(model)) + 8


def test_lg_fedavg_of_one_architecture_is_fedavg():
    one = {"models": {"names": ["cnn1"]}}
    found, plain = went("lg_fedavg", **one), went("fedavg", **one)
    for client in range(CLIENTS):
        assert bits(found.state(client)) == bits(plain.state(client))


def test_the_head_is_common_and_personal_representations_stay_with_their_clients():
    found, before = before_average("lg_fedavg", {"shared": "head", "rest": "personal"}, models={"names": ["mlp2", "cnn1"]})
    head = ("head.weight", "head.bias")
    assert set(found.states[-1].server) == {f"common/{path}" for path in head}
    for round_, local in enumerate(before):
        after = models({client: found.state(client, round_ + 1) for client in range(CLIENTS)})
        for path in head:
            got = found.states[round_ + 1].server[f"common/{path}"]
            np.testing.assert_allclose(got.numpy(), mean([local[client][path] for client in range(CLIENTS)], sizes(found)), rtol=1e-5, atol=1e-7)
            assert all(torch.equal(own[path], got) for own in after.values())
        for client, own in after.items():
            personal = own.keys() - set(head)
            assert personal and all(torch.equal(own[path], local[client][path]) for path in personal)
    assert bits(before[1][0]) != bits(before[1][2]), "two clients of one architecture, each with a model of its own"
    sent = 4 * (CLASSES * 6 + CLASSES)
    assert set(found.accounts[1]["up"].values()) == {sent + 8} and set(found.accounts[1]["down"].values()) == {sent}
    lg = step(found.world, LgFedAvg)
    assert not lg.global_models(lg.publish(found.states[-1].server)), "a head alone is no model"


@pytest.mark.parametrize(("settings", "those", "said"), [
    ({}, {"names": ["cnn1", "mlp2"]}, r"'extractor\.\*' over all clients, but of 'mlp2' that is .*\(16, 64\).* and of 'cnn1' .*\(3, 1, 3, 3\)"),
    ({}, {"names": ["resnet8"]}, r"'extractor\.\*' over all clients, but of 'resnet8' that is empty"),
    ({"shared": "head"}, {"names": ["cnn1", "cnn2"], "feature_size": 0}, r"'head\.\*' over all clients, but of 'cnn2'.*models.feature_size above 0")])
def test_models_without_a_common_part_are_refused(settings, those, said):
    with pytest.raises(JobError, match=said):
        world(job("lg_fedavg", settings, models=those))
