"""Gaussians of latents: estimated covariances are made safe to draw from; draws, distances and divergences."""
import torch
from torch import Tensor

from hpcfl.errors import NonFiniteError

FLOOR = 1e-4                                                       # variance; smallest that a server lets pass
RELATIVE_FLOOR = 1e-6                                              # of the mean variance tr(S)/p
JITTERS = tuple(10.0 ** power for power in range(-6, 0))           # of the mean variance, tried in turn where Cholesky fails


def oas(covariance: Tensor, count: Tensor | float) -> Tensor:
    """How far to shrink a covariance (..., p, p) of `count` (...) samples towards a multiple of the identity: rho (...) in [0, 1].

    Oracle approximating shrinkage (Chen, Wiesel, Eldar, Hero 2010, eq. 23); it needs only the covariance, where Ledoit-Wolf needs fourth moments,
    which cannot be had from what clients send. 1 for a covariance that is a multiple of the identity already.
    """
    size = covariance.shape[-1]
    trace = _variances(covariance).sum(-1)
    square = covariance.square().sum((-2, -1))                     # tr(S^2) of a symmetric S
    departure = (count + 1 - 2 / size) * (square - trace.square() / size)
    return torch.where(departure > 0, ((1 - 2 / size) * square + trace.square()) / departure, 1.0).clamp(0, 1)


def shrink(covariance: Tensor, count: Tensor | float, target: str = "iso") -> Tensor:
    """(1 - rho) S + rho T with rho from `oas`, (..., p, p): T is tr(S)/p I ("iso") or diag(S) ("diag": keeps the variance of each feature)."""
    rho = oas(covariance, count)[..., None, None]
    return (1 - rho) * covariance + rho * torch.diag_embed(TARGETS[target](_variances(covariance)))


def floor(covariance: Tensor, minimum: float = FLOOR) -> Tensor:
    """S + f I with f = max(minimum, 1e-6 tr(S)/p), (..., p, p): no direction is left without variance."""
    variances = _variances(covariance)
    lift = (RELATIVE_FLOOR * variances.mean(-1, keepdim=True)).clamp(min=minimum)
    return covariance + torch.diag_embed(lift.expand_as(variances))


def cholesky(covariance: Tensor, minimum: float = FLOOR) -> Tensor:
    """Lower triangular L with L L^T = S, or as near as a floating-point S allows, (..., p, p) float64; never NaN.

    S is made symmetric; where it is not positive definite, a growing multiple of the identity is added, and at last negative eigenvalues are
    raised to `minimum`.
    Raises: NonFiniteError for NaN or infinity in S.
    """
    if not bool(torch.isfinite(covariance).all()):
        raise NonFiniteError(f"a covariance {tuple(covariance.shape)} holds NaN or infinity; the features it was estimated from have diverged")
    symmetric = (covariance.double() + covariance.double().mT) / 2
    factor, failed = torch.linalg.cholesky_ex(symmetric)
    for index in failed.nonzero().tolist():
        factor[tuple(index)] = _repair(symmetric[tuple(index)], minimum)
    return factor


def compute_factors(covariances: Tensor) -> Tensor:
    """What `draw` multiplies noise with: deviations (n, p or 1) of variances, Cholesky factors (n, p, p) of covariances; n is 1 or C."""
    return covariances.sqrt() if covariances.dim() == 2 else cholesky(covariances)


def draw(mean: Tensor, factor: Tensor, labels: Tensor, eps: Tensor) -> Tensor:
    """Features v = c^y + L^y eps of the classes `labels` (n,), in the type of eps (n, p), standard normal noise.

    mean (C, p); factor as `compute_factors` gives it: deviations (1 or C, 1 or p), or matrices (1 or C, p, p).
    """
    centre, factor = mean.to(eps)[labels], factor.to(eps)          # (n, p)
    if factor.dim() == 2:
        return centre + eps * factor.expand(len(mean), -1)[labels]
    if len(factor) == 1:
        return centre + eps @ factor[0].T
    if eps.is_cuda:                                                # C times the products, but nothing that waits for the device
        return centre + (eps @ factor.mT)[labels, torch.arange(len(labels), device=eps.device)]
    noise = torch.empty_like(eps)
    for label in labels.unique().tolist():                         # a factor per sample would be (n, p, p)
        noise[labels == label] = eps[labels == label] @ factor[label].T
    return centre + noise


def distance(mean: Tensor, factor: Tensor, labels: Tensor, z: Tensor) -> Tensor:
    """(z - c^y)^T (S^y)^-1 (z - c^y) of features z (n, p) of the classes `labels` (n,), (n,) in the type of z: |L^-1 (z - c)|^2 by triangular solves.

    mean and factor as for `draw`, whose eps it gives back: its result is |eps|^2 where z was drawn with eps.
    """
    apart, factor = z - mean.to(z)[labels], factor.to(z)           # (n, p)
    if factor.dim() == 2:
        return (apart / factor.expand(len(mean), -1)[labels]).square().sum(1)
    if len(factor) == 1:
        return torch.linalg.solve_triangular(factor[0], apart.T, upper=False).square().sum(0)
    if apart.is_cuda:
        solved = torch.linalg.solve_triangular(factor, apart.T.expand(len(factor), -1, -1), upper=False)                    # (C, p, n)
        return solved.square().sum(1)[labels, torch.arange(len(labels), device=apart.device)]
    squared = torch.empty_like(apart[:, 0])
    for label in labels.unique().tolist():
        squared[labels == label] = torch.linalg.solve_triangular(factor[label], apart[labels == label].T, upper=False).square().sum(0)
    return squared


def precision(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Of S = L L^T the diagonal of S^-1, and ln det S + sum_j ln (S^-1)_jj, which is 0 where S is diagonal: all that `kl` needs besides a distance.

    Factor as `compute_factors` gives it, (n, p or 1) or (n, p, p); to (n, p or 1) and (n,).
    """
    if factor.dim() == 2:
        return factor.square().reciprocal(), factor.new_zeros(len(factor))
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    diagonal = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False).square().sum(-2)           # (n, p)
    return diagonal, 2 * _variances(factor).log().sum(-1) + diagonal.log().sum(-1)


def kl(variance: Tensor, distance: Tensor, precision: Tensor, coupling: Tensor) -> Tensor:
    """KL(N(z, diag variance) || N(c, S)) in nats, (...), from variance (..., p), the `distance` of z from c (...), and the `precision` of S (..., p) and (...).

    1/2 [tr(S^-1 diag variance) + (z-c)^T S^-1 (z-c) - p + ln det S - sum_j ln variance_j], put together so that equal variances cancel exactly.
    """
    ratio = variance * precision
    return 0.5 * ((ratio - 1 - ratio.log()).sum(-1) + distance + coupling)


TARGETS = {"iso": lambda variances: variances.mean(-1, keepdim=True).expand_as(variances), "diag": lambda variances: variances}


def _variances(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _repair(symmetric: Tensor, minimum: float) -> Tensor:
    identity = torch.eye(len(symmetric), dtype=symmetric.dtype, device=symmetric.device)
    scale = _variances(symmetric).mean()
    for jitter in JITTERS:
        factor, failed = torch.linalg.cholesky_ex(symmetric + jitter * scale * identity)
        if not int(failed):
            return factor
    values, vectors = torch.linalg.eigh(symmetric)
    root = vectors * values.clamp(min=minimum).sqrt()              # S = root root^T; triangular by root^T = Q R, S = R^T R
    triangular = torch.linalg.qr(root.T).R.T
    return triangular * triangular.diagonal().sign()               # columns with a positive diagonal, as Cholesky has them
