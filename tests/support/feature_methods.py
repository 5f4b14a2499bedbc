"""What the tests of methods that share features have in common: small runs, and what the clients held in them."""
import functools

import numpy as np

from hpcfl.contract import ServerSite
from hpcfl.federation.ledger import Ledger
from hpcfl.training.evaluate import extract_features
from hpcfl.tree import Tree
from tests.support.in_memory import Run, job, run, world

CLASSES, CLIENTS, SIZE = 10, 4, 6
FOUR = {"clients": CLIENTS, "rounds": 2}
HEAD_BYTES = 4 * CLASSES * (SIZE + 1)
FEW = {"fedgh": {"server_lr": 0.1}, "fedtgp": {"server_epochs": 3}, "fedgen": {"server_steps": 4, "hidden": 8, "alpha": 1.0, "beta": 1.0},
       "ccvr": {"per_class": 6, "epochs": 2}}


def went(name: str, settings=None, **sections) -> tuple[Run, list[dict[int, Tree]]]:
    """A run, and of each round what the clients had before they took over anything new."""
    before: list[dict[int, Tree]] = []

    def keep(state, place):
        before.append({client: own for group in state.groups for client, own in group.states().items()})
    return run(world(job(name, FEW[name] | (settings or {}), **({"federation": FOUR} | sections))), keep), before


usual = functools.cache(went)


def labels_of(found: Run, client: int) -> np.ndarray:
    return found.world.corpus.train_labels[found.world.split.train[client]]


def shares(found: Run, clients) -> np.ndarray:
    sizes = np.array([len(found.world.split.train[client]) for client in clients], float)
    return sizes / sizes.sum()


def features_of(found: Run, client: int, position: int) -> np.ndarray:
    """g_k(x) of a client's training images by its state after some round."""
    group = next(group for group in found.states[position].groups if client in group.clients)
    return extract_features(group, found.world.modules[group.architecture], client, found.world.holdings[client].train).double().numpy()


def server_site(found: Run, phase: int = 0, round_: int = 0) -> ServerSite:
    return found.world.server_site(found.world.plan[phase], round_, Ledger(found.world.problem.device))


def prototypes_of(found: Run, position: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean features of each client's classes, (n, p), and the classes, client after client."""
    rows, classes = [], []
    for client in range(CLIENTS):
        z, y = features_of(found, client, position), labels_of(found, client)
        for label in np.unique(y):
            rows.append(z[y == label].mean(0))
            classes.append(label)
    return np.stack(rows), np.array(classes)
