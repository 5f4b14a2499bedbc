"""Noise: images that are drawn instead of read, so that a benchmark needs no data set."""
from collections.abc import Mapping
from functools import cached_property

import torch

from hpcfl.contract import Holdings, Problem
from hpcfl.data.shards import Shard
from hpcfl.federation.world import World
from hpcfl.settings.job import Job
from hpcfl.streams import Stream
from hpcfl.wire.communicator import Communicator


def draw_noise(problem: Problem, stream: Stream, count: int) -> Shard:
    """Random uint8 images, of all classes in turn."""
    images = torch.from_numpy(stream.numpy().integers(256, size=(count, *problem.shape), dtype="uint8"))
    return Shard(images, torch.arange(count) % problem.classes, problem.scale).to(problem.device)


class NoiseWorld(World):
    """Clients that train on so many images of noise each, and have none to select by."""

    def __init__(self, job: Job, comm: Communicator, device: torch.device, images: int) -> None:
        super().__init__(job, comm, device)
        self.images = images

    @cached_property
    def holdings(self) -> Mapping[int, Holdings]:
        """The images of this rank's clients."""
        return {client: Holdings(self.noise(client, self.images), self.noise(client, 0)) for client in self.mine}

    def noise(self, client: int, count: int) -> Shard:
        """The first so many images of a client."""
        return draw_noise(self.problem, self.problem.stream("noise", client), count)
