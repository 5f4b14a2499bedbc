"""Evaluation: the right client's weights, eval mode, the shard's order, compiled or not, and nothing left behind."""
import logging

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from hpcfl import tree
from hpcfl.data.shards import Scale, Shard
from hpcfl.errors import NonFiniteError
from hpcfl.models import zoo
from hpcfl.streams import sow
from hpcfl.training import compiling
from hpcfl.training.evaluate import apply_in_batches, bind, bind_model, count_correct, extract_features
from hpcfl.training.group import Group

CLASSES, COUNT = 4, 30


def shard(count: int = COUNT) -> Shard:
    generator = torch.Generator().manual_seed(0)
    return Shard(torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(count) % (CLASSES - 1), Scale())


def example() -> tuple[Group, dict[str, nn.Module]]:
    """Three clients of cnn1, whose norm layers have running statistics of their own."""
    states = {}
    for client in (2, 5, 9):
        torch.manual_seed(client)
        model = zoo.build("cnn1", (1, 8, 8), CLASSES, 6)
        model.train()(torch.randn(16, 1, 8, 8))
        states[client] = tree.join(model=model.state_dict())
    return Group.from_states("cnn1", states), {"model": zoo.build("cnn1", (1, 8, 8), CLASSES, 6)}


def alone(group: Group, client: int) -> nn.Module:
    """The client's model as a module of its own, in eval mode."""
    model = zoo.build("cnn1", (1, 8, 8), CLASSES, 6)
    model.load_state_dict(tree.part(group.states()[client], "model"))
    return model.eval()


@pytest.mark.parametrize("client", [2, 5, 9])
def test_each_client_is_evaluated_with_its_own_weights_in_eval_mode(client):
    group, modules = example()
    x = shard().pixels(slice(None))
    with torch.no_grad():
        torch.testing.assert_close(bind_model(group, modules, client)(x), alone(group, client)(x))
        torch.testing.assert_close(extract_features(group, modules, client, shard()), alone(group, client).features(x))
        torch.testing.assert_close(bind_model(group, modules, client, method="head")(torch.ones(2, 6)), alone(group, client).head(torch.ones(2, 6)))


def test_nothing_is_differentiated_and_the_module_stays_as_it_was():
    group, modules = example()
    before = tree.clone(modules["model"].state_dict())
    modules["model"].train()
    assert not bind_model(group, modules, 5)(shard().pixels(slice(None))).requires_grad
    assert modules["model"].training and tree.equal(before, modules["model"].state_dict())
    assert all(parameter.requires_grad for parameter in modules["model"].parameters())


def test_the_mode_comes_back_after_an_exception():
    model = nn.Linear(3, 2).train()
    with pytest.raises(RuntimeError):
        bind(model, model.state_dict())(torch.zeros(1, 5))
    assert model.training


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_answers_are_the_eager_ones_and_one_compilation_serves_all_states(backend, compile_with, caplog):
    compile_with(backend)
    group, modules = example()
    x, states = shard().pixels(slice(None)), [tree.part(own, "model") for own in group.states().values()]
    with inductor.patch(compile_threads=1):                        # starting workers takes longer than compiling
        before = counters["stats"]["unique_graphs"]
        for number, state in enumerate(states):
            modules["model"].train(number % 2 == 0)
            eager, fast = (bind(modules["model"], state, compile=choice)(x) for choice in (False, True))
            torch.testing.assert_close(fast, eager)
            assert not fast.requires_grad and modules["model"].training == (number % 2 == 0)
    compiling.compile_forward.cache_clear()
    assert counters["stats"]["unique_graphs"] == before + 1
    assert not [record for record in caplog.records if record.name.startswith("hpcfl")]


def test_what_is_not_asked_for_is_not_compiled():
    (group, modules), graphs = example(), counters["stats"]["unique_graphs"]
    bind_model(group, modules, 5)(shard().pixels(slice(None)))
    assert counters["stats"]["unique_graphs"] == graphs


def test_without_a_compiler_answers_are_the_eager_ones_and_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    compiling.compile_forward.cache_clear()
    torch.compiler.reset()
    group, modules = example()
    x, state = shard().pixels(slice(None)), tree.part(group.states()[5], "model")
    with caplog.at_level(logging.WARNING, logger="hpcfl"), inductor.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}):
        answers = [bind(modules["model"], state, compile=choice)(x) for choice in (True, True, False)]
    compiling.compile_forward.cache_clear()
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[2])
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hpcfl")]
    assert len(said) == 1 and said[0].startswith("torch.compile does not work here")


def test_batches_change_neither_order_nor_result():
    predict = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)).requires_grad_(False)
    whole = apply_in_batches(predict, shard(), COUNT)
    torch.testing.assert_close(apply_in_batches(predict, shard(), 7), whole)
    assert count_correct(predict, shard(), CLASSES, 7).tolist() == count_correct(predict, shard(), CLASSES).tolist()


def test_right_answers_are_counted_by_class():
    labels, answers = shard().labels, (torch.arange(COUNT) * 7) % CLASSES
    asked = []

    def predict(x: torch.Tensor) -> torch.Tensor:
        start = sum(asked)
        asked.append(len(x))
        return nn.functional.one_hot(answers[start:start + len(x)], CLASSES).float()
    want = [sum(int(a == y == label) for a, y in zip(answers, labels, strict=True)) for label in range(CLASSES)]
    right = count_correct(predict, shard(), CLASSES, 8)
    assert right.tolist() == want and right.dtype == torch.int64
    assert 0 < sum(want) < COUNT and asked == [8, 8, 8, 6]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_share_the_batches_and_together_count_every_image_once(ranks):
    group, modules = example()
    predict, seen = bind_model(group, modules, 5), []

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return predict(x)
    shares = [count_correct(watched, shard(), CLASSES, 8, rank, ranks) for rank in range(ranks)]
    assert sum(shares).tolist() == count_correct(predict, shard(), CLASSES, 8).tolist() and int(sum(shares).sum()) > 0
    batches = [shard().pixels(slice(start, start + 8)) for start in range(0, COUNT, 8)]
    assert len(seen) == len(batches) and all(any(torch.equal(x, batch) for x in seen) for batch in batches), "other batches round differently"


def test_an_empty_shard_has_no_right_answers():
    assert count_correct(lambda x: x, shard(0), CLASSES).tolist() == [0] * CLASSES


def test_features_that_are_not_finite_name_the_client():
    group, modules = example()
    state = dict(group.state)
    state["model/projection.bias"] = state["model/projection.bias"].clone()
    state["model/projection.bias"][1] = float("nan")
    spoiled = Group(group.architecture, group.clients, state)
    assert bool(torch.isfinite(extract_features(spoiled, modules, 2, shard())).all())
    with pytest.raises(NonFiniteError, match=r"round 7: client 5 \(cnn1\).*; lower training\.lr = 3$"):
        extract_features(spoiled, modules, 5, shard(), "round 7", "lower training.lr = 3")


def test_a_network_that_draws_in_eval_mode_answers_alike_in_every_run_and_on_every_rank():
    black = Shard(torch.zeros(40, 1, 2, 2), torch.arange(40) % 4, Scale())

    def guess(x):
        return torch.rand(len(x), 4)
    whole = apply_in_batches(guess, black, 8)
    sow(9)
    assert torch.equal(apply_in_batches(guess, black, 8), whole) and len(torch.unique(whole)) > 100
    shares = [count_correct(guess, black, 4, 8, rank, 3) for rank in range(3)]
    assert torch.equal(sum(shares), count_correct(guess, black, 4, 8)) and 0 < int(sum(shares).sum()) < 40
