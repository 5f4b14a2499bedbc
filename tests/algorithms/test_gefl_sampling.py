"""Sampling in rounds of GeFL: which generators are compiled for it, and that this changes no sample."""
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from hpcfl.algorithms.gefl import TrainTargets
from hpcfl.federation.state import schedule
from hpcfl.streams import Stream
from hpcfl.training import compiling
from tests.support import in_memory

STEPS, BATCH, ROUNDS = 4, 16, 3
DDPM = {"generator": "ddpm", "generator_rounds": 1, "generator_epochs": 1, "steps": STEPS, "width": 8}
BALANCED = {"data": {"partition": "iid"}, "models": {"names": ["cnn1"]}}


def targets(settings, device="cpu", **run):
    """The step of the target rounds, its group and what that may see, in a federation of three clients with 71 or 72 images each."""
    described = in_memory.job("gefl", settings, run=run, federation={"rounds": ROUNDS}, **BALANCED)
    world = in_memory.world(described)
    step, place, group = in_memory.step(world, TrainTargets), schedule(world)[-1], world.join()[0]
    step.problem = replace(step.problem, device=torch.device(device))
    return world, step, group, world.client_site(group, place.phase, place.round)


@pytest.mark.parametrize("settings, compile, wanted", [(DDPM, "on", True), (DDPM, "off", False), (DDPM, "auto", False), (DDPM | {"ddim_steps": 1}, "on", False),
                                                       ({"generator": "cvae", "generator_rounds": 1}, "on", False)],
                         ids=["asked for", "not wanted", "on a cpu", "one step", "one call"])
def test_only_what_samples_in_many_calls_is_compiled(settings, compile, wanted):
    _, step, group, site = targets(settings, compile=compile)
    assert step.draws_often(group, site) is wanted


def test_a_gpu_compiles_from_the_number_of_calls_in_the_whole_run_that_pays(monkeypatch):
    _, step, group, site = targets(DDPM, "cuda", compile="auto")
    images = int(site.sizes(group).max())
    calls = STEPS * (images // BATCH) * ROUNDS * len(group.clients)
    assert images // BATCH == 4 and len(group.clients) == 3
    for pays, wanted in ((calls, True), (calls + 1, False)):
        monkeypatch.setattr(compiling, "COMPILE_PAYS", pays)
        assert step.draws_often(group, site) is wanted


def test_clients_with_less_than_a_batch_still_draw_one(monkeypatch):
    _, step, group, site = targets(DDPM, "cuda", compile="auto")
    small = replace(step.problem.job, training=replace(step.problem.job.training, batch=1000))
    step.problem = replace(step.problem, job=small)
    monkeypatch.setattr(compiling, "COMPILE_PAYS", STEPS * ROUNDS * len(group.clients))
    assert step.draws_often(group, site)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_samples_are_the_eager_ones_and_pictures_are_drawn_as_they_were(backend, compile_with, caplog):
    compile_with(backend)
    world, step, group, site = targets(DDPM, compile="on")
    message, y = world.found(), torch.arange(BATCH) % 10
    before = counters["stats"]["unique_graphs"]
    with inductor.patch(compile_threads=1):                        # starting workers takes longer than compiling
        eager, fast, again = (step.build_drawer(message, site, compile)(y, Stream(0, "sample").torch()) for compile in (False, True, True))
    graphs = counters["stats"]["unique_graphs"]
    pictures, has = step.draw(group, message, site, 2)
    compiling.compile_forward.cache_clear()
    torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-5)
    assert torch.equal(again, fast) and graphs == before + 1 == counters["stats"]["unique_graphs"]
    assert pictures.shape[:2] == (10, 2) and has.all() and not [record for record in caplog.records if record.name.startswith("hpcfl")]
