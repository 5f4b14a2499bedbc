"""The loop: every round of the plan in order, from the beginning or from a state, and clients in Groups of their architecture of the round."""
import torch

from hpcfl import tree
from hpcfl.contract import Algorithm, Update
from hpcfl.federation.exchange import Exchange
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.loop import regroup, rounds
from hpcfl.federation.state import begin
from hpcfl.federation.world import World
from tests.support import in_memory
from tests.support.in_memory import bits

ROTATING = {"models": {"names": ["cnn2_bn"], "sizes": [0, 1], "size_schedule": "rotate", "feature_size": 6}, "federation": {"clients": 3, "rounds": 2}}


def exchange_of(world: World) -> Exchange:
    return Exchange(world, Ledger(world.problem.device), lambda state, place: None)


class Counting(Algorithm):
    """A server that counts rounds, and clients that count the rounds that they saw."""

    def found(self, site):
        return {"round": torch.zeros((), dtype=torch.int64)}

    def publish(self, server):
        return server

    def aggregate(self, server, totals, site):
        return {"round": server["round"] + 1}

    def train(self, group, message, site):
        seen = group.part("seen").get("rounds", torch.zeros(len(group.clients), dtype=torch.int64))
        assert int(message["round"]) == site.round
        return Update(group.with_part("seen", {"rounds": seen + 1}))

    def join(self, group, site):
        return super().join(group, site).with_part("seen", {"rounds": torch.zeros(len(group.clients), dtype=torch.int64)})


def test_rounds_are_carried_out_in_order_and_the_state_after_each_is_given(monkeypatch):
    world = in_memory.of_steps(monkeypatch, Counting, federation={"clients": 3, "rounds": 4})
    went = list(rounds(exchange_of(world)))
    assert [(place.row, place.round, place.last) for _, place in went] == [(0, 0, False), (1, 1, False), (2, 2, False), (3, 3, True)]
    assert [(state.rows, int(state.server["round"]), state.version) for state, _ in went] == [(1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 4)]
    assert all(int(own["seen/rounds"]) == 4 for group in went[-1][0].groups for own in group.states().values())


def test_a_state_goes_on_where_it_is_and_an_old_one_stays_what_it_was(monkeypatch):
    world = in_memory.of_steps(monkeypatch, Counting, federation={"clients": 3, "rounds": 4})
    middle = [state for state, _ in rounds(exchange_of(world))][1]
    before = [bits(group.state) for group in middle.groups]
    rest = list(rounds(exchange_of(world), middle))
    assert [place.row for _, place in rest] == [2, 3] and int(rest[-1][0].server["round"]) == 4
    assert [bits(group.state) for group in middle.groups] == before and int(middle.server["round"]) == 2
    assert not list(rounds(exchange_of(world), rest[-1][0])), "a finished plan has a round left"


def test_clients_whose_groups_stay_are_not_regrouped():
    world = in_memory.world(in_memory.job("fedavg"))
    state = begin(world)
    assert regroup(world, state, 1) is state


def test_a_client_whose_architecture_changes_begins_anew_with_nothing_downloaded_and_the_others_go_on():
    world = in_memory.world(in_memory.job("heterofl", **ROTATING))
    first = next(state for state, _ in rounds(exchange_of(world)))
    second = regroup(world, first, 1)
    was, now = ({client: group.architecture for group in state.groups for client in group.clients} for state in (first, second))
    assert was == {0: "cnn2_bn", 1: "cnn2_bn@0.75", 2: "cnn2_bn"} and now == {0: "cnn2_bn@0.75", 1: "cnn2_bn", 2: "cnn2_bn@0.75"}
    assert all(first.received[client] for client in range(3)) and second.received == {0: {}, 1: {}, 2: {}}
    begun = {client: own for group in regroup(world, begin(world), 1).groups for client, own in group.states().items()}
    assert all(tree.equal(own, begun[client]) for group in second.groups for client, own in group.states().items())


def test_a_group_has_at_most_a_chunk_of_clients_of_one_architecture_in_every_round():
    changing = {"federation": {"clients": 7}, "models": {"size_schedule": "rotate"}, "residency": {"chunk": 2, "location": "disk"}}
    world = in_memory.world(in_memory.job("fedrolex", **changing))
    state = begin(world)
    for row in range(3):
        state = regroup(world, state, row)
        assert sorted(client for group in state.groups for client in group.clients) == list(range(7))
        assert {client: group.architecture for group in state.groups for client in group.clients} == {k: world.problem.architecture(k, row) for k in range(7)}
        assert all(len(group.clients) <= 2 and group.clients == group.fetch().clients for group in state.groups)
        assert [(group.architecture, group.clients) for group in state.groups] == sorted((group.architecture, group.clients) for group in state.groups)
