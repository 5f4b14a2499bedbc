"""The loop in memory, without files around it: a federation small enough to follow, all its states, and what was booked in each round."""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from hpcfl.algorithms import PLANS
from hpcfl.contract import Algorithm, Phase
from hpcfl.federation.exchange import Exchange
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.loop import rounds
from hpcfl.federation.state import Place, State, begin
from hpcfl.federation.world import World
from hpcfl.runs.choices import CHOICES
from hpcfl.settings.job import Job, resolve
from hpcfl.tree import Tree
from hpcfl.wire.communicator import Alone, Communicator

SMALL = {"run": {"device": "cpu", "compile": "off"},
         "data": {"name": "digits", "fraction": 0.15, "partition": "dirichlet", "alpha": 0.3, "validation_fraction": 0.0, "test_fraction": 0.0},
         "models": {"names": ["mlp2", "cnn1"], "feature_size": 6},                  # one without and one with running statistics
         "federation": {"clients": 3, "rounds": 3},
         "training": {"batch": 16}}
WIDTHS = {"models": {"names": ["cnn2_bn"], "sizes": [0, 1], "feature_size": 6}}    # for methods with one global model
OWN = {"lg_fedavg": {"models": {"names": ["cnn2_bn", "cnn1"]}},                     # with one common extractor
       "gefl_f": {"models": {"names": ["cnn2_bn", "cnn1"], "feature_size": 6}},
       "feddf": {"data": {"public_fraction": 0.3, "validation_fraction": 0.2}},
       "heterofl": WIDTHS, "fedrolex": WIDTHS, "fedconv": WIDTHS | {"data": {"public_fraction": 0.4, "validation_fraction": 0.2}}}


def job(name: str, settings: Mapping[str, object] | None = None, **sections: Mapping[str, object]) -> Job:
    """The small job of an algorithm with some settings of its own, and other sections changed."""
    layers = [SMALL, OWN.get(name, {}), sections]
    tables = {section: {key: value for layer in layers for key, value in layer.get(section, {}).items()} for layer in layers for section in layer}
    return resolve(tables | {"algorithm": {"name": name, **(settings or {})}}, CHOICES)


def world(described: Job, comm: Communicator | None = None) -> World:
    """The job's world on the ranks it belongs to; on one unless `comm` says otherwise."""
    return World(described, comm or Communicator(Alone()), torch.device(described.run.device))


def of_steps(monkeypatch: pytest.MonkeyPatch, *kinds: type[Algorithm], comm: Communicator | None = None, **sections: Mapping[str, object]) -> World:
    """The world of a method of one's own, whose one phase has these steps; the small job's in all else."""
    monkeypatch.setitem(PLANS, "standalone", SimpleNamespace(
        plan=lambda config, problem: (Phase("rounds", problem.job.federation.rounds, tuple(kind(config, problem) for kind in kinds)),)))
    return world(job("standalone", **sections), comm)


@dataclass(frozen=True)
class Run:
    """What a run went through: the states, one more than rounds, and the account and place of each round."""

    world: World
    states: list[State]
    accounts: list[dict]
    places: list[Place]

    def state(self, client: int, position: int = -1) -> Tree:
        """A client's own state."""
        return next(group.states()[client] for group in self.states[position].groups if client in group.clients)

    def metric(self, name: str, position: int) -> dict[int, float]:
        """One metric of one round, by client."""
        return self.accounts[position]["metrics"][name]


def run(world: World, before_refine: Callable[[State, Place], None] = lambda state, place: None) -> Run:
    """Carry the world's plan to its end."""
    ledger = Ledger(world.problem.device)
    found = Run(world, [begin(world)], [], [])
    for state, place in rounds(Exchange(world, ledger, before_refine), found.states[0]):
        found.states.append(state)
        found.accounts.append(ledger.close())
        found.places.append(place)
    return found


def step(world: World, kind: type[Algorithm]) -> Algorithm:
    """The one step of a kind in the plan."""
    return next(step for phase in world.plan for step in phase.steps if type(step) is kind)


def bits(state: Tree) -> dict[str, bytes]:
    """Every leaf as bytes, to compare states leaf by leaf to the bit."""
    return {path: leaf.detach().cpu().contiguous().numpy().tobytes() for path, leaf in state.items()}


def changed(one: Tree, other: Tree) -> set[str]:
    """The first two names of the paths in which two states differ: {"model/head", "generator/start"}."""
    before, after = bits(one), bits(other)
    paths = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    return {"/".join(path.replace(".", "/").split("/")[:2]) for path in paths}


def finite(state: Tree) -> bool:
    """Whether no leaf holds NaN or infinity."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in state.values() if leaf.is_floating_point())
