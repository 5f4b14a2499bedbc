"""Compiling: whether torch.compile pays, and what it makes of a function."""
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)

RECOMPILES = 256                                                   # torch's limit of 8 per function is below the architectures of a run
COMPILE_PAYS = 5_000                                               # expected steps on CUDA from which a minute of compilation is taken to pay


def compiles(compile: str, device: str, expected_steps: int) -> bool:
    """Whether to compile what takes so many steps in the whole run on that type of device; `compile` as `fit` takes it."""
    return compile == "on" or (compile == "auto" and device == "cuda" and expected_steps >= COMPILE_PAYS)


@functools.cache
def compile_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module-level function compiled (its backward pass with it); where that proves impossible, one warning and the function as it is from then on."""
    from torch._dynamo import config  # imported here: a second of start-up that eager runs do not need
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor import config as inductor
    inductor.fallback_random = True                                # what is compiled draws the numbers that it draws uncompiled
    config.recompile_limit = max(config.recompile_limit, RECOMPILES)
    fast = torch.compile(forward)
    obstacles: list[TorchDynamoException] = []

    def either(*arguments: object) -> Any:
        if not obstacles:
            try:
                return fast(*arguments)
            except TorchDynamoException as obstacle:
                obstacles.append(obstacle)
                log.warning("torch.compile does not work here, this run goes on uncompiled: %s", str(obstacle).strip().partition("\n")[0])
        return forward(*arguments)
    return either
