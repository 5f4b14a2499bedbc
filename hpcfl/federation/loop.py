"""THE loop: phases of rounds of steps; arrows only downward, no rank in sight."""
from collections.abc import Iterator
from dataclasses import replace

from hpcfl.federation.exchange import Exchange
from hpcfl.federation.state import Place, State, begin, schedule
from hpcfl.federation.world import World
from hpcfl.training.group import Group
from hpcfl.tree import Tree


def rounds(exchange: Exchange, state: State | None = None) -> Iterator[tuple[State, Place]]:
    """Run what is left of the plan, from a state or its beginning, yielding the state after each round."""
    state = state or begin(exchange.world)
    for place in schedule(exchange.world)[state.rows:]:
        exchange.wait()                                            # nobody leaves a barrier before all have come: the round begins at one time everywhere
        exchange.ledger.open()
        state = regroup(exchange.world, state, place.row)
        exchange.delivery.forget(place.phase.steps)
        for step in place.phase.steps:
            for half in (exchange.collect, exchange.refine):       # the state before each is let go with it: of a client there are two at most
                state = half(step, state, place)
        state = replace(state, rows=state.rows + 1)
        yield state, place


def regroup(world: World, state: State, row: int) -> State:
    """The state with each client in a Group of its architecture of this round; a client that changes it begins anew, with nothing downloaded."""
    wanted, begun = world.teams(row), []
    if wanted == [(group.architecture, group.clients) for group in state.groups]:
        return state

    def formed(architecture: str, clients: tuple[int, ...]) -> Group:
        states: dict[int, Tree] = {}
        for group in state.groups:
            stay = set(clients).intersection(group.clients) if group.architecture == architecture else ()
            states |= group.fetch().select(stay).states() if stay else {}
        new = [client for client in clients if client not in states]
        begun.extend(new)
        return Group.from_states(architecture, states | (world.begin_clients(architecture, new).states() if new else {}))
    groups = tuple(world.park(formed(*team)) for team in wanted)
    return replace(state, groups=groups, received=state.received | {client: {} for client in begun})
