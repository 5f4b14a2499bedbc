"""Classes: the labels of a data set as numbers from 0, the names of its classes, and what a reader of accuracies should know of them."""
from collections.abc import Mapping, Sequence

import numpy as np

from hpcfl.errors import DataError
from hpcfl.wording import count_text, list_text

Counts = Mapping[str, Sequence[int]]                               # split -> images of each class, (C,)


def number_labels(where: str, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Integer labels (N,) and (M,) as int64 in [0, C) in order of the training part's labels, those labels as names (C,), and a note where they changed.

    Raises: DataError for a negative label and for a test label that no training image has.
    """
    found = sorted(set(train.tolist()))                            # numbers of Python: no label is too large for them
    if found[0] < 0:
        raise DataError(f"{where}: training label {found[0]} is negative; classes are numbered from 0: leave out images without a class, or number it anew")
    absent = {label: int((test == label).sum()) for label in sorted(set(test.tolist()) - set(found))}
    if absent:
        images = count_text(sum(absent.values()), "test image")
        raise DataError(f"{where}: {images} of class {list_text(tuple(absent))}, which has no training images (those are of class {list_text(found)}); "
                        "leave them out of the test part, or add such images to the training part")
    number = {label: index for index, label in enumerate(found)}
    learned, asked = (np.array([number[label] for label in labels.tolist()], dtype=np.int64) for labels in (train, test))
    note = f"labels {list_text(found)} became the numbers 0 to {len(found) - 1}, in this order; the classes keep their labels as names"
    return learned, asked, tuple(map(str, found)), () if found == list(range(len(found))) else (note,)


def name_classes(names: Sequence[str], classes: int) -> tuple[str, ...]:
    """The names of the classes, their numbers where they have none."""
    return tuple(names) or tuple(map(str, range(classes)))


def list_remarks(names: Sequence[str], counts: Counts) -> list[str]:
    """What a reader should know of the classes before he believes an accuracy, a sentence each."""
    untrained, untested = ({name: count for name, count in zip(names, counts[split], strict=True) if not count} for split in ("train", "test"))
    found = []
    if len(names) == 1:
        found.append(f"all images are of one class, '{names[0]}': the accuracy of every model is 100")
    if untrained:
        found.append(f"{_classes_text(tuple(untrained))} no training images, so that no model can learn of them; where they are only gaps between labels, "
                     "delete the data set's file in the cache and import it again, which numbers the classes without gaps")
    if only_trained := [name for name in untested if name not in untrained]:
        found.append(f"{_classes_text(only_trained)} no test images, so that accuracies say nothing of them")
    return found


def _classes_text(names: Sequence[str]) -> str:
    return f"class {list_text(names)} has" if len(names) == 1 else f"classes {list_text(names)} have"
