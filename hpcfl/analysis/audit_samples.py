"""Samples of an audit: which images an audit compares: members and others of one class mix, and what nobody trained on."""
import numpy as np
import torch
from torch import Tensor

from hpcfl.data.shards import Shard, load
from hpcfl.federation.world import World
from hpcfl.streams import Stream

POOL = 20_000                                                      # images that nobody trained on: in colour and of 64 pixels they take 250 MB


def match_classes(labels: Tensor, others: Tensor, most: int, stream: Stream) -> tuple[Tensor, Tensor]:
    """Indices of at most `most` of labels (n,) drawn at random, and of equally many of each class of others (m,): two of one length and class mix.

    Of a class that the others have fewer of, fewer are taken.
    """
    random = stream.numpy()
    here, there = (torch.from_numpy(random.permutation(len(each))).to(each.device) for each in (labels, others))
    here, classes = here[:most], 1 + max(int(each.max()) if len(each) else 0 for each in (labels, others))
    counts = torch.minimum(*(each.bincount(minlength=classes) for each in (labels[here], others)))
    return take_by_class(labels, here, counts), take_by_class(others, there, counts)


def draw_replacements(pool: Shard, others: Shard, stream: Stream) -> Shard:
    """Images of the pool to put in the place of members: as many of each class as the others have, or as there are."""
    return select_images(pool, match_classes(others.labels, pool.labels, len(others), stream)[1])


def take_by_class(labels: Tensor, order: Tensor, counts: Tensor) -> Tensor:
    """The first counts[c] indices of each class c in the order, class by class."""
    ordered = labels[order]
    return torch.cat([order[ordered == c][:count] for c, count in enumerate(counts.tolist())])


def draw_images(shard: Shard, counts: Tensor, stream: Stream) -> Shard:
    """Random images of a shard, counts[c] of each class c or as many as there are, class by class."""
    order = torch.from_numpy(stream.numpy().permutation(len(shard))).to(shard.labels.device)
    return select_images(shard, take_by_class(shard.labels, order, counts))


def select_images(shard: Shard, indices: Tensor) -> Shard:
    """The images of a shard at the indices (n,)."""
    return Shard(shard.images[indices], shard.labels[indices], shard.scale)


def find_unseen(world: World) -> Shard:
    """Images of the official training set that neither a client nor the server trained on, at most POOL."""
    trained = np.concatenate([*world.split.train, world.split.public])
    rest = np.setdiff1d(np.arange(len(world.corpus.train_labels)), trained)
    drawn = world.problem.stream("audit/pool").numpy().permutation(rest)[:POOL]
    return load(world.corpus, [drawn], world.problem.scale, world.problem.device)[0]
