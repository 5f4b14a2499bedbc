"""What a method's steps are and what their verbs give is checked where it comes from, and said in words that name method, verb, clients and what was wanted."""
import pytest
import torch

from hpcfl import tree
from hpcfl.contract import Algorithm, ClientSite, Phase, ServerSite, Update
from hpcfl.contract.verbs import check_plan
from hpcfl.errors import HpcflError, JobError, LayoutError
from hpcfl.federation.delivery import Delivery
from hpcfl.federation.state import begin
from hpcfl.training.group import Group
from hpcfl.tree import Tree
from hpcfl.wire.uplink import Sums, Uplink, Uploads
from tests.support.in_memory import bits, job, of_steps, run

TWO = {"federation": {"clients": 2, "rounds": 2}, "models": {"names": ["mlp2"]}}


class Idle(Algorithm):
    """Trains nothing and sends a number."""

    def found(self, site: ServerSite) -> Tree:
        return {"w": torch.zeros(2)}

    def publish(self, server: Tree) -> Tree:
        return server

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        return Update(group, Uplink({"w": Sums.weighted(group.clients, {"w": torch.ones(len(group.clients), 2)}, site.sizes(group))}))

    def aggregate(self, server: Tree, totals, site: ServerSite) -> Tree:
        return tree.transform(totals["w"].mean(), torch.Tensor.float)


def having(verb: str, function) -> type[Idle]:
    return type("Own", (Idle,), {verb: function})


def said(monkeypatch, kind: type[Algorithm], error: type[Exception] = LayoutError) -> str:
    with pytest.raises(error) as raised:
        run(of_steps(monkeypatch, kind, **TWO))
    return str(raised.value)


def test_a_step_that_keeps_all_promises_is_carried_out(monkeypatch):
    assert run(of_steps(monkeypatch, Idle, **TWO)).states[-1].server["w"].tolist() == [1.0, 1.0]


def wrong_state(change):
    def train(self, group, message, site):
        return Update(Group(group.architecture, group.clients, change(group.state)), Idle.train(self, group, message, site).uplink)
    return train


CLIENTS_VERBS = {
    "a group alone": (lambda self, group, message, site: group, "gave a Group, wanted an Update"),
    "a tuple": (lambda self, group, message, site: (group, Uplink()), "gave a tuple of Group, Uplink, wanted an Update"),
    "nothing": (lambda self, group, message, site: None, "gave None, wanted an Update"),
    "no group": (lambda self, group, message, site: Update(group.state), "gave a dict, wanted a Group"),
    "other clients": (lambda self, group, message, site: Update(group.select([0])), "gave a Group of mlp2, client 0, wanted mlp2, clients 0-1"),
    "a dtype": (wrong_state(lambda state: state | {"model/head.bias": state["model/head.bias"].double()}),
                "gave 'model/head.bias' as (2, 10) float64, wanted (2, 10) float32"),
    "a shape": (wrong_state(lambda state: state | {"model/head.bias": state["model/head.bias"][:, :9]}),
                "gave 'model/head.bias' as (2, 9) float32, wanted (2, 10) float32"),
    "a missing leaf": (wrong_state(lambda state: {path: leaf for path, leaf in state.items() if path != "model/head.bias"}),
                       "'model/head.bias' is in only one"),
    "no tensor": (wrong_state(lambda state: state | {"model/head.bias": [1.0, 2.0]}), None),
    "few metrics": (lambda self, group, message, site: Update(group, metrics={"loss": torch.zeros(1)}),
                    "gave metric 'loss' as shape (1,), wanted a Tensor (2,)"),
    "a number": (lambda self, group, message, site: Update(group, metrics={"loss": 0.5}), "gave metric 'loss' as a float, wanted a Tensor (2,)"),
    "statistics of others": (lambda self, group, message, site: Update(group, Uplink({"w": Uploads({7: {}})})),
                             "sends up for client 7, wanted its own clients alone"),
    "statistics that do not fit": (lambda self, group, message, site: Sums.weighted([0, 1], {"x": torch.ones(3)}, torch.ones(2)),
                                   "'x': value is (3,), weight (2,), wanted a client axis of length 2"),
    "what it writes in place": (lambda self, group, message, site: (message["w"].add_(1), Idle.train(self, group, message, site))[1],
                                "changed 'w' of the message in place")}


@pytest.mark.parametrize("case", CLIENTS_VERBS)
def test_what_a_clients_verb_gives_is_checked(case, monkeypatch):
    train, wanted = CLIENTS_VERBS[case]
    if wanted is None:                                             # the Group itself refuses it, before we see it
        with pytest.raises(AttributeError) as raised:
            run(of_steps(monkeypatch, having("train", train), **TWO))
        assert "raised in Own.train, clients 0-1" in raised.value.__notes__
        return
    text = said(monkeypatch, having("train", train))
    assert text.startswith("Own.train, clients 0-1: ") and wanted in text and text.count("Own.train") == 1, text


SERVERS_VERBS = {
    "aggregate gives nothing": ("aggregate", lambda self, server, totals, site: None, "Own.aggregate: gave None, wanted a Tree"),
    "aggregate gives a number": ("aggregate", lambda self, server, totals, site: {"w": 1.0}, "Own.aggregate: gave 'w': a float in its Tree"),
    "aggregate changes a type": ("aggregate", lambda self, server, totals, site: totals["w"].mean(),
                                 "Own.aggregate: gave 'w' as (2,) float64, wanted (2,) float32 as before; cast it"),
    "prepare changes a shape": ("prepare", lambda self, server, site: {"w": torch.zeros(3)},
                                "Own.prepare: gave 'w' as (3,) float32, wanted (2,) float32 as before"),
    "publish gives a list": ("publish", lambda self, server: [server], "Own.publish: gave a list, wanted a Tree"),
    "publish changes a type": ("publish", lambda self, server: {"v": server["w"].double() if server["w"].any() else server["w"] + 0},
                               "Own.publish: gave 'v' as (2,) float64, wanted (2,) float32 as before"),
    "publish writes": ("publish", lambda self, server: {"w": server["w"].add_(1)}, "Own.publish: changed 'w' of the server's state in place"),
    "found gives nothing": ("found", lambda self, site: None, "Own.found: gave None, wanted a Tree"),
    "join gives a state": ("join", lambda self, group, site: group.state, "Own.join, clients 0-1: gave a dict, wanted a Group"),
    "modules gives a model": ("modules", lambda self, architecture: self.problem.model(architecture), "Own.modules, for mlp2: gave a Model, wanted a dict"),
    "global_models gives models": ("global_models", lambda self, message: {"w": message}, None),
    "receive gives nothing": ("receive", lambda self, message, architecture: None, "Own.receive, for mlp2: gave None, wanted a Tree")}


@pytest.mark.parametrize("case", SERVERS_VERBS)
def test_what_the_servers_verbs_give_is_checked(case, monkeypatch):
    verb, function, wanted = SERVERS_VERBS[case]
    if verb == "global_models":                                    # asked for where models are evaluated
        world = of_steps(monkeypatch, having(verb, function), **TWO)
        with pytest.raises(LayoutError, match="Own.global_models: gave a dict, wanted a dict from name to .architecture, Tree."):
            Delivery(world.comm, world.home).global_models(world.steps[0], begin(world))
        return
    assert wanted in (text := said(monkeypatch, having(verb, function))), text


def test_an_error_in_a_method_says_in_which_verb_of_which_clients(monkeypatch):
    with pytest.raises(KeyError) as raised:
        run(of_steps(monkeypatch, having("train", lambda self, group, message, site: message["none"]), **TWO))
    assert "raised in Own.train, clients 0-1" in raised.value.__notes__


@pytest.mark.parametrize("results", [{}, {0: {"x": torch.ones(1)}}, None, {0: {}, 1: 3}])
def test_results_of_spread_work_are_checked(results, monkeypatch):
    kind = type("Own", (Idle,), {"halve": lambda self, items, site: results,
                                 "aggregate": lambda self, server, totals, site: site.spread("halve", {0: {"x": torch.ones(1)}, 1: {"x": torch.ones(1)}})[0]})
    assert "Own.halve" in said(monkeypatch, kind)


def test_what_refine_sends_up_is_refused_and_so_is_what_nobody_aggregates(monkeypatch):
    text = said(monkeypatch, having("refine", lambda self, group, message, site: Idle.train(self, group, message, site)))
    assert text.startswith("Own.refine, clients 0-1: sends up 'w', but nobody takes it")

    class Unheard(Algorithm):
        def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
            return Update(group, Uplink({"w": Uploads({client: {} for client in group.clients})}))
    assert "Unheard.train, clients 0-1: sends up 'w', but nobody takes it" in said(monkeypatch, Unheard)


def test_what_a_clients_verb_writes_in_place_counts_wherever_states_lie(monkeypatch, tmp_path):
    """Written in place or made anew, kept in memory or put away: the states are the same."""
    def train(in_place: bool):
        def train(self, group, message, site):
            if in_place:
                group.state["model/head.bias"].add_(1)
                return Update(group)
            return Update(group.with_part("model", group.part("model") | {"head.bias": group.part("model")["head.bias"] + 1}))
        return train

    def outcome(in_place: bool, residency: str) -> list:
        kind = type("Own", (Algorithm,), {"train": train(in_place)})
        found = run(of_steps(monkeypatch, kind, **TWO, residency={"location": residency, "folder": str(tmp_path)}))
        return [bits(state) for parked in found.states[-1].groups for state in parked.fetch().states().values()]
    wanted = outcome(False, "device")
    assert all(outcome(in_place, residency) == wanted for in_place in (False, True) for residency in ("device", "host", "disk"))


def test_what_is_written_in_place_is_evaluated_again(monkeypatch):
    kept = []

    class Writing(Idle):
        def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
            kept.append(group.state["model/head.bias"])
            kept[-1].add_(1)
            return Idle.train(self, group, message, site)
    found = run(of_steps(monkeypatch, Writing, **TWO))
    assert found.states[1].groups[0].state["model/head.bias"] is not kept[0], "whoever knows models by their leaves takes it for the one before"


def test_what_a_client_keeps_of_a_message_does_not_change_with_the_servers_state(monkeypatch):
    class Keeping(Idle):
        def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
            return Update(group.with_part("kept", {"w": message["w"].expand(len(group.clients), -1)}), Idle.train(self, group, message, site).uplink)

        def join(self, group: Group, site: ClientSite) -> Group:
            return super().join(group, site).with_part("kept", {"w": torch.zeros(len(group.clients), 2)})

        def aggregate(self, server: Tree, totals, site: ServerSite) -> Tree:
            server["w"].add_(1)
            return server
    found = run(of_steps(monkeypatch, Keeping, **TWO))
    assert found.state(0)["kept/w"].tolist() == [1.0, 1.0] and found.states[-1].server["w"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(("names", "wanted"), [
    ({"trian": lambda self, group, message, site: Update(group)}, "Own in phase 'rounds' has 'trian', which nobody calls; did you mean 'train'?"),
    ({"agregate": lambda self, server, totals, site: server}, "did you mean 'aggregate'?"),
    ({"recieve": lambda self, message, architecture: message}, "did you mean 'receive'?"),
    ({"train": lambda self, group, message: Update(group)}, "train(self, group, message) cannot be called with (self, group, message, site)"),
    ({"help": lambda self: None}, "would do nothing: it has none of prepare, train, aggregate, refine"),
    ({"aggregate": lambda self, server, totals, site: server}, "has aggregate and no train, so nothing would ever be sent to it")])
def test_a_step_is_checked_when_the_plan_is_made(names, wanted, monkeypatch):
    with pytest.raises(JobError) as raised:
        of_steps(monkeypatch, type("Own", (Algorithm,), names), **TWO)
    assert wanted in str(raised.value) and str(raised.value).startswith("standalone: "), str(raised.value)


def test_words_like_a_verb_that_are_meant_so_are_let_be(monkeypatch):
    names = ("trained", "receiver", "publisher", "learn", "drawer", "turn", "merge")
    of_steps(monkeypatch, type("Own", (Idle,), {name: lambda self: None for name in names}), **TWO)


def test_a_plan_is_checked(monkeypatch):
    step = of_steps(monkeypatch, Idle, **TWO).steps[0]
    good = Phase("one", 1, (step,))
    for plan, wanted in (((), "wanted a tuple of at least one Phase"), ([good], "wanted a tuple"), ((good, good), "wanted each name once"),
                         ((Phase("two", 1, ()),), "phase 'two' has no steps"), ((Phase("two", 1, (Idle,)),), "wanted an instance of Algorithm"),
                         ((Phase("two", -1, (step,)),), "of 0 rounds or more")):
        with pytest.raises(JobError, match="mine: .*") as raised:
            check_plan("mine", plan)
        assert wanted in str(raised.value)
    check_plan("mine", (good, Phase("two", 0, (step, step))))


def test_clients_are_evaluated_once_before_the_first_step_that_refines(monkeypatch):
    class Refining(Idle):
        def refine(self, group: Group, message: Tree, site: ClientSite) -> Update:
            return Update(group)
    stages = []
    run(of_steps(monkeypatch, Refining, Refining, **TWO), lambda state, place: stages.append(place.row))
    assert stages == [0, 1]


def test_errors_of_ours_inside_a_verb_stay_what_they_are(monkeypatch):
    def fail(self, group, message, site):
        raise JobError("set it")
    assert said(monkeypatch, having("train", fail), HpcflError) == "set it"


@pytest.mark.parametrize(("participation", "clients", "size"), [(0.5, 5, 3), (0.5, 7, 4), (0.29, 50, 15), (0.1, 4, 1), (1.0, 5, 5), (0.3, 7, 2)])
def test_half_a_client_takes_part(participation, clients, size, monkeypatch):
    found = of_steps(monkeypatch, Idle, federation={"clients": clients, "participation": participation, "rounds": 1}, data={"partition": "iid"})
    assert len(found.cohort(found.plan[0], 0)) == size and job("fedavg").federation.participation == 1.0
