"""Sites: what a client's code may see, what it may have computed once, and from which streams it draws."""
import torch

from hpcfl.contract import ClientSite
from hpcfl.training.losses import cross_entropy
from tests.support.in_memory import job, world


def site_of(found, client: int = 0, round_: int = 0) -> tuple[ClientSite, object]:
    group = next(group for group in found.join() if client in group.clients)
    return found.client_site(group, found.plan[0], round_), group


def counted(calls: list, value):
    def make():
        calls.append(value)
        return value
    return make


def test_a_site_shows_the_images_of_its_own_clients_and_no_test_part():
    found = world(job("standalone"))
    site, group = site_of(found)
    assert site.holdings.keys() == set(group.clients) and set(vars(site.holdings[0])) == {"train", "validation"}
    assert site.sizes(group).tolist() == [len(found.split.train[client]) for client in group.clients] and site.sizes(group).dtype == torch.float64


def test_what_no_round_changes_is_made_once_for_each_client():
    found, calls = world(job("standalone", models={"names": ["mlp2"]})), []
    for round_ in (0, 1):
        site, _ = site_of(found, round_=round_)
        assert [float(site.once("latent", client, counted(calls, torch.tensor(float(client))))) for client in (0, 1, 0)] == [0.0, 1.0, 0.0]
    assert len(calls) == 2


def test_what_all_clients_share_is_made_once_for_a_source_and_again_for_another():
    found, calls = world(job("standalone")), []
    one, equal = torch.ones(2), torch.ones(2)
    for client in (0, 1, 2):                                       # of two groups
        assert site_of(found, client)[0].once_for_all("read", (one,), counted(calls, "first")) == "first"
    assert calls == ["first"]
    site, _ = site_of(found, round_=1)
    assert site.once_for_all("read", (equal,), counted(calls, "second")) == "second", "a tensor is known by itself and not by its values"
    assert site.once_for_all("pool", ("rounds", 1000), counted(calls, "pool")) == "pool"
    assert site.once_for_all("pool", ("rounds", 500 + 500), counted(calls, "again")) == "pool", "all else is known by its value"
    assert site.once_for_all("pool", ("rounds", 1001), counted(calls, "next")) == "next"
    assert site.once_for_all("read", (equal,), counted(calls, "third")) == "second"
    assert site.once_for_all("read", (equal, one), counted(calls, "longer")) == "longer"
    assert site.once_for_all("none", (), counted(calls, "nothing")) == "nothing"


def test_trainings_are_counted_by_client_and_round_so_that_none_draws_what_another_drew():
    found = world(job("standalone", models={"names": ["mlp2"]}))
    site, group = site_of(found)
    site.train_model(group, cross_entropy)
    assert dict(site.trainings) == dict.fromkeys(group.clients, 1) == dict(found.client_site(group, found.plan[0], 0).trainings)
    assert not found.client_site(group, found.plan[0], 1).trainings


def test_batches_of_another_round_come_in_another_order():
    found = world(job("standalone", models={"names": ["mlp2"]}))
    one, other = (site_of(found, round_=round_)[0] for round_ in (0, 1))
    orders = [torch.cat([batch["index"] for batch in site.epochs(0, 1, 16)]) for site in (one, one, other)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert all(sorted(order.tolist()) == list(range(len(found.holdings[0].train))) for order in orders)


def test_streams_are_of_phase_round_client_and_purpose():
    found = world(job("standalone"))
    site, _ = site_of(found)
    draws = [float(stream.numpy().random()) for stream in (site.stream("a", 0), site.stream("a", 0), site.stream("b", 0), site.stream("a", 1),
                                                           site_of(found, round_=1)[0].stream("a", 0))]
    assert draws[0] == draws[1] and len(set(draws)) == 4


def test_expected_steps_are_those_of_the_largest_client_in_the_whole_run():
    found = world(job("standalone", training={"batch": 16, "epochs": 2}, federation={"rounds": 3, "clients": 3}))
    site, group = site_of(found)
    assert site.steps(group) == -(-max(len(found.split.train[client]) for client in group.clients) // 16) * 2 * 3
