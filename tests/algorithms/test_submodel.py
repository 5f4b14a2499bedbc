"""HeteroFL and FedRolex: what clients get, how they train it, and the mean of every element over those who trained it."""
import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcfl import tree
from hpcfl.algorithms.fedrolex import FedRolex
from hpcfl.algorithms.heterofl import HeteroFL
from hpcfl.algorithms.submodel import GLOBAL, MaskAbsentClasses, Scaler, SubModel, masked_cross_entropy
from hpcfl.contract import ServerSite
from hpcfl.errors import JobError
from hpcfl.federation.ledger import Ledger
from hpcfl.resize import slices
from hpcfl.training.evaluate import bind_model
from hpcfl.training.turns import Modules
from tests.support.in_memory import Run, bits, changed, finite, job, run, step, world

CLASSES, CLIENTS = 10, 4
METHODS = {"heterofl": HeteroFL, "fedrolex": FedRolex}
MODELS = {"names": ["cnn2_bn"], "sizes": [0, 1, 2], "feature_size": 0}
both = pytest.mark.parametrize("name", METHODS)


def built(name: str, settings=None, **sections):
    return world(job(name, settings, **({"models": MODELS, "federation": {"clients": CLIENTS, "rounds": 2}} | sections)))


@functools.cache
def went(name: str) -> Run:
    return run(built(name))


def method(found: Run) -> SubModel:
    return step(found.world, METHODS[found.world.job.algorithm_name])


def uploads(name: str, settings=None, **sections) -> tuple[Run, list[dict[int, tree.Tree]]]:
    """A run, and of each round the models that its clients had trained."""
    before: list[dict[int, tree.Tree]] = []

    def keep(state, place):
        before.append({client: tree.part(own, "model") for group in state.groups for client, own in group.states().items()})
    return run(built(name, settings, **sections), keep), before


def model_after(found: Run, position: int) -> tree.Tree:
    return tree.part(found.states[position].server, GLOBAL)


def labels(found: Run, client: int) -> np.ndarray:
    return found.world.corpus.train_labels[found.world.split.train[client]]


# The mean of every element


@both
@pytest.mark.parametrize("weighting", ["images", "clients"])
@pytest.mark.parametrize("masked", [True, False])
def test_every_element_is_the_mean_of_the_clients_that_trained_it(name, weighting, masked):
    found, before = uploads(name, {"weighting": weighting, "masked_loss": masked}, data={"partition": "dirichlet", "alpha": 0.1})
    algorithm, missing = method(found), 0
    for round_ in range(2):
        old, new = model_after(found, round_), model_after(found, round_ + 1)
        for path in algorithm.parameters:
            total, count = np.zeros(old[path].shape), np.zeros(old[path].shape)
            for client in range(CLIENTS):
                where = np.ix_(*(axis.numpy() for axis in algorithm.kept(found.world.problem.architectures[client], round_)[path]))
                weight = np.full(before[round_][client][path].shape, len(labels(found, client)) if weighting == "images" else 1.0)
                if masked and path.startswith("head."):
                    absent = np.bincount(labels(found, client), minlength=CLASSES) == 0
                    weight[absent], missing = 0.0, missing + absent.sum()
                total[where] += weight * before[round_][client][path].double().numpy()
                count[where] += weight
            want = np.where(count > 0, total / np.where(count > 0, count, 1), old[path].numpy())
            np.testing.assert_allclose(new[path].numpy(), want, rtol=1e-5, atol=1e-7)
    assert bool(missing) == masked, "every client has every class: the comparison says nothing of masks"


def test_who_trains_which_channel_is_counted_by_hand():
    counts = {}
    for name in METHODS:
        found = went(name)
        algorithm, counts[name] = method(found), torch.zeros(16)
        for client in range(CLIENTS):                              # sizes 0, 1, 2, 0 of 16 channels: 16, 12, 9 and 16
            counts[name][algorithm.kept(found.world.problem.architectures[client], 3)["body.conv1.weight"][0]] += 1
    assert counts["heterofl"].int().tolist() == [4] * 9 + [3] * 3 + [2] * 4
    assert counts["fedrolex"].int().tolist() == [2] * 3 + [4] * 9 + [3] * 3 + [2]


def test_channels_that_no_client_reaches_stay_as_they_were():
    found = run(built("heterofl", models=MODELS | {"sizes": [1, 2]}))
    first, last = (model_after(found, position) for position in (0, -1))
    assert torch.equal(first["body.conv1.weight"][12:], last["body.conv1.weight"][12:])
    assert not torch.isclose(first["body.conv1.weight"][:12], last["body.conv1.weight"][:12]).all(dim=(1, 2, 3)).any()
    rolled = run(built("fedrolex", models=MODELS | {"sizes": [1, 2]}, federation={"clients": CLIENTS, "rounds": 6}))
    moved = (model_after(rolled, 0)["body.conv1.weight"] != model_after(rolled, -1)["body.conv1.weight"]).any(dim=(1, 2, 3))
    assert moved.all(), "in six rounds a window of 12 of 16 channels was everywhere"


@both
def test_a_round_without_learning_changes_no_weight(name):
    found = run(built(name, training={"lr": 1e-30, "optimizer": "sgd"}))
    for path in method(found).parameters:
        assert float((model_after(found, 0)[path] - model_after(found, -1)[path]).abs().max()) < 1e-25, path


@both
def test_equal_uploads_of_all_clients_are_their_mean(name):
    found = went(name)
    algorithm, server = method(found), found.states[0].server
    new = tree.transform(tree.select_floating(model_after(found, 0)), lambda leaf: leaf + 1)
    parts = []
    for group in found.states[0].groups:
        one = slices.take(new, algorithm.kept(group.architecture, 0))
        site = found.world.client_site(group, found.world.plan[0], 0)
        parts.append(algorithm.train(group, one, unmoved(site)).uplink)
    totals = {name: piece.total() for name, piece in sum(parts[1:], parts[0]).pieces.items()}
    after = tree.part(algorithm.aggregate(server, totals, site_of(found)), GLOBAL)
    assert all(torch.equal(after[path], new[path]) for path in new)


def unmoved(site):
    """The site of clients whose training changes nothing."""
    class Still(type(site)):
        def train_model(self, group, loss, context=None):
            return group, {}
    return Still(**vars(site))


def site_of(found: Run) -> ServerSite:
    return found.world.server_site(found.world.plan[0], 0, Ledger(found.world.problem.device))


@both
def test_with_one_size_for_all_it_is_fedavg(name):
    same = {"models": {"names": ["cnn2_bn"], "sizes": [0], "feature_size": 0}}
    found, average = run(built(name, {"masked_loss": False}, **same)), run(built("fedavg", **same))
    assert bits(tree.select_floating(model_after(found, -1))) == bits(tree.select_floating(tree.part(average.states[-1].server, "cnn2_bn")))


@both
def test_integer_buffers_are_carried(name):
    found = went(name)
    (path,) = [path for path in model_after(found, -1) if path.endswith("norm2.num_batches_tracked")]
    assert int(model_after(found, -1)[path]) == 0
    assert int(found.state(0)[f"model/{path}"]) > 0


# What norms measured


@both
def test_running_statistics_are_averaged_within_a_width_and_the_global_model_has_those_of_the_widest(name):
    found, before = uploads(name)
    algorithm, server = method(found), found.states[1].server
    wide, narrow = (0, 3), 2
    sizes = np.array([len(labels(found, client)) for client in wide], float)
    assert algorithm.norm_buffers and all("running" in path for path in algorithm.norm_buffers)
    for path in algorithm.norm_buffers:
        rows = np.stack([before[0][client][path].double().numpy() for client in wide])
        np.testing.assert_allclose(server[f"{GLOBAL}/{path}"].numpy(), np.tensordot(sizes / sizes.sum(), rows, 1), rtol=1e-5, atol=1e-7)
        architecture = found.world.problem.architectures[narrow]
        own = slices.take({path: server[f"norms/{architecture}/{path}"]}, algorithm.kept(architecture, 0))
        np.testing.assert_allclose(own[path].numpy(), before[0][narrow][path].numpy(), rtol=1e-6)


@both
def test_a_client_without_company_in_its_width_gets_back_what_its_norms_measured(name):
    found, before = uploads(name)
    algorithm, architecture = method(found), found.world.problem.architectures[2]
    now = algorithm.kept(architecture, 1)
    for path in algorithm.norm_buffers:
        kept = [index for index, channel in enumerate(now[path][0].tolist()) if channel in algorithm.kept(architecture, 0)[path][0].tolist()]
        was = [algorithm.kept(architecture, 0)[path][0].tolist().index(now[path][0][index]) for index in kept]
        got = slices.take({path: found.states[1].server[f"norms/{architecture}/{path}"]}, now)[path]
        torch.testing.assert_close(got[kept], before[0][2][path][was])


# What travels


@both
def test_a_client_downloads_and_uploads_its_slice_and_no_more(name):
    found = went(name)
    for client in range(CLIENTS):
        with torch.random.fork_rng(devices=[]):
            one = tree.select_floating(found.world.problem.model(found.world.problem.architectures[client]).state_dict())
        assert [account["down"][client] for account in found.accounts] == [2 * tree.nbytes(one), tree.nbytes(one)]       # the start, then each mean
        assert {account["up"][client] for account in found.accounts} == {tree.nbytes(one) + 8}
    assert len(set(found.accounts[0]["up"].values())) == 3
    algorithm = method(found)
    received = algorithm.receive(found.states[-1].server, "cnn2_bn@0.75")
    assert {path: leaf.shape for path, leaf in received.items()} == {path: leaf.shape for path, leaf in tree.select_floating(
        algorithm.structure("cnn2_bn@0.75").state_dict()).items()}


def test_without_counts_of_images_only_the_slice_is_sent():
    found = run(built("heterofl", {"weighting": "clients"}))
    assert found.accounts[0]["up"][0] == tree.nbytes(tree.select_floating(model_after(found, 0)))


@both
def test_clients_end_a_round_with_their_slice_for_the_next_and_the_statistics_of_their_width(name):
    found = went(name)
    for client, architecture in enumerate(found.world.problem.architectures):
        whole = tree.select_floating(model_after(found, -1)) | tree.part(found.states[-1].server, f"norms/{architecture}")
        own = tree.select_floating(tree.part(found.state(client), "model"))
        assert bits(own) == bits(slices.take(whole, method(found).kept(architecture, 2)))


@both
def test_the_global_model_has_the_full_size(name):
    found = went(name)
    algorithm = method(found)
    ((owner, (architecture, state)),) = algorithm.global_models(algorithm.publish(found.states[-1].server)).items()
    assert (owner, architecture) == (GLOBAL, "cnn2_bn")
    found.world.problem.model(architecture).load_state_dict(state)
    assert finite(state) and changed(model_after(found, 0), state)


@both
def test_clients_that_change_their_size_take_part(name):
    found = run(built(name, models=MODELS | {"size_schedule": "rotate"}))
    assert [[group.architecture for group in state.groups if 0 in group.clients] for state in found.states[1:]] == [["cnn2_bn"], ["cnn2_bn@0.75"]]
    assert finite(found.states[-1].server)


# Local training


def test_logits_of_missing_classes_are_zero_and_their_rows_get_no_gradient():
    model, held = torch.nn.Linear(3, 4), MaskAbsentClasses(4)
    held.classes.copy_(torch.tensor([True, False, True, False]))
    x, y = torch.randn(5, 3), torch.tensor([0, 2, 2, 0, 0])
    loss = masked_cross_entropy(Modules({"model": model, "held": held}), {"x": x, "y": y}, {})
    logits = model(x).detach()
    logits[:, [1, 3]] = 0.0
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(logits, y)))
    loss.backward()
    assert model.weight.grad[[0, 2]].any(1).all() and not model.weight.grad[[1, 3]].any() and not model.bias.grad[[1, 3]].any()


@pytest.mark.parametrize("masked", [True, False])
def test_each_client_knows_the_classes_of_its_own_images(masked):
    found = run(built("heterofl", {"masked_loss": masked}, data={"partition": "disjoint"}))
    for client in range(CLIENTS):
        held = np.bincount(labels(found, client), minlength=CLASSES) > 0
        assert found.state(client)["held/classes"].tolist() == (held.tolist() if masked else [True] * CLASSES)
        assert not held.all()


def test_a_scaled_slice_has_outputs_of_the_size_of_the_whole():
    """A whole of equal channels: any of them, scaled, give exactly what all give."""
    for name in ("fedconv", "w1", "mlp3"):
        narrow = scaled_modules("heterofl", name, f"{name}@0.5")
        wide = scaled_modules("heterofl", name, name)
        whole = tree.transform(wide.state_dict(), lambda leaf: torch.full_like(leaf, 0.01))
        narrow.load_state_dict(tree.transform(narrow.state_dict(), lambda leaf: torch.full_like(leaf, 0.01)))
        wide.load_state_dict(whole)
        x = torch.rand(3, *narrow.shape)
        torch.testing.assert_close(narrow(x), wide(x), rtol=1e-5, atol=1e-6)


def scaled_modules(method_name: str, *names: str):
    """The network of the last name under a method whose models are these."""
    built_world = world(job(method_name, models={"names": list(names), "feature_size": 0, "sizes": [0]}, data={"image_size": 16}))
    return built_world.modules[names[-1]]["model"]


def test_layers_whose_outputs_stay_whole_and_depthwise_ones_are_not_scaled():
    def hooked(model) -> list[str]:
        return [name for name, module in model.named_modules() if any(isinstance(hook, Scaler) for hook in module._forward_hooks.values())]
    assert hooked(scaled_modules("heterofl", "cnn2", "cnn2@0.5")) == ["body.conv1", "body.conv2"]
    assert hooked(scaled_modules("heterofl", "cnn2")) == []
    found = world(job("heterofl", {"scaler": False}, models={"names": ["cnn2", "cnn2@0.5"], "feature_size": 0, "sizes": [0]}))
    assert hooked(found.modules["cnn2@0.5"]["model"]) == []
    names = hooked(scaled_modules("heterofl", "mobilenet_v2", "mobilenet_v2@0.5"))
    assert "body.stage2_block1.conv.0.0" in names and "body.stage2_block1.conv.1.0" not in names


def test_what_a_client_evaluates_is_what_it_trained():
    found = went("heterofl")
    group = next(group for group in found.states[-1].groups if group.architecture == "cnn2_bn@0.5625")
    x = torch.randn(2, *found.world.problem.shape)
    predict = bind_model(group, found.world.modules[group.architecture], group.clients[0])
    plain = copy.deepcopy(method(found).structure(group.architecture)).eval()
    plain.load_state_dict(tree.part(found.state(group.clients[0]), "model"))
    assert not torch.allclose(predict(x), plain(x))
    for name, layer in plain.named_modules():
        if name in ("body.conv1", "body.conv2"):
            layer.register_forward_hook(lambda layer, inputs, output: output / 0.5625)
    torch.testing.assert_close(predict(x), plain(x).detach())


@both
def test_both_engines_train_alike(name):
    results = [run(built(name, training={"engine": engine, "lr": 0.01})) for engine in ("sequential", "vmap")]
    one, other = (model_after(found, -1) for found in results)
    for path in one:
        torch.testing.assert_close(one[path], other[path], rtol=1e-3, atol=1e-4)


@both
def test_models_of_two_families_have_no_common_global_model(name):
    with pytest.raises(JobError, match="makes one global model"):
        built(name, models={"names": ["cnn1", "cnn2"], "feature_size": 0})


@both
def test_a_size_that_cannot_be_sliced_is_refused_before_the_first_round(name):
    with pytest.raises(JobError, match="models.feature_size = 128 is the size"):
        _ = built(name, models={"names": ["fedconv"], "sizes": [0, 1], "feature_size": 128}).modules
