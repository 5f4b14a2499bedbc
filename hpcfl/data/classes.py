"""Classes: how the labels of a data set become numbers from 0, what the classes are called, and what a reader of accuracies should know of them."""
from collections.abc import Mapping, Sequence

import numpy as np

from hpcfl.errors import DataError
from hpcfl.wording import count_text

SHOWN = 12                                                         # labels or names that are spelled out at most
Counts = Mapping[str, Sequence[int]]                               # part -> images of each class, (C,)


def number_labels(where: str, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Integer labels (N,) and (M,) as int64 in [0, C) in order of the training part's labels, those labels as names (C,), and a note where they changed.

    Raises: DataError for a negative label and for a test label that no training image has.
    """
    found = sorted(set(train.tolist()))                            # of Python, which no label is too large for
    if found[0] < 0:
        raise DataError(f"{where}: training label {found[0]} is negative; classes are numbered from 0: leave out images without a class, or number it anew")
    absent = {label: int((test == label).sum()) for label in sorted(set(test.tolist()) - set(found))}
    if absent:
        raise DataError(f"{where}: {count_text(sum(absent.values()), 'test image')} of class {list_text(tuple(absent))}, which has no "
                        f"training images (those are of class "
                        f"{list_text(found)}); leave them out of the test part, or add such images to the training part")
    number = {label: index for index, label in enumerate(found)}
    numbered, asked = (np.array([number[label] for label in labels.tolist()], dtype=np.int64) for labels in (train, test))
    note = f"labels {list_text(found)} became the numbers 0 to {len(found) - 1}, in this order; the classes keep their labels as names"
    return numbered, asked, tuple(map(str, found)), () if found == list(range(len(found))) else (note,)


def name_classes(names: Sequence[str], classes: int) -> tuple[str, ...]:
    """The names of the classes, their numbers where they have none."""
    return tuple(names) or tuple(map(str, range(classes)))


def list_remarks(names: Sequence[str], counts: Counts) -> list[str]:
    """What is to be known of the classes before an accuracy is believed."""
    untrained, untested = ({name: count for name, count in zip(names, counts[part], strict=True) if not count} for part in ("train", "test"))
    found = []
    if len(names) == 1:
        found.append(f"all images are of one class, '{names[0]}': the accuracy of every model is 100")
    if untrained:
        found.append(f"{_classes_text(tuple(untrained))} no training images, so that no model can learn of them; where they are only gaps between labels, "
                     "delete the data set's file in the cache and import it again, which numbers the classes without gaps")
    if only_trained := [name for name in untested if name not in untrained]:
        found.append(f"{_classes_text(only_trained)} no test images, so that accuracies say nothing of them")
    return found


def list_text(values: Sequence[object]) -> str:
    """Values in words: "1, 2, 3"; of many the first ones, the last one and how many there are."""
    words = list(map(str, values))
    return ", ".join(words) if len(words) <= SHOWN else f"{', '.join(words[:SHOWN - 2])} ... {words[-1]} ({len(words)} in all)"


def range_text(counts: Sequence[int]) -> str:
    """How many images a class has: "50", or "48 to 52"."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _classes_text(names: Sequence[str]) -> str:
    return f"class {list_text(names)} has" if len(names) == 1 else f"classes {list_text(names)} have"
