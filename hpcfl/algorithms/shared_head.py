"""Shared heads: what methods have in common whose clients keep their extractors to themselves and get the head h of f_k = h o g_k from the server."""
from collections.abc import Iterable

from torch import nn

from hpcfl import tree
from hpcfl.contract import Algorithm, ClientSite, Group, ServerSite, Turn, Update
from hpcfl.training.losses import cross_entropy
from hpcfl.training.optimizers import Optimizer
from hpcfl.tree import Tree

HEAD = ("head.weight", "head.bias")                                # (C, p) and (C,), by their paths in a model


class SharedHead(Algorithm):
    """The server's state holds the head under its paths in a model; whoever takes part begins a round with it and ends it with the new one."""

    refines = "adopt"

    def found(self, site: ServerSite) -> Tree:
        """A head for features of the one common size, as the zoo initialises it."""
        with self.problem.stream("init/head").seeding():
            return prefix_head(nn.Linear(self.problem.common_feature_size(), self.problem.classes).state_dict())

    def publish(self, server: Tree) -> Tree:
        return server

    def refine(self, group: Group, message: Tree, site: ClientSite) -> Update:
        """The client's head is replaced by the server's; evaluated before it are the heads as they were trained locally."""
        return Update(self.adopt(group, message))

    def adopt(self, group: Group, message: Tree) -> Group:
        """The group with the head of the message, and extractors of its own."""
        received = tree.repeat(tree.to(take_head(message), self.problem.device), len(group.clients))
        return group.with_part("model", group.part("model") | received)


def prefix_head(linear: Tree) -> Tree:
    """The state_dict of a linear layer under the paths that it has as the head of a model."""
    return {f"head.{name}": leaf for name, leaf in linear.items()}


def take_head(state: Tree) -> Tree:
    """The head's leaves in a model, a part of a group or a message."""
    return {path: state[path] for path in HEAD}


def train_head(head: Tree, batches: Iterable[Tree], optimizer: Optimizer, site: ServerSite, work: str) -> Tree:
    """The head after cross-entropy on batches {"x": features (B, p), "y": (B,)} at the server."""
    device, (classes, size) = site.problem.device, head["head.weight"].shape
    with site.problem.stream("structure").seeding():
        module = nn.Linear(size, classes).to(device)
    state = {path.removeprefix("head."): leaf.to(device) for path, leaf in head.items()}
    group = Group("head", (0,), tree.repeat(tree.join(model=state), 1))
    turn = Turn(("model",), cross_entropy, optimizer)
    group, metrics = site.fit(group, {"model": module}, [turn], lambda row: batches, work=work, member="the head")
    site.note(f"{work} loss", float(metrics["loss"]))
    return prefix_head(tree.clone(tree.row(group.part("model"), 0)))
