"""What the tests of GeFL and GeFL-F share: small generators, what every call of the training loop was given, and sizes counted layer by layer."""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hpcfl import tree
from hpcfl.contract import ClientSite
from hpcfl.generators.generative import GenerativeModel
from hpcfl.models import zoo
from hpcfl.settings.job import Job
from hpcfl.training.group import Group
from hpcfl.training.turns import Turn
from hpcfl.tree import Tree
from tests.support.in_memory import Run, job, run, world

PLANS = ("gefl", "gefl_f")
GENERATORS = {"cvae": {"latent": 4}, "dcgan": {"width_g": 8, "width_d": 8}, "ddpm": {"steps": 4, "width": 8}, "vtc": {"latent": 8}}
QUICK = {"generator_rounds": 2, "generator_epochs": 1}
CLASSES, CLIENTS, FEATURES = 10, 3, 6                              # of the small job


def described(name: str, generator: str = "cvae", settings=None, **sections) -> Job:
    """A small job with a small generator; where images of digits are too small for the maps of a GAN, they are made larger."""
    size = {"data": {"image_size": 16}} if (name, generator) == ("gefl_f", "dcgan") else {}
    own = QUICK | ({"warmup_rounds": 1} if name == "gefl_f" else {})
    sections = {section: size.get(section, {}) | dict(sections.get(section, {})) for section in size.keys() | sections.keys()}
    return job(name, {"generator": generator} | own | GENERATORS[generator] | (settings or {}), **sections)


def went(name: str, generator: str = "cvae", settings=None, **sections) -> Run:
    return run(world(described(name, generator, settings, **sections)))


@dataclass(frozen=True)
class Fit:
    """One call of the training loop: where, what it was given, and the Group that came out."""

    phase: str
    round: int
    before: Group
    turns: Sequence[Turn]
    source: Callable[[int], Iterable[Tree]]
    after: Group

    @property
    def trains(self) -> set[str]:
        return {name for turn in self.turns for name in turn.trains}

    def batches(self, client: int) -> list[Tree]:
        """The client's batches, made again: they follow from streams alone."""
        return list(self.source(client))


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Fit]:
    """A list that every call of ClientSite.fit from now on adds to."""
    calls, fit = [], ClientSite.fit

    def record(self, group, turns, batches, **options):
        after, metrics = fit(self, group, turns, batches, **options)
        calls.append(Fit(self.phase, self.round, group, turns, batches, after))
        return after, metrics
    monkeypatch.setattr(ClientSite, "fit", record)
    return calls


def phase_of(found: Run, name: str):
    return next(phase for phase in found.world.plan if phase.name == name)


def rows_of(found: Run, name: str) -> list[int]:
    """The positions in `states` that are ends of a phase's rounds."""
    return [place.row + 1 for place in found.places if place.phase.name == name]


def inside(found: Run, phase: str, client: int = 0, round_: int = 0, which: int = -1):
    """A step of a phase, a client's group at the end, what it receives then, and its site in a round."""
    chosen, end = phase_of(found, phase), found.states[-1]
    step, group = chosen.steps[which], next(group for group in end.groups if client in group.clients)
    return step, group, step.receive(step.publish(end.server), group.architecture), found.world.client_site(group, chosen, round_)


def scalars(module: nn.Module) -> int:
    """S of the specification: parameters and running statistics, counted by layer."""
    return sum(parameter.numel() for parameter in module.parameters()) + sum(2 * norm.num_features for norm in norms(module))


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    """The layers with running statistics; each has an integer counter of 8 bytes beside them."""
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]


def classifier(found: Run, client: int) -> nn.Module:
    """A model of the zoo as the client has it, with weights of its own."""
    with found.world.problem.stream("test").seeding():
        return zoo.build(found.world.problem.architectures[client], found.world.problem.shape, CLASSES, FEATURES)


def booked(found: Run, client: int, way: str) -> list[int]:
    """Bytes of one client in each round."""
    return [account[way].get(client, 0) for account in found.accounts]


def mean(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean over clients of (K, ...), in float64."""
    return torch.tensordot(weights.double() / weights.double().sum(), rows.double(), 1)


def optimizer_paths(state: Tree) -> list[str]:
    return [path for path in state if path.startswith("optimizer/")]


def adam(kind: GenerativeModel, networks: dict[str, nn.Module]) -> list[torch.optim.Adam]:
    """torch's own Adam for each loss of a generative model."""
    return [torch.optim.Adam([p for name in names for p in networks[name].parameters()], lr=rule.lr, betas=rule.betas, weight_decay=rule.weight_decay)
            for (names, _), rule in zip(kind.losses(), kind.rules(), strict=True)]


def loaded(networks: dict[str, nn.Module], state: Tree) -> None:
    """Write weights and running statistics into networks in place, so that an optimiser goes on with them."""
    for name, network in networks.items():
        network.load_state_dict(tree.part(state, name), strict=False)              # batch counters do not travel
