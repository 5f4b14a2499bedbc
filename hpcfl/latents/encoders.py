"""Encoders: what turns images into latents, the space of the class Gaussians: each client's own features, or one fixed map that all share."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpcfl.data.shards import Scale
from hpcfl.models import fixed_maps
from hpcfl.training.evaluate import apply_in_batches
from hpcfl.training.group import Group


@dataclass(frozen=True)
class OwnLatent:
    """z = g_k(x), the feature of the client's own classifier (FedVTC, arXiv 2508.01669); nothing forces two clients' axes to agree."""

    size: int
    scale: Scale

    def modules(self) -> dict[str, nn.Module]:
        """The networks that encoding needs beside the classifier: none."""
        return {}

    def encode(self, modules, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to latents (B, p), differentiable."""
        return modules.model.features(self.scale.from_symmetric(images))

    def encode_training(self, group: Group, site, client: int) -> Tensor:
        """Latents of a client's training images, (n, p), without gradients."""
        return site.features(group, client)


@dataclass(frozen=True)
class CommonLatent:
    """z = phi(x), a fixed map without training that is the same for all clients (ours): a generator that inverts it knows every client's latents."""

    map: fixed_maps.CommonMap
    scale: Scale

    @property
    def size(self) -> int:
        """The latent size p."""
        return self.map.size

    def modules(self) -> dict[str, nn.Module]:
        """The map; no client has a state of it."""
        return {"map": self.map}

    def encode(self, modules, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to latents (B, p), differentiable."""
        return modules.map(images)

    def encode_training(self, group: Group, site, client: int) -> Tensor:
        """Latents of a client's training images, (n, p), without gradients; neither map nor images change, so they are encoded once."""
        return site.once("latent", client, lambda: apply_in_batches(self._map, site.holdings[client].train))

    @torch.no_grad()
    def _map(self, images: Tensor) -> Tensor:
        return self.map(self.scale.to_symmetric(images))


def build_own(config, problem) -> OwnLatent:
    """The paper's latent."""
    return OwnLatent(problem.common_feature_size(), problem.scale)


def build_common(config, problem) -> CommonLatent:
    """The shared fixed map that the job names."""
    return CommonLatent(fixed_maps.build(config.common_map, problem.shape, config.common_size, problem.job.run.seed).to(problem.device), problem.scale)


LATENTS: dict[str, Callable[[Any, Any], OwnLatent | CommonLatent]] = {"own": build_own, "common": build_common}
