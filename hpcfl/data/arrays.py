"""Arrays: a user's own data set from an .npz file, with a note of every change to it."""
import zipfile
from pathlib import Path

import numpy as np

from hpcfl.data.sources import DAMAGED, Labelled, build_labelled
from hpcfl.errors import DataError
from hpcfl.wording import cause_text

NEAR = 1e-3 / 255                                                  # a number this close to a level is that level


def read_npz(path: Path) -> Labelled:
    """The arrays x_train, y_train, x_test, y_test of an .npz file.

    Images may be (N, C, H, W), (N, H, W, C) or (N, H, W) with 1 or 3 channels, as uint8 or as finite floats in [0, 1], which are rounded to
    256 levels; labels are integers from 0, (N,) or (N, 1), numbered anew where they have gaps. Pickled objects are refused, not loaded.

    Raises: DataError naming the file and the array, also an array that would not be read.
    """
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as members:
            stored = {member.removesuffix(".npy") for member in members.namelist()}
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in names if name in stored}
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read as .npz ({cause_text(error)}); it is missing, truncated, damaged or holds pickled objects. "
                        "Write it again with numpy.savez(file, x_train=..., y_train=..., x_test=..., y_test=...)") from error
    missing = [name for name in names if name not in arrays]
    if missing:
        raise DataError(f"{path}: has no {', '.join(missing)}; wanted the arrays {', '.join(names)}, got {', '.join(sorted(stored)) or 'none'}")
    if extra := sorted(stored.difference(names)):
        raise DataError(f"{path}: holds {', '.join(extra)} too, and only {', '.join(names)} are read (who owns which image is a matter of data.partition); "
                        "save the file without what is not read")
    images = {name: _to_pixels(arrays[name], f"{path}: {name}") for name in ("x_train", "x_test")}
    labels = {name: _to_integers(arrays[name], f"{path}: {name}") for name in ("y_train", "y_test")}
    notes = tuple(f"{name} {note}" for name, (_, note) in images.items() if note)
    return build_labelled(str(path), images["x_train"][0], labels["y_train"], images["x_test"][0], labels["y_test"], notes=notes)


def _to_pixels(array: np.ndarray, where: str) -> tuple[np.ndarray, str]:
    """Images as uint8 (N, C, H, W), and a note of what was done to them. Raises: DataError."""
    note = ""
    if np.issubdtype(array.dtype, np.floating):
        array, note = _from_unit(array, where)
    if array.dtype != np.uint8:
        raise DataError(f"{where} is {array.dtype}; wanted uint8 in 0..255 or floats in [0, 1]")
    if array.ndim == 3:
        return array[:, None], note                                # (N, 1, H, W)
    channels = (1, 3)
    if array.ndim == 4 and array.shape[1] in channels:
        return array, note
    if array.ndim == 4 and array.shape[3] in channels:
        return array.transpose(0, 3, 1, 2), note
    raise DataError(f"{where} has shape {array.shape}; wanted (N, C, H, W), (N, H, W, C) or (N, H, W) with C = 1 or 3")


def _from_unit(array: np.ndarray, where: str) -> tuple[np.ndarray, str]:
    if not np.isfinite(array).all():
        bad = int(np.argwhere(~np.isfinite(array))[0][0])
        raise DataError(f"{where} holds NaN or infinity, first in image {bad}; mend or drop such images")
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        raise DataError(f"{where} is {array.dtype} in [{array.min():g}, {array.max():g}]; floats must lie in [0, 1]: scale them, or save uint8")
    levels = array * np.float64(255)
    rounded = np.rint(levels)
    furthest = float(np.abs(levels - rounded).max(initial=0)) / 255
    between = f", numbers between these levels rounded, by {furthest:.1g} at most" if furthest > NEAR else ""
    return rounded.astype(np.uint8), f"was {array.dtype} in [0, 1] and became uint8, 255 times as large{between}"


def _to_integers(array: np.ndarray, where: str) -> np.ndarray:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{where} is {array.dtype} of shape {array.shape}; wanted integer class numbers of shape (N,), for example as "
                        "numpy.unique(labels, return_inverse=True) makes them")
    return array
