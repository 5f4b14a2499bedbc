"""Examination: how many images the models of a run get right, each different model asked once, however many clients hold it and however often."""
import weakref
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from torch import Tensor

from hpcfl import tree
from hpcfl.data.shards import Shard
from hpcfl.errors import LayoutError
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.residency import Parked
from hpcfl.federation.world import World
from hpcfl.training.evaluate import bind, count_correct
from hpcfl.training.group import Group
from hpcfl.tree import Tree

RightCounts = dict[str, np.ndarray]                                    # {"generalization_correct": (C,), ...}
Identity = tuple[str, str]                                         # of a model: its architecture, and the fingerprint of its bits


class Examination:
    """What one rank knows of the models, from one evaluation to the next.

    Two models that are equal bit for bit answer alike, so that a model is asked on the official test set once: not again for another client that holds
    it, and not for a client that holds a model of the federation, which the ranks ask together. Only what is a client's own is asked for each of them.
    """

    def __init__(self, world: World, ledger: Ledger):
        self.world, self.ledger = world, ledger
        self.common: dict[Identity, np.ndarray] = {}               # the federation's own models that this rank holds, (C,) on the official test set
        self.held: dict[int, tuple[Identity, RightCounts]] = {}        # this rank's clients at the last evaluation
        self.leaves: dict[tuple[int, ...], tuple[weakref.ref, ...]] = {}               # of the models of a group of clients then

    def count_of_federation(self, models: Mapping[str, tuple[str, Tree, int, int]]) -> RightCounts:
        """(C,) of each of the federation's own models over the official test set, at every rank; called by all ranks.

        models: name -> (architecture, state_dict, number of this rank among those who ask the model, their number); a rank that has no part in one lacks it.
        Raises: LayoutError for a model that is not of its architecture.
        """
        identities, shares = dict[str, Identity](), RightCounts()
        with self.ledger("evaluate"):
            for name, (architecture, model, first, every) in models.items():
                module = self.world.problem.structure(architecture)
                if odd := model.keys() ^ module.state_dict().keys():
                    raise LayoutError(f"global model '{name}': '{min(odd)}' is in only one of it and {architecture}; wanted the state_dict of {architecture}")
                identities[name] = architecture, tree.fingerprint(model)
                shares[name] = self._count_right(bind(module, tree.to(model, self.world.problem.device)), self.world.test, first, every)
        with self.ledger("idle"):
            found = self.world.comm.share(_sum_by_name(self.world.comm.gather(shares) or ()))
        self.common = {identity: found[name] for name, identity in identities.items()}
        return found

    def count_of_clients(self, groups: Iterable[Group | Parked]) -> dict[int, RightCounts]:
        """(C,) of each client's model over the official test set and over the client's own parts."""
        with self.ledger("evaluate"):
            known = self.common | {identity: answers["generalization_correct"] for identity, answers in self.held.values()}
            held: dict[int, tuple[Identity, RightCounts]] = {}
            leaves = {}
            for parked in groups:
                held |= self._recall(parked) or self._ask(parked.fetch(), known)
                leaves[parked.clients] = tuple(map(weakref.ref, parked.part("model").values()))
            self.held, self.leaves = held, leaves
        return {client: answers for client, (_, answers) in held.items()}

    def _recall(self, parked: Group | Parked) -> dict[int, tuple[Identity, RightCounts]]:
        """What is known of a group whose models are the very tensors of the last evaluation: it need not be fetched; nothing of another."""
        leaves, now = self.leaves.get(parked.clients, ()), parked.part("model").values()
        same = len(leaves) > 0 and all(before() is leaf for before, leaf in zip(leaves, now, strict=True))
        return {client: self.held[client] for client in parked.clients} if same else {}

    def _ask(self, group: Group, known_out: dict[Identity, np.ndarray]) -> dict[int, tuple[Identity, RightCounts]]:
        """What the clients of a group answer; `known_out` has what models are known to answer on the official test set, and gets what is new."""
        world, found, state, equals = self.world, {}, group.part("model"), dict[Identity, list[int]]()
        for row, fingerprint in enumerate(tree.fingerprints(state)):
            equals.setdefault((group.architecture, fingerprint), []).append(row)
        for identity, rows in equals.items():
            predict = bind(world.modules[group.architecture]["model"], tree.row(state, rows[0]))
            if identity not in known_out:
                known_out[identity] = self._count_right(predict, world.test)
            for client in (group.clients[row] for row in rows):
                before, answers = self.held.get(client, (None, {}))
                own = answers if before == identity else self._count_own(client, predict)
                found[client] = identity, own | {"generalization_correct": known_out[identity]}
        return found

    def _count_own(self, client: int, predict: Callable[[Tensor], Tensor]) -> RightCounts:
        """What a client's model answers on the parts that nobody else has."""
        parts = {"validation": self.world.holdings[client].validation}
        if self.world.job.evaluation.personal:
            parts["personal"] = self.world.personal[client]
        return {f"{name}_correct": self._count_right(predict, shard) for name, shard in parts.items()}

    def _count_right(self, predict: Callable[[Tensor], Tensor], shard: Shard, first: int = 0, every: int = 1) -> np.ndarray:
        return count_correct(predict, shard, self.world.problem.classes, self.world.job.evaluation.batch, first, every).numpy()


def _sum_by_name(parts: Iterable[RightCounts]) -> RightCounts:
    """What ranks counted, added up by name."""
    found: RightCounts = {}
    for part in parts:
        for name, count in part.items():
            found[name] = found.get(name, 0) + count
    return found
