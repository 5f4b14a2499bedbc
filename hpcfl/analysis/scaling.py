"""Predict: a round of a run on other numbers of ranks, from the seconds and bytes that it measured and the latency and bandwidth of a wire.

What clients do is placed as a run places it, and the busiest rank counts. What travels costs alpha + n beta for n bytes between two ranks (Hockney, Parallel
Computing 20, 1994), times the steps of the collectives' algorithms (Thakur, Rabenseifner and Gropp, International Journal of High Performance Computing
Applications 19, 2005).
"""
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpcfl.errors import JobError
from hpcfl.federation.placement import place_clients
from hpcfl.report.recording import Recording, read
from hpcfl.wire.communicator import EXCHANGES, SMALL_CALLS
from hpcfl.wording import align_rows, byte_text, count_text, duration_text

GOOD = 0.8                                                         # of the seconds of all ranks spent as one rank would spend them
TRIES, MOST_CLIENTS = 8, 200_000                                   # numbers of clients per rank that are tried, each a fourth larger; and of all ranks
SMALL_BYTES = 8
NEEDED = ("clients/forward_flops", "partition/train", "bytes/simulated_up", "seconds/spread", "wire/item_s",
          *(f"wire/{kind}" for kind in EXCHANGES if not kind.endswith("_by_client")))       # an earlier hpcfl did not tell whom messages are for
ASSUMPTIONS = (
    "every rank has the device, the cores and the memory bandwidth that a rank of the run had: ranks that share them take longer",
    "a client takes as long as in the run, wherever it is; clients are placed by expected cost, as a run begins",
    "collectives overlap with nothing, and no two messages compete for a link; headers and barriers are {small} collectives of {bytes} bytes",
    "a message reaches, and a sum takes, as many ranks as it has clients in the mean, and the server's; what later cohorts fetch on other ranks is not counted",
    "the server works alone but for what it spreads; its seconds grow with the clients where each client's own upload reaches it, and not where sums do",
    "a checkpoint takes as long as in the run; start-up, compilation, and what the server does in Python for each rank are not counted")


@dataclass(frozen=True)
class Line:
    """The seconds of a message between two ranks: latency_s + bytes * byte_s."""

    latency_s: float
    byte_s: float

    def seconds(self, steps: Sequence[tuple[float, float]], count: float) -> float:
        """Of a collective of `count` bytes by the quickest of its algorithms, each so many latencies and so many times its bytes, one after the other."""
        return min(latencies * self.latency_s + times * count * self.byte_s for latencies, times in steps)


def list_tree_algorithms(ranks: int) -> tuple[tuple[float, float], ...]:
    """The algorithms of Bcast and Reduce: whole messages along a binomial tree; or halves of halves, by scatter and allgather, reduce-scatter and gather."""
    levels = math.ceil(math.log2(ranks))
    return (levels, levels), (2 * levels, 2 * (ranks - 1) / ranks)


def list_root_algorithms(ranks: int) -> tuple[tuple[float, float], ...]:
    """The algorithm of Gatherv, and of messages between rank 0 and each of the others: one after the other at rank 0."""
    return ((ranks - 1, ranks - 1),)


ALGORITHMS: dict[str, Callable[[int], tuple[tuple[float, float], ...]]] = {
    "Bcast": list_tree_algorithms, "Reduce": list_tree_algorithms, "Gatherv": list_root_algorithms}


@dataclass(frozen=True)
class Wire:
    """What travels between the ranks, by collective, and where that is known from."""

    lines: dict[str, Line]
    source: str

    def seconds(self, collective: str, count: float, ranks: int) -> float:
        """Of a collective of `count` bytes of each rank; 0 where nothing travels."""
        return self.lines[collective].seconds(ALGORITHMS[collective](ranks), count) if ranks > 1 and count else 0.0


@dataclass(frozen=True)
class Round:
    """A round of one phase of a run, apart by what becomes of it on other numbers of ranks. K clients, R rounds."""

    phase: str
    rounds: int
    clients: int
    ranks: int                                                     # of the run
    server: str                                                    # shared or dedicated
    round_s: float                                                 # as measured, with its share of the checkpoints
    costs: np.ndarray                                              # (K,) expected, by which clients are placed
    work_s: dict[str, np.ndarray]                                  # of clients between two barriers, (R, K) each
    server_s: float                                                # of the server alone
    spread_s: float                                                # of what it spreads, on one rank
    item_s: float                                                  # of that, what no number of ranks makes shorter
    checkpoint_s: float
    carried: dict[str, float]                                      # bytes of EXCHANGES

    def per_client(self) -> float:
        """Seconds of all clients in a round, over their number."""
        return sum(find_typical(seconds.sum(1)) for seconds in self.work_s.values()) / self.clients

    def for_all(self, wire: Wire, ranks: int, clients: float) -> dict[str, float]:
        """The seconds of a round that do not depend on who hosts whom, by cause."""
        more = clients / self.clients if self.carried["gatherv"] else 1.0
        spread = max(self.spread_s * more / ranks, self.item_s)
        exchanges = [*scale_collectives(self.carried, ranks, clients / self.clients), ("Gatherv", more * self.carried["send"] / ranks, ranks),
                     *[("Bcast", SMALL_BYTES, ranks)] * SMALL_CALLS]
        wire_s = sum(wire.seconds(*exchange) for exchange in exchanges)
        return {"server": self.server_s * more + spread, "wire": wire_s, "checkpoint": self.checkpoint_s}


def predict(round_: Round, wire: Wire, ranks: int, clients: int) -> dict[str, Any]:
    """A round on so many ranks with so many clients, those of the run over and over: its seconds by part, its speed-up over one rank, and what limits it.

    `compute` and `evaluation` are the mean rank's, `waiting` is what the busiest rank has more; `clients_per_rank` as of `enough`.
    """
    alone, parts = (split_seconds(round_, wire, count, clients) for count in (1, ranks))
    speed_up = sum(alone.values()) / sum(parts.values())
    return {"ranks": ranks, "round_s": sum(parts.values()), **{f"{name}_s": seconds for name, seconds in parts.items()}, "speed_up": speed_up,
            "efficiency": speed_up / ranks, "limit": max(parts, key=parts.__getitem__), "clients_per_rank": find_enough_clients(round_, wire, ranks)}


def split_seconds(round_: Round, wire: Wire, ranks: int, clients: int) -> dict[str, float]:
    """The seconds of a round by part."""
    again = np.arange(clients) % round_.clients
    home = np.array(place_clients(round_.costs[again].tolist(), ranks, round_.server), int)
    mean, waiting = {}, 0.0
    for name, seconds in round_.work_s.items():
        loads = np.stack([np.bincount(home, row[again], ranks) for row in seconds])                     # (R, ranks)
        mean[name] = find_typical(loads.sum(1)) / ranks
        waiting += find_typical(loads.max(1)) - mean[name]
    evaluation = mean.pop("evaluate")
    return {"compute": sum(mean.values()), "waiting": waiting, "evaluation": evaluation, **round_.for_all(wire, ranks, clients)}


def find_enough_clients(round_: Round, wire: Wire, ranks: int) -> int | None:
    """The fewest clients per rank with which so many ranks have an efficiency of GOOD; None where server, wire or an uneven placement keep them from it.

    Spread evenly, P ranks take a_P + b_P c seconds with c clients each: (a_1 + b_1 c) / (P (a_P + b_P c)) >= GOOD. From that c on they are placed.
    """
    def even_s(count: int, each: int) -> float:
        clients = ranks * each
        return clients / count * round_.per_client() + sum(round_.for_all(wire, count, clients).values())

    def line(count: int) -> tuple[float, float]:
        one, two = even_s(count, 1), even_s(count, 2)
        return 2 * one - two, two - one
    (a_1, b_1), (a_p, b_p) = line(1), line(ranks)
    gained, lacking = b_1 - GOOD * ranks * b_p, GOOD * ranks * a_p - a_1
    each, tries = max(1, math.ceil(lacking / gained)) if gained > 0 else MOST_CLIENTS, 0
    while tries < TRIES and each * ranks < MOST_CLIENTS:
        alone, parts = (sum(split_seconds(round_, wire, count, each * ranks).values()) for count in (1, ranks))
        if alone >= GOOD * ranks * parts:
            return each
        each, tries = each + 1 + each // 4, tries + 1
    return None


def find_typical(values: np.ndarray) -> float:
    """What a round takes of something: the median over the rounds that have any of it, times their share of all rounds."""
    some = values[values > 0]
    return float(np.median(some)) * len(some) / len(values) if len(some) else 0.0


def measure_round(recording: Recording, wire: Wire, phase: str | None = None) -> Round:
    """What a run measured of a round, by default of the phase that took longest; what the collectives take on the ranks of the run is taken off.

    Raises: JobError for a run without rounds, without that phase, or recorded by an earlier hpcfl.
    """
    arrays = recording.arrays
    if recording.rounds == 0:
        raise JobError(f"{recording.folder}: has no finished round to predict from; wanted one at least in its metrics.h5, so let the job reach a checkpoint")
    if missing := [name for name in NEEDED if name not in arrays]:
        raise JobError(f"{recording.folder}: its metrics.h5 has no '{missing[0]}'; it was written by an earlier hpcfl, so run some rounds of the job anew")
    phases = arrays["rounds/phase"]
    took = {str(name): arrays["rounds/wall_s"][phases == name].sum() for name in phases}
    chosen = phase or max(took, key=took.__getitem__)
    if chosen not in took:
        raise JobError(f"{recording.folder}: has no phase '{chosen}', wanted one of {', '.join(took)}")
    rows, ranks, flops = phases == chosen, recording.ranks, arrays["clients/forward_flops"]
    by_rank = {kind: array[rows] for kind, array in recording.datasets("seconds").items()}                  # (R, ranks) each
    carried = {kind: find_typical(arrays.get(f"wire/{kind}", np.zeros(len(phases)))[rows]) for kind in EXCHANGES}
    wall, wire_s = arrays["rounds/wall_s"][rows], {exchange[0]: wire.seconds(*exchange) for exchange in scale_collectives(carried, ranks)}
    loop = np.maximum(0, wall - sum(seconds[:, 0] for kind, seconds in by_rank.items() if kind != "checkpoint"))
    publishing = np.maximum(0, by_rank["publish"][:, 0] - wire_s["Bcast"])
    combining = np.maximum(0, by_rank["combine"] - wire_s["Reduce"] - wire_s["Gatherv"])                # adding and copying
    adding, collecting = combining.sum(1), np.zeros(len(wall))     # where the clients are ...
    if carried["gatherv"]:
        adding, collecting = collecting, combining[:, 0]           # ... or at the server
    nothing = np.zeros((len(phases), recording.clients))
    work = {"train": arrays.get("train/seconds", nothing)[rows], "refine": arrays.get("train/refine_seconds", nothing)[rows],
            "combine": share_seconds(adding, arrays["bytes/simulated_up"][rows]), "evaluate": share_seconds(by_rank["evaluate"].sum(1), flops)}
    checkpoint_s = find_typical(by_rank["checkpoint"].max(1))
    return Round(
        chosen, int(rows.sum()), recording.clients, ranks, recording.job["federation"]["server_rank"], float(np.median(wall)) + checkpoint_s,
        costs=arrays["partition/train"].sum(1) * flops,
        work_s={name: np.nan_to_num(seconds) for name, seconds in work.items()},              # NaN: a client that took no part
        server_s=find_typical(by_rank["aggregate"][:, 0] + publishing + collecting + loop), spread_s=find_typical(by_rank["spread"].sum(1)),
        item_s=find_typical(arrays["wire/item_s"][rows]), checkpoint_s=checkpoint_s, carried=carried)


def scale_collectives(carried: dict[str, float], ranks: int, more: float = 1.0) -> list[tuple[str, float, int]]:
    """A round's collectives with so many times the clients, each with the bytes of a rank and how many ranks take part."""
    def reached(kind: str) -> int:
        clients = more * carried[f"{kind}_by_client"] / max(carried[kind], 1)              # of a byte, in the mean; placed by cost they spread over the ranks
        return min(ranks, math.ceil(clients) + 1) if clients else ranks
    return [("Bcast", carried["bcast"], reached("bcast")), ("Reduce", carried["reduce"], reached("reduce")),
            ("Gatherv", more * carried["gatherv"] / ranks, ranks)]


def share_seconds(seconds: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Seconds of each round, (R,), among clients by weights, (K,) or (R, K)."""
    return np.expand_dims(seconds, -1) * weights / np.maximum(weights.sum(-1, keepdims=True), 1)


def fit_wire(told: dict[str, Any], where: Path) -> Wire:
    """The wire as the doctor timed it.

    Raises: JobError where the doctor ran on one rank.
    """
    ranks, rows = told["ranks"], told["wire"]
    if not rows:
        raise JobError(f"{where}: the doctor ran on {count_text(ranks, 'rank')}, where nothing travels; wanted its output on two ranks or more "
                       "(mpirun -n 2 hpcfl doctor --json), or --latency and --bandwidth")
    lines, worst = {}, 0.0
    for name, algorithms in ALGORITHMS.items():
        sizes, took = (np.array([row[key] for row in rows if row["collective"] == name], float) for key in ("rank_bytes", "median_s"))
        lines[name] = fit_line(algorithms(ranks), sizes, took)
        worst = max(worst, *(abs(lines[name].seconds(algorithms(ranks), count) / each - 1) for count, each in zip(sizes, took, strict=True)))
    hosts = {facts["host"] for facts in told["by_rank"]}
    kind = f"the shared memory of one host ({min(hosts)}), no network" if len(hosts) == 1 else f"between {count_text(len(hosts), 'host')}"
    return Wire(lines, f"{where}: {kind}; timed on {count_text(ranks, 'rank')}, fitted to within {worst:.0%}")


def fit_line(steps: Sequence[tuple[float, float]], sizes: np.ndarray, took: np.ndarray) -> Line:
    """The line that is nearest to what messages of these sizes took, (n,) both, by relative errors; every size by the algorithm that is quickest for it."""
    chosen = np.zeros(len(sizes), int)
    for _ in range(len(sizes) + 1):                                # each size changes its algorithm once at most, or two are alike
        latencies, times = np.array(steps)[chosen].T
        line = Line(*solve_non_negative(np.stack([latencies / took, times * sizes / took], 1)))
        chosen = np.argmin([a * line.latency_s + b * sizes * line.byte_s for a, b in steps], 0)
    return line


def solve_non_negative(columns: np.ndarray) -> tuple[float, float]:
    """x >= 0 with the least |A x - 1|^2, A (n, 2) >= 0."""
    both = np.linalg.lstsq(columns, np.ones(len(columns)))[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    one, other = columns.sum(0) / np.maximum((columns ** 2).sum(0), np.finfo(float).tiny)
    return min((float(one), 0.0), (0.0, float(other)), key=lambda x: ((columns @ x - 1) ** 2).sum())


def read_wire(doctor: Path | None, latency_s: float | None, bandwidth: float | None) -> Wire:
    """The wire of a file that `hpcfl doctor --json` wrote, or of a data sheet: seconds between two ranks, bytes per second; what is given counts.

    Raises: JobError for a file of another kind, and where latency or bandwidth are known from neither.
    """
    if doctor is None and (latency_s is None or bandwidth is None):
        raise JobError("predict: nothing says how fast the wire is; wanted --doctor FILE (mpirun -n 2 hpcfl doctor --json > FILE), or --latency and "
                       "--bandwidth of a data sheet, for example --latency 2e-6 --bandwidth 12.5e9 for HDR100 InfiniBand")
    if (latency_s is not None and not 0 <= latency_s < math.inf) or (bandwidth is not None and not 0 < bandwidth < math.inf):
        raise JobError(f"predict: --latency {latency_s} --bandwidth {bandwidth}: wanted seconds from 0 and bytes per second above 0")
    wire = fit_wire(read_doctor(doctor), doctor) if doctor else Wire(dict.fromkeys(ALGORITHMS, Line(0.0, 0.0)), "")
    given = {} if latency_s is None else {"latency_s": latency_s}
    given |= {} if bandwidth is None else {"byte_s": 1 / bandwidth}
    words = [] if latency_s is None else [f"latency {duration_text(latency_s)}"]
    words += [] if bandwidth is None else [f"{byte_text(bandwidth)}/s"]
    source = "; but ".join(filter(None, [wire.source, " and ".join(words) + " as given" if words else ""]))
    return Wire({name: replace(line, **given) for name, line in wire.lines.items()}, source)


def read_doctor(path: Path) -> dict[str, Any]:
    """What the doctor wrote.

    Raises: JobError for a file that is not its output.
    """
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise JobError(f"{path}: cannot be read as JSON ({error}); wanted what `mpirun -n 2 hpcfl doctor --json` prints") from None
    if not isinstance(told, dict) or not {"ranks", "wire", "by_rank"} <= told.keys():
        raise JobError(f"{path}: is JSON, but not what `hpcfl doctor --json` prints: no 'ranks', 'wire' and 'by_rank'")
    return told


def predict_table(run: str | Path, wire: Wire, ranks: Sequence[int], clients: int | None = None, phase: str | None = None) -> dict[str, Any]:
    """The prediction for each number of ranks with what it stands on, as plain data, units in the key names.

    Raises: as `recording.read` and `round_of`; JobError for numbers of ranks or clients below 1.
    """
    if min(ranks) < 1 or (clients is not None and clients < 1):
        raise JobError(f"predict: --ranks {','.join(map(str, ranks))} --clients {clients}: wanted numbers from 1")
    round_ = measure_round(read(run), wire, phase)
    return {"run": str(run), "phase": round_.phase, "rounds": round_.rounds, "clients": clients or round_.clients,
            "measured": {"ranks": round_.ranks, "clients": round_.clients, "round_s": round_.round_s, "carried_bytes": round_.carried},
            "wire": {"source": wire.source, **{name: vars(line) for name, line in wire.lines.items()}},
            "predicted": [predict(round_, wire, count, clients or round_.clients) for count in ranks],
            "assumptions": [each.format(small=SMALL_CALLS, bytes=SMALL_BYTES) for each in ASSUMPTIONS]}


def render(found: dict[str, Any]) -> str:
    """The prediction for people."""
    was, parts = found["measured"], ("compute", "waiting", "evaluation", "server", "wire", "checkpoint")
    rows = [("ranks", "round", *parts, "speed-up", "efficiency", "most is", f"clients/rank for {GOOD:.0%}")]
    rows += [(str(row["ranks"]), duration_text(row["round_s"]), *(duration_text(row[f"{part}_s"]) if row[f"{part}_s"] else "0" for part in parts),
              f"{row['speed_up']:.3g}", f"{row['efficiency']:.0%}", row["limit"], str(row["clients_per_rank"] or "none")) for row in found["predicted"]]
    lines = {name: f"{name} {duration_text(line['latency_s'])} + bytes * {1e9 * line['byte_s']:.3g} ns"
             for name, line in found["wire"].items() if name != "source"}
    return "\n".join([
        f"{found['run']}, phase {found['phase']}: {duration_text(was['round_s'])} measured, over {count_text(found['rounds'], 'round')} of "
        f"{count_text(was['clients'], 'client')} on {count_text(was['ranks'], 'rank')}; predicted for {count_text(found['clients'], 'client')}",
        f"wire: {found['wire']['source']}", f"      {', '.join(lines.values())}", "", align_rows(rows, words=0), "", "Assumed:",
        *(f"* {each}" for each in found["assumptions"])])
