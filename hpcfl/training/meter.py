"""Meter: sums of what the losses of clients measured, and the check that what training left can be used."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from hpcfl import tree
from hpcfl.errors import NonFiniteError
from hpcfl.training.setup import Setup
from hpcfl.tree import Tree

BLAMELESS_LOSS = 1e6                                               # a larger loss before the first step is no fault of training; ten classes begin at 2.3


class Meter:
    """Sums of what the losses of K clients measured; they stay on the device until the end, so that no step waits for them."""

    def __init__(self, clients: Sequence[int]) -> None:
        self.clients = clients
        self.totals: Tree = {}                                     # name -> (K,) float64
        self.counts: dict[str, list[int]] = {}                     # name -> K numbers of values
        self.first: Tensor | None = None                           # (K,) float64: each client's loss before its first step

    def add(self, values: Tree, rows: Sequence[int], index: Tensor | None = None) -> None:
        """Add values, () of a single client or (K',), to those of the clients at `rows`; `index`: these rows as a tensor, None for all clients."""
        for name, value in values.items():
            if name not in self.totals:
                self.totals[name] = torch.zeros(len(self.clients), dtype=torch.float64, device=value.device)
                self.counts[name] = [0] * len(self.clients)
            if index is None:
                self.totals[name].add_(value.detach())
            else:
                self.totals[name].index_add_(0, index, value.detach().double())
            for row in rows:
                self.counts[name][row] += 1
        if self.counts["loss"][rows[0]] == 1:
            chosen = slice(None) if index is None else index
            self.first = torch.full_like(self.totals["loss"], math.nan) if self.first is None else self.first
            self.first[chosen] = self.totals["loss"][chosen]

    def read(self, changed: Tree, setup: Setup, read_start: Callable[[], Tree]) -> list[dict[str, float]]:
        """Each client's means; training made `changed` (K, ...) of `read_start()` (K, ...).

        Raises: NonFiniteError naming the clients whose sums or changed leaves hold NaN or infinity, or whose weights are so large that their squares do.
        """
        weights = set(chain(*setup.trained))
        checks = [_sum_for_check(leaf.reshape(len(self.clients), -1), path in weights) for path, leaf in tree.select_floating(changed).items()]
        table = torch.stack([*self.totals.values(), torch.stack(checks).sum(0)], dim=1).tolist()    # (K, names + 1): the one synchronisation
        broken = [row for row, numbers in enumerate(table) if not all(map(math.isfinite, numbers))]
        if broken:
            raise NonFiniteError(self.diagnosis_text(broken, setup, read_start(), changed))
        return [{name: total / counts[row] for (name, counts), total in zip(self.counts.items(), totals, strict=True) if counts[row]}
                for row, (*totals, _) in enumerate(table)]

    def diagnosis_text(self, broken: Sequence[int], setup: Setup, start: Tree, changed: Tree) -> str:
        """What went wrong with the clients at these rows, and what to do; that depends on whether it was there before their first step."""
        who = f"{setup.where}: training of {setup.member} {', '.join(str(self.clients[row]) for row in broken)}"
        firsts = self.first.tolist() if self.first is not None else [math.nan] * len(self.clients)
        for row in broken:
            own = {path: leaf[row] for path, leaf in tree.select_floating(start).items() if path in setup.own}
            spoiled = next((path for path, leaf in own.items() if not bool(torch.isfinite(leaf).all())), None)
            if spoiled or not abs(firsts[row]) < BLAMELESS_LOSS:
                one, way_out = f"{setup.member} {self.clients[row]}", f"; {setup.origin}" if setup.origin else ""
                found = f"'{spoiled}' of {one} held it" if spoiled else f"the loss of {one} was {firsts[row]:.3g}"
                return (f"{who} reached NaN or infinity in its loss or weights; but {found} before its first step: "
                        f"what it received, or its data or loss, is at fault, not its training{way_out}")
        advice = " and ".join(dict.fromkeys(turn.optimizer.advice for turn in setup.turns))
        weights = set(chain(*setup.trained))
        largest = max(float(leaf[broken].abs().max()) for path, leaf in tree.select_floating(changed).items() if path in weights)
        if math.isfinite(largest) and all(math.isfinite(float(total[row])) for total in self.totals.values() for row in broken):
            return f"{who} left weights of up to {largest:.3g}, with which nobody can compute: their squares are infinite; {advice}"
        return f"{who} reached NaN or infinity in its loss or weights; {advice}"


def _sum_for_check(rows: Tensor, is_weight: bool) -> Tensor:
    """(K,) float64, finite where a row (K, n) can be computed with: the sum of squares for weights, the sum for buffers and optimiser states."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (torch.linalg.vecdot(rows, rows) if is_weight else rows.sum(1)).double()
