"""Normalisation layers by name: BatchNorm, or GroupNorm where running statistics must not be averaged over clients."""
from collections.abc import Callable

from torch import nn

MOST_GROUPS = 8              # the usual GroupNorm(8) of small generators and classifiers
FEWEST_CHANNELS = 4          # in a group: a group of one channel on a 1x1 map would normalise everything to zero


def choose_groups(channels: int) -> int:
    """The most groups, at most 8, that divide `channels` and leave at least 4 channels in each; 1 where none do."""
    return max((count for count in range(1, MOST_GROUPS + 1) if channels % count == 0 and channels >= FEWEST_CHANNELS * count), default=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with `choose_groups(channels)` groups: GroupNorm(8) for powers of two from 32 channels on."""
    return nn.GroupNorm(choose_groups(channels), channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "group": group_norm}
