"""fit, the one training loop: a Group of clients, per-client loss code, batches in; the trained Group and its metrics out."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hpcfl.errors import JobError, LayoutError, note_whom
from hpcfl.streams import Stream, kept
from hpcfl.training.compiling import compile_forward, compiles
from hpcfl.training.engines import forward_one, forward_together, run_sequential, run_stacked
from hpcfl.training.group import OPTIMIZER, Group
from hpcfl.training.turns import Batches, Forward, Modules, Setup, Turn
from hpcfl.tree import Tree
from hpcfl.wording import numbers_text

ENGINES = {"sequential": run_sequential, "vmap": run_stacked}
PRECISIONS = {"auto": None, "float32": None, "bfloat16": torch.bfloat16}
UNNAMED = partial(Stream, 0, "fit")


def fit(group: Group, modules: Mapping[str, nn.Module], turns: Sequence[Turn], batches: Batches, *, context: Tree | None = None,
        engine: str = "auto", compile: str = "auto", precision: str = "auto", channels_last: bool | None = None, frozen_norm: bool = False,
        keep_optimizer: bool = False, expected_steps: int = 0, where: str = "fit", member: str = "client", origin: str = "",
        streams: Callable[[int], Stream] = UNNAMED) -> tuple[Group, dict[str, Tensor]]:
    """The Group after every client went through its batches, each batch taking all `turns` in order, and the clients' metrics.

    `modules` say how to compute; the weights are the Group's. A module of which the Group holds nothing serves all clients as it is.
    Modules that a Turn trains are in train mode (their norm layers in eval mode with `frozen_norm`), the others in eval mode; the caller's
    modules keep their weights and get their flags back, also after an exception. `context` is what every client's loss may read.

    engine: "sequential" runs client after client, the result of each being the same bits in whatever Group; "vmap" advances all together,
        in one call those whose batches have one shape, and is equal to rounding. "auto": vmap on CUDA, else sequential.
    compile: "on" compiles the loss and its gradient; "auto" does on CUDA from COMPILE_PAYS `expected_steps` of the whole run.
    precision: "bfloat16" is autocast of the loss; "auto" is float32.
    channels_last: memory format of images and convolutions in the sequential engine. None: yes on a CPU, where it saved 5 to 36 % of the time of the
        networks measured; it rounds differently than the usual format.
    keep_optimizer: optimiser state, step counts included, goes on from the Group's part "optimizer" and is returned there.
    streams: client -> Stream. A network, loss or batch that draws from a global generator (dropout, torch.rand, numpy.random) draws from it, for each step
        anew, the same in whatever Group and under both engines; "vmap" then computes such losses client by client. Afterwards the generators are as before.
    origin: what to say, and to do, where it is not training that failed but what the rows began with.
    Metrics: {name: (K,) float64 on the host}, the mean over a client's steps (of all Turns) of "loss" and of the scalars its losses name; NaN for
        a client without any.
    Raises: NonFiniteError naming `where` and clients, or what else `member` calls the rows of the Group; LayoutError where Group, modules, turns and batches do
        not fit each other, and for a loss that is no scalar or trains nothing; JobError for an engine, compile or precision that does not exist.
    """
    for name, value, allowed in (("engine", engine, ("auto", *ENGINES)), ("compile", compile, ("auto", "on", "off")),
                                 ("precision", precision, tuple(PRECISIONS))):
        if value not in allowed:
            raise JobError(f"{where}: {name} = {value!r} is not known; there are {', '.join(allowed)}")
    device = group.device.type
    run = ENGINES[engine if engine != "auto" else "vmap" if device == "cuda" else "sequential"]

    def prepared(forward: Forward) -> Forward:
        if compiles(compile, device, expected_steps):
            forward = compile_forward(forward)
        return forward if PRECISIONS[precision] is None else torch.autocast(device, PRECISIONS[precision], cache_enabled=False)(forward)
    setup = _set_up(group, modules, turns, keep_optimizer, alone=prepared(forward_one), stacked=prepared(forward_together), context=context or {}, where=where,
                 member=member, origin=origin, streams=streams, channels_last=device == "cpu" if channels_last is None else channels_last)
    asked: list[int] = []                                          # whose batches are read, the client at work last; with vmap all are at work

    def noted(client: int) -> Iterable[Tree]:
        asked.append(client)
        return batches(client)
    with _modes(setup, frozen_norm), kept(), note_whom(lambda: numbers_text(asked[-1:] if run is run_sequential else asked, member)):
        changed, rows = run(setup, group, noted)
    names = dict.fromkeys(["loss", *(name for row in rows for name in row)])
    metrics = {name: torch.tensor([row.get(name, math.nan) for row in rows], dtype=torch.float64) for name in names}
    return replace(group, state={**group.state, **changed}), metrics


def _set_up(group: Group, modules: Mapping[str, nn.Module], turns: Sequence[Turn], keep_optimizer: bool, channels_last: bool, where: str,
          **settings: Any) -> Setup:
    wrapped = Modules(modules)
    everything = dict([*wrapped.named_parameters(remove_duplicate=False), *wrapped.named_buffers(remove_duplicate=False)])
    if len({id(tensor) for tensor in everything.values()}) < len(everything):
        raise LayoutError(f"{where}: modules {', '.join(modules)}: two names share one parameter or buffer; give each use a tensor of its own")
    own = {f"{name}/{path}": f"{name}.{path}" for name in modules for path in _find_held(group, name, modules[name], where)}
    all_buffers = {name for name, _ in wrapped.named_buffers()}
    fixed = {name for name, tensor in everything.items() if not tensor.requires_grad}
    parameters = [path for path, name in own.items() if name not in all_buffers and name not in fixed]
    trained = tuple(_find_trained(group, turn, parameters, where) for turn in turns)
    slots = tuple({slot: [_slot_path(OPTIMIZER if keep_optimizer else f"turn {number}", slot, path) for path in trained[number]]
                   for slot in turn.optimizer.slots} for number, turn in enumerate(turns))
    kept = [path for turn in slots for paths in turn.values() for path in paths] if keep_optimizer else []
    if len(set(kept)) < len(kept):
        raise LayoutError(f"{where}: keep_optimizer with two Turns that train one parameter: their optimiser states would have one path")
    names = {name for turn in turns for name in turn.trains}
    buffers = tuple(path for path, name in own.items() if name in all_buffers and _module(path) in names)
    held = set(own.values())
    shared = {name: tensor.detach().to(group.device) for name, tensor in everything.items() if name not in held}
    returned = tuple(dict.fromkeys([*(path for paths in trained for path in paths), *buffers, *kept]))
    convolutions = {f"{name}.weight" for name, module in wrapped.named_modules() if isinstance(module, nn.Conv2d)} if channels_last else set()
    images = frozenset(path for path, name in own.items() if name in convolutions)
    return Setup(wrapped, tuple(turns), own, trained, slots, buffers, returned, shared, channels_last=images, images_last=channels_last,
                 where=where, **settings)


def _find_held(group: Group, name: str, module: nn.Module, where: str) -> list[str]:
    """The names of one module's tensors that the Group holds: all of its state_dict, or none."""
    def told(tensor: Tensor, first: int) -> str:
        return f"{tuple(tensor.shape[first:])} {str(tensor.dtype).removeprefix('torch.')}"
    held = group.part(name)
    wanted = {path: told(tensor, 0) for path, tensor in module.state_dict().items()} if held else {}
    for path in dict.fromkeys([*wanted, *held]):
        got, want = told(held[path], 1) if path in held else "missing", wanted.get(path, "missing")
        if got != want:
            raise LayoutError(f"{where}: group {group.architecture}: '{name}/{path}' of a client is {got}, in the module it is {want}")
    return list(wanted)


def _find_trained(group: Group, turn: Turn, parameters: Sequence[str], where: str) -> tuple[str, ...]:
    """The paths one Turn updates."""
    there = {_module(path) for path in parameters}
    if missing := set(turn.trains) - there:
        raise LayoutError(f"{where}: a Turn trains {sorted(missing)}, but of the given modules group {group.architecture} holds only {sorted(there)}")
    paths = tuple(path for path in parameters if _module(path) in turn.trains and (turn.scope is None or turn.scope(path)))
    if not paths:
        raise LayoutError(f"{where}: the scope of the Turn that trains {turn.trains} leaves no parameter of group {group.architecture}")
    return paths


def _module(path: str) -> str:
    return path.partition("/")[0]


def _slot_path(root: str, slot: str, path: str) -> str:
    module, _, parameter = path.partition("/")
    return f"{root}/{module}/{slot}/{parameter}"


@contextmanager
def _modes(setup: Setup, frozen_norm: bool) -> Iterator[None]:
    """Inside the block, train mode for what holds trained parameters and eval mode for the rest; then the caller's flags again."""
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
