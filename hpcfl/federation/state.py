"""State: all that a run is between two rounds, and where in the plan a round lies."""
from dataclasses import dataclass, field

from hpcfl.contract import Phase
from hpcfl.federation.residency import Parked
from hpcfl.federation.world import World
from hpcfl.training.group import Group
from hpcfl.tree import Tree
from hpcfl.wire.communicator import require_server

Versions = dict[str, int]                                          # part -> version


@dataclass(frozen=True)
class State:
    """All that a run is between two rounds: what a checkpoint holds.

    `version` counts the changes of the server's state, and `versions` says of each part with which change it last came. `received` says for each of this rank's
    clients which version of each part it downloaded: what a device already has is not counted as traffic again. What a step derives from the server's
    state for its message is one more part.
    """

    server: Tree | None                                            # at the server alone
    groups: tuple[Group | Parked, ...]                             # this rank's clients, by architecture; parked while they are not at work
    received: dict[int, Versions]                                  # client -> what it downloaded
    rows: int = 0                                                  # rounds finished, over all phases
    version: int = 0
    versions: Versions = field(default_factory=dict)               # of the parts that have changed since the beginning

    def at_server(self) -> Tree:
        """The server's state, asked for where it is. Raises: RuntimeError on any other rank."""
        return require_server(self.server)


@dataclass(frozen=True)
class Place:
    """Where in the plan a round lies: its phase, and its numbers."""

    phase: Phase
    round: int                                                     # inside the phase
    row: int                                                       # over all phases
    last: bool                                                     # of its phase


def schedule(world: World) -> list[Place]:
    """Every round of the plan in order."""
    places = [(phase, round_) for phase in world.plan for round_ in range(phase.rounds)]
    return [Place(phase, round_, row, round_ == phase.rounds - 1) for row, (phase, round_) in enumerate(places)]


def begin(world: World) -> State:
    """The state before the first round."""
    return State(world.comm.at_server(world.found), tuple(world.join()), {client: {} for client in world.mine})
