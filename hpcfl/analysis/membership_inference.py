"""Membership inference: how well an attacker tells the images of a training set from others, by a classifier's losses or a generator's samples."""
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from sklearn.metrics import auc, roc_curve
from torch import Tensor

from hpcfl.data.shards import Shard
from hpcfl.errors import DataError, NonFiniteError
from hpcfl.training.evaluate import BATCH, apply_in_batches

ALARMS = 0.01                                                      # false alarms allowed where few are wanted: Carlini et al., S&P 2022, look at 1 % and less
NORMAL = 1.959964                                                  # standard deviations to either side that hold 95 % of a normal distribution
BLOCK = 1024                                                       # points, and samples, compared at once: their distances take 8 MB in float64


@dataclass(frozen=True)
class Attack:
    """How well thresholds on a score tell members from others.

    auc: chance that a random member scores above a random other, ties half; 0.5 is guessing. auc_interval: 95 %, over the draw of the images, the
    attacked model being what it is. tpr_at_1_percent_fpr: the largest true positive rate of any threshold with a false positive rate of at most 1 %
    (Carlini et al., S&P 2022, arXiv 2112.03570). resolution: the smallest false positive rate above 0 that these others can show, 1 / others; where
    it is above 0.01, what is given for 1 % is the rate without any false alarm.
    """

    auc: float
    auc_interval: tuple[float, float]
    tpr_at_1_percent_fpr: float
    members: int
    others: int
    resolution: float


def compute_losses(predict: Callable[[Tensor], Tensor], shard: Shard, batch: int = BATCH) -> Tensor:
    """Cross-entropy of each labelled image under a classifier, images -> logits (B, C), in the shard's order: (n,) float64 on the host.

    Raises: as `compute_logits` and `compute_costs`.
    """
    return compute_costs(compute_logits(predict, shard, batch), shard.labels)


def compute_logits(predict: Callable[[Tensor], Tensor], shard: Shard, batch: int = BATCH) -> Tensor:
    """A classifier's logits (n, C) on a shard, to take costs and right answers from. Raises: DataError for an empty shard."""
    if len(shard) == 0:
        raise DataError("membership losses: the shard has no image; wanted at least one")
    return apply_in_batches(predict, shard, batch)


def compute_costs(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image by its logits (n, C) and its label (n,): (n,) float64 on the host.

    Minus these are the scores of Yeom et al., CSF 2018, arXiv 1709.01604. As ln(1 + sum_j exp(z_j - z_y)) over the wrong classes j: an overfitted
    model gives its members losses that log_softmax rounds to one and the same 0 and so cannot rank.
    Raises: NonFiniteError where a logit is not finite.
    """
    logits, own = logits.double(), labels.unsqueeze(1)             # (n, C), (n, 1)
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("membership losses: the classifier gives logits that are not finite; its training diverged, lower its learning rate")
    wrong = logits.scatter(1, own, -inf).logsumexp(1)              # (n,)
    return -F.logsigmoid(logits.gather(1, own).squeeze(1) - wrong).cpu()


def calibrate(target: Tensor, references: Tensor) -> Tensor:
    """Scores (n,): what an image costs reference models, which never saw it, on average, minus what it costs the target; easy images no longer stand out.

    target (n,) and references (R, n) float64: `compute_losses`, as Watson et al., ICLR 2022, arXiv 2111.08440; or distances of
    generators, `measure_nearest` to their samples and to a reference set (Chen et al., CCS 2020, arXiv 1909.03935).
    Raises: DataError where there is no reference or they are not of the same images.
    """
    if references.dim() != 2 or len(references) == 0 or target.shape != references.shape[1:]:
        raise DataError(f"calibrated scores: got {tuple(target.shape)} of the target and {tuple(references.shape)} of references; wanted (n,) and (R, n) "
                        "of the same images, and at least one reference")
    return references.mean(0) - target


def measure_nearest(points: Tensor, samples: Tensor) -> Tensor:
    """Squared L2 distance of each point (n, ...) to the nearest of the samples (s, ...), (n,) float64: minus it is the black-box score of GAN-Leaks.

    Chen et al., CCS 2020, arXiv 1909.03935. Of any type and on any device, taken in blocks of float64. The distance is exact, that of a copy 0;
    only of samples whose squared distances differ by rounding, some 1e-15 of their squared norms, it may be another's.
    Raises: DataError for no points, no samples and other sizes; NonFiniteError for NaN or infinity in either.
    """
    if len(points) == 0 or len(samples) == 0 or points.shape[1:] != samples.shape[1:]:
        raise DataError(f"nearest: got points {tuple(points.shape)} and samples {tuple(samples.shape)}; wanted at least one of each, and of one shape")
    points, samples = points.flatten(1), samples.flatten(1)
    centre = samples.mean(0, dtype=torch.float64)                  # (d,); norms about it are small, so that few digits cancel
    distances = torch.cat([_measure_block(block, samples, centre) for block in points.split(BLOCK)])
    if not bool(torch.isfinite(centre).all() and torch.isfinite(distances).all()):
        raise NonFiniteError("nearest: points or samples hold NaN or infinity; a generator that gives such samples has diverged")
    return distances


def threshold_attack(members: Tensor, others: Tensor) -> Attack:
    """How well a threshold separates the scores of members (n,) from those of others (m,), higher being more likely a member.

    Raises: DataError where either is empty or not one number per image; NonFiniteError for NaN or infinity.
    """
    members, others = _check_scores("members", members), _check_scores("others", others)
    truth = torch.cat([torch.ones(len(members)), torch.zeros(len(others))])
    alarms, found, _ = roc_curve(truth.numpy(), torch.cat([members, others]).numpy(), drop_intermediate=False)
    return Attack(float(auc(alarms, found)), _estimate_interval(members, others), float(found[alarms <= ALARMS].max()),
                  len(members), len(others), 1 / len(others))


def _check_scores(name: str, scores: Tensor) -> Tensor:
    if scores.dim() != 1 or len(scores) == 0:
        raise DataError(f"threshold attack: the scores of {name} are {tuple(scores.shape)}; wanted one number for each of at least one image")
    if not bool(torch.isfinite(scores).all()):
        raise NonFiniteError(f"threshold attack: the scores of {name} hold NaN or infinity; the model they were taken from has diverged")
    return scores.double().cpu()


def _estimate_interval(members: Tensor, others: Tensor) -> tuple[float, float]:
    """95 % for the AUC: DeLong, DeLong and Clarke-Pearson 1988, on scores with one more member and one more other at either end (ours).

    What Agresti and Coull do for a share: without them the interval of separated scores has no width, and near 1 it holds the true AUC far too rarely.
    """
    ends = torch.tensor([-inf, inf], dtype=torch.float64)
    members, others = torch.cat([members, ends]), torch.cat([others, ends])
    above, below = _share_below(members, others), 1 - _share_below(others, members)
    reach = NORMAL * float((above.var() / len(above) + below.var() / len(below)).sqrt())
    return max(0.0, float(above.mean()) - reach), min(1.0, float(above.mean()) + reach)


def _share_below(scores: Tensor, rivals: Tensor) -> Tensor:
    """Share of the rivals below each score, ties half, (n,)."""
    ordered = rivals.sort().values
    return (torch.searchsorted(ordered, scores) + torch.searchsorted(ordered, scores, right=True)).double() / (2 * len(rivals))


def _measure_block(block: Tensor, samples: Tensor, centre: Tensor) -> Tensor:
    x = block.double()                                             # (B, d)
    least, index = x.new_full((len(x),), inf), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for start in range(0, len(samples), BLOCK):
        s = samples[start:start + BLOCK].double() - centre         # (S, d)
        found = (s.square().sum(1) - 2 * (x - centre) @ s.T).min(1)                                    # |x - s|^2 but for |x|^2, which all have
        closer = found.values < least
        least, index = torch.where(closer, found.values, least), torch.where(closer, found.indices + start, index)
    return (x - samples[index].double()).square().sum(1)           # differences first: of nearly equal vectors the sums above keep no digit
