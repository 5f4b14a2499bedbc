"""The benchmarks of FedConv's server and of GeFL-F: which figures they give, what these leave out, and what they do on two ranks."""
import functools
import json
import time
from argparse import Namespace
from collections import Counter

import pytest
import torch

from hpcfl import tree
from hpcfl.bench import fedconv, gefl, w1_vtc
from hpcfl.bench.fedconv import Timed, find_typical
from hpcfl.training import compiling
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Modules
from hpcfl.wire.communicator import Alone, Communicator
from tests.support import in_memory
from tests.support.tiny_runs import started, undisturbed

STEPS = ("plain_step_ms", "engine_step_ms", "compression_step_ms", "dilation_step_ms", "aggregation_step_ms")
DELAY_S = 0.1


def carried_out(**changes) -> dict:
    with undisturbed():
        return w1_vtc.fedconv(Communicator(Alone()), Namespace(**{"device": "cpu", "threads": 1, "steps": 2, "rounds": 1, **changes}))


def test_every_step_and_the_whole_round_are_timed_and_fit_a_terminal():
    figures = carried_out(rounds=2)
    assert all(figures[name] > 0 for name in STEPS) and figures["server_phase_s"] > 0
    assert figures["idle_s"] == [0] and figures["repetitions"] == 2 and figures["steps_per_epoch"] == 2
    assert [line.split()[0] for line in w1_vtc.render(figures).splitlines()] == list(figures)


def test_validation_counts_in_the_round_and_in_no_step(monkeypatch):
    validate, calls = Timed.validate, []

    def slow(*arguments):
        calls.append(time.sleep(DELAY_S))
        return validate(*arguments)
    monkeypatch.setattr(Timed, "validate", slow)
    figures = carried_out()
    assert len(calls) == 2 * (2 + 8 + 1), "after each of two epochs of two sizes, eight clients and the average"
    assert figures["server_phase_s"] > DELAY_S * len(calls) and max(figures[name] for name in STEPS) < 1000 * DELAY_S / 2


def test_all_sizes_have_their_part_in_a_figure(monkeypatch):
    booked = []
    monkeypatch.setattr(fedconv, "find_typical", lambda laps, work: booked.extend(laps) or find_typical(laps, work))
    carried_out()
    counts = {key: len(seconds) for laps in booked[:2] for key, seconds in laps.items()}
    sizes = ("fedconv@0.75", "fedconv@0.5625")
    assert counts == {("server", "fedconv"): 1, ("aggregation", "fedconv"): 2, ("fine-tuning", "fedconv"): 1,
                      **{(work, size): epochs for size in sizes for work, epochs in {"compression": 2, "fine-tuning": 1, "dilation": 2}.items()}}


def test_a_figure_is_the_mean_over_sizes_of_the_median_over_repetitions_on_any_rank():
    laps = [{("dilation", "a"): [1.0, 9.0], ("dilation", "b"): [4.0], ("server", "a"): [50.0]}, {("dilation", "a"): [2.0]}]
    assert find_typical(laps, "dilation") == pytest.approx((2 + 4) / 2)


def test_two_ranks_share_the_round_and_one_of_them_reports(tmp_path):
    with started(tmp_path, "bench", "fedconv", "--steps", "2", "--rounds", "1", "--threads", "1", "--json", ranks=2) as process:
        assert process.ends() == 0, process.text()
        figures = json.loads(process.text())
    assert figures["ranks"] == 2 and len(figures["idle_s"]) == 2
    assert 0 < figures["idle_s"][1] < figures["server_phase_s"], "rank 1 waits while the server averages"


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
            return w1_vtc.gefl(Communicator(Alone()), Namespace(**arguments | changes)), worlds[0]
    return carry_out


def test_rounds_of_gefl_stand_beside_bare_loops_and_samples_and_fit_a_terminal(brief_gefl):
    figures, world = brief_gefl()
    wanted = [*COMMON, *(f"{name}_{what}" for name in BARE for what in ("s", "ratio")), "cvae_samples_per_s", "ddpm_samples_per_s", "rows"]
    assert list(figures) == wanted and all(figures[name] > 0 for name in wanted if name.endswith(("_s", "_ms", "_ratio")))
    assert figures["generator_step_ms"] == pytest.approx(1000 * figures["generator_round_s"] / 2, abs=0.1), "two clients, one step each"
    assert [(phase.name, phase.rounds) for phase in world.plan] == [("generator", 2), ("targets", 2)]
    assert [row["phase"] for row in figures["rows"]] == ["generator", "targets"]
    assert all(0 < row["train_s"] < figures[name] for row, name in zip(figures["rows"], ("generator_round_s", "header_round_s"), strict=True))
    assert [line.split()[0] for line in w1_vtc.render(figures).splitlines()] == [*wanted[:-1], "phase", "generator", "targets"]


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


COLUMNS = ["ranks", "residency", "chunk", "clients", "round_s", "peak_memory_bytes", "before_bytes", "state_bytes"]


def test_each_case_of_many_clients_has_a_process_of_its_own(tmp_path):
    with started(tmp_path, "bench", "clients", "--clients", "3,4", "--residency", "disk", "--rounds", "1", "--threads", "1", "--json") as process:
        assert process.ends() == 0, process.text()
        rows = json.loads(process.text())["rows"]
    assert [list(row) for row in rows] == [COLUMNS] * 2
    assert [(row["ranks"], row["residency"], row["chunk"], row["clients"]) for row in rows] == [(1, "disk", 20, 3), (1, "disk", 20, 4)]
    assert all(row["peak_memory_bytes"] >= row["before_bytes"] > row["state_bytes"] > 0 and row["round_s"] > 0 for row in rows)
    assert rows[0]["state_bytes"] < rows[1]["state_bytes"]


def test_ranks_measure_one_case_and_refuse_several(tmp_path):
    with started(tmp_path, "bench", "clients", "--clients", "3", "--residency", "disk", "--chunk", "1",
                 "--rounds", "1", "--threads", "1", "--json", ranks=2) as process:
        assert process.ends() == 0, process.text()
        figures = json.loads(process.text())
    assert list(figures) == COLUMNS and (figures["ranks"], figures["chunk"]) == (2, 1)
    with started(tmp_path, "bench", "clients", "--clients", "3,4", "--residency", "disk", ranks=2) as process:
        assert process.ends() == 2 and "2 cases under mpirun, but a peak of memory belongs to a process" in process.text(), process.text()
