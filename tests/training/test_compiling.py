"""Compiling: when it pays, equal results, one compilation for many states, and training that goes on where it fails."""
import logging

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from hpcfl import tree
from hpcfl.training import compiling
from hpcfl.training.fit import fit
from hpcfl.training.group import Group
from hpcfl.training.turns import Turn
from tests.support.small_nets import ADAM, Generator, close, noisy_batches, states


@pytest.mark.parametrize(("engine", "backend"), [("sequential", "aot_eager"), ("vmap", "aot_eager"), ("vmap", "inductor")])
def test_compiled_equals_eager(engine, backend, compile_with, caplog):
    compile_with(backend)
    group = Group.from_states("gan", states(Generator, "generator", 2))
    turn = Turn(("generator",), lambda modules, batch, context: modules.generator(batch["z"]).square().mean(), ADAM)
    with inductor.patch(compile_threads=1):                        # starting workers takes longer than compiling
        eager, fast = (fit(group, {"generator": Generator()}, [turn], noisy_batches([(5, 5), (5, 5)]), engine=engine, compile=choice)[0].state
                       for choice in ("off", "on"))
        graphs = counters["stats"]["unique_graphs"]
        fit(group, {"generator": Generator()}, [turn], noisy_batches([(5,), (5,)]), engine=engine, compile="on")
    assert counters["stats"]["unique_graphs"] == graphs            # the next round compiles nothing
    compiling.compile_forward.cache_clear()
    assert not [record for record in caplog.records if record.name.startswith("hpcfl")]
    close(eager, fast)


def test_without_a_compiler_training_goes_on_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    compiling.compile_forward.cache_clear()
    torch.compiler.reset()
    group = Group.from_states("gan", states(Generator, "generator", 2))
    turn = Turn(("generator",), lambda modules, batch, context: modules.generator(batch["z"]).abs().mean(), ADAM)
    with caplog.at_level(logging.WARNING, logger="hpcfl"), inductor.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}):
        results = [fit(group, {"generator": Generator()}, [turn], noisy_batches([(5,), (5,)]), compile=choice)[0].state
                   for choice in ("on", "on", "off")]
    compiling.compile_forward.cache_clear()
    assert tree.equal(results[0], results[2]) and tree.equal(results[1], results[2])
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hpcfl")]
    assert len(said) == 1 and said[0].startswith("torch.compile does not work here") and "\n" not in said[0]


@pytest.mark.parametrize("choice, device, steps, wanted", [("on", "cpu", 0, True), ("off", "cuda", 10**9, False), ("auto", "cpu", 10**9, False),
                                                           ("auto", "cuda", compiling.COMPILE_PAYS, True), ("auto", "cuda", compiling.COMPILE_PAYS - 1, False)])
def test_compiling_pays_on_cuda_from_so_many_steps_on(choice, device, steps, wanted):
    assert compiling.compiles(choice, device, steps) is wanted
