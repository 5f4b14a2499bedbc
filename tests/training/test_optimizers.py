"""Optimizer: rules equal to torch.optim, slots, clipping, and the advice where training diverges."""
import pytest
import torch

from hpcfl.errors import JobError
from hpcfl.settings.sections import Training
from hpcfl.training.optimizers import STEP, Optimizer, begin_slot, clip_gradients


@pytest.mark.parametrize("clip, told", [(0.0, "training.clip = 0: not at all"), (5.0, "training.clip = 5")])
def test_clipping_is_advised_where_it_is_read(clip, told):
    rule = Optimizer.from_settings(Training(lr=1e30, clip=clip))
    assert rule.advice == f"lower the learning rate (training.lr = 1e+30) or bound the gradient norm ({told})"
    assert Optimizer("sgd", 1e30).advice == "lower the learning rate (1e+30)"


def test_a_rule_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(JobError, match="optimizer = 'lion' is not known; there are adam, sgd"):
        Optimizer("lion", 0.1)


@pytest.mark.parametrize("rule, torchs", [(Optimizer("sgd", 0.1), lambda p: torch.optim.SGD(p, 0.1, fused=True)),
                                          (Optimizer("sgd", 0.1, momentum=0.9, weight_decay=0.01), lambda p: torch.optim.SGD(p, 0.1, 0.9, 0, 0.01, fused=True)),
                                          (Optimizer("adam", 0.1, betas=(0.5, 0.9)), lambda p: torch.optim.Adam(p, 0.1, (0.5, 0.9), fused=True))])
def test_updates_are_those_of_torch_bit_for_bit(rule, torchs):
    mine, theirs = torch.linspace(-1, 1, 6).view(2, 3), torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
    slots, optimizer = {slot: [begin_slot(slot, mine)] for slot in rule.slots}, torchs([theirs])
    for step in range(3):
        theirs.grad = torch.cos(torch.arange(6.0) + step).view(2, 3)
        rule.update_out([mine], [theirs.grad.clone()], slots)
        optimizer.step()
    assert torch.equal(mine, theirs)
    kept = optimizer.state[theirs]
    assert all(torch.equal(slot, kept["momentum_buffer" if name == "momentum" else name]) for name, (slot,) in slots.items())


def test_slots_begin_at_zero_and_count_steps_for_each_row():
    parameter = torch.ones(4, 2, 3, dtype=torch.float64)
    assert begin_slot("momentum", parameter).shape == (4, 2, 3) and not begin_slot("momentum", parameter).any()
    assert begin_slot(STEP, parameter).shape == () and begin_slot(STEP, parameter, rows=4).shape == (4,)
    assert begin_slot(STEP, parameter).dtype == torch.float32
    assert Optimizer("sgd", 0.1).slots == () and Optimizer("sgd", 0.1, momentum=0.5).slots == ("momentum",)
    assert Optimizer("sgd", 0.1, momentum=0.5).elementwise and not Optimizer("adam", 0.1).elementwise


def test_gradients_are_clipped_to_a_common_norm_and_shorter_ones_stay():
    gradients = [torch.tensor([3.0]), torch.tensor([[4.0]])]                      # of norm 5
    clipped = clip_gradients(gradients, 2.5)
    assert [leaf.item() for leaf in clipped] == pytest.approx([1.5, 2.0], rel=1e-6) and gradients[0].item() == 3.0
    assert [leaf.item() for leaf in clip_gradients(gradients, 10.0)] == [3.0, 4.0]


def test_a_jobs_section_gives_the_rule_and_what_a_method_changes_of_it():
    rule = Optimizer.from_settings(Training(optimizer="sgd", lr=0.5, momentum=0.9, weight_decay=0.1, clip=2.0), lr=0.25)
    assert (rule.name, rule.lr, rule.momentum, rule.weight_decay, rule.clip) == ("sgd", 0.25, 0.9, 0.1, 2.0)
