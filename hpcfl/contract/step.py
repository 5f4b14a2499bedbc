"""Step: what an algorithm is, a few verbs over Trees, and the plan that puts its steps in order."""
import copy
from abc import ABCMeta
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from hpcfl import tree
from hpcfl.contract.problem import Problem
from hpcfl.contract.sites import ClientSite, ServerSite
from hpcfl.data.shards import Shard
from hpcfl.errors import LayoutError
from hpcfl.training.group import Group
from hpcfl.training.optimizers import Optimizer
from hpcfl.tree import Tree
from hpcfl.wire.uplink import Uplink

Totals = Mapping[str, Any]                                         # of all clients' Uplinks: a Total or Uploads, which of them the step knows that sent it


@dataclass(frozen=True)
class Update:
    """What a step made of a group: its new state, what it sends up, and one number per client for each metric, name -> (K,)."""

    group: Group
    uplink: Uplink = field(default_factory=Uplink)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class StepType(ABCMeta):
    """The type of step classes: it freezes what they construct, whatever their own __init__ does, in files outside hpcfl too."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        step = super().__call__(*args, **options)
        vars(step)["_frozen"] = True
        return step


class Algorithm(metaclass=StepType):
    """One step of a federated method: state in, state out, no communicator in sight.

    A step overrides what it does differently; every default does nothing. `config` is the [algorithm] section of the job. A step is frozen once it is
    constructed: a checkpoint knows nothing of it, so that what it remembered of a run would be lost, and be another on each rank.
    """

    refines: ClassVar[str] = "refine"                              # what `refine` does, a key of measures.REFINING: reports name the models by it

    def __init__(self, config: Any, problem: Problem):
        self.config, self.problem = config, problem

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute while the step is constructed. Raises: LayoutError afterwards."""
        if "_frozen" in vars(self):
            raise LayoutError(f"'{name}' of {type(self).__name__} is set after its construction, but a step is frozen; what a run remembers belongs in the "
                              "server's or the group's state, and what can be computed again in site.once or site.once_for_all")
        super().__setattr__(name, value)

    def modules(self, architecture: str) -> dict[str, nn.Module]:
        """The networks of a client; their parameters live in Group.state under the names given here.

        A network without parameters in Group.state keeps the weights that it is built with. It is built inside a stream, so that these are the same on all
        ranks and after a restart, and for all architectures unless something is drawn before it that depends on one. This default draws nothing.
        """
        return {"model": copy.deepcopy(self.problem.structure(architecture))}

    def rule(self, name: str, setting: str, lr: float | None = None, **others: Any) -> Optimizer:
        """An update rule at the rate of one of the step's settings, or at an `lr` that follows from it; its gradients are not clipped."""
        value = getattr(self.config, setting)
        at_work = "" if lr in (None, value) else f", at work {lr:g}"
        return Optimizer(name, value if lr is None else lr, rate_setting=f"algorithm.{setting} = {value:g}{at_work}", **others)

    def accept(self, counts: np.ndarray) -> None:
        """Refuse a partition that the step cannot work with; counts: training images per client and class, (K, C). Raises: DataError."""

    def found(self, site: ServerSite) -> Tree:
        """The initial server state."""
        return {}

    def join(self, group: Group, site: ClientSite) -> Group:
        """The initial client state; by default a model for each client, initialised from the client's own stream."""
        def initial(client: int) -> Tree:
            with self.problem.stream("init", client).seeding():
                return self.problem.model(group.architecture).state_dict()
        return group if group.part("model") else group.with_part("model", tree.stack([initial(client) for client in group.clients]))

    def prepare(self, server: Tree, site: ServerSite) -> Tree:
        """The server's state after its own work at the start of a round, before it publishes."""
        return server

    def publish(self, server: Tree) -> Tree:
        """What every client may read."""
        return {}

    def global_models(self, message: Tree) -> Mapping[str, tuple[str, Tree]]:
        """The global models in a message, to be evaluated: name -> (architecture of the zoo, its state_dict)."""
        return {}

    def averages(self, architecture: str) -> tuple[str, ...]:
        """The parts of models that a client of this architecture averages with all clients that name them too; none by default."""
        return ()

    def receive(self, message: Tree, architecture: str) -> Tree:
        """The part of the message that a client of this architecture downloads; by default all of it. The server computes it once for all its clients."""
        return message

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        """Local work of a group and what it sends up."""
        return Update(group)

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        """The next server state. Leaves may be written in place by torch; what NumPy or `.data` writes is not noticed, and does not reach the clients."""
        return server

    def refine(self, group: Group, message: Tree, site: ClientSite) -> Update:
        """Local work on the fresh message, after aggregation: generation and fine-tuning."""
        return Update(group)

    def draw(self, group: Group, message: Tree, site: ClientSite, per_class: int) -> tuple[Tensor, Tensor] | None:
        """Synthetic images of the group's first client to look at, (C, per_class, Cin, H, W) in [0, 1], and has (C,); None where there is no generator."""
        return None

    def seen(self, group: Group, message: Tree, site: ClientSite, x: Tensor) -> Tensor:
        """What samples of `draw` compare with: images (B, C, H, W) as the classifier reads them, in the space of the samples, (B, c, h, w)."""
        return self.problem.scale.to_unit(x)

    def generator_losses(self, group: Group, message: Tree, site: ClientSite, shard: Shard) -> Tensor:
        """The generator's own loss of each image of a shard, (n,) float64; only where a step has one."""
        raise NotImplementedError(f"{type(self).__name__} has no generator that knows a loss of one image")

    @classmethod
    def overrides(cls, verb: str) -> bool:
        """Whether this step does anything of its own under a verb; the loop skips the others."""
        return getattr(cls, verb) is not getattr(Algorithm, verb)


@dataclass(frozen=True)
class Phase:
    """A stretch of rounds of the same steps; each round runs the steps one after the other."""

    name: str
    rounds: int
    steps: tuple[Algorithm, ...]
    everyone: bool = False                                         # all clients take part, whatever federation.participation says

    @property
    def asks(self) -> Algorithm | None:
        """The first of the steps whose message clients are to answer; None where they only refine."""
        return next((step for step in self.steps if step.overrides("train")), None)

    @property
    def refiner(self) -> Algorithm | None:
        """The first of the steps with local work on the fresh message, before which clients are evaluated."""
        return next((step for step in self.steps if step.overrides("refine")), None)


Plan = tuple[Phase, ...]


def plan_rounds(step: type[Algorithm], mixed_images: bool = True) -> Callable[[Any, Problem], Plan]:
    """The `plan` of a method that is one step: a phase named "rounds", federation.rounds rounds of that step.

    `mixed_images`: whether its loss takes images that training.augment has mixed of several classes; where not, the plan raises JobError for such a job.
    """
    def plan(config: Any, problem: Problem) -> Plan:
        if not mixed_images:
            problem.augmentation()
        return (Phase("rounds", problem.job.federation.rounds, (step(config, problem),)),)
    return plan
