"""The one loop: every round of the plan, every step of a round; no rank in sight."""
from collections.abc import Iterator
from dataclasses import replace

from hpcfl.federation.exchange import Exchange
from hpcfl.federation.state import Place, State, begin, schedule
from hpcfl.federation.world import World
from hpcfl.training.group import Group
from hpcfl.tree import Tree


def rounds(exchange: Exchange, state: State | None = None) -> Iterator[tuple[State, Place]]:
    """Carry out what is left of the plan, from a state or from the beginning; yields the state after each round, and the round's place."""
    state = state or begin(exchange.world)
    for place in schedule(exchange.world)[state.rows:]:
        exchange.wait()                                            # nobody leaves a barrier before all have come: all ranks begin the round at one time
        exchange.ledger.open()
        state = regroup(exchange.world, state, place.row)
        exchange.delivery.forget(place.phase.steps)
        for step in place.phase.steps:
            for half in (exchange.collect, exchange.refine):       # each lets go of the state before it: at most two states of a client are held
                state = half(step, state, place)
        state = replace(state, rows=state.rows + 1)
        yield state, place


def regroup(world: World, state: State, row: int) -> State:
    """The state with each client in a Group of its architecture of this round; a client whose architecture changes begins anew, with nothing downloaded."""
    wanted, begin_anew = world.teams(row), []
    if wanted == [(group.architecture, group.clients) for group in state.groups]:
        return state

    def form(architecture: str, clients: tuple[int, ...]) -> Group:
        states: dict[int, Tree] = {}
        for group in state.groups:
            stay = set(clients).intersection(group.clients) if group.architecture == architecture else ()
            states |= group.fetch().select(stay).states() if stay else {}
        new = [client for client in clients if client not in states]
        begin_anew.extend(new)
        return Group.from_states(architecture, states | (world.begin_clients(architecture, new).states() if new else {}))
    groups = tuple(world.park(form(*team)) for team in wanted)
    return replace(state, groups=groups, received=state.received | {client: {} for client in begin_anew})
