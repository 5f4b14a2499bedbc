"""A small net, Groups of it, and batches of uneven shards, to train in a moment; and what anybody would write to train it."""
import torch
from torch import nn
from torch.nn import functional as F

from hpcfl import tree
from hpcfl.streams import Stream
from hpcfl.training.group import Group
from hpcfl.training.optimizers import Optimizer

SGD = Optimizer("sgd", 0.1, momentum=0.9, weight_decay=1e-3)
ADAM = Optimizer("adam", 1e-3, weight_decay=1e-3)
ENGINES = ("sequential", "vmap")


class Net(nn.Module):
    """Two convolutions with BatchNorm and a linear head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(6 * 4 * 4, 3)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def cross_entropy(modules, batch, context):
    return F.cross_entropy(modules.model(batch["x"]), batch["y"])


def states(build, name, count):
    trees = {}
    for client in range(count):
        with Stream(0, f"init/{name}", client).seeding():
            trees[client] = tree.join(**{name: build().state_dict()})
    return trees


def net_group(count=3):
    return Group.from_states("net", states(Net, "model", count))


def batches(sizes, batch=5, passes=1):
    """Batches of uneven shards, the last one of each pass partial."""
    def of(client):
        generator = Stream(0, "data", client).torch()
        x, y = torch.randn(sizes[client], 1, 8, 8, generator=generator), torch.randint(0, 3, (sizes[client],), generator=generator)
        for _ in range(passes):
            yield from ({"x": a, "y": b} for a, b in zip(x.split(batch), y.split(batch), strict=True))
    return of


def close(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for path in one:
        torch.testing.assert_close(one[path], other[path], rtol=0, atol=tolerance, equal_nan=True, msg=lambda text, path=path: f"{path}: {text}")


def plain(group, client, data, optimizer, passes=1):
    """What anybody would write: one client's net trained with torch.optim."""
    net = Net()
    net.load_state_dict(tree.part(group.states()[client], "model"))
    settings = {"params": net.parameters(), "lr": optimizer.lr, "weight_decay": optimizer.weight_decay, "fused": True}
    rule = {"sgd": lambda: torch.optim.SGD(momentum=optimizer.momentum, **settings),
            "adam": lambda: torch.optim.Adam(betas=optimizer.betas, **settings)}[optimizer.name]()
    losses = []
    for _ in range(passes):
        for batch in data(client):
            rule.zero_grad()
            losses.append(F.cross_entropy(net(batch["x"]), batch["y"]))
            losses[-1].backward()
            if optimizer.clip:
                nn.utils.clip_grad_norm_(net.parameters(), optimizer.clip)
            rule.step()
    return net.state_dict(), torch.stack(losses).mean().item()


class Generator(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))


def noisy_batches(sizes):
    def of(client):
        generator = Stream(0, "noise", client).torch()
        for size in sizes[client]:
            yield {"x": torch.randn(size, 6, generator=generator), "z": torch.randn(size, 4, generator=generator)}
    return of
