"""Flops: counts the floating-point operations of a block of code, where torch carries out matrix products and convolutions."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.mv: 0, aten.dot: 0, aten.addmm: 1, aten.baddbmm: 1, aten.addmv: 1}   # where the left factor stands


class Counter(TorchDispatchMode):
    """Adds to `flops` what runs inside its `with` block: two for each multiply-add of matrix products and convolutions, nothing for the rest.

    Each gradient of a convolution, by its input or by its weights, takes as many operations as the convolution; only gradients that are computed count.
    torch.utils.flop_counter is less exact: it counts the backward pass of a grouped convolution, which vmap makes of many clients' ones, as that of a
    dense one; and it keeps 2 kB for each call of a module until the block ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Sequence[type], arguments: tuple = (), settings: dict[str, Any] | None = None) -> Any:
        result = function(*arguments, **(settings or {}))
        operator = function.overloadpacket
        if operator in PRODUCTS:
            self.flops += 2 * result.numel() * arguments[PRODUCTS[operator]].shape[-1]
        elif operator is aten.convolution:
            x, weight, _, _, _, _, transposed = arguments[:7]
            self.flops += _count_convolution(x if transposed else result, weight)
        elif operator is aten.convolution_backward:
            gradient, x, weight, *_, transposed, _, _, mask = arguments
            self.flops += sum(mask[:2]) * _count_convolution(x if transposed else gradient, weight)
        return result


@contextmanager
def counting(wanted: bool) -> Iterator[Counter | None]:
    """A Counter for the block, or None. Compiled code shows no operators, so it runs uncompiled in a block that is counted."""
    if not wanted:
        yield None
        return
    with torch.compiler.set_stance("force_eager"), Counter() as counter:
        yield counter


def _count_convolution(positions: Tensor, weight: Tensor) -> int:
    """Each weight is used once at each of the positions (B, C, ...): of the output, or of the input of a transposed convolution."""
    return 2 * len(positions) * prod(positions.shape[2:]) * weight.numel()
