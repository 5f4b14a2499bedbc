"""Synthetic data: class-balanced batches drawn from a generator on the fly."""
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from hpcfl.data.shards import list_batch_sizes
from hpcfl.streams import Stream
from hpcfl.tree import Tree

Draw = Callable[[Tensor, torch.Generator], Tensor]                 # (labels (B,), generator) -> images (B, C, H, W) in the classifier's range


def draw_synthetic_epochs(draw: Draw, classes: Tensor, per_class: int, batch: int, count: int, stream: Stream, *, resample: bool = True,
                     real: Callable[[int], Iterable[Tree]] | None = None) -> Iterator[Tree]:
    """`count` passes over `per_class` images of each of `classes` (n,), shuffled, as batches {"x": (B, C, H, W), "y": (B,)}.

    Images are drawn batch by batch and never stored as a whole; batches are sized as by `epochs`. With `resample` every pass draws anew,
    without it the first pass repeats.
    `real(epoch)` gives batches of real images that follow each pass.
    """
    for epoch in range(count):
        generator = stream.branch(str(epoch if resample else 0)).torch(classes.device)
        labels = classes.repeat_interleave(per_class)
        labels = labels[torch.randperm(len(labels), generator=generator, device=classes.device)]
        for y in labels.split(list_batch_sizes(len(labels), batch)):
            yield {"x": draw(y, generator), "y": y}
        if real is not None:
            yield from real(epoch)
