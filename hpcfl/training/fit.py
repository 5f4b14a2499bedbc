"""fit, the one training loop: a Group of clients, losses of one client, batches in; the trained Group and its metrics out."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from hpcfl.errors import JobError, note_whom
from hpcfl.streams import Stream, keeping_generators
from hpcfl.training.compiling import COMPILING, compile_forward, compiles
from hpcfl.training.engines import forward_one, forward_stacked, run_sequential, run_stacked
from hpcfl.training.group import Group
from hpcfl.training.setup import Forward, Setup, set_up
from hpcfl.training.turns import Batches, Turn
from hpcfl.tree import Tree
from hpcfl.wording import numbers_text

ENGINES = {"sequential": run_sequential, "vmap": run_stacked}
PRECISIONS = {"auto": None, "float32": None, "bfloat16": torch.bfloat16}
UNNAMED = partial(Stream, 0, "fit")


def fit(group: Group, modules: Mapping[str, nn.Module], turns: Sequence[Turn], batches: Batches, *, context: Tree | None = None,
        engine: str = "auto", compile: str = "auto", precision: str = "auto", channels_last: bool | None = None, frozen_norm: bool = False,
        keep_optimizer: bool = False, expected_steps: int = 0, where: str = "fit", member: str = "client", origin: str = "",
        streams: Callable[[int], Stream] = UNNAMED) -> tuple[Group, dict[str, Tensor]]:
    """Train every client of the Group on its batches, each batch taking all `turns` in order. Gives the Group afterwards, and the clients' metrics.

    modules: how to compute; the weights are the Group's. A module of which the Group holds nothing serves all clients as it is. Modules that a Turn trains
        are in train mode, the others in eval mode. The caller's modules keep their weights and get their flags back, also after an exception.
    context: what the loss of every client may read.
    engine: "sequential" trains client after client; each client's result is the same bits in whatever Group. "vmap" takes a step of all clients at a time,
        in one call for those whose batches have one shape; its results are equal to rounding. "auto": vmap on CUDA, else sequential.
    compile: "on" compiles the loss and its gradient; "auto" does on CUDA from COMPILE_PAYS `expected_steps` of the whole run.
    precision: "bfloat16" is autocast of the loss; "auto" is float32.
    channels_last: memory format of images and convolutions in the sequential engine. None: yes on a CPU, where it saved 5 to 36 % of the time of the
        networks measured; it rounds differently than the usual format.
    frozen_norm: whether the norm layers of trained modules are in eval mode.
    keep_optimizer: optimiser state, step counts included, goes on from the Group's part "optimizer" and is returned there.
    streams: client -> Stream. A network, loss or batch that draws from a global generator (dropout, torch.rand, numpy.random) draws from this stream, in each
        step anew, the same in whatever Group and under both engines; "vmap" computes such losses client by client. Afterwards the generators are as before.
    where, member: how errors name this training and a row of the Group.
    origin: what errors advise where the state that the rows began with is at fault, and not their training.
    Metrics: {name: (K,) float64 on the host}, the mean of "loss" and of each scalar that the losses name, over a client's steps of all Turns; NaN for a
        client without any.
    Raises: NonFiniteError naming `where` and clients; LayoutError where Group, modules, turns and batches do not fit each other, and for a loss that is no
        scalar or trains nothing; JobError for an engine, compile or precision that does not exist.
    """
    for name, value, allowed in (("engine", engine, ("auto", *ENGINES)), ("compile", compile, COMPILING), ("precision", precision, PRECISIONS)):
        if value not in allowed:
            raise JobError(f"{where}: {name} = {value!r} is not known; there are {', '.join(allowed)}")
    device = group.device.type
    run = ENGINES[engine if engine != "auto" else "vmap" if device == "cuda" else "sequential"]

    def prepare(forward: Forward) -> Forward:
        if compiles(compile, device, expected_steps):
            forward = compile_forward(forward)
        return forward if PRECISIONS[precision] is None else torch.autocast(device, PRECISIONS[precision], cache_enabled=False)(forward)
    setup = set_up(group, modules, turns, keep_optimizer, forward_one=prepare(forward_one), forward_stacked=prepare(forward_stacked), context=context or {},
                   where=where, member=member, origin=origin, streams=streams, channels_last=device == "cpu" if channels_last is None else channels_last)
    asked: list[int] = []                                          # whose batches were asked for; the last one is at work, with vmap all are

    def note_and_read(client: int) -> Iterable[Tree]:
        asked.append(client)
        return batches(client)
    with _choosing_modes(setup, frozen_norm), keeping_generators(), note_whom(lambda: numbers_text(asked[-1:] if run is run_sequential else asked, member)):
        changed, rows = run(setup, group, note_and_read)
    names = dict.fromkeys(["loss", *(name for row in rows for name in row)])
    metrics = {name: torch.tensor([row.get(name, math.nan) for row in rows], dtype=torch.float64) for name in names}
    return replace(group, state={**group.state, **changed}), metrics


@contextmanager
def _choosing_modes(setup: Setup, frozen_norm: bool) -> Iterator[None]:
    """Inside the block, modules with trained parameters are in train mode and the others in eval mode; afterwards all have the caller's flags again."""
    trained = {setup.own[path] for paths in setup.trained for path in paths}
    before = [(module, module.training) for module in setup.modules.modules()]

    def choose(module: nn.Module, prefix: str, inherited: bool) -> None:
        names = {prefix + name for name, _ in module.named_parameters()}
        module.training = not names.isdisjoint(trained) if names else inherited
        for name, child in module.named_children():
            choose(child, f"{prefix}{name}.", module.training)
        if frozen_norm and hasattr(module, "track_running_stats"):
            module.training = False
    try:
        choose(setup.modules, "", False)
        yield
    finally:
        for module, training in before:
            module.training = training
