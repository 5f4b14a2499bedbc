"""Recorded runs whose figures can be worked out by hand, and what the terminal shows of runs."""
import json
from pathlib import Path

import h5py
import numpy as np

from hpcfl.report import labels, recording, summary, tables

TEXT = h5py.string_dtype()
JOB = """[run]
name = "{name}"
seed = {seed}

[data]
name = "digits"

[algorithm]
name = "fedvtc"
lr = {lr}
"""


def record(folder: Path, name: str = "toy", seed: int = 0, lr: float = 0.1, status: str = "done", right: int = 0) -> Path:
    """A run of 2 clients, 3 classes, 2 rounds on 2 ranks; client 0 has no sample of class 2, client 1 none of 0 and 1; `right` adds correct ones."""
    folder.mkdir(parents=True)
    (folder / "STATUS").write_text(status)
    with h5py.File(folder / "metrics.h5", "w") as file:
        file.attrs.update(schema=1, algorithm="fedvtc", job=JOB.format(name=name, seed=seed, lr=lr), clients=2, classes=3, ranks=2)
        file.create_dataset("rounds/phase", data=np.array(["train", "train"], object), dtype=TEXT)
        file["rounds/round"], file["rounds/wall_s"] = [0, 1], [4.0, 6.0]
        file["train/loss"] = [[2.0, np.nan], [1.0, 1.5]]
        file["train/kl"] = [[0.5, np.nan], [0.25, 0.3]]
        file["bytes/simulated_up"], file["bytes/simulated_down"] = [[100, 0], [100, 50]], [[10, 10], [10, 10]]
        file["bytes/transported"] = [[7, 3], [7, 3]]
        file["seconds/train"], file["seconds/combine"] = [[1.0, 3.0], [2.0, 1.0]], [[2.5, 0.5], [0.5, 1.5]]
        file["seconds/idle"] = [[2.0, 0.0], [0.0, 1.0]]
        file["evaluation/at"] = [0, 0, 1, 1]
        file.create_dataset("evaluation/stage", data=np.array(["before_refine", "end"] * 2, object), dtype=TEXT)
        file["evaluation/generalization_count"] = [10, 10, 20]
        file["evaluation/generalization_correct"] = np.array([[[1, 1, 2], [1, 1, 2]], [[5, 5, 0], [0, 0, 10]],
                                                              [[6, 6, 0], [0, 0, 12]], [[8, 8, 4], [2, 0, 18]]]) + right
        file["evaluation/personal_count"] = [[2, 2, 0], [0, 0, 0]]
        file["evaluation/personal_correct"] = [[[1, 1, 0], [0, 0, 0]]] * 4
        file["partition/train"] = [[30, 10, 0], [0, 0, 40]]
        file.create_dataset("clients/architecture", data=np.array(["cnn1", "mlp<b>"], object), dtype=TEXT)
        file["clients/rank"], file["clients/parameters"] = [0, 1], [1000, 2000]
        file["samples/synthetic"], file["samples/real"] = np.full((1, 3, 2, 1, 4, 4), 90, np.uint8), np.full((3, 2, 1, 4, 4), 200, np.uint8)
        file["samples/has"], file["samples/client"] = [[True, True, False]], [0]
    return folder


def altered(folder: Path, change) -> Path:
    """A recorded run whose file `change` was allowed to alter."""
    with h5py.File(record(folder) / "metrics.h5", "r+") as file:
        change(file)
    return folder


def compressing(layers: int):
    """What a server that compresses adds to a record: shares of negative weights of so many layers, accuracies, seconds and memory of its clients."""
    def change(file):
        for layer in range(1, layers + 1):
            for size, share in (("1", 50.0), ("cnn1@0.5", 30.0), ("cnn1@0.75", 40.0)):
                file[f"server/negative body.{layer}.weight {size}"] = [np.nan, share + layer]
        file["server/aggregation_accuracy"], file["server/compression_accuracy cnn1@0.5"] = [60.0, np.nan], [10.0, 20.0]
        file["train/aggregate_dilation_accuracy"] = [[np.nan, 30.0], [np.nan, 35.0]]
        file["train/seconds"], file["clients/memory_bytes"] = [[2.0, np.nan], [4.0, 1.0]], [4_000_000, 7]
    return change


def three_ways(folder: Path, validation: tuple[int, int, int] = (10, 30, 20), seed: int = 0, better: int = 0, change=lambda file: None) -> Path:
    """A run of 3 clients, two of architecture a and one of b, 100 test images, 4 rounds in 2 phases; `better` adds right answers at the last evaluation.

    Taken together a's clients validate best after rounds 2 and 3, alike; as a mean over clients after round 1, where client 0 does well on few images.
    """
    folder.mkdir(parents=True)
    with h5py.File(folder / "metrics.h5", "w") as file:
        file.attrs.update(schema=1, algorithm="fedavg", job=JOB.format(name="toy", seed=seed, lr=0.1), clients=3, classes=1, ranks=1)
        file.create_dataset("rounds/phase", data=np.array(["warm-up", "warm-up", "warm-up", "train"], object), dtype=TEXT)
        file.create_dataset("clients/architecture", data=np.array(["a", "a", "b"], object), dtype=TEXT)
        file["clients/forward_flops"], file["clients/parameters"] = [1500, 1500, 10], [3, 3, 2]
        file["evaluation/at"] = [0, 0, 1, 2, 3]
        file.create_dataset("evaluation/stage", data=np.array(["before_refine", *["end"] * 4], object), dtype=TEXT)
        file["evaluation/generalization_count"] = [100]
        right = np.array([[99, 99, 99], [10, 20, 40], [30, 50, 60], [50, 40, 50], [20, 20, 30]])
        right[-1] += better
        file["evaluation/generalization_correct"] = right[:, :, None]
        file["evaluation/validation_count"] = np.array(validation)[:, None]
        validated = np.array([[10, 30, 20], [9, 3, 5], [1, 15, 10], [2, 14, 12], [0, 0, 12]])
        file["evaluation/validation_correct"] = np.minimum(validated, validation)[:, :, None]
        change(file)
    return folder


def planned(**refines: str | None):
    """What a record says of its plan: phases by what they do last; parts that are averaged come from nowhere."""
    plan = [{"phase": phase, "rounds": 1, "refines": word, "averages": {}} for phase, word in refines.items()]
    return lambda file: file.attrs.update(plan=json.dumps(plan))


def told(folders: list[Path], how: str = "text") -> str:
    """What the terminal shows of runs."""
    groups = labels.label_groups([recording.read(folder) for folder in folders])
    return tables.FORMATS[how]({label: [summary.summarise(each) for each in group] for label, group in groups.items()})
