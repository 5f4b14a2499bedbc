"""The benchmark of GeFL-F: rounds beside bare loops that take the same steps, samples of each generator, and what two ranks do."""
import functools
import json
from argparse import Namespace
from collections import Counter

import pytest
import torch

from hpcfl import tree
from hpcfl.bench import gefl
from hpcfl.bench.benches import render
from hpcfl.training import compiling
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Modules
from hpcfl.wire.communicator import Communicator
from hpcfl.wire.ranks import Alone
from tests.support import in_memory
from tests.support.tiny_runs import started, undisturbed

BRIEF = {"cvae": {}, "ddpm": {"generator": "ddpm", "steps": 2, "width": 8}}

COMMON = ("ranks", "threads", "device", "clients", "images_per_client", "generator_epochs", "repetitions",
          "generator_round_s", "generator_step_ms", "header_round_s")

BARE = ("generator_bare", "generator_bare_fused", "header_bare")


@pytest.fixture
def brief_gefl(monkeypatch):
    """The benchmark with one batch of images per client and short diffusion, and the world it made."""
    monkeypatch.setattr(gefl, "SAMPLED", BRIEF)
    monkeypatch.setattr(gefl, "DRAWN", {"cpu": 2})
    measured, worlds = gefl.measure_phases, []
    monkeypatch.setattr(gefl, "measure_phases", lambda world: worlds.append(world) or measured(world))

    def carry_out(**changes):
        arguments = {"device": "cpu", "threads": 1, "clients": (2,), "epochs": 1, "steps": 1, "rounds": 1, "compile": False}
        with undisturbed():
            return gefl.gefl(Communicator(Alone()), Namespace(**arguments | changes)), worlds[0]
    return carry_out


def test_rounds_of_gefl_stand_beside_bare_loops_and_samples_and_fit_a_terminal(brief_gefl):
    figures, world = brief_gefl()
    wanted = [*COMMON, *(f"{name}_{what}" for name in BARE for what in ("s", "ratio")), "cvae_samples_per_s", "ddpm_samples_per_s", "rows"]
    assert list(figures) == wanted and all(figures[name] > 0 for name in wanted if name.endswith(("_s", "_ms", "_ratio")))
    assert figures["generator_step_ms"] == pytest.approx(1000 * figures["generator_round_s"] / 2, abs=0.1), "two clients, one step each"
    assert [(phase.name, phase.rounds) for phase in world.plan] == [("generator", 2), ("targets", 2)]
    assert [row["phase"] for row in figures["rows"]] == ["generator", "targets"]
    assert all(0 < row["train_s"] < figures[name] for row, name in zip(figures["rows"], ("generator_round_s", "header_round_s"), strict=True))
    assert [line.split()[0] for line in render(figures).splitlines()] == [*wanted[:-1], "phase", "generator", "targets"]


def test_the_bare_loops_take_as_many_steps_as_the_rounds(brief_gefl, monkeypatch):
    steps, update, update_out = Counter(), gefl.update, Optimizer.update_out
    monkeypatch.setattr(gefl, "update", lambda optimizer, loss: steps.update([type(optimizer).__name__.lower()]) or update(optimizer, loss))
    monkeypatch.setattr(Optimizer, "update_out", lambda self, *rest: steps.update([f"own {self.name}"]) or update_out(self, *rest))
    brief_gefl(steps=2, epochs=3)
    batches, rounds = 2, 2                                         # of a client; of which one has a bare loop beside it
    assert steps == {"own adam": rounds * 2 * 3 * batches, "adam": 2 * 2 * 3 * batches,              # two bare loops for two clients
                     "own sgd": rounds * 2 * (1 + 5) * batches, "sgd": 2 * (1 + 5) * batches}


def test_the_bare_generator_learns_what_the_only_client_learns(brief_gefl, monkeypatch):
    _, world = brief_gefl(clients=(1,), steps=2)
    found, made = in_memory.run(world), []
    monkeypatch.setattr(gefl, "Modules", lambda networks: made.append(Modules(networks)) or made[0])
    assert gefl.time_bare_generator(world, found.states[1], found.places[0], fused=True) > 0
    for path, leaf in tree.select_floating(tree.join(**{name: network.state_dict() for name, network in made[0].named_children()})).items():
        torch.testing.assert_close(leaf, found.states[1].server[path], rtol=1e-4, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}")


def test_what_samples_in_many_calls_is_timed_compiled_where_that_is_wanted(brief_gefl, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiling.compile_forward.cache_clear()
    figures, _ = brief_gefl(compile=True)
    compiling.compile_forward.cache_clear()
    assert [name for name in figures if name.endswith("samples_per_s")] == ["cvae_samples_per_s", "ddpm_samples_per_s", "ddpm_compiled_samples_per_s"]


def test_two_ranks_share_the_rounds_of_gefl_and_time_nothing_else(tmp_path):
    with started(tmp_path, "bench", "gefl", "--clients", "2", "--steps", "1", "--rounds", "1", "--threads", "1", "--json", ranks=2) as process:
        assert process.ends() == 0, process.text()
        figures = json.loads(process.text())
    assert list(figures) == [*COMMON, "rows"] and figures["ranks"] == 2
    assert figures["generator_step_ms"] == pytest.approx(1000 * figures["generator_round_s"], abs=0.1), "one client on each"
