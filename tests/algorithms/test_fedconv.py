"""FedConv in the loop: what is selected and by what, what crosses the wire, what the server keeps, and how it fails."""
from dataclasses import replace

import pytest
import torch

from hpcfl import tree
from hpcfl.algorithms.fedconv import FedConv
from hpcfl.data.partition import Partition
from hpcfl.errors import DataError, JobError, NonFiniteError, TrainingError
from hpcfl.federation.ledger import Ledger
from hpcfl.models import zoo
from hpcfl.training.group import Group
from tests.support.in_memory import Run, bits, finite, job, run, step, world

QUICK = {"server_epochs": 1, "filter_epochs": 1, "first_epochs": 2, "first_rounds": 1, "server_finetune": 1, "aggregation_epochs": 2}
PUBLIC = {"fraction": 0.3, "public_fraction": 0.4, "validation_fraction": 0.2, "test_fraction": 0.0, "partition": "iid"}
NET = {"names": ["fedconv"], "feature_size": 0, "sizes": [0, 1, 2]}


def described(settings=None, **sections):
    tables = {"data": PUBLIC, "models": NET, "federation": {"clients": 3, "rounds": 2}}
    return job("fedconv", QUICK | (settings or {}), **{name: tables.get(name, {}) | dict(sections.get(name, {})) for name in tables.keys() | sections.keys()})


def went(settings=None, **sections) -> Run:
    return run(world(described(settings, **sections)))


def scalars(name: str, base: str = "fedconv") -> int:
    return sum(leaf.numel() for leaf in tree.select_floating(zoo.build(name, (1, 8, 8), 10, 0).state_dict()).values())


@pytest.mark.parametrize("name", ["fedconv", "cnn5_bn"])
def test_bytes_of_a_round_equal_the_specification(name):
    found = went(models={"names": [name]}, federation={"clients": 5, "rounds": 2})
    each = [scalars(found.world.problem.architecture(client, 0).replace("fedconv", name)) for client in range(5)]
    for account in found.accounts:
        assert [account["down"][client] for client in range(5)] == [4 * size for size in each]
        assert [account["up"][client] for client in range(5)] == [4 * size + 8 for size in each]
        assert sum(account["down"].values()) + sum(account["up"].values()) == sum(8 * size for size in each) + 8 * 5


@pytest.mark.parametrize("sizes", [[0], [2], [0, 1, 2]])
@pytest.mark.parametrize("clients", [1, 3])
def test_odd_numbers_of_clients_and_any_mix_of_sizes_work(clients, sizes):
    found = went(models={"sizes": sizes}, federation={"clients": clients, "rounds": 2})
    server = found.states[-1].server
    assert finite(server) and {path.split("/")[1] for path in server if path.startswith("dilation/")} == \
        {str(client) for client in range(clients) if sizes[client % len(sizes)]}
    assert {path.split("/")[1] for path in server if path.startswith("filters/")} == {f"fedconv@{0.75 ** size:g}" for size in sizes[:clients] if size}
    assert tree.part(server, "global").keys() == zoo.build("fedconv", (1, 8, 8), 10, 0).state_dict().keys()


def test_clients_train_what_the_server_compressed():
    found = world(described())
    fedconv = step(found, FedConv)
    site = found.server_site(found.plan[0], 0, Ledger(found.problem.device))
    found.comm._help_with = lambda verb, items: getattr(fedconv, verb)(items, site)
    server = fedconv.prepare(found.found(), site)
    message = fedconv.publish(server)
    for client in range(3):
        architecture = found.problem.architecture(client, 0)
        want = zoo.build(architecture, (1, 8, 8), 10, 0).state_dict()
        assert {path: leaf.shape for path, leaf in fedconv.receive(message, architecture).items()} == {path: leaf.shape
                for path, leaf in tree.select_floating(want).items()}
    module = fedconv.build_filters("fedconv", "fedconv@0.75")
    module.load_state_dict(dict(module.state_dict()) | module.derive_state(tree.part(server, "global")) | tree.part(server, "filters/fedconv@0.75"))
    for path, leaf in module.weights().items():
        torch.testing.assert_close(leaf, server[f"small/fedconv@0.75/{path}"])


def test_the_best_epoch_by_the_public_validation_part_is_kept_for_each_model_by_itself(monkeypatch):
    found = world(described())
    fedconv = step(found, FedConv)
    site = found.server_site(found.plan[0], 0, Ledger(found.problem.device))
    scores = iter([10.0, 50.0, 30.0, 20.0, 20.0, 20.0, 5.0, 50.0])                                     # of two models, epoch by epoch
    epochs: list[dict] = []

    def validate(self, site, module, own):
        epochs.append(bits(own))
        return torch.tensor(next(scores))
    monkeypatch.setattr(FedConv, "validate", validate)
    module = fedconv.problem.structure("fedconv")
    group = Group("fedconv", (3, 8), tree.repeat(tree.join(model=module.state_dict()), 2))
    best, accuracy = fedconv.tune(site, group, module, 4, 1e-3, "test")
    assert accuracy.tolist() == [30.0, 50.0]
    kept = [bits(own) for own in best.states().values()]
    assert kept[0].items() <= epochs[2].items() and kept[1].items() <= epochs[7].items(), "of equals the later one"
    assert not best.part("optimizer")


def test_nothing_is_selected_by_client_data_or_by_the_part_that_is_tuned_on():
    found = world(described())
    fedconv = step(found, FedConv)
    site = found.server_site(found.plan[0], 0, Ledger(found.problem.device))
    seen = []
    wrong = replace(site.public_validation, labels=(site.public_validation.labels + 1) % 10)
    tuned_on = replace(site.public, labels=(site.public.labels + 1) % 10, images=255 - site.public.images)
    module = fedconv.problem.structure("fedconv").eval()
    own = tree.join(model=module.state_dict())
    for validation in (site.public_validation, wrong):
        seen.append(float(fedconv.validate(replace(site, public=tuned_on, public_validation=validation), module, own)))
    right = (module(site.public_validation.pixels()).argmax(1) == site.public_validation.labels).float().mean()
    assert seen[0] == pytest.approx(100 * float(right)) and seen[0] != seen[1]


def test_filters_live_on_from_round_to_round_and_each_client_has_its_own():
    found = went({"server_finetune": 0}, models={"sizes": [1]}, federation={"clients": 2, "rounds": 2})
    first, second = (tree.part(state.server, "dilation") for state in found.states[1:])
    assert first.keys() == second.keys() and bits(first) != bits(second)
    assert bits(tree.part(second, "0/fedconv@0.75")) != bits(tree.part(second, "1/fedconv@0.75"))
    assert bits(tree.part(found.states[1].server, "filters")) != bits(tree.part(found.states[2].server, "filters"))


@pytest.mark.parametrize("schedule", ["rotate", "random"])
def test_size_classes_may_change_from_round_to_round(schedule):
    found = went(models={"size_schedule": schedule}, federation={"clients": 3, "rounds": 3})
    for row, state in enumerate(found.states[1:]):
        held = {client: group.architecture for group in state.groups for client in group.clients}
        assert held == {client: found.world.problem.architecture(client, row) for client in range(3)}
        for client in held:
            want = zoo.build(held[client], (1, 8, 8), 10, 0).state_dict()
            assert {path: leaf.shape for path, leaf in tree.part(found.state(client, row + 1), "model").items()} == {path: leaf.shape
                for path, leaf in want.items()}
        assert found.accounts[row]["down"] == {client: 4 * scalars(held[client]) for client in range(3)}
    assert len({tuple(found.world.problem.architecture(client, row) for client in range(3)) for row in range(3)}) > 1
    assert finite(found.states[-1].server)


@pytest.mark.parametrize("weights", ["learned", "code", "mean"])
def test_the_mean_is_the_mean_and_what_is_learned_is_not(weights):
    found = went({"weights": weights, "server_finetune": 0}, models={"sizes": [0]}, federation={"clients": 2, "rounds": 1})
    shares = torch.tensor([len(found.world.split.train[client]) for client in range(2)], dtype=torch.float64)
    for path, leaf in tree.part(found.states[-1].server, "global").items():
        want = sum(share / shares.sum() * found.state(client)[f"model/{path}"].double() for client, share in enumerate(shares))
        same = torch.allclose(leaf.double(), want, rtol=1e-5, atol=1e-6)
        assert same == (weights == "mean"), path


def test_the_learning_rate_of_the_filters_halves_down_to_its_floor():
    schedule = step(world(described({"lr_halving": 25, "first_rounds": 5, "first_epochs": 20, "filter_epochs": 10})), FedConv).schedule_filters
    assert [schedule(round_) for round_ in (0, 4, 5, 25, 50, 99, 500)] == \
        [(20, 1e-3), (20, 1e-3), (10, 1e-3), (10, 5e-4), (10, 2.5e-4), (10, 1.25e-4), (10, 1e-4)]


def test_a_floor_above_the_rate_does_not_raise_it():
    assert step(world(described({"filter_lr": 2e-5})), FedConv).schedule_filters(0)[1] == 2e-5


def test_signs_are_noted_before_and_after_compression():
    found = went()
    notes = found.accounts[-1]["notes"]
    assert {name for name in notes if name.startswith("negative head.weight")} == \
        {f"negative head.weight {size}" for size in ("1", "fedconv@0.75", "fedconv@0.5625")}
    small = zoo.build("fedconv@0.75", (1, 8, 8), 10, 0)
    assert all(0 <= value <= 100 for value in notes.values()) and "compression_accuracy fedconv@0.75" in notes and small is not None
    assert set(found.metric("aggregate_dilation_accuracy", -1)) == {1, 2}, "a client of full size needs no dilation"


def test_a_public_set_that_lacks_a_class_is_refused():
    observed = world(described())
    labels = observed.corpus.train_labels
    observed.split = Partition(observed.split.train, observed.split.validation, observed.split.test,
                           observed.split.public[labels[observed.split.public] != 4], observed.split.public_validation)
    with pytest.raises(DataError, match=r"none of class 4.*raise data\.public_fraction"):
        observed.found()


def test_a_public_set_without_an_image_to_select_by_is_refused():
    with pytest.raises(DataError, match="none to select by; raise data.validation_fraction"):
        world(described(data={"validation_fraction": 0.001})).found()


@pytest.mark.parametrize("data", [{"public_fraction": 0.0}, {"validation_fraction": 0.0}])
def test_a_server_without_data_to_learn_on_or_to_select_by_is_refused(data):
    with pytest.raises(JobError, match="data.public_fraction = .* and data.validation_fraction = "):
        world(described(data=data))


def test_a_shrinkage_that_leaves_no_channel_is_refused():
    with pytest.raises(JobError, match="has none left at width"):
        went(models={"sizes": [0, 12]})


def test_models_of_two_kinds_are_refused():
    with pytest.raises(JobError, match=r"'fedconv', 'cnn1'\] are of 2 models, but fedconv makes one global model"):
        world(described(models={"names": ["fedconv", "cnn1"]}))


def test_dilation_below_the_floor_ends_after_bounded_tries_and_names_the_client(monkeypatch):
    tries = []
    tune = FedConv.tune

    def counted(self, site, group, *rest, **settings):
        tries.extend(group.clients if "dilation" in rest[3] else ())
        return tune(self, site, group, *rest, **settings)
    monkeypatch.setattr(FedConv, "tune", counted)
    with pytest.raises(TrainingError, match=r"round 0: the dilated model of client 1 \(fedconv@0.75\) got \d+\.\d % .* after 2 tries .*dilation_floor = 100 %"):
        went({"dilation_floor": 100.0, "dilation_tries": 2}, models={"sizes": [0, 1]})
    assert tries == [1, 1]


@pytest.mark.parametrize(("settings", "said"), [({"filter_lr": 1e30}, r"compression to fedconv@0.\d+ \d+: training of the filters \d"),
                                                ({"server_lr": 1e30}, "server training: training of the global model")])
def test_filters_that_are_not_finite_end_the_run(settings, said):
    with pytest.raises(NonFiniteError, match=rf"server, phase rounds, round \d, {said}.*NaN or infinity"):
        went(settings, federation={"clients": 3, "rounds": 3})


def test_a_feature_size_that_only_one_width_ends_with_is_refused_before_anything_runs():
    odd = {"names": ["cnn5"], "sizes": [0, 1]}
    with pytest.raises(JobError, match="resizes every weight of 'cnn5' to one of 'cnn5@0.75', but 'projection.bias' is in only one of the two: "
                                       "models.feature_size = 64 is the size .* set another models.feature_size, or 0"):
        world(described(models=odd | {"feature_size": 64}))
    for size in (0, 16):                                           # the ways out
        assert world(described(models=odd | {"feature_size": size})).found()
