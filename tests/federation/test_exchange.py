"""Exchange: verbs in their order, what is booked for whom, and states that share no memory with messages."""
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from hpcfl.contract import Algorithm, Update
from hpcfl.errors import LayoutError
from hpcfl.federation.exchange import Exchange, call_verb
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.state import begin, schedule
from hpcfl.federation.world import World
from hpcfl.training.group import Group
from hpcfl.wire.uplink import Uplink, Uploads
from tests.support.in_memory import job, of_steps, run, world

ONE = {"federation": {"clients": 2, "rounds": 2}, "models": {"names": ["mlp2"]}}


class Noting(Algorithm):
    """A step with every verb, which notes what is called."""

    called: ClassVar[list[str]] = []

    def found(self, site):
        return {"w": torch.zeros(3), "fixed/w": torch.ones(5)}

    def prepare(self, server, site):
        self.called.append("prepare")
        return server

    def publish(self, server):
        self.called.append("publish")
        return server

    def train(self, group, message, site):
        self.called.append("train")
        return Update(group, Uplink({"w": Uploads({client: {"w": torch.ones(3)} for client in group.clients})}))

    def aggregate(self, server, totals, site):
        self.called.append("aggregate")
        return server | {"w": server["w"] + 1}

    def refine(self, group, message, site):
        self.called.append("refine")
        return Update(group)


def carry_out(found: World, rows: int = 1):
    """The first rounds by hand, and what was called."""
    Noting.called.clear()
    exchange = Exchange(found, Ledger(found.problem.device), lambda state, place: Noting.called.append(f"evaluate version {state.version}"))
    state = begin(found)
    for place in schedule(found)[:rows]:
        for step in place.phase.steps:
            state = exchange.refine(step, exchange.collect(step, state, place), place)
    return exchange, state


def test_a_round_goes_through_the_verbs_in_order(monkeypatch):
    _, state = carry_out(of_steps(monkeypatch, Noting, **ONE))
    assert Noting.called == ["prepare", "publish", "train", "aggregate", "publish", "evaluate version 1", "refine"]
    assert (state.version, state.versions) == (1, {"w": 1}), "prepare gave back the very state, and what is fixed did not change"


def test_verbs_that_a_step_does_not_have_are_not_called(monkeypatch):
    class Alone(Algorithm):
        """Clients train, and nobody hears of it."""

        def train(self, group, message, site):
            assert message == {}
            return Update(group)
    found = run(of_steps(monkeypatch, Alone, **ONE))
    assert found.states[-1].version == 0 and not found.accounts[0]["up"] and sum(found.accounts[0]["down"].values()) == 0


def test_a_client_downloads_a_part_again_only_when_it_has_changed(monkeypatch):
    found = run(of_steps(monkeypatch, Noting, **ONE))
    w, fixed = 3 * 4, 5 * 4
    assert [account["down"][0] for account in found.accounts] == [w + fixed + w, w], "the message of refine is that of the next train"
    assert found.states[-1].received[0] == {"w": 2, "fixed": 0}


def test_clients_of_a_group_share_its_costs_by_their_images():
    found = run(world(job("fedavg", models={"names": ["mlp2"]}, federation={"clients": 3, "rounds": 1})))
    seconds, images = found.metric("seconds", 0), {client: len(holding.train) for client, holding in found.world.holdings.items()}
    assert len(set(images.values())) > 1
    rates = [seconds[client] / images[client] for client in range(3)]
    assert rates == pytest.approx([rates[0]] * 3)


# What a client's verb gives

def group_and_site(monkeypatch, kind: type[Algorithm]):
    found = of_steps(monkeypatch, kind, **ONE)
    (group,) = found.join()
    return found.steps[0], Group("mlp2", group.clients, {"model/w": torch.zeros(2, 3), "model/b": torch.ones(2, 3)}), found.client_site(group, found.plan[0], 0)


def test_a_leaf_written_in_place_becomes_another_tensor_and_the_others_stay_the_same(monkeypatch):
    class InPlace(Algorithm):
        def refine(self, group, message, site):
            group.state["model/w"].add_(1)
            return Update(group)
    step, group, site = group_and_site(monkeypatch, InPlace)
    state = call_verb(step, "refine", group, {}, site).group.state
    assert state["model/w"] is not group.state["model/w"] and state["model/w"].tolist() == [[1.0] * 3] * 2
    assert state["model/b"] is group.state["model/b"]


def test_a_leaf_taken_from_the_message_gets_memory_of_its_own(monkeypatch):
    class Adopting(Algorithm):
        def refine(self, group, message, site):
            return Update(replace(group, state=group.state | {"model/w": message["w"].expand(2, 3)}))
    step, group, site = group_and_site(monkeypatch, Adopting)
    message = {"w": torch.full((3,), 2.0)}
    state = call_verb(step, "refine", group, message, site).group.state
    state["model/w"].zero_()
    assert message["w"].tolist() == [2.0] * 3


def test_a_client_that_writes_into_the_message_is_refused(monkeypatch):
    class Writing(Algorithm):
        def refine(self, group, message, site):
            message["w"].add_(1)
            return Update(group)
    step, group, site = group_and_site(monkeypatch, Writing)
    with pytest.raises(LayoutError, match="Writing.refine, clients 0-1: changed 'w' of the message in place"):
        call_verb(step, "refine", group, {"w": torch.zeros(3)}, site)


def test_an_error_of_client_code_notes_the_verb_and_the_client(monkeypatch):
    class Broken(Algorithm):
        def train(self, group, message, site):
            raise KeyError("labels")
    with pytest.raises(KeyError) as raised:
        run(of_steps(monkeypatch, Broken, **ONE))
    assert raised.value.__notes__ == ["at clients 0-1", "raised in Broken.train, clients 0-1"]
