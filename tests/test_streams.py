"""Streams: the same four fields give the same draws, any other field gives others, and no global generator moves."""
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from hpcfl.streams import Stream, find_generators, keeping_generators, sow, sow_and_watch

STREAM = Stream(seed=7, purpose="batches", client=3, round=5)
OTHERS = [replace(STREAM, seed=8), replace(STREAM, purpose="noise"), replace(STREAM, client=4), replace(STREAM, round=6), Stream(7, "batches", 5, 3),
          Stream(7, "batches"), Stream(7, "batches", 0, 0), Stream(0, "batches", 3, 5), STREAM.branch("noise")]


def draws(stream):
    return stream.numpy().integers(0, 2**62, 8).tolist()


def torch_draws(stream):
    return torch.randint(0, 2**62, (8,), generator=stream.torch()).tolist()


def test_equal_fields_give_equal_draws():
    twin = Stream(seed=7, purpose="batches", client=3, round=5)
    assert draws(STREAM) == draws(twin) and torch_draws(STREAM) == torch_draws(twin)


def test_every_generator_starts_at_the_beginning():
    first = STREAM.numpy()
    first.random(1000)
    assert draws(STREAM) == draws(STREAM)


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_any_other_field_gives_other_draws(other):
    assert draws(other) != draws(STREAM) and torch_draws(other) != torch_draws(STREAM)


def test_draws_do_not_depend_on_global_generators():
    torch.manual_seed(1)
    np.random.seed(1)
    before = draws(STREAM), torch_draws(STREAM)
    torch.manual_seed(2)
    np.random.seed(2)
    assert (draws(STREAM), torch_draws(STREAM)) == before


def test_drawing_leaves_the_global_generators_alone():
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    draws(STREAM), torch_draws(STREAM)
    assert torch.equal(torch.rand(4), expected)


def test_draws_are_the_same_in_every_version():
    assert draws(STREAM)[:2] == [635545906610133984, 2994897191799290855]
    assert STREAM.torch().initial_seed() == 4675950156844711119


def test_seeding_directs_default_initialisation_and_gives_the_global_generator_back():
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    with STREAM.seeding():
        one = torch.nn.Linear(3, 2).weight
    assert torch.equal(torch.rand(4), expected)
    with STREAM.seeding():
        other = torch.nn.Linear(3, 2).weight
    assert torch.equal(one, other)


def test_seeding_gives_the_global_generator_back_after_an_error():
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    with pytest.raises(RuntimeError), STREAM.seeding():
        torch.rand(100)
        raise RuntimeError
    assert torch.equal(torch.rand(4), expected)


def test_neighbouring_clients_are_uncorrelated():
    rows = np.stack([Stream(0, "noise", client).numpy().standard_normal(20_000) for client in range(4)])
    correlation = np.corrcoef(rows) - np.eye(4)
    assert np.abs(correlation).max() < 0.03                        # four standard deviations of 1 / sqrt(20,000)


def test_seeding_sets_the_gpus_generators_where_cuda_is_in_use_and_gives_them_back(monkeypatch):
    gpu = torch.Generator().manual_seed(5)
    wanted = torch.rand(3, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", (gpu,))
    drawn = []
    for _ in range(2):
        with Stream(0, "init").seeding():
            drawn.append(torch.rand(3, generator=gpu))
    assert torch.equal(*drawn) and torch.equal(torch.rand(3, generator=gpu), wanted)


def test_seeding_leaves_a_cuda_that_nobody_uses_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", asked.append)
    with Stream(0, "init").seeding():
        torch.rand(1)
    assert not asked and len(find_generators()) == 1


def test_the_block_leaves_no_trace_in_any_global_generator():
    def drawn():
        return torch.rand(2).tolist(), np.random.random(), random.random()
    sow(3)
    wanted = drawn()
    sow(3)
    with pytest.raises(ValueError), keeping_generators():
        drawn()
        raise ValueError
    assert drawn() == wanted


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), np.random.random, random.random])
def test_a_draw_from_any_global_generator_is_noticed(draw):
    with keeping_generators():
        has_drawn = sow_and_watch(5)
        assert not has_drawn()
        has_drawn = sow_and_watch(5)
        draw()
        assert has_drawn()


def test_seeds_are_endless_and_those_of_the_stream():
    one, other = STREAM.seeds(), STREAM.seeds()
    found = [next(one) for _ in range(50)]
    assert found == [next(other) for _ in range(50)] and len(set(found)) == 50 and all(0 <= seed < 2**63 for seed in found)


@pytest.mark.gpu
def test_a_stream_repeats_itself_on_a_gpu():
    one, other = (torch.rand(8, device="cuda", generator=STREAM.torch("cuda")) for _ in range(2))
    assert torch.equal(one, other)
