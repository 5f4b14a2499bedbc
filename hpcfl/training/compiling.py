"""Compiling: whether torch.compile pays, and a function compiled, or as it is where that fails."""
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)

RECOMPILES = 256                                                   # torch's limit of 8 per function is below the architectures of a run
COMPILE_PAYS = 5_000                                               # expected steps on CUDA from which a minute of compilation is taken to pay
COMPILING: dict[str, Callable[[str, int], bool]] = {                # (type of the device, steps in the whole run) -> whether to compile
    "auto": lambda device, steps: device == "cuda" and steps >= COMPILE_PAYS, "on": lambda device, steps: True, "off": lambda device, steps: False}


def compiles(compile: str, device: str, expected_steps: int) -> bool:
    """Whether to compile a function that the whole run calls `expected_steps` times on this type of device; `compile` as `fit` takes it."""
    return COMPILING[compile](device, expected_steps)


@functools.cache
def compile_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module-level function compiled, its backward pass too. Where compiling fails it warns once, and calls the function as it is from then on."""
    from torch._dynamo import config  # imported here: it takes a second of start-up, which eager runs do not need
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor import config as inductor
    inductor.fallback_random = True                                # compiled code draws the same numbers as eager code
    config.recompile_limit = max(config.recompile_limit, RECOMPILES)
    fast = torch.compile(forward)
    obstacles: list[TorchDynamoException] = []

    def call(*arguments: object) -> Any:
        if not obstacles:
            try:
                return fast(*arguments)
            except TorchDynamoException as obstacle:
                obstacles.append(obstacle)
                log.warning("torch.compile does not work here, this run goes on uncompiled: %s", str(obstacle).strip().partition("\n")[0])
        return forward(*arguments)
    return call
