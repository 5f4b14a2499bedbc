"""Evaluation: logits, features and right answers of a client's model, in eval mode and without gradients."""
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hpcfl import tree
from hpcfl.data.shards import Shard
from hpcfl.errors import NonFiniteError
from hpcfl.streams import keeping_generators, sow
from hpcfl.training.compiling import compile_forward
from hpcfl.training.group import Group
from hpcfl.tree import Tree

BATCH = 250                                                        # images per forward pass: fit a CPU's cache; at 1000 an image takes 1.3 to 2.7 times as long


class _Method(nn.Module):
    """A module whose forward is one method of another module, so that functional_call reaches it."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(self.module, self.method)(*inputs)


def bind(module: nn.Module, state: Tree, method: str = "forward", compile: bool = False) -> Callable[..., Any]:
    """module.method as a function with the parameters and buffers of `state`, in eval mode and without gradients.

    On a CPU convolutions get their weights channels last: the small networks of the zoo take 25 to 50 % less time for it.
    compile: for functions that are called thousands of times; equal to rounding. One compilation serves every state and module of the same structure.
    """
    forward = compile_forward(_forward) if compile else _forward
    wrapped, convolutions = _Method(module, method), {name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)}
    state = {f"module.{path}": leaf.to(memory_format=torch.channels_last)
             if leaf.device.type == "cpu" and leaf.dim() == 4 and path.removesuffix("weight").removesuffix(".") in convolutions else leaf
             for path, leaf in state.items()}

    @torch.no_grad()
    def call(*inputs: Tensor) -> Tensor:
        modes = [(layer, layer.training) for layer in wrapped.module.modules()]          # of each layer: others may be training with this module
        wrapped.module.eval()
        try:
            return forward(wrapped, state, inputs)
        finally:
            for layer, training in modes:
                layer.training = training
    return call


def _forward(wrapped: _Method, state: Tree, inputs: tuple[Tensor, ...]) -> Tensor:
    return functional_call(wrapped, state, inputs)


def bind_model(group: Group, modules: Mapping[str, nn.Module], client: int, name: str = "model", method: str = "forward") -> Callable[..., Tensor]:
    """A method of one client's network as a function, see `bind`."""
    return bind(modules[name], tree.part(tree.row(group.state, group.row_of[client]), name), method)


def apply_in_batches(function: Callable[[Tensor], Tensor], shard: Shard, batch: int = BATCH) -> Tensor:
    """function over all images of a shard, batch by batch, concatenated (n, ...)."""
    return torch.cat(_apply_to_blocks(function, shard, [slice(start, start + batch) for start in range(0, len(shard), batch)]))


def _apply_to_blocks(function: Callable[[Tensor], Tensor], shard: Shard, blocks: Iterable[slice]) -> list[Tensor]:
    """function of each block of images; a network that draws random numbers even in eval mode draws the same for a block on every rank and in every run."""
    outputs = []
    with keeping_generators():
        for block in blocks:
            sow(block.start)
            outputs.append(function(shard.pixels(block)))
    return outputs


def extract_features(group: Group, modules: Mapping[str, nn.Module], client: int, shard: Shard, where: str = "evaluation",
             advice: str = "lower the learning rate") -> Tensor:
    """Features z = g_k(x) of a shard, (n, p) float32, in the shard's order and without augmentation.

    Raises: NonFiniteError naming `where` and the client, with the advice.
    """
    z = apply_in_batches(bind_model(group, modules, client, method="features"), shard)
    if not bool(torch.isfinite(z).all()):
        raise NonFiniteError(f"{where}: client {client} ({group.architecture}): its features hold NaN or infinity; {advice}")
    return z


def count_correct(predict: Callable[[Tensor], Tensor], shard: Shard, classes: int, batch: int = BATCH, first: int = 0, every: int = 1) -> Tensor:
    """Right answers per class, (C,) int64: the diagonal of the confusion matrix.

    Only the batches first, first + every, ... are counted: `every` ranks that each begin with another batch count all images once. The batches are the
    same for any number of ranks, and so are the bits of what the model says.
    """
    blocks = [slice(start, start + batch) for start in range(first * batch, len(shard), every * batch)]
    if not blocks:
        return torch.zeros(classes, dtype=torch.int64)
    labels = torch.cat([shard.labels[block] for block in blocks])
    right = torch.cat([logits.argmax(1) for logits in _apply_to_blocks(predict, shard, blocks)]) == labels
    return torch.bincount(labels[right], minlength=classes).cpu()
