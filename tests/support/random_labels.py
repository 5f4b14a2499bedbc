"""Digits with labels drawn at random: whoever knows such a label has seen the image."""
from functools import cache

import torch

from hpcfl.contract import Problem
from hpcfl.data.shards import Scale, Shard
from tests.support.in_memory import job, world

MEMBERS, ARCHITECTURE = 100, "mlp2"


def marked(count: int) -> Shard:
    """Images that carry their index in every pixel."""
    return Shard(torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8), torch.arange(count) % 10, Scale())


@cache
def problem() -> Problem:
    return world(job("fedavg", training={"batch": 16, "lr": 0.2})).problem


@cache
def parts() -> tuple[Shard, Shard, Shard]:
    """Members, others and a pool."""
    digits = world(job("fedavg")).corpus
    images = torch.from_numpy(digits.train_images())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 10, (len(images),), generator=torch.Generator().manual_seed(1))
    return tuple(Shard(images[part], labels[part], problem().scale) for part in order[:1000].split([MEMBERS, 300, 600]))
