"""The benchmark of GeFL-F: rounds of the real loop beside bare PyTorch on the same batches, and how fast each generative model draws."""
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcfl.algorithms.gefl import GENERATOR, TrainGenerator, build_generator
from hpcfl.algorithms.gefl_f import EXTRACTOR, Config, TrainHeaders
from hpcfl.bench.noise import NoiseWorld
from hpcfl.bench.timing import measure_elapsed, median_seconds, to_milliseconds
from hpcfl.contract import ClientSite
from hpcfl.data.shards import iterate_epochs, list_batch_sizes
from hpcfl.federation.exchange import Exchange
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.loop import rounds
from hpcfl.federation.state import Place, State, begin
from hpcfl.generators.ddpm import Ddpm
from hpcfl.models.classifier import Shape
from hpcfl.runs import devices
from hpcfl.runs.choices import CHOICES
from hpcfl.settings.job import Job, resolve
from hpcfl.training.evaluate import bind
from hpcfl.training.turns import Modules
from hpcfl.wire.communicator import Communicator

CLIENTS, ARCHITECTURES = 10, 10                                    # of the paper's runs
IMAGES, BATCH = 600, 64                                            # of a client, for MNIST
EPOCHS = 1                                                         # T_g; the paper's 5 take five times as long
REPETITIONS = 3
KINDS_OF_WORK = ("train", "idle", "combine", "aggregate", "publish", "refine")
DRAWN = {"cpu": 16, "cuda": 64}                                    # samples at a time; of 16 on a CPU each takes as long as of 64, to a few percent
SAMPLED: dict[str, dict[str, Any]] = {"cvae": {}, "dcgan": {"generator": "dcgan"}, "ddpm": {"generator": "ddpm"},
                                      "ddim10": {"generator": "ddpm", "ddim_steps": 10}}     # figure -> settings; the others are those of MNIST, T = 100


def gefl(comm: Communicator, arguments: Namespace) -> dict[str, Any]:
    """Rounds of GeFL-F with FedCVAE-F, and samples of all its generators on one rank; `--epochs` is T_g, the rest the paper's for MNIST, on noise.

    `generator_round_s`: T_g epochs of all clients and what federates them; `header_round_s`: T_s = 1 and T_r = 5. `*_bare_s`: their batches by modules,
    autograd and torch.optim, one network (a classifier for each client) that is neither sent, averaged nor checked; `fused`: by the optimiser kernel that
    hpcfl takes. Medians over `--rounds` repetitions, rounds and bare loops in turn, `*_ratio` of the pairs; all eager, but on CUDA or where asked diffusion
    is sampled compiled too. `rows`: where the server's rank spends a round.
    """
    device = devices.choose_device(arguments.device, comm.local_rank)
    clients, repetitions, count = (arguments.clients or (CLIENTS,))[0], arguments.rounds or REPETITIONS, arguments.epochs or EPOCHS
    job = resolve({"run": {"name": "gefl", "threads": arguments.threads, "compile": "off"},
                   "data": {"image_size": 32, "normalization": "unit", "validation_fraction": 0.0, "test_fraction": 0.0},
                   "models": {"names": [f"cnn{number}" for number in range(1, min(clients, ARCHITECTURES) + 1)], "assignment": "blocks", "feature_size": 0},
                   "federation": {"clients": clients, "rounds": repetitions + 1}, "training": {"batch": BATCH, "epochs": 5, "lr": 0.1},
                   "algorithm": {"name": "gefl_f", "generator_rounds": repetitions + 1, "generator_epochs": count}}, CHOICES)
    devices.set_threads(job, comm)
    world = GeFLNoise(job, comm, device, BATCH * arguments.steps or IMAGES)
    laps, bare, rows = measure_phases(world)
    steps = count * len(list_batch_sizes(world.images, BATCH)) * max(Counter(world.home).values())
    figures = {"ranks": comm.size, "threads": torch.get_num_threads(), "device": str(device), "clients": clients, "images_per_client": world.images,
               "generator_epochs": count, "repetitions": repetitions, "generator_round_s": median_seconds(laps["generator"]),
               "generator_step_ms": to_milliseconds(median(laps["generator"]) / steps), "header_round_s": median_seconds(laps["targets"])}
    for name, (phase, bare_s) in bare.items():
        figures |= {f"{name}_s": median_seconds(bare_s), f"{name}_ratio": round(median(lap / each for lap, each in zip(laps[phase], bare_s, strict=True)), 3)}
    if comm.size == 1:
        figures |= time_sampling(world, repetitions, arguments.compile or device.type == "cuda")
    return figures | {"rows": rows}


class GeFLNoise(NoiseWorld):
    """GeFL-F without its warm-up."""

    def __init__(self, job: Job, comm: Communicator, device: torch.device, images: int) -> None:
        super().__init__(job, comm, device, images)
        self.plan = tuple(phase for phase in self.plan if phase.name != "warmup")


def measure_phases(world: GeFLNoise) -> tuple[dict[str, list[float]], dict[str, tuple[str, list[float]]], list[dict[str, Any]]]:
    """Seconds of each phase's rounds but its first; on one rank {bare loop: (phase, its seconds)}; and rows of what this rank did in them."""
    comm, ledger = world.comm, Ledger(world.problem.device)
    laps, accounts = defaultdict(list), defaultdict(list)
    bare: dict[str, tuple[str, list[float]]] = {name: (phase, []) for name, (phase, *_) in BARE.items()} if comm.size == 1 else {}
    begun = begin(world)
    comm.barrier()
    start = time.perf_counter()
    for state, place in rounds(Exchange(world, ledger, lambda state, place: None), begun):
        comm.barrier()
        lap, account = time.perf_counter() - start, ledger.close()
        if place.round:                                            # the first makes the maps
            laps[place.phase.name].append(lap)
            accounts[place.phase.name].append(account["seconds"])
            for name, (phase, found) in bare.items():
                if phase == place.phase.name:
                    _, carry_out, settings = BARE[name]
                    found.append(carry_out(world, state, place, **settings))
        comm.barrier()
        start = time.perf_counter()
    rows = [{"phase": phase, **{f"{kind}_s": median_seconds([each[kind] for each in every]) for kind in KINDS_OF_WORK}} for phase, every in accounts.items()]
    return laps, bare, rows


def list_sites(world: GeFLNoise, state: State, place: Place) -> Iterator[tuple[int, str, ClientSite]]:
    """This rank's clients, their architectures and what they may see."""
    for group in state.groups:
        site = world.client_site(group.fetch(), place.phase, place.round)
        yield from ((client, group.architecture, site) for client in group.clients)


def time_bare_generator(world: GeFLNoise, state: State, place: Place, **settings: Any) -> float:
    """Seconds in which torch.optim.Adam with these settings takes one network through the batches of a generator round."""
    step, device = cast(TrainGenerator, place.phase.steps[0]), world.problem.device
    (rule,), ((_, loss),) = step.generative.rules(), step.generative.losses()
    modules = Modules(step.initialise("init/generator")).to(device)
    optimizer = torch.optim.Adam(modules.parameters(), lr=rule.lr, betas=rule.betas, weight_decay=rule.weight_decay, **settings)
    start = time.perf_counter()
    for client, _, site in list_sites(world, state, place):
        for batch in step.batches(state.at_server(), site, client, BATCH):
            update(optimizer, modules(loss, batch, {})[0])
    return measure_elapsed(start, device)


def time_bare_header(world: GeFLNoise, state: State, place: Place) -> float:
    """Seconds in which torch.optim.SGD takes a header of each client through the samples and maps of a header round."""
    step, device, training = cast(TrainHeaders, place.phase.steps[0]), world.problem.device, world.job.training
    generator = step.initialise("init/generator")[GENERATOR].to(device).eval()
    models = {client: world.problem.structure(architecture) for client, architecture, _ in list_sites(world, state, place)}

    @torch.no_grad()
    def draw(y: Tensor, random: torch.Generator) -> Tensor:
        return step.generative.sample(generator, y, random)
    start = time.perf_counter()
    for client, _, site in list_sites(world, state, place):
        header = [leaf for path, leaf in models[client].named_parameters() if not path.startswith(EXTRACTOR)]
        own = iterate_epochs(step.space.encode_own(state.at_server(), site, client), BATCH, training.epochs, site.stream("batches", client))
        for batches in (step.draw_batches(draw, site, client), own):
            optimizer = torch.optim.SGD(header, lr=training.lr)
            for batch in batches:
                update(optimizer, F.cross_entropy(models[client].header(batch["x"]), batch["y"]))
    return measure_elapsed(start, device)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def time_sampling(world: GeFLNoise, repetitions: int, compiling: bool) -> dict[str, float]:
    """{"ddpm_samples_per_s": ...} of networks as they are initialised, all kinds in turn; where wanted, compiled too if they sample in many calls."""
    problem, device = world.problem, world.problem.device
    shape, y = cast(Shape, problem.structure(problem.sizes.every[0]).maps_shape), torch.arange(DRAWN[device.type], device=device) % problem.classes
    kinds = {name: build_generator(Config(**settings), shape, problem.classes, True) for name, settings in SAMPLED.items()}
    ways, laps = [(name, kind, False) for name, kind in kinds.items()], defaultdict(list)
    ways += [(f"{name}_compiled", kind, True) for name, kind in kinds.items() if compiling and kind.calls > 1]
    calls = {}
    for name, kind, compile in ways:
        with problem.stream("init/sampling").seeding():
            network = kind.networks()[GENERATOR].to(device)
        calls[name] = bind(network, network.state_dict(), compile=compile)
        brief = replace(kind, ddim_steps=1) if isinstance(kind, Ddpm) else kind
        brief.sample(calls[name], y, problem.stream("sample").torch(device))               # compiles, where that is wanted, and warms up
    for number in range(repetitions):
        for name, kind, _ in ways:
            random, start = problem.stream("sample", round_=number).torch(device), time.perf_counter()
            kind.sample(calls[name], y, random)
            laps[name].append(measure_elapsed(start, device))
    return {f"{name}_samples_per_s": round(len(y) / median(each), 2) for name, each in laps.items()}


BARE = {"generator_bare": ("generator", time_bare_generator, {}), "generator_bare_fused": ("generator", time_bare_generator, {"fused": True}),
        "header_bare": ("targets", time_bare_header, {})}               # figure -> (phase, loop, its settings)
