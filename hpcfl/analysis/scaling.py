"""Scaling: a round of a run on other numbers of ranks, from the seconds and bytes that the run measured and a model of the wire.

What clients do is placed as a run places it, and the busiest rank counts. What travels takes what wire/hockney.py says.
"""
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpcfl.accounts import EXCHANGES
from hpcfl.errors import JobError
from hpcfl.federation.placement import place_clients
from hpcfl.report.recording import Recording, read
from hpcfl.wire.hockney import ALGORITHMS, SMALL_BYTES, SMALL_CALLS, Line, Wire, fit_lines
from hpcfl.wording import align_rows, byte_text, count_text, duration_text

GOOD = 0.8                                                         # efficiency: speed-up over one rank, per rank
TRIES, MOST_CLIENTS = 8, 200_000                                   # numbers per rank that are tried, each a fourth larger; clients of all ranks
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
class Round:
    """A round of one phase of a run, taken apart by how its seconds change with the number of ranks. K clients, R rounds."""

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

    def seconds_per_client(self) -> float:
        """Mean seconds of a client in a round."""
        return sum(find_typical(seconds.sum(1)) for seconds in self.work_s.values()) / self.clients

    def common_seconds(self, wire: Wire, ranks: int, clients: float) -> dict[str, float]:
        """Seconds of a round that do not depend on which rank hosts which client, by cause."""
        more = clients / self.clients if self.carried["gatherv"] else 1.0
        spread = max(self.spread_s * more / ranks, self.item_s)
        exchanges = [*scale_collectives(self.carried, ranks, clients / self.clients), ("Gatherv", more * self.carried["send"] / ranks, ranks),
                     *[("Bcast", SMALL_BYTES, ranks)] * SMALL_CALLS]
        wire_s = sum(wire.seconds(*exchange) for exchange in exchanges)
        return {"server": self.server_s * more + spread, "wire": wire_s, "checkpoint": self.checkpoint_s}


def predict(round_: Round, wire: Wire, ranks: int, clients: int) -> dict[str, Any]:
    """A round on so many ranks with so many clients, those of the run over and over: its seconds by cause, its speed-up over one rank, and what limits it.

    `compute` and `evaluation` are the mean rank's, `waiting` is what the busiest rank has more; `clients_per_rank`: see `find_enough_clients`.
    """
    alone, split = (split_seconds(round_, wire, count, clients) for count in (1, ranks))
    speed_up = sum(alone.values()) / sum(split.values())
    return {"ranks": ranks, "round_s": sum(split.values()), **{f"{cause}_s": seconds for cause, seconds in split.items()}, "speed_up": speed_up,
            "efficiency": speed_up / ranks, "limit": max(split, key=split.__getitem__), "clients_per_rank": find_enough_clients(round_, wire, ranks)}


def split_seconds(round_: Round, wire: Wire, ranks: int, clients: int) -> dict[str, float]:
    """The seconds of a round by cause."""
    again = np.arange(clients) % round_.clients
    home = np.array(place_clients(round_.costs[again].tolist(), ranks, round_.server), int)
    mean, waiting = {}, 0.0
    for name, seconds in round_.work_s.items():
        loads = np.stack([np.bincount(home, row[again], ranks) for row in seconds])                     # (R, ranks)
        mean[name] = find_typical(loads.sum(1)) / ranks
        waiting += find_typical(loads.max(1)) - mean[name]
    evaluation = mean.pop("evaluate")
    return {"compute": sum(mean.values()), "waiting": waiting, "evaluation": evaluation, **round_.common_seconds(wire, ranks, clients)}


def find_enough_clients(round_: Round, wire: Wire, ranks: int) -> int | None:
    """The fewest clients per rank with which so many ranks have an efficiency of GOOD; None where server, wire or uneven placement prevent it.

    Spread evenly, P ranks take a_P + b_P c seconds with c clients each: (a_1 + b_1 c) / (P (a_P + b_P c)) >= GOOD. From that c on
    clients are placed as a run places them.
    """
    def even_s(count: int, each: int) -> float:
        clients = ranks * each
        return clients / count * round_.seconds_per_client() + sum(round_.common_seconds(wire, count, clients).values())

    def line(count: int) -> tuple[float, float]:
        one, two = even_s(count, 1), even_s(count, 2)
        return 2 * one - two, two - one
    (a_1, b_1), (a_p, b_p) = line(1), line(ranks)
    gained, lacking = b_1 - GOOD * ranks * b_p, GOOD * ranks * a_p - a_1
    each, tries = max(1, math.ceil(lacking / gained)) if gained > 0 else MOST_CLIENTS, 0
    while tries < TRIES and each * ranks < MOST_CLIENTS:
        alone, shared = (sum(split_seconds(round_, wire, count, each * ranks).values()) for count in (1, ranks))
        if alone >= GOOD * ranks * shared:
            return each
        each, tries = each + 1 + each // 4, tries + 1
    return None


def find_typical(values: np.ndarray) -> float:
    """What is typical of a value of each round: the median over the rounds where it is above 0, times the share of these rounds."""
    some = values[values > 0]
    return float(np.median(some)) * len(some) / len(values) if len(some) else 0.0


def measure_round(recording: Recording, wire: Wire, phase: str | None = None) -> Round:
    """What a run measured of a round, by default of the phase that took longest, less what the wire model gives for its collectives.

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
    """The collectives of a round with so many times the clients: (name, bytes of each rank, how many ranks take part)."""
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
    ranks = told["ranks"]
    if not told["wire"]:
        raise JobError(f"{where}: the doctor ran on {count_text(ranks, 'rank')}, where nothing travels; wanted its output on two ranks or more "
                       "(mpirun -n 2 hpcfl doctor --json), or --latency and --bandwidth")
    lines, worst = fit_lines(told["wire"], ranks)
    hosts = {facts["host"] for facts in told["by_rank"]}
    kind = f"the shared memory of one host ({min(hosts)}), no network" if len(hosts) == 1 else f"between {count_text(len(hosts), 'host')}"
    return Wire(lines, f"{where}: {kind}; timed on {count_text(ranks, 'rank')}, fitted to within {worst:.0%}")


def read_wire(doctor: Path | None, latency_s: float | None, bandwidth: float | None) -> Wire:
    """The wire of a file that `hpcfl doctor --json` wrote, or of a data sheet: seconds between two ranks and bytes per second.

    What is given overrides the file.
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

    Raises: as `recording.read` and `measure_round`; JobError for numbers of ranks or clients below 1.
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
    was, causes = found["measured"], ("compute", "waiting", "evaluation", "server", "wire", "checkpoint")
    rows = [("ranks", "round", *causes, "speed-up", "efficiency", "most is", f"clients/rank for {GOOD:.0%}")]
    rows += [(str(row["ranks"]), duration_text(row["round_s"]), *(duration_text(row[f"{cause}_s"]) if row[f"{cause}_s"] else "0" for cause in causes),
              f"{row['speed_up']:.3g}", f"{row['efficiency']:.0%}", row["limit"], str(row["clients_per_rank"] or "none")) for row in found["predicted"]]
    lines = [f"{name} {duration_text(line['latency_s'])} + bytes * {1e9 * line['byte_s']:.3g} ns" for name, line in found["wire"].items() if name != "source"]
    return "\n".join([
        f"{found['run']}, phase {found['phase']}: {duration_text(was['round_s'])} measured, over {count_text(found['rounds'], 'round')} of "
        f"{count_text(was['clients'], 'client')} on {count_text(was['ranks'], 'rank')}; predicted for {count_text(found['clients'], 'client')}",
        f"wire: {found['wire']['source']}", f"      {', '.join(lines)}", "", align_rows(rows, words=0), "", "Assumed:",
        *(f"* {each}" for each in found["assumptions"])])
