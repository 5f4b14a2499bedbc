"""The Gaussian discriminant against the densities of the pooled latents in NumPy."""
import numpy as np
import pytest
import torch

from hpcfl.data.partition import Partition
from hpcfl.latents.moments import MODES
from hpcfl.models import fixed_maps
from hpcfl.training.evaluate import bind_model, count_correct
from tests.support.baselines import CLASSES, CLIENTS, FOUR, went
from tests.support.in_memory import Run, bits, finite, job, run, world


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
