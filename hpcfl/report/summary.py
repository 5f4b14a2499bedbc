"""Summary: what a run left behind, read from its metrics.h5 as one dictionary."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcfl.report import lone_clients, measures
from hpcfl.report.recording import Recording, average, read

TARGETS = (10, 20, 30, 40, 50, 60, 70, 80, 90)                     # percent; `bytes.until_accuracy` says what each cost
WAYS = {                                                           # of reading one accuracy for each architecture out of a run, and what people read
    "final": "Final", "selected": "Selected by validation", "best_on_test": "Best on test, as published; selects by test data"}
FLOPS = {"training": "flops", "refining": "refine_flops"}          # of which metric a client's operations are
WORK = ("train", "refine", "aggregate", "spread", "evaluate")       # kinds of seconds that are work; the rest is waiting and moving


def summarise(run: str | Path | Recording, targets: Sequence[float] = TARGETS) -> dict[str, Any]:
    """A run in figures that JSON can carry: accuracies in percent, bytes, seconds; None for what was not measured.

    `data_source` and `data_sha256` say which data the name stood for, None where an earlier hpcfl did not note it.
    `accuracy.*` hold {mean, min, max, sd, per_client} of the last evaluation, sd over clients (population); `accuracy.global`, where the
    federation has models of its own, {mean, min, max, per_model} over these; `accuracy.over_architectures` is as of the function of that name.
    `accuracy.refine` says what clients did last in that round, a key of measures.REFINING or None, and `accuracy.before_<refine>` what their models were
    worth before that; `accuracy.described` says of each accuracy which model, when and on which images; `accuracy.report` which is the run's result.
    `seconds` sums, over rounds, the slowest rank of each phase; waiting, which is no phase, is in `seconds_by_rank` and as `idle_share` of ranks x
    wall time. `load_balance`: the work (WORK) of each round's busiest rank over that of the mean rank, both summed over rounds; 1 is even.
    `bytes.until_accuracy` has the cumulative bytes at the first evaluation at which the accuracy that `until_accuracy_of` names (global where there is
    one, else generalization), a mean, reaches each target; `bytes.until_client_accuracy` the same of generalization in any case.
    `conditions`, where the job simulates who answers: how many answers the server asked for, got, and missed because clients dropped out or were late, and
    the simulated seconds of all rounds.
    `by_architecture` is a list, empty where clients change architecture between rounds: seconds are means over clients and the rounds in which they
    worked, simulated bytes over clients and finished rounds, accuracies over clients, forward_flops of one image. `flops` has {phase: {architecture:
    floating-point operations of one client in a round}}, means over the clients that took part in the phase's first round, where it was counted
    (evaluation.flops). `server` has the last value of each number that the server measured itself, but for the shares of negative weights.

    Raises: as `read`.
    """
    recording = run if isinstance(run, Recording) else read(run)
    data = recording.job.get("data", {}).get("name")
    return {"run": str(recording.folder), "name": recording.name, "algorithm": recording.algorithm, "seed": recording.seed, "data": data,
            "data_source": recording.data_source, "data_sha256": recording.data_sha256, "status": recording.status, "rounds": recording.rounds,
            "planned_rounds": recording.planned, "ranks": recording.ranks, "clients": recording.clients, "classes": recording.classes,
            "accuracy": _accuracy(recording), "bytes": _bytes(recording, targets), **_seconds(recording),
            "conditions": _conditions(recording), "by_architecture": _by_architecture(recording), "flops": _flops(recording),
            "server": {name: _last(values) for name, values in recording.notes().items()},
            "warnings": list(filter(None, [lone_clients.warning_text(recording.algorithm, recording.averages())]))}


def summarise_values(values: np.ndarray) -> dict[str, Any]:
    """Mean, min, max and population sd over the finite entries of (K,), and all of them; None where there is nothing."""
    finite = values[np.isfinite(values)]
    over = {"mean": finite.mean(), "min": finite.min(), "max": finite.max(), "sd": finite.std()} if finite.size else {}
    return {**{key: float(over[key]) if over else None for key in ("mean", "min", "max", "sd")}, "per_client": _plain(values)}


def _accuracy(recording: Recording) -> dict[str, Any]:
    end, before = recording.last("end"), recording.last("before_refine")
    nothing, kinds = np.full(recording.clients, np.nan), ("generalization", "personal", "validation")
    found: dict[str, Any] = {kind: summarise_values(nothing if end is None else recording.accuracy(kind, [end])[0]) for kind in kinds}
    found["absent_classes"] = summarise_values(recording.absent_accuracy(end))
    found["recall"] = _plain(average(recording.recall(end), 0))
    if models := recording.global_accuracy(end):
        over = summarise_values(np.array(list(models.values())))
        found["global"] = {**{key: over[key] for key in ("mean", "min", "max")}, "per_model": models}
    found["over_architectures"] = average_architectures(recording)
    found["refine"] = refine = None if end is None else recording.refines(end)
    if refine and before is not None:
        key = measures.find_before_key(refine)
        found[key] = summarise_values(recording.accuracy("generalization", [before])[0])
        found["absent_classes"][key] = summarise_values(recording.absent_accuracy(before))
        found[f"recall_{key}"] = _plain(average(recording.recall(before), 0))
    return {"unit": "percent", "rounds": None if end is None else int(recording.arrays["evaluation/at"][end]) + 1, **found,
            "described": measures.describe_accuracies(found), "report": measures.choose_result(found, recording.rounds, recording.planned)}


def average_architectures(recording: Recording) -> dict[str, Any] | None:
    """Mean over architectures m of acc_m, the mean accuracy in percent of m's clients on the official test set, read in three ways (WAYS).

    `final`: every acc_m at the last evaluation. `selected`: at the evaluation at which m's clients, taken together, got most of their validation parts
    right, the earliest of equals; None where there is no such part. `best_on_test`: the largest acc_m of all evaluations, as GeFL publishes it
    (specification, section 7): test data select it. Evaluations at the end of a round count, those of all phases.

    {each way: mean over m, per_architecture: {m: {each way: acc_m, selected_rounds: rounds finished by then}}}; None where nothing was evaluated or
    clients change architecture between rounds.
    """
    end, members = recording.stage("end"), recording.by_architecture()
    if not len(end) or not members:
        return None
    rounds, right, found = recording.arrays["evaluation/at"][end] + 1, recording.accuracy("generalization", end), {}
    for name, clients in members.items():
        test, validation = average(right[:, clients], 1), recording.pooled_accuracy("validation", end, clients)          # (E,) both
        chosen = int(np.nanargmax(validation)) if np.isfinite(validation).any() else None
        found[name] = {"final": _number(test[-1]), "selected": None if chosen is None else _number(test[chosen]),
                       "best_on_test": _number(np.fmax.reduce(test)), "selected_rounds": None if chosen is None else int(rounds[chosen])}
    columns = {key: [value for entry in found.values() if (value := entry[key]) is not None] for key in WAYS}
    return {**{key: float(np.mean(column)) if len(column) == len(found) else None for key, column in columns.items()}, "per_architecture": found}


def _flops(recording: Recording) -> dict[str, dict[str, dict[str, float | None]]]:
    nothing, members = np.full((recording.rounds, recording.clients), np.nan), recording.by_architecture()
    counted = {f"{verb}_flops_per_round": recording.arrays.get(f"train/{name}", nothing) for verb, name in FLOPS.items()}
    rows = np.flatnonzero(np.isfinite(list(counted.values())).any((0, 2))) if members else ()
    return {str(recording.arrays["rounds/phase"][row]): {name: {key: _number(average(values[row, clients], 0)) for key, values in counted.items()}
                                                         for name, clients in members.items()} for row in rows}


def _bytes(recording: Recording, targets: Sequence[float]) -> dict[str, Any]:
    names, first = ("simulated_up", "simulated_down", "transported"), "global" if recording.global_accuracy(recording.last("end")) else "generalization"
    totals = {f"{name}_bytes": int(recording.per_round(name).sum()) for name in names}
    return {**totals, "per_round": {f"{name}_bytes": _plain(recording.per_round(name)) for name in names},
            "per_client": {f"{name}_bytes": _plain(recording.per_client(name)) for name in names[:2]},
            "until_accuracy": {f"{target:g}": count_bytes_until(recording, first, target) for target in targets}, "until_accuracy_of": first,
            "until_client_accuracy": {f"{target:g}": count_bytes_until(recording, "generalization", target) for target in targets}}


def count_bytes_until(recording: Recording, measure: str, target: float) -> dict[str, int] | None:
    """Rounds and cumulative bytes at the first "end" evaluation whose mean of "global" or "generalization" is >= target percent; None if it never came."""
    end = recording.stage("end")
    reached = np.flatnonzero(recording.means(measure, end) >= target)
    if not len(reached):
        return None
    rounds = int(recording.arrays["evaluation/at"][end[reached[0]]]) + 1
    up, down, transported = (int(recording.per_round(name)[:rounds].sum()) for name in ("simulated_up", "simulated_down", "transported"))
    return {"rounds": rounds, "simulated_bytes": up + down, "transported_bytes": transported}


def _seconds(recording: Recording) -> dict[str, Any]:
    by_rank = {name: np.nan_to_num(array.astype(float)) for name, array in recording.datasets("seconds").items()}          # each (R, ranks)
    wall = float(np.nan_to_num(recording.arrays["rounds/wall_s"].astype(float)).sum()) if "rounds/wall_s" in recording.arrays else 0.0
    idle = float(by_rank["idle"].sum()) if "idle" in by_rank else None
    return {"wall_s": wall, "seconds": {name: float(array.max(1, initial=0).sum()) for name, array in by_rank.items() if name != "idle"},
            "seconds_by_rank": {name: _plain(array.sum(0)) for name, array in by_rank.items()},
            "idle_share": idle / (wall * recording.ranks) if idle is not None and wall > 0 else None, "load_balance": _load_balance(by_rank)}


def _conditions(recording: Recording) -> dict[str, Any] | None:
    found = recording.datasets("conditions")
    if not {"answered", "delay_s", "duration_s"} <= found.keys():
        return None
    missing, came = found["answered"] == 0, np.isfinite(found["delay_s"])
    return {"asked": int((found["answered"] >= 0).sum()), "answered": int((found["answered"] == 1).sum()), "dropped": int((missing & ~came).sum()),
            "late": int((missing & came).sum()), "simulated_s": float(found["duration_s"].sum())}


def _load_balance(by_rank: dict[str, np.ndarray]) -> float | None:
    work = sum((by_rank[kind] for kind in WORK if kind in by_rank), np.zeros(()))
    mean = float(np.mean(work, 1).sum()) if np.ndim(work) == 2 and np.size(work) else 0.0
    return float(work.max(1).sum()) / mean if mean > 0 else None


def _by_architecture(recording: Recording) -> list[dict[str, Any]]:
    end, rows, nothing = recording.last("end"), [], np.full((recording.rounds, recording.clients), np.nan)
    accuracies = {kind: np.full(recording.clients, np.nan) if end is None else recording.accuracy(kind, [end])[0]
                  for kind in ("generalization", "personal")}
    for name, members in recording.by_architecture().items():
        described = {key: int(recording.arrays[f"clients/{key}"][members[0]]) if f"clients/{key}" in recording.arrays else None
                     for key in ("parameters", "memory_bytes", "forward_flops")}
        seconds = {key: recording.arrays.get(f"train/{metric}", nothing)[:, members].ravel()
                   for key, metric in (("train_s", "seconds"), ("refine_s", "refine_seconds"))}
        sent = {f"{key}_bytes": recording.per_client(key)[members] / max(1, recording.rounds) for key in ("simulated_up", "simulated_down")}
        right = {kind: values[members] for kind, values in accuracies.items()}
        means = {key: average(values, 0) for key, values in (seconds | sent | right).items()}
        rows.append({"architecture": name, "clients": len(members), **described,
                     **{key: _number(value) for key, value in means.items()}})
    return rows


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _last(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)][-1])


def _plain(values: np.ndarray) -> list[float | int | None]:
    return [None if isinstance(value, float) and not np.isfinite(value) else value for value in np.asarray(values).tolist()]
