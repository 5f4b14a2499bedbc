"""Operations of clients: counts worked out by hand, in both engines, compiled or not, and results that counting does not change."""
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from hpcfl import tree
from hpcfl.algorithms.fedvtc import FedVTCBySums
from hpcfl.models.flops import Counter
from hpcfl.models.vit import Attention
from hpcfl.training import compiling
from hpcfl.training.fit import fit
from hpcfl.training.group import Group
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Turn
from tests.support import in_memory

ENGINES = ("sequential", "vmap")
COUNTED = {"evaluation": {"flops": True}}
SHORT = {"fedvtc": {"vtc_steps": 1, "finetune_epochs": 1, "per_class": 5, "dm_samples": 2}}


class Net(nn.Module):
    """One convolution (2, 6, 6) -> (3, 4, 4) and one linear layer 48 -> 5: 16 x 3 x 18 + 48 x 5 multiply-adds for each image."""

    convolution, linear = 16 * 3 * 18, 48 * 5

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 3, 3), nn.Linear(48, 5)

    def forward(self, x):
        return self.last(F.relu(self.first(x)).flatten(1))


def fitted(module: nn.Module, engine: str, images: list[list[int]], scope=None) -> int:
    """The operations of training clients with batches of so many images."""
    group = Group("net", tuple(range(len(images))), {}).with_part("model", tree.repeat(module.state_dict(), len(images)))
    turn = Turn(("model",), lambda modules, batch, _: F.cross_entropy(modules.model(batch["x"]), batch["y"]), Optimizer("sgd", 0.1, clip=1.0), scope)
    with Counter() as counter:
        fit(group, {"model": module}, [turn], lambda client: [{"x": torch.ones(n, 2, 6, 6), "y": torch.arange(n) % 5} for n in images[client]], engine=engine)
    return counter.flops


@pytest.mark.parametrize("engine", ENGINES)
def test_training_takes_three_forward_passes_less_the_first_layers_gradient_by_its_input(engine):
    images = [[4, 4, 4], [4, 1], [3]]                              # clients that take their last steps alone
    assert fitted(Net(), engine, images) == 20 * 2 * (3 * (Net.convolution + Net.linear) - Net.convolution)


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_that_are_not_trained_take_no_gradient(engine):
    assert fitted(Net(), engine, [[4], [4]], scope=lambda path: path.startswith("model/last")) == 8 * 2 * (Net.convolution + 2 * Net.linear)


def test_torchs_own_counter_would_not_do():
    """Why there is another: when this fails, torch counts grouped convolutions as they are, and hpcfl.models.flops may go."""
    from torch.utils.flop_counter import FlopCounterMode
    x, layer = torch.ones(1, 4, 6, 6), nn.Conv2d(4, 4, 3, groups=4)
    with FlopCounterMode(display=False) as torchs, Counter() as ours:
        layer(x).sum().backward()
    assert ours.flops == 2 * 2 * 4 * 16 * 9 < torchs.get_total_flops()


@pytest.mark.parametrize("layer, multiply_adds", [(nn.Conv2d(4, 6, 3, stride=2, padding=1), 9 * 6 * 36), (nn.Conv2d(4, 4, 3, groups=4), 16 * 4 * 9),
                                                  (nn.ConvTranspose2d(4, 6, 2, 2), 36 * 4 * 24)], ids=["strided", "grouped", "transposed"])
def test_both_gradients_of_a_convolution_cost_what_it_costs(layer, multiply_adds):
    x = torch.ones(5, 4, 6, 6, requires_grad=True)
    with Counter() as forward:
        y = layer(x)
    with Counter() as backward:
        y.sum().backward()
    assert (forward.flops, backward.flops) == (5 * 2 * multiply_adds, 2 * 5 * 2 * multiply_adds)


@pytest.mark.parametrize("compute, multiply_adds", [
    (lambda a, b, v: a @ b, 3 * 4 * 5), (lambda a, b, v: a @ v, 3 * 4), (lambda a, b, v: v @ v, 4), (lambda a, b, v: v @ b, 4 * 5),
    (lambda a, b, v: torch.addmm(torch.ones(5), a, b), 3 * 4 * 5), (lambda a, b, v: torch.addmv(torch.ones(3), a, v), 3 * 4),
    (lambda a, b, v: torch.baddbmm(torch.ones(1, 3, 5), a[None], b[None]), 3 * 4 * 5), (lambda a, b, v: a + a, 0)])
def test_products_are_counted_in_every_form_and_sums_are_not(compute, multiply_adds):
    with Counter() as counter:
        compute(torch.ones(3, 4), torch.ones(4, 5), torch.ones(4))
    assert counter.flops == 2 * multiply_adds


def test_attention_costs_its_products_of_tokens_too():
    tokens, size = 7, 8
    with Counter() as counter:
        Attention(size, heads=2)(torch.ones(3, tokens, size))
    assert counter.flops == 3 * 2 * (4 * tokens * size**2 + 2 * tokens**2 * size)


@pytest.mark.parametrize("engine", ENGINES)
def test_clients_are_booked_their_own_images(engine):
    world = in_memory.world(in_memory.job("standalone", models={"names": ["mlp2"]}, training={"engine": engine, "epochs": 2}, **COUNTED))
    found, model = in_memory.run(world), world.problem.model("mlp2")
    layers = [layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert world.forward_flops == (2 * sum(layers),) * 3
    for client, flops in found.metric("flops", 0).items():
        assert flops == pytest.approx(2 * len(world.holdings[client].train) * 2 * (3 * sum(layers) - layers[0]), rel=1e-12)


@pytest.mark.parametrize("name", ["fedavg", "fedproto", "fedvtc", "gaussian"])
def test_both_engines_take_the_same_operations(name):
    jobs = [in_memory.job(name, SHORT.get(name), federation={"rounds": 1}, training={"engine": engine}, **COUNTED) for engine in ENGINES]
    one, other = (in_memory.run(in_memory.world(job)) for job in jobs)
    for position, account in enumerate(one.accounts):
        for metric in {"flops", "refine_flops"} & account["metrics"].keys():
            assert other.metric(metric, position) == pytest.approx(one.metric(metric, position), rel=1e-12)
    assert sum(one.metric("flops", 0).values()) > 0


def test_operations_are_counted_in_the_first_round_of_each_phase_and_change_nothing():
    settings = {"latent": "common", "finetune": "final", **SHORT["fedvtc"]}
    plain, counted = (in_memory.run(in_memory.world(in_memory.job("fedvtc", settings, federation={"rounds": 2}, **more))) for more in ({}, COUNTED))
    there = [{"flops", "refine_flops"} & account["metrics"].keys() for account in counted.accounts]
    assert [place.phase.name for place in counted.places] == ["statistics", "rounds", "rounds", "finetune"]
    assert there == [{"flops"}, {"flops"}, set(), {"refine_flops"}]
    assert not any({"flops", "refine_flops"} & account["metrics"].keys() for account in plain.accounts)
    for client in range(3):
        assert in_memory.bits(counted.state(client)) == in_memory.bits(plain.state(client))


def test_clients_outside_the_first_cohort_have_no_count():
    found = in_memory.run(in_memory.world(in_memory.job("fedavg", federation={"rounds": 1, "participation": 0.4}, **COUNTED)))
    assert set(found.metric("flops", 0)) == set(found.world.cohort(found.places[0].phase, 0)) and len(found.metric("flops", 0)) == 1


def test_a_step_with_little_to_do_does_not_hide_what_the_one_before_it_took():
    """By sums, clients train in one step and send what is between them in the next."""
    world = in_memory.world(in_memory.job("fedvtc", {"statistics": "sums", **SHORT["fedvtc"]}, federation={"rounds": 1}, **COUNTED))
    assert len(world.plan[0].steps) > 1 and isinstance(world.plan[0].steps[0], FedVTCBySums)
    flops = in_memory.run(world).metric("flops", 0)
    for client, forward in enumerate(world.forward_flops):
        assert flops[client] > 2 * forward * len(world.holdings[client].train), "less than an epoch of training"


def test_compiled_code_runs_uncompiled_where_it_is_counted():
    compiling.compile_forward.cache_clear()
    graphs = counters["stats"]["unique_graphs"]
    runs = [in_memory.run(in_memory.world(in_memory.job("fedavg", federation={"rounds": 1}, run={"compile": choice}, **COUNTED))) for choice in ("off", "on")]
    compiling.compile_forward.cache_clear()
    assert runs[0].metric("flops", 0) == runs[1].metric("flops", 0)
    assert counters["stats"]["unique_graphs"] == graphs
