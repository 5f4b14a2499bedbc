"""Benches: the benchmarks by name, and how their figures are shown. Each is a function of ranks and command line; units stand in the keys of its figures."""
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from hpcfl.bench.clients import clients
from hpcfl.bench.fedconv import fedconv
from hpcfl.bench.gefl import gefl
from hpcfl.bench.vtc import vtc
from hpcfl.bench.w1 import w1
from hpcfl.wire.communicator import Communicator
from hpcfl.wording import align_rows

BENCHES: dict[str, Callable[[Communicator, Namespace], dict[str, Any]]] = {"w1": w1, "vtc": vtc, "fedconv": fedconv, "gefl": gefl, "clients": clients}


def render(figures: Mapping[str, Any]) -> str:
    """Figures for people: one a line, and `rows` as a table."""
    lines = [f"{key:<32} {value}" for key, value in figures.items() if key != "rows"]
    rows = figures.get("rows", [])
    table = [tuple(rows[0]), *(tuple(map(str, row.values())) for row in rows)] if rows else []
    return "\n".join([*lines, *([align_rows(table, words=3)] if table else [])])
