"""What the tests of the generative models share: sizes counted without memory, and gradients of many clients against those of one."""
from types import SimpleNamespace

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from hpcfl import tree
from hpcfl.streams import Stream
from hpcfl.training.evaluate import bind
from hpcfl.training.fit import fit
from hpcfl.training.group import Group
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Modules, Turn

CLIENTS = 3
LABEL = torch.zeros(1, dtype=torch.int64, device="meta")


def parameters(model):
    """{network: number of its parameters}, counted on the meta device."""
    with torch.device("meta"):
        return {name: sum(leaf.numel() for leaf in network.parameters()) for name, network in model.networks().items()}


def scalars(model):
    """Scalars in the states of all networks, running statistics included: the specification's S(w)."""
    with torch.device("meta"):
        return sum(leaf.numel() for network in model.networks().values() for leaf in tree.select_floating(network.state_dict()).values())


def blank(*shape):
    """One sample of an input without memory."""
    return torch.zeros(1, *shape, device="meta")


def million_macs(network, *inputs):
    """Multiply-accumulates of one forward pass without memory, in millions."""
    with FlopCounterMode(display=False) as counter:
        network.eval()(*inputs)
    return counter.get_total_flops() / 2e6


def on_meta(model):
    """The networks without memory."""
    with torch.device("meta"):
        return model.networks()


def networks(model, client=0, dtype=torch.float64):
    """The networks of one client."""
    with Stream(0, "init", client).seeding():
        return {name: network.to(dtype) for name, network in model.networks().items()}


def batch(model, size=4, client=0, dtype=torch.float64):
    """A batch with the draws of one step."""
    generator = Stream(0, "data", client).torch()
    data = {"x": torch.rand(size, *model.shape, generator=generator, dtype=dtype), "y": torch.randint(0, model.classes, (size,), generator=generator)}
    return model.noise(data, generator)


def trained_by(model):
    """Turns of fit from the model's losses and rules."""
    return [Turn(names, loss, Optimizer(**vars(rule))) for (names, loss), rule in zip(model.losses(), model.rules(), strict=True)]


def check_gradients(model):
    """vmap(grad) over clients with weights of their own gives for every loss what each client gets alone."""
    wrapped = [Modules(networks(model, client)) for client in range(CLIENTS)]
    states = [{**dict(each.named_parameters()), **dict(each.named_buffers())} for each in wrapped]
    stacked, data = tree.stack([tree.clone(state) for state in states]), [batch(model, client=client) for client in range(CLIENTS)]
    for names, loss in model.losses():
        trained = [path for path, _ in wrapped[0].named_parameters() if path.split(".")[0] in names]
        rest = {path: leaf for path, leaf in stacked.items() if path not in trained}

        def value(leaves, others, drawn, loss=loss):
            return functional_call(wrapped[0], {**leaves, **others}, (loss, drawn, {}))[0]
        together = vmap(grad(value))({path: stacked[path] for path in trained}, tree.clone(rest), tree.stack(data))
        for client, modules in enumerate(wrapped):
            leaves = [dict(modules.named_parameters())[path] for path in trained]
            alone = torch.autograd.grad(modules(loss, data[client], {})[0], leaves)
            for path, gradient in zip(trained, alone, strict=True):
                assert gradient.abs().max() > 0 or "bias" in path, path
                torch.testing.assert_close(together[path][client], gradient, rtol=1e-9, atol=1e-12, msg=lambda text, path=path: f"{path}: {text}")


def check_engines(model):
    """fit with kept optimiser state gives the same states in both engines, on batches of two sizes."""
    group = Group.from_states("none", {client: tree.join(**{name: network.state_dict() for name, network in networks(model, client).items()})
                              for client in range(CLIENTS)})

    def batches(client):
        return [batch(model, size, client) for size in ((4, 3) if client else (3, 4))]
    modules = networks(model)
    one, other = (fit(group, modules, trained_by(model), batches, engine=engine, keep_optimizer=True)[0].state for engine in ("sequential", "vmap"))
    assert one.keys() == other.keys()
    for path in one:
        torch.testing.assert_close(one[path], other[path], rtol=1e-6, atol=1e-8, msg=lambda text, path=path: f"{path}: {text}")
    changed = {path.split("/")[0] for path in group.state if not torch.equal(group.state[path], one[path])}
    assert changed == set(modules)


def check_samples(model, low=None):
    """Samples of a bound generator: shape, not below `low`, decided by state, classes and generator alone, and different between classes."""
    network = networks(model, dtype=torch.float32)["generator"]
    call, y = bind(network, tree.clone(network.state_dict())), torch.arange(5) % model.classes
    samples = model.sample(call, y, Stream(0, "sample").torch())
    assert samples.shape == (5, *model.shape) and samples.isfinite().all() and not samples.requires_grad
    assert low is None or samples.min() >= low
    assert torch.equal(samples, model.sample(call, y, Stream(0, "sample").torch()))
    assert not torch.equal(samples, model.sample(call, y, Stream(1, "sample").torch()))
    assert not torch.equal(samples, model.sample(call, y.flip(0), Stream(0, "sample").torch()))
    assert network.training
    return samples


def check_draws(model):
    """The draws of a step follow from the generator alone, leave the batch as it is, and do not touch the global generator."""
    data = {"x": torch.zeros(6, *model.shape), "y": torch.arange(6) % model.classes, "index": torch.arange(6)}
    before = torch.get_rng_state()
    one, same, other = (model.noise(data, Stream(seed, "noise").torch()) for seed in (0, 0, 1))
    assert tree.equal(one, same) and not tree.equal(one, other)
    assert all(one[name] is data[name] for name in data) and set(data) == {"x", "y", "index"}
    assert all(len(leaf) == 6 for leaf in one.values())
    assert torch.equal(torch.get_rng_state(), before)


def stub(**calls):
    """Modules whose networks are plain functions."""
    return SimpleNamespace(**calls)


def close(got, wanted):
    """Equal to what a hand reckons in float64."""
    return torch.as_tensor(got).detach().numpy() == pytest.approx(wanted, rel=1e-10, abs=1e-12)
