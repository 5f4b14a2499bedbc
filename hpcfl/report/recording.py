"""recording: a run's metrics.h5 read into memory, checked against the schema, with the accuracies that are asked of it."""
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcfl.accounts import RECORD_VERSION, SHAPES
from hpcfl.errors import CheckpointError, JobError
from hpcfl.files import metrics
from hpcfl.report.measures import REFINING
from hpcfl.report.run_folders import read_status, why_no_run
from hpcfl.settings.job import read_recorded
from hpcfl.wording import numbers_text

NEGATIVE = "negative "                                             # begins the name of a share of negative weights: negative PATH SIZE
BEFORE = "1"                                                       # its SIZE of the model that was not compressed; of others the architecture
OLD_REFINES = {"fedvtc": "finetune"}                               # of records that say nothing of the plan
ROWS = "RE"                                                        # axes that grow: cut to the shortest, a write may have been interrupted
Indices = Sequence[int] | np.ndarray                               # of evaluations or clients


@dataclass(frozen=True)
class Recording:
    """A run's metrics.h5 in memory: `arrays` maps "group/name" to its array, accuracies come out in percent.

    Letters of shapes: R finished rounds, E evaluations, K clients, C classes, G models of the federation's own, I intervals of work.
    NaN stands for what was not measured.
    """

    folder: Path
    status: str
    algorithm: str
    job_text: str
    job: dict[str, dict[str, Any]]
    clients: int
    classes: int
    ranks: int
    arrays: dict[str, np.ndarray]
    plan: Sequence[Mapping[str, Any]] = ()                         # of each phase: its name, rounds, what refining is, with how many clients parts are averaged
    data_source: str | None = None                                 # where the data set came from, and the SHA-256 of what it held
    data_sha256: str | None = None

    @property
    def rounds(self) -> int:
        """Finished rounds over all phases."""
        return len(self.arrays["rounds/phase"])

    @property
    def planned(self) -> int | None:
        """Rounds of all phases together; None where the record does not say."""
        return sum(each["rounds"] for each in self.plan) or None

    @property
    def name(self) -> str:
        """run.name of the job."""
        return str(self.job.get("run", {}).get("name", self.folder.name))

    @property
    def seed(self) -> int | None:
        """run.seed of the job."""
        return self.job.get("run", {}).get("seed")

    def datasets(self, group: str) -> dict[str, np.ndarray]:
        """The datasets of one group by name."""
        return {path.split("/", 1)[1]: array for path, array in self.arrays.items() if path.startswith(f"{group}/")}

    def stage(self, name: str) -> np.ndarray:
        """Which evaluations belong to a stage ("end" | "before_refine"), as indices in order of time."""
        return np.flatnonzero(self.arrays.get("evaluation/stage", np.zeros(0, object)) == name)

    def last(self, name: str) -> int | None:
        """The last evaluation of a stage; of "before_refine" the one that goes with the last "end", so that pairs are pairs."""
        found, end = self.stage(name), self.stage("end")
        if name == "before_refine" and len(end):
            at = self.arrays["evaluation/at"]
            found = found[at[found] == at[end[-1]]]
        return int(found[-1]) if len(found) else None

    def refines(self, evaluation: int) -> str | None:
        """What refining was in the round of an evaluation, a key of measures.REFINING; None where its phase has none."""
        at = self.arrays["evaluation/at"]
        phase = str(self.arrays["rounds/phase"][at[evaluation]])
        known = {each["phase"]: each["refines"] for each in self.plan}
        refined = (at[self.stage("before_refine")] == at[evaluation]).any()
        word = known.get(phase, OLD_REFINES.get(self.algorithm, "refine")) if refined else None
        return word if word is None or word in REFINING else "refine"

    def averages(self) -> dict[str, int]:
        """How many clients average each part of models that any phase averages."""
        return {name: int(clients) for each in self.plan for name, clients in each["averages"].items()}

    def accuracy(self, kind: str, evaluations: Indices) -> np.ndarray:
        """Accuracy of each client over all test samples in percent, (len(evaluations), K); `kind` is generalization, personal or validation."""
        correct, count = self._counted(kind, evaluations)
        return to_percent(correct.sum(-1), count.sum(-1))

    def pooled_accuracy(self, kind: str, evaluations: Indices, clients: Indices) -> np.ndarray:
        """Accuracy in percent over the samples of some clients taken together, (len(evaluations),); `kind` as in `accuracy`."""
        correct, count = (part[:, clients].sum((1, 2)) for part in self._counted(kind, evaluations))
        return to_percent(correct, count)

    def global_accuracy(self, evaluation: int | None) -> dict[str, float]:
        """Accuracy in percent over the official test set of each of the federation's own models that was evaluated then, by name."""
        correct, names = self.arrays.get("evaluation/global_correct"), self.arrays.get("evaluation/global_names", ())
        if evaluation is None or correct is None or "evaluation/generalization_count" not in self.arrays:
            return {}
        total = self.arrays["evaluation/generalization_count"].sum()
        return {str(name): float(to_percent(counts.sum(), total)) for name, counts in zip(names, correct[evaluation], strict=True) if (counts >= 0).all()}

    def means(self, measure: str, evaluations: Indices) -> np.ndarray:
        """The mean in percent over clients, or for "global" over the federation's own models, (len(evaluations),); NaN where there is none."""
        if measure != "global":
            return average(self.accuracy(measure, evaluations), 1)
        return np.array([np.mean([*models.values()]) if (models := self.global_accuracy(evaluation)) else np.nan for evaluation in evaluations])

    def recall(self, evaluation: int | None) -> np.ndarray:
        """Generalization accuracy of each client on each class in percent, (K, C)."""
        correct, count = self._counted("generalization", [] if evaluation is None else [evaluation])
        return to_percent(correct, count)[0] if evaluation is not None else np.full((self.clients, self.classes), np.nan)

    def absent(self) -> np.ndarray:
        """Which classes a client has no training sample of, (K, C); none where the partition was not recorded."""
        train = self.arrays.get("partition/train")
        return np.zeros((self.clients, self.classes), bool) if train is None else train == 0

    def absent_accuracy(self, evaluation: int | None) -> np.ndarray:
        """Accuracy of each client in percent over the test samples of its absent classes, (K,); NaN for a client that has all classes."""
        if evaluation is None:
            return np.full(self.clients, np.nan)
        correct, count = (np.where(self.absent(), part[0], 0) for part in self._counted("generalization", [evaluation]))
        return to_percent(correct.sum(-1), count.sum(-1))

    def per_round(self, path: str) -> np.ndarray:
        """A bytes dataset summed over clients or ranks, (R,); zeros where it was not recorded."""
        array = self.arrays.get(f"bytes/{path}")
        return np.zeros(self.rounds, np.int64) if array is None else array.sum(1)

    def per_client(self, path: str) -> np.ndarray:
        """A bytes dataset summed over rounds, (K,); zeros where it was not recorded."""
        array = self.arrays.get(f"bytes/{path}")
        return np.zeros(self.clients, np.int64) if array is None else array.sum(0)

    def negatives(self) -> tuple[list[str], list[str], np.ndarray]:
        """Parameter paths, sizes (before compression first, then from wide to narrow) and the percent of negative weights, (R, paths, sizes)."""
        named = {tuple(name.split(" ")[1:]): values for name, values in self.datasets("server").items() if re.fullmatch(NEGATIVE + r"\S+ \S+", name)}
        paths = sorted({path for path, _ in named}, key=lambda path: [part.zfill(9) for part in re.split(r"(\d+)", path)])    # 2 before 10
        sizes = sorted({size for _, size in named}, key=lambda size: (size == BEFORE, size), reverse=True)
        missing = np.full(self.rounds, np.nan)
        columns = [[named.get((path, size), missing) for size in sizes] for path in paths]
        return paths, sizes, np.moveaxis(np.array(columns, float).reshape(len(paths), len(sizes), self.rounds), 2, 0)

    def notes(self) -> dict[str, np.ndarray]:
        """What else the server measured in a round, (R,) by name; names without any value are left out."""
        return {name: values for name, values in self.datasets("server").items() if not name.startswith(NEGATIVE) and np.isfinite(values).any()}

    def by_architecture(self) -> dict[str, np.ndarray]:
        """The clients of each architecture, from many parameters to few; none where clients change theirs between rounds or it was not recorded."""
        names, parameters = self.arrays.get("clients/architecture", ()), self.arrays.get("clients/parameters", np.zeros(self.clients))
        if self.job.get("models", {}).get("size_schedule", "fixed") != "fixed":
            return {}
        found = {str(name): np.flatnonzero(np.asarray(names) == name) for name in names}
        return dict(sorted(found.items(), key=lambda item: (-parameters[item[1][0]], item[0])))

    def _counted(self, kind: str, evaluations: Indices) -> tuple[np.ndarray, np.ndarray]:
        correct, count = self.arrays.get(f"evaluation/{kind}_correct"), self.arrays.get(f"evaluation/{kind}_count")
        if correct is None or count is None:
            shape = (len(evaluations), self.clients, self.classes)
            return np.full(shape, np.nan), np.zeros(shape)
        correct = correct[np.asarray(evaluations, int)].astype(float)                                  # (e, K, C)
        return np.where(correct < 0, np.nan, correct), np.broadcast_to(count, correct.shape)


def read(run: str | Path) -> Recording:
    """Read a run folder, finished or not.

    Raises: JobError for a folder that is no run; CheckpointError for a metrics.h5 that is truncated, of another schema, inconsistent, or that
    leads into other files.
    """
    folder = Path(run)
    path = folder / "metrics.h5"
    if not path.is_file():
        raise JobError(f"{folder}: {why_no_run(folder)}")
    status = read_status(folder)
    attributes, arrays = metrics.read(path, _way_out(status))
    if attributes.get("schema") != RECORD_VERSION:
        raise CheckpointError(f"{path}: schema = {attributes.get('schema')}, wanted {RECORD_VERSION}; report it with the hpcfl version that wrote it")
    try:
        sizes = {"K": int(attributes["clients"]), "C": int(attributes["classes"])}
        text = str(attributes["job"])
        status = ": ".join(filter(None, [status, _lost_text(attributes)]))
        return Recording(folder, status, str(attributes["algorithm"]), text, read_recorded(tomllib.loads(text)), sizes["K"], sizes["C"],
                         int(attributes["ranks"]),
                         _align(arrays, sizes, path), _read_plan(attributes), attributes.get("data_source"), attributes.get("data_sha256"))
    except (KeyError, TypeError, ValueError) as error:             # TOMLDecodeError is a ValueError
        raise CheckpointError(f"{path}: attribute missing or damaged ({error}); wanted algorithm, job, clients, classes and ranks") from None


def to_percent(correct: np.ndarray, count: np.ndarray) -> np.ndarray:
    """100 correct / count; NaN where there is nothing to count."""
    return 100.0 * np.divide(correct, count, out=np.full(np.shape(correct), np.nan), where=np.asarray(count) > 0)


def average(values: np.ndarray, axis: int) -> Any:
    """The mean along an axis that leaves NaN out; NaN, without a warning, where all of it is NaN."""
    known = np.isfinite(values)
    return np.divide(np.where(known, values, 0).sum(axis), known.sum(axis), out=np.full(known.sum(axis).shape, np.nan), where=known.any(axis))


def _read_plan(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a record says of the phases; nothing where an earlier version wrote it."""
    return [{"phase": str(each["phase"]), "rounds": int(each["rounds"]), "refines": each["refines"], "averages": dict(each["averages"])}
            for each in json.loads(attributes.get("plan", "[]"))]


def _way_out(status: str) -> str:
    if status == "done":
        return "; the run is done and its checkpoints hold its models, but the figures are lost: repeat it with another --out to have them again"
    return "; if the run is still writing, ask again, otherwise resume it: it sets that file aside and goes on from its last checkpoint, without these figures"


def _lost_text(attributes: Mapping[str, Any]) -> str:
    """Words for the rounds whose figures were lost before the run was resumed."""
    rounds = [int(row) + 1 for row in attributes.get("lost_rounds", ())]
    return f"without the figures of {numbers_text(rounds, 'round', ' to ')}, which were lost" if rounds else ""


def _align(arrays: dict[str, np.ndarray], sizes: dict[str, int], path: Path) -> dict[str, np.ndarray]:
    """The arrays with their shapes checked, growing axes cut to the rows that every dataset has, evaluations of unfinished rounds left out."""
    wanted = {name: SHAPES.get(name, SHAPES.get(name.split("/")[0], "")) for name in arrays}
    bound = dict(sizes)
    for name, letters in wanted.items():
        shape = arrays[name].shape
        if letters and (len(shape) != len(letters) or any(bound.setdefault(letter, size) != size for letter, size in zip(letters, shape, strict=True)
                                                          if letter not in ROWS + ".")):
            raise CheckpointError(f"{path}: '{name}' is {shape}, wanted ({', '.join(str(bound.get(letter, letter)) for letter in letters)})")
    rows = {letter: min((len(arrays[name]) for name, letters in wanted.items() if letters.startswith(letter)), default=0) for letter in ROWS}
    if not {"evaluation/at", "evaluation/stage"} <= arrays.keys():
        rows["E"] = 0                                              # counts that belong to no round say nothing
    cut = {name: array[:rows[wanted[name][0]]] if wanted[name][:1] in ROWS else array for name, array in arrays.items() if wanted[name]}
    known = cut.get("evaluation/at", np.zeros(0, int)) < rows["R"]
    kept = {"E": known, "I": cut.get("trace/row", np.zeros(0, int)) < rows["R"]}
    return {name: array[kept[wanted[name][0]]] if wanted[name][:1] in kept else array for name, array in cut.items()}
