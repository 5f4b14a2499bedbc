"""What clients read is what the server has now, on whatever rank they are; what they do not read does not travel there, and nothing travels twice."""
from collections.abc import Callable

import pytest
import torch

from hpcfl import tree
from hpcfl.contract import Algorithm, ClientSite, ServerSite, Update
from hpcfl.federation.delivery import Delivery
from hpcfl.federation.state import State
from hpcfl.training.group import Group
from hpcfl.tree import Tree
from hpcfl.wire.communicator import Alone, Communicator, connect
from hpcfl.wire.traffic import Traffic
from tests.support.in_memory import job, of_steps, run, world
from tests.support.verdict import mpi_assert

FOUR = {"federation": {"clients": 4, "rounds": 4}, "models": {"names": ["mlp2"]}}


class Reading(Algorithm):
    """Clients note what they read; the server does something in each round."""

    def found(self, site: ServerSite) -> Tree:
        return {"w": torch.ones(4), "scale": torch.ones(())}

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        return Update(group, metrics={"read": torch.full((len(group.clients),), float(message["w"].double().mean()))})


class Scaled(Reading):
    """A message that is derived of two parts, of which one never changes."""

    def publish(self, server: Tree) -> Tree:
        return {"w": server["w"] * server["scale"]}

    def aggregate(self, server: Tree, totals, site: ServerSite) -> Tree:
        return server | {"scale": server["scale"] + 1}


class InPlace(Reading):
    """A server that writes into its own tensors, through a view of one."""

    def publish(self, server: Tree) -> Tree:
        return {"w": server["w"]}

    def aggregate(self, server: Tree, totals, site: ServerSite) -> Tree:
        server["w"][:].add_(1)
        return server


class InferenceMode(InPlace):
    """The same where torch does not count writes."""

    @torch.inference_mode()
    def aggregate(self, server: Tree, totals, site: ServerSite) -> Tree:
        server["w"] = server["w"] + 0
        server["w"].add_(1)
        return server


class Renamed(Reading):
    """A message whose leaf is the server's, but another one in each round."""

    def found(self, site: ServerSite) -> Tree:
        return {"a": torch.ones(4), "b": torch.full((4,), 2.0), "round": torch.ones((), dtype=torch.int64)}

    def publish(self, server: Tree) -> Tree:
        return {"w": server["ab"[(int(server["round"]) - 1) % 2]]}

    def aggregate(self, server: Tree, totals, site: ServerSite) -> Tree:
        return server | {"round": server["round"] + 1}


class Received(Scaled):
    """A derived download instead of a derived message."""

    def publish(self, server: Tree) -> Tree:
        return server

    def receive(self, message: Tree, architecture: str) -> Tree:
        return {"w": message["w"] * message["scale"]}


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("kind", [Scaled, InPlace, InferenceMode, Renamed, Received])
def test_clients_of_all_ranks_read_what_the_server_has_in_this_round(kind, monkeypatch):
    comm = connect()
    found = run(of_steps(monkeypatch, kind, comm=comm, **FOUR))
    read = [comm.share(comm.gather(found.metric("read", position))) for position in range(4)]
    wanted = [1.0, 2.0, 1.0, 2.0] if kind is Renamed else [1.0, 2.0, 3.0, 4.0]
    got = [{value for part in parts for value in part.values()} for parts in read]
    mpi_assert(comm, got == [{value} for value in wanted] and all(sum(map(len, parts)) == 4 for parts in read), f"{got}")


@pytest.mark.parametrize(("kind", "down"), [(Scaled, 16), (InPlace, 16), (Received, 16), (Renamed, 16)])
def test_what_is_new_to_a_client_is_booked_and_nothing_else(kind, down, monkeypatch):
    found = run(of_steps(monkeypatch, kind, **FOUR))
    booked = [found.accounts[position]["down"].get(0, 0) for position in range(4)]
    assert booked == ([down, down, 0, 0] if kind is Renamed else [down] * 4)             # Renamed: the client has had both


def test_a_derived_message_that_says_the_same_is_no_news(monkeypatch):
    class Same(Scaled):
        def aggregate(self, server: Tree, totals, site: ServerSite) -> Tree:
            return server | {"scale": server["scale"].clone()}
    found = run(of_steps(monkeypatch, Same, **FOUR))
    assert [found.accounts[position]["down"].get(0, 0) for position in range(4)] == [16, 0, 0, 0] and found.states[-1].version == 4


@pytest.mark.mpi(min_size=2)
def test_a_model_travels_to_the_ranks_of_its_clients_alone_and_back_from_them_alone():
    """Every rank but the first hosts one architecture: what it gets and sends in a round is one model each way."""
    comm = connect()
    names = ["mlp2", "cnn1", "mlp3"][:comm.size - 1] if comm.size > 2 else ["mlp2"]
    described = job("fedavg", models={"names": names}, federation={"clients": comm.size - 1, "rounds": 2, "server_rank": "dedicated"})
    built = world(described, comm)
    sent = [0]
    built.comm.distribute = noting(built.comm, sent)
    found = run(built)
    models = {name: tree.part(found.states[-1].server, name) for name in names} if comm.is_server else {}
    averaged = {name: tree.select_floating(model) for name, model in models.items()}
    sizes = comm.share({name: (tree.nbytes(model), tree.nbytes(averaged[name]), 8 * len(averaged[name])) for name, model in models.items()})
    if comm.rank:
        (group,) = found.states[-1].groups
        down, up, counts = sizes[group.architecture]
        good = comm.traffic.sent_bytes == 2 * (up + counts) and sent[0] == 3 * down              # the beginning, and what came of each round
    else:
        good = comm.traffic.sent_bytes == 3 * sum(sizes[built.problem.architecture(client, 0)][0] for client in range(comm.size - 1))
    mpi_assert(comm, good, f"{comm.traffic.sent_bytes} {sent} {sizes}")


def noting(comm: Communicator, total: list[int]) -> Callable:
    distribute = comm.distribute

    def noted(parcels):
        arrived = distribute(parcels)
        total[0] += tree.nbytes(arrived)
        return arrived
    return noted


@pytest.mark.mpi(min_size=2)
def test_what_is_carried_by_a_round_does_not_depend_on_the_number_of_ranks():
    comm = connect()
    described = job("lg_fedavg", {"shared": "head", "rest": "personal"}, federation={"clients": 5, "rounds": 2})

    def carried(of: Communicator) -> dict[str, int]:
        run(world(described, of))
        return of.traffic.carried
    alone, ranks = carried(Communicator(Alone())), comm.share(comm.gather(carried(comm)))
    mpi_assert(comm, {kind: sum(each[kind] for each in ranks) for kind in alone} == alone and alone["bcast_by_client"] == 5 * alone["bcast"] > 0
               and alone["reduce_by_client"] == 5 * alone["reduce"] > 0, f"{alone} {ranks}")


class Serving:
    """What Delivery asks of the ranks, with nobody there but the server; it notes what would travel where."""

    size, rank, is_server = 3, 0, True

    def __init__(self):
        self.travelled: list[dict[tuple[int, ...], set[str]]] = []
        self.traffic = Traffic()

    def share(self, value):
        return value

    def distribute(self, parcels):
        self.travelled.append({audience: set(parcel) for audience, parcel in parcels.items()})
        return {path: leaf for parcel in parcels.values() for path, leaf in parcel.items()}


def delivering(server: Tree, version: int = 0, versions: dict[str, int] | None = None) -> State:
    return State(server, (), {}, version=version, versions=versions or {})


def with_verbs(step: Algorithm, **verbs: Callable) -> Algorithm:
    """A step like another one but for some verbs, which are given without self."""
    return type("Another", (type(step),), {name: staticmethod(verb) for name, verb in verbs.items()})(step.config, step.problem)


def test_what_a_rank_has_does_not_travel_to_it_again(monkeypatch):
    step = with_verbs(of_steps(monkeypatch, Reading, Scaled, **FOUR).steps[1], publish=lambda server: server,
                      receive=lambda message, architecture: {path: message[path] for path in ("all", architecture)})
    comm, server = Serving(), {"all": torch.ones(2), "one": torch.ones(3), "two": torch.ones(4)}
    delivery = Delivery(comm, (0, 1, 2, 1))
    delivery.publish(step, delivering(server), {"one": [1], "two": [0]})
    delivery.publish(step, delivering(server), {"one": [1, 3]})     # rank 1 has it
    delivery.publish(step, delivering(server), {"one": [2, 1]})     # rank 2 comes later
    later = server | {"two": torch.zeros(4)}
    delivery.publish(step, delivering(later, 1, {"two": 1}), {"one": [1, 2], "two": [1]})
    assert comm.travelled == [{(0, 1): {"all", "one"}}, {(0, 2): {"all", "one"}}, {(0, 1): {"two"}}]
    assert tree.equal(delivery.download(delivery.messages[step], "two"), {"all": later["all"], "two": later["two"]})
    delivery.forget([])
    assert not delivery.held and not delivery.places, "what nobody publishes any more is kept"


def test_a_global_model_is_worked_with_where_it_is_and_goes_to_all_where_nobody_has_it(monkeypatch):
    step = with_verbs(of_steps(monkeypatch, Scaled, **FOUR).steps[0], publish=lambda server: server, receive=tree.part,
                      global_models=lambda message: {name: (name, tree.part(message, name)) for name in ("one", "two", "none")})
    comm, state = Serving(), delivering({"one/w": torch.ones(2), "two/w": torch.ones(3), "none/w": torch.ones(4)})
    delivery = Delivery(comm, (0, 1, 2, 1))
    delivery.publish(step, state, {"one": [0, 1], "two": [1]})
    found = delivery.global_models(step, state)
    assert {name: place for name, (_, _, *place) in found.items()} == {"one": [0, 2], "none": [0, 3]}
    assert comm.travelled[-1] == {(0, 1, 2): {"none/w"}}


def test_derived_leaves_that_no_message_has_any_more_are_let_go(monkeypatch):
    step = of_steps(monkeypatch, Scaled, **FOUR).steps[0]
    delivery = Delivery(Communicator(Alone()), (0,))
    for version in range(3):
        message = delivery.publish(step, delivering({"w": torch.ones(4), "scale": torch.tensor(version + 1.0)}, version), {"mlp2": [0]})
        assert delivery.download(message, "mlp2")["w"].tolist() == [version + 1.0] * 4 and len(delivery.held) == len(delivery.places) == 1
