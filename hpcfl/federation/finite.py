"""Finite: what the server makes and says is looked at before anybody gets it and before it is saved."""
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hpcfl import tree
from hpcfl.errors import NonFiniteError
from hpcfl.tree import Tree
from hpcfl.wire.communicator import Total
from hpcfl.wire.uplink import Uploads


def refuse_broken(fresh: Tree, before: Tree, where: str, advice: str, sent: Mapping[str, Total | Uploads] | None = None) -> None:
    """Refuse leaves that hold NaN or infinity where the leaf of `before` with the same path did not; one that is the very same is not looked at again.

    What began with infinity, as a record that is to be beaten, may keep it. `sent`: what came from clients for it, to be blamed where it is at fault.
    Raises: NonFiniteError naming the leaf, and the client who sent what was broken already.
    """
    for path, leaf in fresh.items():
        old = before.get(path)
        if leaf is old or is_finite(leaf) or (old is not None and not is_finite(old)):
            continue
        culprit = next((who for name, part in (sent or {}).items() for who, given in _find_givers(name, part) if not all(map(is_finite, given.values()))), None)
        fault = f"; so did {culprit} already" if culprit else ""
        raise NonFiniteError(f"{where}: '{path}' holds NaN or infinity{fault}: nothing is sent or saved; {advice}")


def is_finite(leaf: Tensor) -> bool:
    """Whether no number in a leaf is NaN or infinity."""
    if not (leaf.is_floating_point() or leaf.is_complex()) or math.isfinite(abs(leaf.sum().item())):
        return True                                                # a sum takes a third of the time, and tells of any; it may only be too large itself
    return bool(torch.isfinite(leaf).all())


def _find_givers(name: str, piece: Total | Uploads) -> list[tuple[str, Tree]]:
    if isinstance(piece, Uploads):
        return [(f"what client {client} sent as '{name}'", uploaded) for client, uploaded in piece.trees.items()]
    return [(f"the sum of what clients sent as '{name}'", tree.join(values=piece.values, counts=piece.counts))]
