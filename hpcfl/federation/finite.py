"""Finite: refuse NaN and infinity in what the server computes and publishes, before anybody gets it and before it is saved."""
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
    """Refuse leaves that hold NaN or infinity, unless the leaf of `before` with the same path held it too; a leaf that is the very same is not checked again.

    So a leaf that begins with infinity, as a record to be beaten, may keep it. `sent`: what clients sent up for these leaves, which may be at fault.
    Raises: NonFiniteError naming the leaf, and the client that sent NaN or infinity.
    """
    for path, leaf in fresh.items():
        old = before.get(path)
        if leaf is old or is_finite(leaf) or (old is not None and not is_finite(old)):
            continue
        culprit = next((who for name, piece in (sent or {}).items() for who, given in _list_sent(name, piece) if not all(map(is_finite, given.values()))), None)
        fault = f"; so did {culprit} already" if culprit else ""
        raise NonFiniteError(f"{where}: '{path}' holds NaN or infinity{fault}: nothing is sent or saved; {advice}")


def is_finite(leaf: Tensor) -> bool:
    """Whether no number in a leaf is NaN or infinity."""
    if not (leaf.is_floating_point() or leaf.is_complex()) or math.isfinite(abs(leaf.sum().item())):
        return True                                                # the sum takes a third of the time and shows any; but it may itself be too large
    return bool(torch.isfinite(leaf).all())


def _list_sent(name: str, piece: Total | Uploads) -> list[tuple[str, Tree]]:
    if isinstance(piece, Uploads):
        return [(f"what client {client} sent as '{name}'", uploaded) for client, uploaded in piece.trees.items()]
    return [(f"the sum of what clients sent as '{name}'", tree.join(values=piece.values, counts=piece.counts))]
