"""What the tests of the baselines share: runs of four clients, and mean, softmax and divergence in NumPy."""
import numpy as np
import torch

from hpcfl import tree
from hpcfl.contract import Problem
from hpcfl.tree import Tree
from tests.support.in_memory import Run, job, run, world

CLASSES, CLIENTS = 10, 4
FOUR = {"clients": CLIENTS, "rounds": 2}
PUBLIC = {"public_fraction": 0.3, "validation_fraction": 0.2}
QUICK = {"fedprox": {}, "lg_fedavg": {}, "avgkd": {}, "feddf": {"steps": 3, "stage": 2}, "fml": {}}


def went(name: str, settings=None, **sections) -> Run:
    return run(world(job(name, QUICK.get(name, {}) | (settings or {}), **({"federation": FOUR} | sections))))


def sizes(found: Run) -> np.ndarray:
    return np.array([len(part) for part in found.world.split.train], float)


def models(states: dict[int, Tree]) -> dict[int, Tree]:
    return {client: tree.part(state, "model") for client, state in sorted(states.items())}


def before_average(name: str, settings=None, **sections) -> tuple[Run, list[dict[int, Tree]]]:
    """A run, and of each round the clients' models before they took anything over."""
    before: list[dict[int, Tree]] = []

    def keep(state, place):
        before.append(models({client: own for group in state.groups for client, own in group.states().items()}))
    return run(world(job(name, settings, **({"federation": FOUR} | sections))), keep), before


def mean(rows: list[torch.Tensor], weights: np.ndarray) -> np.ndarray:
    return np.tensordot(weights / weights.sum(), np.stack([row.double().numpy() for row in rows]), 1)


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * (np.log(p) - np.log(q))).sum(1).mean())


def built(problem: Problem, architecture: str, seed: int) -> torch.nn.Module:
    """A model in float64 with weights of its own, in eval mode and without gradients."""
    with problem.stream("test", seed).seeding():
        return problem.model(architecture).double().eval().requires_grad_(False)


def images(found, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    shard = found.holdings[0].train
    return shard.pixels(slice(0, count)).double(), shard.labels[:count]
