"""Record: one row per finished round, gathered at the server, and its way to metrics.h5 and back."""
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from hpcfl.accounts import EXCHANGES, RECORD_VERSION, SECONDS
from hpcfl.errors import CheckpointError
from hpcfl.federation.answers import Answers
from hpcfl.files import metrics
from hpcfl.files.metrics import Arrays, DamagedFile, RecordFile

ACCURACIES = ("generalization", "personal", "validation")               # of right answers, by the images that they are out of
GLOBAL = "evaluation/global_correct"
TRACE = {"rank": np.uint16, "row": np.int32, "kind": np.uint8, "start_s": np.float64, "duration_s": np.float32}          # of an interval: 19 bytes
INTERVALS = 500_000                                                # kept at most, 10 MB; beyond that the oldest rounds lose theirs


class Record:
    """The server's account of a run.

    It lives in memory, and what is new of it goes to the disk at each checkpoint, see hpcfl.files.metrics; rows past the last checkpoint are dropped on resume
    because the rounds behind them run again. `lost` are rounds whose figures could not be read again.
    """

    def __init__(self, attributes: Mapping[str, Any], fixed: Mapping[str, np.ndarray], clients: int, ranks: int):
        self.attributes, self.fixed, self.clients, self.ranks = dict(attributes), dict(fixed), clients, ranks
        self.rows: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.samples: dict[str, np.ndarray] = {}
        self.lost: list[int] = []
        self.left_out: list[str] = []
        self._series = metrics.Series()
        self._intervals: list[dict[str, np.ndarray]] = []          # of the last rounds, one table each, TRACE
        self._resumed_s = 0.0                                      # where the clock of this process begins

    def finish_round(self, phase: str, round_: int, accounts: Sequence[Mapping[str, Any]], answers: Answers | None = None) -> None:
        """Add a row from the accounts of all ranks, in rank order, and from who answered, where that was simulated.

        Times count from rank 0's first round; the other ranks' from when the round began at them, which was at one time for all.
        """
        def by_client(key: str) -> np.ndarray:
            values = np.zeros(self.clients, np.int64)
            for account in accounts:
                for client, count in account[key].items():
                    values[client] += count
            return values
        metrics: dict[str, np.ndarray] = {}
        for account in accounts:
            for name, values in account["metrics"].items():
                row = metrics.setdefault(name, np.full(self.clients, np.nan))
                row[list(values)] = list(values.values())
        self.rows.append({"phase": phase, "round": round_, "wall_s": max(account["wall_s"] for account in accounts),
                          "conditions": self._describe_conditions(answers), "up": by_client("up"), "down": by_client("down"), "metrics": metrics,
                          "notes": {name: value for account in accounts for name, value in account["notes"].items()},
                          "transported": np.array([account["sent_bytes"] for account in accounts], np.int64),
                          "seconds": {kind: np.array([account["seconds"][kind] for account in accounts]) for kind in SECONDS},
                          "wire": {kind: sum(account["carried"][kind] for account in accounts) for kind in EXCHANGES},
                          "item_s": max(account["item_s"] for account in accounts)})
        self._trace(accounts)

    def add_late(self, accounts: Sequence[Mapping[str, Any]]) -> None:
        """Add to the last row what all ranks booked after it, where no round follows."""
        for kind, seconds in self.rows[-1]["seconds"].items():
            seconds += [account["seconds"][kind] for account in accounts]
        self._trace(accounts)

    def _trace(self, accounts: Sequence[Mapping[str, Any]]) -> None:
        began_s = self._resumed_s + accounts[0]["opened_s"]
        tables = [{"rank": np.full(len(own["kind"]), rank), "row": np.full(len(own["kind"]), len(self.rows) - 1), **own, "start_s": began_s + own["start_s"]}
                  for rank, own in enumerate(account["intervals"] for account in accounts)]
        self._remember(_join(tables))

    def _describe_conditions(self, answers: Answers | None) -> dict[str, np.ndarray | float]:
        answered, delays = np.full(self.clients, -1, np.int8), np.full(self.clients, np.nan)
        if answers is None or not answers.simulated:
            return {"answered": answered, "delay_s": delays, "duration_s": 0.0}
        answered[list(answers.cohort)] = 0
        answered[list(answers.answered)] = 1
        delays[list(answers.delays_s)] = list(answers.delays_s.values())
        return {"answered": answered, "delay_s": delays, "duration_s": answers.duration_s}

    def _remember(self, intervals: dict[str, np.ndarray]) -> None:
        self._intervals.append(intervals)
        while sum(len(table["row"]) for table in self._intervals) > INTERVALS:
            self._intervals.pop(0)

    def evaluate(self, stage: str, counts: Mapping[str, np.ndarray], global_counts: Mapping[str, np.ndarray] | None = None) -> None:
        """Add an evaluation to the round that is open: name -> (K, C) right answers of the clients, model -> (C,) of the federation's own models."""
        self.evaluations.append({"at": len(self.rows), "stage": stage, "global": dict(global_counts or {}), **counts})

    def write(self, path: Path) -> None:
        """Replace the file by one that holds everything up to now.

        Raises: CheckpointError where the disk does not take it; the file that was there stays.
        """
        lost = {"lost_rounds": self.lost} if self.lost else {}
        samples = {f"samples/{name}": value for name, value in self.samples.items()}
        self._series.replace(path, {**self.attributes, **lost}, {**self.fixed, **self._build_columns(0), **samples})

    def append(self, path: Path) -> None:
        """Bring the disk up to now, by what is new alone where there is much. Raises CheckpointError as `write`; all that was there stays."""
        if self._series.full():
            self.write(path)
        elif self._series.rows < len(self.rows):
            self._series.add(path, self._build_columns(self._series.rows))

    def gather(self, path: Path) -> None:
        """See that the one file holds everything, where a run that had nothing left to do was killed before it did. Raises CheckpointError as `write`."""
        if metrics.find_beside(path) or self.lost or not path.exists():
            self.write(path)

    def read(self, path: Path, rows: int, places: Sequence[tuple[str, int]] = ()) -> list[DamagedFile]:
        """Take over the first `rows` rounds of an earlier run; what is wrong with files of it that cannot be used.

        Rounds that none of the others holds are `lost`: their figures are missing, their phases and counters are those of `places`. Right answers out of
        other images than this run's are `left_out`, which are the kinds: there is one count for all rounds.
        Raises: CheckpointError for a record of another schema.
        """
        pieces, damaged = metrics.salvage(path)
        taken: set[int] = set()
        self.left_out = [kind for kind in ACCURACIES if any(f"evaluation/{kind}_count" in piece.arrays and not np.array_equal(
            piece.arrays[f"evaluation/{kind}_count"], self.fixed.get(f"evaluation/{kind}_count", np.zeros(0))) for piece in pieces)]
        self.rows = [self._make_unknown(*(places[row] if row < len(places) else ("unknown", 0))) for row in range(rows)]
        for piece in pieces:
            if (schema := piece.attributes.get("schema")) != RECORD_VERSION:
                raise CheckpointError(f"{piece.path}: schema = {schema}, wanted {RECORD_VERSION}; resume with the hpcfl version that wrote it")
            if flaw := metrics.find_flaw(piece, self.clients):
                damaged.append(DamagedFile(piece.path, f"{piece.path}: {flaw}; it is no record of this job"))
                continue
            new = [row for row in range(piece.first, min(piece.stop, rows)) if row not in taken]
            self._take(piece, set(new))
            taken |= set(new) - set(piece.attributes.get("lost_rounds", ()))
        self.lost = [row for row in range(rows) if row not in taken]
        return damaged

    def _take(self, piece: RecordFile, rows: Set[int]) -> None:
        """Take over these rows of a file."""
        get, first = piece.arrays, piece.first
        unknown = np.zeros((piece.stop - first, self.ranks))       # for what an earlier version did not record
        simulated = [name for name in get if name.startswith("conditions/")]
        for row in sorted(rows):
            t = row - first
            self.rows[row] = {
                "phase": get["rounds/phase"][t], "round": int(get["rounds/round"][t]), "wall_s": float(get["rounds/wall_s"][t]),
                "conditions": {name[11:]: get[name][t] for name in simulated} or self._describe_conditions(None),
                "up": get["bytes/simulated_up"][t], "down": get["bytes/simulated_down"][t], "transported": self._fit_width(get["bytes/transported"][t]),
                "metrics": {name[6:]: get[name][t] for name in get if name.startswith("train/") and not np.isnan(get[name][t]).all()},
                "notes": {name[7:]: float(get[name][t]) for name in get if name.startswith("server/") and not np.isnan(get[name][t])},
                "seconds": {kind: self._fit_width(get.get(f"seconds/{kind}", unknown)[t]) for kind in SECONDS},
                "wire": {kind: int(get.get(f"wire/{kind}", unknown[:, 0])[t]) for kind in EXCHANGES},
                "item_s": float(get.get("wire/item_s", unknown[:, 0])[t])}
        kinds = [f"{kind}_correct" for kind in ACCURACIES if f"evaluation/{kind}_correct" in get and kind not in self.left_out]
        models = get.get("evaluation/global_names", ())
        for e, at in enumerate(get.get("evaluation/at", ())):
            if at in rows:
                known = {model: get[GLOBAL][e, g] for g, model in enumerate(models) if (get[GLOBAL][e, g] >= 0).all()}
                self.evaluations.append({"at": int(at), "stage": get["evaluation/stage"][e], "global": known,
                                         **{kind: get[f"evaluation/{kind}"][e] for kind in kinds if (get[f"evaluation/{kind}"][e] >= 0).all()}})
        if "trace/row" in get:
            before = {name: get[f"trace/{name}"][np.isin(get["trace/row"], sorted(rows))] for name in TRACE}
            self._intervals += [{name: column[before["row"] == row] for name, column in before.items()} for row in np.unique(before["row"])]
            self._resumed_s = max(self._resumed_s, float((before["start_s"] + before["duration_s"]).max(initial=0.0)))

    def _make_unknown(self, phase: str, round_: int) -> dict[str, Any]:
        """A row of which nothing is known but its place."""
        nothing = np.zeros(self.clients, np.int64)
        return {"phase": phase, "round": round_, "wall_s": np.nan, "conditions": self._describe_conditions(None), "up": nothing, "down": nothing,
                "transported": np.zeros(self.ranks, np.int64), "metrics": {}, "notes": {},
                "seconds": {kind: np.full(self.ranks, np.nan) for kind in SECONDS}, "wire": dict.fromkeys(EXCHANGES, 0), "item_s": np.nan}

    def _fit_width(self, by_rank: np.ndarray) -> np.ndarray:
        """Rows by rank as wide as this run: another number of ranks may have written them."""
        return np.pad(by_rank, (0, max(0, self.ranks - len(by_rank))))[:self.ranks] if len(by_rank) <= self.ranks else \
            np.append(by_rank[:self.ranks - 1], by_rank[self.ranks - 1:].sum())

    def _build_columns(self, first: int) -> Arrays:
        """What is known of the rounds from `first` on."""
        rows, evaluations = self.rows[first:], [entry for entry in self.evaluations if entry["at"] >= first]
        names = sorted({name for row in rows for name in row["metrics"]})
        missing = np.full(self.clients, np.nan)
        columns: Arrays = {
            "rounds/phase": np.array([row["phase"] for row in rows], object), "rounds/round": np.array([row["round"] for row in rows], np.int64),
            "rounds/wall_s": np.array([row["wall_s"] for row in rows], np.float64),
            "bytes/simulated_up": _tabulate(rows, "up", self.clients), "bytes/simulated_down": _tabulate(rows, "down", self.clients),
            "bytes/transported": _tabulate(rows, "transported", self.ranks)}
        columns |= {f"train/{name}": np.array([row["metrics"].get(name, missing) for row in rows]).reshape(-1, self.clients) for name in names}
        notes = sorted({name for row in rows for name in row["notes"]})
        columns |= {f"server/{name}": np.array([row["notes"].get(name, np.nan) for row in rows], np.float64) for name in notes}
        columns |= {f"seconds/{kind}": np.array([row["seconds"][kind] for row in rows], np.float64).reshape(-1, self.ranks) for kind in SECONDS}
        columns |= {f"wire/{kind}": np.array([row["wire"][kind] for row in rows], np.int64) for kind in EXCHANGES}
        columns["wire/item_s"] = np.array([row["item_s"] for row in rows], np.float64)
        intervals = [table for table in self._intervals if len(table["row"]) and table["row"][0] >= first]          # those of one round each
        columns |= {f"trace/{name}": column for name, column in _join(intervals).items()}
        columns["trace/kinds"] = np.array(SECONDS, object)
        if any((row["conditions"]["answered"] >= 0).any() for row in rows):
            columns |= {f"conditions/{name}": np.array([row["conditions"][name] for row in rows]) for name in rows[0]["conditions"]}
        if evaluations:
            columns |= {"evaluation/at": np.array([entry["at"] for entry in evaluations], np.int64),
                        "evaluation/stage": np.array([entry["stage"] for entry in evaluations], object)}
            kinds = sorted({name for entry in evaluations for name in entry} - {"at", "stage", "global"})
            columns |= {f"evaluation/{kind}": _stack([entry.get(kind) for entry in evaluations]) for kind in kinds}
            models = sorted({name for entry in evaluations for name in entry["global"]})
            if models:
                counts = [_stack([entry["global"].get(model) for entry in evaluations]) for model in models]
                columns |= {"evaluation/global_names": np.array(models, object), GLOBAL: np.stack(counts, 1)}
        return columns


def measure_client_seconds(path: Path, rows: int) -> tuple[float, ...]:
    """What each client took of a round, (K,): the median over its rounds of the phase in which a run was after `rows` rounds; NaN where it had none.

    The median, because the first round of a phase may include compilation. Raises: CheckpointError where the file cannot be read.
    """
    attributes, arrays = metrics.read(path)
    phases = arrays["rounds/phase"][:rows]
    nothing = np.full((len(phases), int(attributes["clients"])), np.nan)
    training, refining = (arrays[name][:rows] if name in arrays else nothing for name in ("train/seconds", "train/refine_seconds"))
    taken = np.nan_to_num(training) + np.nan_to_num(refining)
    absent = np.isnan(training) & np.isnan(refining)
    own = [taken[(phases == phases[-1:]) & ~absent[:, client], client] for client in range(taken.shape[1])]
    return tuple(float(np.median(each)) if len(each) else float("nan") for each in own)


def _join(tables: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Tables of intervals one after the other."""
    return {name: np.concatenate([np.zeros(0, kind), *(table[name].astype(kind) for table in tables)]) for name, kind in TRACE.items()}


def _tabulate(rows: list[dict[str, Any]], key: str, width: int) -> np.ndarray:
    return np.array([row[key] for row in rows], np.int64).reshape(-1, width)


def _stack(counts: Sequence[np.ndarray | None]) -> np.ndarray:
    """Right answers of all evaluations; -1 where this was not evaluated."""
    missing = np.full_like(next(each for each in counts if each is not None), -1, dtype=np.int64)
    return np.stack([missing if each is None else each for each in counts])
