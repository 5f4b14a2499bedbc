"""Likeness: how much a generator's samples look like real images, and whether they lie nearer to the training images than fresh images do."""
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from hpcfl.analysis.membership_inference import measure_nearest
from hpcfl.errors import DataError, NonFiniteError

GUARD = 1e-6                                                       # the least distance: far below one grey level of one pixel, 1/255, where copies have 0


@dataclass(frozen=True)
class Mnd:
    """Ratios of nearest distances over the training images: mean, population standard deviation, and the share of ratios of at least 1."""

    ratio_mean: float
    ratio_sd: float
    share_at_least_1: float


@dataclass(frozen=True, eq=False)
class Pairs:
    """Points and, of another set, what lies nearest to each: `points` and `others` are indices (n,), `distances` (n,) are L2, ascending."""

    points: Tensor
    others: Tensor
    distances: Tensor


def mnd(train: Tensor, validation: Tensor, samples: Tensor) -> Mnd:
    """Memorisation by nearest distances: rho_i = min_v d(x_i, v) / min_s d(x_i, s), of train (n, ...), validation (v, ...) and samples (s, ...).

    As GeFL measures it (arXiv 2412.18460): above 1, samples lie closer to training images than fresh real images do; copies give ratios of a million.
    d is L2 on whatever the three are given as: GeFL's own figures take LPIPS, whose weights cannot be had offline, so that they do not compare with
    these. A minimum over more of them is smaller, so take as many samples as validation images; even then the mean is somewhat above 1 for
    fresh samples, because it is one of ratios.
    Raises: as `membership.nearest`.
    """
    fresh, drawn = (measure_nearest(train, others).sqrt().clamp_min(GUARD) for others in (validation, samples))
    ratio = fresh / drawn                                          # (n,)
    return Mnd(float(ratio.mean()), float(ratio.std(correction=0)), float((ratio >= 1).double().mean()))


def fid(real: Tensor, generated: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (n, d) and (m, d), by Heusel et al. (2017, arXiv 1706.08500), in float64.

    |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), covariances over n - 1. With S = A^T A and S' = B^T B, the trace of the root is the sum of the singular
    values of A B^T, for (S S') and (A B^T)(A B^T)^T share their eigenvalues. A and B come out of the centred features by QR, so that no covariance is
    squared and rooted again: as good with fewer samples than features. Few samples make it larger; compare sets of equal size.
    Raises: DataError for fewer than two samples of either or other widths; NonFiniteError for NaN or infinity.
    """
    if real.dim() != 2 or real.shape[1:] != generated.shape[1:] or min(len(real), len(generated)) < 2:
        raise DataError(f"Frechet distance: got features {tuple(real.shape)} and {tuple(generated.shape)}; wanted (n, d) and (m, d), two of each at least")
    if not bool(torch.isfinite(real).all() and torch.isfinite(generated).all()):
        raise NonFiniteError("Frechet distance: features hold NaN or infinity; a generator that gives such samples has diverged")
    means, factors = zip(*(_gaussian(features.double()) for features in (real, generated)), strict=True)
    root = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    traces = sum(factor.square().sum() for factor in factors)
    return max(0.0, float((means[0] - means[1]).square().sum() + traces - 2 * root))


def find_closest(points: Tensor, others: Tensor, count: int) -> Pairs:
    """The `count` closest pairs of points (n, ...) and what of the others (m, ...) is nearest to each, no point and no other in two of them.

    Fewer where the points have fewer nearest others. Raises: as `membership.nearest`.
    """
    distances, flat = measure_nearest(points, others).sqrt(), others.flatten(1).double()
    chosen: dict[int, int] = {}
    for point in distances.argsort(stable=True).tolist():
        other = int((flat - points[point].flatten()).square().sum(1).argmin())
        chosen.setdefault(other, point)                            # points come nearest first
        if len(chosen) == count:
            break
    indices = torch.tensor(list(chosen.values()), device=points.device)
    return Pairs(indices, torch.tensor(list(chosen), device=points.device), distances[indices])


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (d,) and a factor A (r, d) of the covariance A^T A of features (n, d)."""
    mean = features.mean(0)
    return mean, torch.linalg.qr(features - mean, mode="r").R / sqrt(len(features) - 1)
