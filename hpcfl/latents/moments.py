"""Moments, the first two of latents by class: measured at a client, sent, and merged at the server by the law of total covariance."""
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from hpcfl.errors import DataError, LayoutError, NonFiniteError
from hpcfl.tree import Tree


@dataclass(frozen=True)
class Mode:
    """How much of the scatter matrices is kept: of each class or `shared`, the sum over classes; the diagonal, its mean, or all of it (`full`)."""

    shared: bool = False
    full: bool = False
    isotropic: bool = False


MODES = {"shared_diag": Mode(shared=True),                         # spread (p,)
         "class_diag": Mode(),                                     # (C, p)
         "class_iso": Mode(isotropic=True),                        # (C,)
         "shared_full": Mode(shared=True, full=True),              # (p, p), sent as its lower triangle (p(p+1)/2,)
         "class_full": Mode(full=True)}                            # (C, p, p), sent as (C, p(p+1)/2)


@dataclass(frozen=True)
class Moments:
    """Per class, in float64: how many samples, their mean, and their scatter W = sum_i (z_i - mean)(z_i - mean)^T; zeros where there is no sample."""

    count: Tensor                                                  # (C,)
    mean: Tensor                                                   # (C, p)
    scatter: Tensor                                                # (C, p): its diagonal; or (C, p, p); from a message: in the shape of the mode


@dataclass(frozen=True)
class ClassGaussians:
    """A Gaussian of each class, of all clients' samples together, float64.

    Every field is a tensor, so that `dict(vars(it))` is a Tree and `ClassGaussians(**tree)` the way back.
    `within` and `between` are the traces of the two terms of the pooled covariance: the scatter inside clients, and that of the clients' means around
    the common ones, which dominates while the clients' feature spaces are not aligned.
    """

    has: Tensor                                                    # (C,) bool: whether anybody has a sample of the class
    mean: Tensor                                                   # (C, p)
    spread: Tensor                                                 # variances or covariances in the shape of the mode
    count: Tensor                                                  # (C,)
    within: Tensor                                                 # ()
    between: Tensor                                                # ()


def needs_full(mode: str) -> bool:
    """Whether the mode needs scatter matrices, not only their diagonals."""
    return MODES[mode].full


def measure(z: Tensor, y: Tensor, classes: int, full: bool, where: str = "features") -> Moments:
    """Moments of features z (n, p) with labels y (n,) by class, in float64 by two passes: first the means, then what is left around them.

    The one-pass form E[x^2] - E[x]^2 has a relative error of 0.94 in float32 for offset 1e3 and deviation 1.
    `full` keeps the scatter (C, p, p), otherwise its diagonal (C, p).
    Raises: NonFiniteError naming `where` for NaN or infinity in z, DataError for labels outside [0, classes).
    """
    sums = sum_features(z, y, classes, where)
    mean = sums["sums"] / sums["counts"].clamp(min=1)[:, None]     # (C, p)
    return Moments(sums["counts"], mean, _scatter(z.detach().double() - mean[y], y, classes, full))


def find_covariances(moments: Moments, mode: str) -> Tensor:
    """One client's variances or covariances W/n, float64, as a message has them: (p,), (C, p), (C,), (p(p+1)/2,) or (C, p(p+1)/2).

    Raises: LayoutError where the mode needs scatter matrices and only diagonals were measured.
    """
    kind = MODES[mode]
    measured_full = moments.scatter.dim() == 3
    if kind.full and not measured_full:
        raise LayoutError(f"'{mode}' needs scatter matrices, got diagonals {tuple(moments.scatter.shape)}; measure(..., full=needs_full(mode))")
    scatter = moments.scatter if kind.full or not measured_full else moments.scatter.diagonal(dim1=-2, dim2=-1)
    spread = _per_sample(_keep(scatter, kind), moments.count, kind)
    return pack_triangle(spread) if kind.full else spread


def to_message(moments: Moments, mode: str, min_count: int = 1, dtype: torch.dtype = torch.float32) -> Tree:
    """What a client sends: {"counts": int64 (C,), "means": (C, p), "spread": as `find_covariances`}, the last two in `dtype`.

    Classes with fewer than `min_count` samples are left out, of the shared spread as well: with one sample the mean is that sample's feature.
    """
    sent = moments.count >= max(min_count, 1)                      # (C,)
    kept = Moments(*(leaf * _align_counts(sent, leaf) for leaf in (moments.count, moments.mean, moments.scatter)))
    return {"counts": kept.count.long(), "means": kept.mean.to(dtype), "spread": find_covariances(kept, mode).to(dtype)}


def from_message(message: Tree, mode: str) -> Moments:
    """What the client measured, as far as the message tells: the scatter in the shape of the mode, sums over classes where they share one."""
    kind = MODES[mode]
    count, spread = message["counts"].double(), message["spread"].double()
    scatter = unpack_triangle(spread) if kind.full else spread
    return Moments(count, message["means"].double(), scatter * (count.sum() if kind.shared else _align_counts(count, scatter)))


def aggregate(messages: Sequence[Tree], mode: str, between_client: bool = True) -> ClassGaussians:
    """The moments of all clients' samples together, by the law of total covariance:

        Sigma^y = 1/n^y     sum_k   [W_k^y + n_k^y (c_k^y - c^y)(c_k^y - c^y)^T]        of each class
        Sigma   = 1/(N-C')  sum_y,k [...]                                               shared; C' classes have samples

    `messages` in client order, so that the result does not depend on the ranks; without `between_client` the second term is left out.
    Raises: DataError without messages, LayoutError where shapes differ.
    """
    _check_alike(messages)
    kind = MODES[mode]
    clients = [from_message(message, mode) for message in messages]
    zero = torch.zeros((), dtype=torch.float64)
    count = sum((client.count for client in clients), zero)        # (C,)
    mean = sum((client.count[:, None] * client.mean for client in clients), zero) / count.clamp(min=1)[:, None]
    within = sum((client.scatter for client in clients), zero)
    between = sum((_scatter_around(client.count, client.mean - mean, kind) for client in clients), zero)
    return _finish(count, mean, within, between if between_client else torch.zeros_like(between), kind)


def sum_features(z: Tensor, y: Tensor, classes: int, where: str = "features") -> Tree:
    """First phase of the form that needs only sums: {"counts": (C,), "sums": (C, p)} of features z (n, p), float64; add over clients.

    Raises: as `measure`.
    """
    if not bool(torch.isfinite(z).all()):
        bad = int((~torch.isfinite(z)).any(1).sum())
        raise NonFiniteError(f"{where}: NaN or infinity in {bad} of {len(z)} rows; lower the learning rate of the network that gave them")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise DataError(f"{where}: labels go from {int(y.min())} to {int(y.max())}, wanted 0 to {classes - 1}")
    counts = torch.bincount(y, minlength=classes).double()
    return {"counts": counts, "sums": torch.zeros(classes, z.shape[1], dtype=torch.float64, device=z.device).index_add_(0, y, z.detach().double())}


def measure_scatter(z: Tensor, y: Tensor, centre: Tensor, mode: str) -> Tensor:
    """Second phase: a client's scatter around the common means `centre` (C, p), float64, in the form of `find_covariances`; add over clients."""
    kind, centred = MODES[mode], z.detach().double() - centre[y]
    if kind.shared and kind.full:
        return pack_triangle(centred.T @ centred)
    scatter = _keep(_scatter(centred, y, len(centre), kind.full), kind)
    return pack_triangle(scatter) if kind.full else scatter


def from_sums(counts: Tensor, sums: Tensor, scatter: Tensor, mode: str) -> ClassGaussians:
    """What `aggregate` gives, from the totals of the two phases; they cannot tell within from between, so `within` is both."""
    kind = MODES[mode]
    whole = unpack_triangle(scatter) if kind.full else scatter
    return _finish(counts, sums / counts.clamp(min=1)[:, None], whole, torch.zeros_like(whole), kind)


def keep_previous(new: ClassGaussians, old: ClassGaussians, mode: str) -> ClassGaussians:
    """`new`, in which classes without a sample are as in `old`; a shared spread is that of `old` only where nobody had any sample."""
    def choose(name: str, by_class: bool) -> Tensor:
        now, before = getattr(new, name), getattr(old, name)
        return torch.where(_align_counts(new.has, now) if by_class else new.has.any(), now, before)
    return ClassGaussians(new.has | old.has, choose("mean", True), choose("spread", not MODES[mode].shared), choose("count", True),
                          choose("within", False), choose("between", False))


def pack_triangle(matrix: Tensor) -> Tensor:
    """The lower triangles of symmetric matrices, row by row: (..., p, p) to (..., p(p+1)/2)."""
    row, column = torch.tril_indices(*matrix.shape[-2:], device=matrix.device)
    return matrix[..., row, column]


def unpack_triangle(packed: Tensor) -> Tensor:
    """The symmetric matrices of lower triangles: (..., p(p+1)/2) to (..., p, p)."""
    size = (isqrt(8 * packed.shape[-1] + 1) - 1) // 2
    row, column = torch.tril_indices(size, size, device=packed.device)
    matrix = packed.new_empty(*packed.shape[:-1], size, size)
    matrix[..., row, column] = packed
    matrix[..., column, row] = packed
    return matrix


def _align_counts(by_class: Tensor, leaf: Tensor) -> Tensor:
    return by_class.view(-1, *[1] * (leaf.dim() - 1))


def _outer(weight: Tensor, vectors: Tensor) -> Tensor:
    return (weight[:, None] * vectors)[:, :, None] * vectors[:, None, :]                 # (C, p, p)


def _scatter(centred: Tensor, y: Tensor, classes: int, full: bool) -> Tensor:
    size = centred.shape[1]
    if not full:
        return torch.zeros(classes, size, dtype=torch.float64, device=centred.device).index_add_(0, y, centred.square())       # (C, p)
    scatter = torch.zeros(classes, size, size, dtype=torch.float64, device=centred.device)
    for label in y.unique().tolist():
        samples = centred[y == label]                              # (n^y, p)
        scatter[label] = samples.T @ samples
    return scatter


def _keep(scatter: Tensor, kind: Mode) -> Tensor:
    """What the mode keeps of scatter (C, p), or (C, p, p) if full, by class."""
    pooled = scatter.sum(0) if kind.shared else scatter
    return pooled.mean(-1) if kind.isotropic else pooled


def _scatter_around(count: Tensor, apart: Tensor, kind: Mode) -> Tensor:
    """sum n d d^T of the means' deviations d (C, p), in the shape of the mode."""
    if kind.full:
        return (count[:, None] * apart).T @ apart if kind.shared else _outer(count, apart)
    return _keep(count[:, None] * apart.square(), kind)


def _per_sample(scatter: Tensor, count: Tensor, kind: Mode) -> Tensor:
    return scatter / (count.sum() if kind.shared else _align_counts(count, scatter)).clamp(min=1)


def _finish(count: Tensor, mean: Tensor, within: Tensor, between: Tensor, kind: Mode) -> ClassGaussians:
    has = count > 0
    freedom = (count.sum() - has.sum()).clamp(min=1)               # N - C'; 1 where every class has one sample and the scatter is 0
    scatter = within + between
    spread = scatter / freedom if kind.shared else _per_sample(scatter, count, kind)
    traces = [(part.diagonal(dim1=-2, dim2=-1) if kind.full else part).sum() * (mean.shape[1] if kind.isotropic else 1) / freedom
              for part in (within, between)]
    return ClassGaussians(has, mean, spread, count, *traces)


def _check_alike(messages: Sequence[Tree]) -> None:
    if not messages:
        raise DataError("no client sent moments; at least one client of the cohort must have samples")
    for index, message in enumerate(messages):
        for path, leaf in messages[0].items():
            if message[path].shape != leaf.shape:
                raise LayoutError(f"message {index}: '{path}' is {tuple(message[path].shape)}, message 0 has {tuple(leaf.shape)}; "
                                  "all models must have the same feature size and number of classes")
