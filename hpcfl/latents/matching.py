"""Distribution matching: what it may mean that images generated from global latents have the right features (FedVTC, arXiv 2508.01669, term L_DM).

The paper's formula is unknown; these are the readings that its known purpose allows, each a function of
f (Y, M, p) features of generated images, v (Y, M, p) the latents they were generated from, fresh (Y, M, p) further draws of the same Gaussians,
mean (Y, p), deviation (Y, p) of those Gaussians, and weight (Y, p) with mean 1. All sum over features and average over classes.
"""
import torch
from torch import Tensor

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)                            # of the RBF kernels, times the median squared distance


def match_class_mean(f: Tensor, v: Tensor, fresh: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor) -> Tensor:
    """Squared distance of the mean feature to the prototype: MMD with a linear kernel (Zhao and Bilen, WACV 2023). Zero when mean features equal c^y."""
    return (weight * (f.mean(1) - mean).square()).sum(1).mean()


def match_second_moment(f: Tensor, v: Tensor, fresh: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor) -> Tensor:
    """`match_class_mean` plus the squared distance of the standard deviations: both uploaded statistics (ours; wants M >= 32)."""
    centred = f - f.mean(1, keepdim=True)
    deviation_now = (centred.square().sum(1) / (f.shape[1] - 1) + 1e-12).sqrt()                    # (Y, p); the 1e-12 keeps the gradient finite at 0
    return match_class_mean(f, v, fresh, mean, deviation, weight) + (deviation_now - deviation).square().sum(1).mean()


def match_per_sample(f: Tensor, v: Tensor, fresh: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor) -> Tensor:
    """Squared distance of every feature to the prototype; it draws all samples to the mean, so it costs diversity."""
    return (weight.unsqueeze(1) * (f - mean.unsqueeze(1)).square()).sum(2).mean()


def match_cycle(f: Tensor, v: Tensor, fresh: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor) -> Tensor:
    """Squared distance of every feature to the latent it came from (ours)."""
    return (f - v).square().sum(2).mean()


def match_mmd_rbf(f: Tensor, v: Tensor, fresh: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor) -> Tensor:
    """Unbiased squared MMD between the features and fresh draws, a sum of RBF kernels (Gretton et al., JMLR 2012, equation 3)."""
    count = f.shape[1]
    joint = torch.cat([f, fresh], 1)                                                        # (Y, 2M, p)
    squared = (joint.unsqueeze(1) - joint.unsqueeze(2)).square().sum(3)                     # (Y, 2M, 2M)
    scale = squared.detach().flatten(1).median(1).values.clamp_min(1e-12)[:, None, None]
    kernel = torch.stack([torch.exp(-squared / (bandwidth * scale)) for bandwidth in BANDWIDTHS]).sum(0)
    within = [block.sum((1, 2)) - block.diagonal(dim1=1, dim2=2).sum(1) for block in (kernel[:, :count, :count], kernel[:, count:, count:])]
    across = kernel[:, :count, count:].mean((1, 2))
    return ((within[0] + within[1]) / (count * (count - 1)) - 2 * across).mean()


MATCHINGS = {"mean": match_class_mean, "moment2": match_second_moment, "per_sample": match_per_sample, "mmd_rbf": match_mmd_rbf, "cycle": match_cycle}
