"""Record: metrics.h5, one row per finished round, gathered at the server and written whole, atomically, at every checkpoint."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcfl import storage
from hpcfl.comm import EXCHANGES
from hpcfl.conditions import Answers
from hpcfl.errors import CheckpointError
from hpcfl.ledger import SECONDS

SCHEMA = 1
GLOBAL = "evaluation/global_correct"
TRACE = {"rank": np.uint16, "row": np.int32, "kind": np.uint8, "start_s": np.float64, "duration_s": np.float32}          # of an interval: 19 bytes
INTERVALS = 500_000                                                # kept at most, 10 MB; beyond that the oldest rounds lose theirs


class Record:
    """The server's account of a run.

    It lives in memory between checkpoints and reaches the disk as a whole new file, so that a killed run never leaves a half-written one; rows past
    the last checkpoint are dropped on resume because the rounds behind them run again.
    """

    def __init__(self, attributes: Mapping[str, Any], fixed: Mapping[str, np.ndarray], clients: int, ranks: int):
        self.attributes, self.fixed, self.clients, self.ranks = dict(attributes), dict(fixed), clients, ranks
        self.rows: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.samples: dict[str, np.ndarray] = {}
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
        self.rows.append({"phase": phase, "round": round_, "wall_s": max(account["wall_s"] for account in accounts), "conditions": self._conditions(answers),
                          "up": by_client("up"), "down": by_client("down"), "metrics": metrics,
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
        self._remember(_joined(tables))

    def _conditions(self, answers: Answers | None) -> dict[str, np.ndarray | float]:
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
        with storage.replacing(path) as temporary, h5py.File(temporary, "w", locking=False) as file:
            file.attrs.update({"schema": SCHEMA, **self.attributes})
            for name, value in self.fixed.items():
                file[name] = value
            for name, column in self._columns().items():
                file[name] = column
            for name, value in self.samples.items():
                file.create_dataset(f"samples/{name}", data=value, compression="gzip" if value.ndim > 1 else None)

    def read(self, path: Path, rows: int) -> None:
        """Take over the first `rows` rounds of an earlier run's file.

        Raises: CheckpointError where the file cannot be read or holds fewer rounds.
        """
        with storage.reading(path) as file:
            if len(file["rounds/round"]) < rows:
                raise CheckpointError(f"{path}: holds {len(file['rounds/round'])} rounds, the checkpoint is at {rows}; the record is older than the checkpoint")
            get = {name: file[name][()] for name in _names(file)}
        phases = [phase.decode() for phase in get["rounds/phase"]]
        unknown = np.zeros((rows, self.ranks))                     # for what an earlier version did not record
        simulated = [name for name in get if name.startswith("conditions/")]
        for t in range(rows):
            self.rows.append({"phase": phases[t], "round": int(get["rounds/round"][t]), "wall_s": float(get["rounds/wall_s"][t]),
                              "conditions": {name[11:]: get[name][t] for name in simulated} or self._conditions(None),
                              "up": get["bytes/simulated_up"][t], "down": get["bytes/simulated_down"][t], "transported": self._fit(get["bytes/transported"][t]),
                              "metrics": {name[6:]: get[name][t] for name in get if name.startswith("train/") and not np.isnan(get[name][t]).all()},
                              "notes": {name[7:]: float(get[name][t]) for name in get if name.startswith("server/") and not np.isnan(get[name][t])},
                              "seconds": {kind: self._fit(get.get(f"seconds/{kind}", unknown)[t]) for kind in SECONDS},
                              "wire": {kind: int(get.get(f"wire/{kind}", unknown[:, 0])[t]) for kind in EXCHANGES},
                              "item_s": float(get.get("wire/item_s", unknown[:, 0])[t])})
        kinds = [name[11:] for name in get if name.startswith("evaluation/") and name.endswith("_correct") and name != GLOBAL]
        models = [name.decode() for name in get.get("evaluation/global_names", ())]
        for e, at in enumerate(get.get("evaluation/at", ())):
            if at < rows:
                known = {model: get[GLOBAL][e, g] for g, model in enumerate(models) if (get[GLOBAL][e, g] >= 0).all()}
                self.evaluations.append({"at": int(at), "stage": get["evaluation/stage"][e].decode(), "global": known,
                                         **{kind: get[f"evaluation/{kind}"][e] for kind in kinds}})
        if "trace/row" in get:
            kept = get["trace/row"] < rows
            before = {name: get[f"trace/{name}"][kept] for name in TRACE}
            self._intervals = [{name: column[before["row"] == row] for name, column in before.items()} for row in np.unique(before["row"])]
            self._resumed_s = float((before["start_s"] + before["duration_s"]).max(initial=0.0))

    def _fit(self, by_rank: np.ndarray) -> np.ndarray:
        """Rows by rank as wide as this run: another number of ranks may have written them."""
        return np.pad(by_rank, (0, max(0, self.ranks - len(by_rank))))[:self.ranks] if len(by_rank) <= self.ranks else \
            np.append(by_rank[:self.ranks - 1], by_rank[self.ranks - 1:].sum())

    def _columns(self) -> dict[str, Any]:
        rows, text = self.rows, h5py.string_dtype()
        names = sorted({name for row in rows for name in row["metrics"]})
        missing = np.full(self.clients, np.nan)
        columns: dict[str, Any] = {
            "rounds/phase": np.array([row["phase"] for row in rows], dtype=text), "rounds/round": np.array([row["round"] for row in rows], np.int64),
            "rounds/wall_s": np.array([row["wall_s"] for row in rows], np.float64),
            "bytes/simulated_up": _table(rows, "up", self.clients), "bytes/simulated_down": _table(rows, "down", self.clients),
            "bytes/transported": _table(rows, "transported", self.ranks)}
        columns |= {f"train/{name}": np.array([row["metrics"].get(name, missing) for row in rows]).reshape(-1, self.clients) for name in names}
        notes = sorted({name for row in rows for name in row["notes"]})
        columns |= {f"server/{name}": np.array([row["notes"].get(name, np.nan) for row in rows], np.float64) for name in notes}
        columns |= {f"seconds/{kind}": np.array([row["seconds"][kind] for row in rows], np.float64).reshape(-1, self.ranks) for kind in SECONDS}
        columns |= {f"wire/{kind}": np.array([row["wire"][kind] for row in rows], np.int64) for kind in EXCHANGES}
        columns["wire/item_s"] = np.array([row["item_s"] for row in rows], np.float64)
        columns |= {f"trace/{name}": column for name, column in _joined(self._intervals).items()}
        columns["trace/kinds"] = np.array(SECONDS, dtype=text)
        if any((row["conditions"]["answered"] >= 0).any() for row in rows):
            columns |= {f"conditions/{name}": np.array([row["conditions"][name] for row in rows]) for name in rows[0]["conditions"]}
        if self.evaluations:
            columns |= {"evaluation/at": np.array([entry["at"] for entry in self.evaluations], np.int64),
                        "evaluation/stage": np.array([entry["stage"] for entry in self.evaluations], dtype=text)}
            columns |= {f"evaluation/{name}": np.stack([entry[name] for entry in self.evaluations]) for name in self.evaluations[0] if name not in ("at", "stage", "global")}
            columns |= self._global_columns()
        return columns

    def _global_columns(self) -> dict[str, Any]:
        """The federation's own models by name, all in every evaluation; -1 where one was not evaluated."""
        models = sorted({name for entry in self.evaluations for name in entry["global"]})
        if not models:
            return {}
        missing = np.full_like(next(counts for entry in self.evaluations for counts in entry["global"].values()), -1)
        counts = [np.stack([entry["global"].get(name, missing) for name in models]) for entry in self.evaluations]
        return {"evaluation/global_names": np.array(models, dtype=h5py.string_dtype()), GLOBAL: np.stack(counts)}


def seconds_taken(path: Path, rows: int) -> tuple[float, ...]:
    """What each client took of a round, (K,): the median over its rounds of the phase in which a run was after `rows` rounds; NaN where it had none.

    The median, because the first round of a phase may include compilation. Raises: CheckpointError where the file cannot be read.
    """
    with storage.reading(path) as file:
        phases = file["rounds/phase"][:rows]
        nothing = np.full((len(phases), int(file.attrs["clients"])), np.nan)
        training, refining = (file[name][:rows] if name in file else nothing for name in ("train/seconds", "train/refine_seconds"))
    taken = np.nan_to_num(training) + np.nan_to_num(refining)
    absent = np.isnan(training) & np.isnan(refining)
    own = [taken[(phases == phases[-1:]) & ~absent[:, client], client] for client in range(taken.shape[1])]
    return tuple(float(np.median(each)) if len(each) else float("nan") for each in own)


def _joined(tables: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Tables of intervals one after the other."""
    return {name: np.concatenate([np.zeros(0, kind), *(table[name].astype(kind) for table in tables)]) for name, kind in TRACE.items()}


def _table(rows: list[dict[str, Any]], key: str, width: int) -> np.ndarray:
    return np.array([row[key] for row in rows], np.int64).reshape(-1, width)


def _names(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names
