"""Group: stacked states of clients as a value, built, selected and written back, and refusals that name client and path."""
import pytest
import torch

from hpcfl import tree
from hpcfl.errors import LayoutError
from hpcfl.training.group import Group
from tests.support.small_nets import net_group


def test_groups_are_built_selected_and_written_back():
    group = net_group(3)
    with pytest.raises(LayoutError, match="'model/head.weight' of client 1 is .*client 0 has"):
        Group.from_states("net", {0: tree.row(group.state, 0), 1: tree.row(group.state, 1) | {"model/head.weight": torch.zeros(2, 2)}})
    with pytest.raises(LayoutError, match="no clients .7."):
        group.select([1, 7])
    with pytest.raises(LayoutError, match="wanted 2 rows"):
        Group("net", (0, 1), group.state)
    half = group.select([2, 0])
    assert half.clients == (0, 2)
    zero = half.with_common_part("model", tree.transform(tree.row(half.part("model"), 0), torch.zeros_like))
    back = group.with_rows(zero)
    assert tree.equal(back.states()[1], group.states()[1]) and all(not leaf.any() for leaf in back.states()[2].values())
    with pytest.raises(LayoutError, match="cannot take rows"):
        half.with_rows(group)
    with pytest.raises(LayoutError, match="'extra/bias' is in only one"):
        group.with_rows(half.with_part("extra", {"bias": torch.zeros(2, 1)}))
    assert not group.without("model").state


def test_clients_are_stacked_in_ascending_order_and_given_back_one_by_one():
    group = Group.from_states("net", {7: {"model/w": torch.full((2,), 7.0)}, 3: {"model/w": torch.full((2,), 3.0)}})
    assert group.clients == (3, 7) and group.row_of == {3: 0, 7: 1} and group.state["model/w"].tolist() == [[3.0, 3.0], [7.0, 7.0]]
    assert {client: state["model/w"].tolist() for client, state in group.states().items()} == {3: [3.0, 3.0], 7: [7.0, 7.0]}
    assert group.fetch() is group and group.device == torch.device("cpu")


def test_optimiser_state_that_only_some_clients_have_begins_at_zero_for_the_others():
    slot = "optimizer/model/momentum/w"
    group = Group.from_states("net", {0: {"model/w": torch.ones(2), slot: torch.ones(2)}, 1: {"model/w": torch.ones(2)}})
    assert group.state[slot].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    fresh = group.select([0]).without("optimizer")
    assert group.with_rows(fresh).state[slot].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_a_part_takes_the_place_of_the_one_before_and_leaves_the_others():
    group = Group("net", (0, 1), {"model/w": torch.zeros(2, 3), "model/b": torch.zeros(2), "generator/w": torch.ones(2, 4)})
    changed = group.with_part("model", {"v": torch.ones(2, 5)})
    assert set(changed.state) == {"model/v", "generator/w"} and changed.state["generator/w"] is group.state["generator/w"]
    common = group.with_common_part("model", {"w": torch.arange(3.0)})
    common.state["model/w"][0].zero_()
    assert common.state["model/w"].tolist() == [[0.0, 0.0, 0.0], [0.0, 1.0, 2.0]], "clients share memory"


@pytest.mark.parametrize("clients", [(), (1, 1)])
def test_clients_are_each_there_once(clients):
    with pytest.raises(LayoutError, match="wanted at least one and each once"):
        Group("net", clients, {})
