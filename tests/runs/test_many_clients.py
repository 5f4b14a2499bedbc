"""Work on many clients grows with their number and not with its square: comparisons and calls are counted, since a clock would only guess."""
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hpcfl import cli
from hpcfl.federation.answers import Answers
from hpcfl.models.sizes import Sizes
from hpcfl.training.evaluate import bind_model
from hpcfl.training.group import Group
from hpcfl.wire.communicator import Alone, Communicator
from tests.support import in_memory

MANY = 300


class Client(int):
    """A client's number that counts how often one is compared with another."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Client.compared += 1
        return int(self) == other

    __hash__ = int.__hash__


def group(clients: list[Client]) -> Group:
    return Group("any", tuple(clients), {"model/weight": torch.ones(len(clients), 2, 2), "model/bias": torch.zeros(len(clients), 2)})


WORK: dict[str, Callable[[list[Client]], object]] = {
    "who was lost": lambda clients: Answers(tuple(clients), tuple(clients[::2])).lost,
    "half a group comes back": lambda clients: group(clients).with_rows(group(clients[::2])),
    "half a group is at work": lambda clients: group(clients).select(clients[::2]),
    "each client's model": lambda clients: [bind_model(whole, {"model": nn.Linear(2, 2)}, client) for whole in [group(clients)] for client in clients]}


@pytest.mark.parametrize("work", WORK)
def test_clients_are_found_without_going_through_the_others(work):
    Client.compared = 0
    WORK[work]([Client(number) for number in range(MANY)])
    assert Client.compared < 4 * MANY


def test_a_dry_run_asks_a_few_times_what_each_client_trains(monkeypatch, capsys):
    asked, architecture = [], Sizes.architecture
    monkeypatch.setattr(Sizes, "architecture", lambda self, client, row: asked.append(client) or architecture(self, client, row))
    cli._dry_run(in_memory.job("fedavg", data={"partition": "iid", "fraction": 1.0}, federation={"clients": MANY}), Communicator(Alone()), "")
    assert len(asked) < 8 * MANY and capsys.readouterr().out.count(" training images\n") == MANY
