"""Embedded: the data sets that need no file in the cache."""
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from hpcfl.data.sources import Labelled
from hpcfl.errors import DataError
from hpcfl.streams import Stream


def load_digits() -> Labelled:
    """Scikit-learn's 1,797 real 8x8 digits: 1,437 to train, 360 to test.

    Every fifth image in order of class is a test image, so the split is the same everywhere and stratified (ours: it depends on no library's
    random numbers). The 17 grey levels are spread over 0..255.

    Raises: DataError where scikit-learn is not installed.
    """
    package = find_spec("sklearn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz" if package and package.origin else Path("sklearn")
    if not file.is_file():
        raise DataError(f"{file}: is not there, so neither is the data set 'digits'; install scikit-learn, or set data.name to another one")
    table = np.loadtxt(file, delimiter=",", dtype=np.int64)        # (1797, 65): 64 pixels and the digit; importing scikit-learn would cost a second
    images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = table[:, -1].copy()
    test = np.zeros(len(labels), dtype=bool)
    test[np.argsort(labels, kind="stable")[::5]] = True
    return Labelled(images[~test], labels[~test], images[test], labels[test], 10)


def draw_random() -> Labelled:
    """Noise for benchmarks: 1,000 training and 200 test images of 3x32x32 in 10 balanced classes, the same everywhere."""
    train, test = (Stream(0, f"random/{split}").numpy().integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
                   for split, count in (("train", 1000), ("test", 200)))
    return Labelled(train, np.arange(1000) % 10, test, np.arange(200) % 10, 10)


EMBEDDED = {"digits": load_digits, "random": draw_random}
