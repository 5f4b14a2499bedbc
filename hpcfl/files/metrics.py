"""Metrics: the record of a run on disk: metrics.h5, and what has come since that was written, in small files beside it that are read along.

No file is ever changed. A checkpoint adds one file with the new rows (metrics/rows-NNNNNN.h5, named after the first of them); once these files weigh a
quarter of metrics.h5, or as long as everything is small, all of it becomes a new metrics.h5, which takes the place of the old one whole. So whenever a run
is killed, the power fails or the disk is full, every file that is there is whole. A new metrics.h5 begins a series; files of another series do not count.
"""
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcfl.accounts import GROWING, MISSING, MODELS, RECORD_VERSION, REQUIRED, ROW, SHAPES
from hpcfl.errors import CheckpointError
from hpcfl.files import atomic, hdf5

FOLDER = "metrics"                                                 # beside metrics.h5
SMALL_BYTES = 1 << 20                                              # up to here everything is written anew, and metrics.h5 has all rows at any time
SHARE = 4                                                          # the files beside metrics.h5 weigh at most a quarter of it
CHUNK_BYTES = 1 << 18                                              # before compression; a chunk is what one checksum is of

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class RecordFile:
    """One file: rounds from `first` on."""

    path: Path
    attributes: Mapping[str, Any]
    arrays: Arrays

    @property
    def first(self) -> int:
        """The first round in it."""
        return int(self.attributes.get("first_row", 0))

    @property
    def stop(self) -> int:
        """The round behind the last in it."""
        return self.first + len(self.arrays["rounds/phase"])


@dataclass(frozen=True)
class DamagedFile:
    """A file that cannot be read, and why."""

    path: Path
    reason: str


class Series:
    """The files of one record as a run writes them."""

    def __init__(self) -> None:
        self._name, self._rows = "", 0                             # how many rows are on the disk
        self._weights = [0]                                        # bytes of metrics.h5 and of each file beside it

    @property
    def rows(self) -> int:
        """How many rows are on the disk."""
        return self._rows

    def full(self) -> bool:
        """Whether all is to be written anew before more is added."""
        return not self._name or sum(self._weights) <= SMALL_BYTES or SHARE * sum(self._weights[1:]) >= self._weights[0]

    def replace(self, path: Path, attributes: Mapping[str, Any], columns: Arrays) -> None:
        """All rows as a new metrics.h5. Raises CheckpointError where the disk does not take it; what was there stays."""
        name = secrets.token_hex(8)
        _write(path, {"schema": RECORD_VERSION, **attributes, "series": name}, columns)
        for piece in find_beside(path):
            with suppress(OSError):                                # it counts no more
                piece.unlink()
        self._name, self._rows, self._weights = name, len(columns["rounds/phase"]), [path.stat().st_size]

    def add(self, path: Path, columns: Arrays) -> None:
        """The rows that are new, as a file beside metrics.h5. Raises CheckpointError as `replace` does."""
        new = path.parent / FOLDER / f"rows-{self._rows:06d}.h5"
        _write(new, {"schema": RECORD_VERSION, "series": self._name, "first_row": self._rows}, columns)
        self._rows += len(columns["rounds/phase"])
        self._weights.append(new.stat().st_size)


def find_beside(path: Path) -> list[Path]:
    """The files beside a metrics.h5, in order of their rows."""
    return sorted((path.parent / FOLDER).glob("rows-*.h5"))


def read(path: Path, advice: str = "") -> tuple[Mapping[str, Any], Arrays]:
    """The attributes and all rows of a record, also of one that is being written; whole numbers as int64, texts as str.

    Raises: CheckpointError where a file of it cannot be read; `advice` as of hdf5.reading.
    """
    pieces, damaged = salvage(path, advice)
    if damaged:
        raise CheckpointError(damaged[0].reason)
    parts, stop = [], 0
    for piece in pieces:
        if piece.first > stop:                                     # what lay between has just become part of a new metrics.h5
            break
        parts.append(_cut_since(piece, stop))
        stop = max(stop, piece.stop)
    return pieces[0].attributes, _join(parts)


def salvage(path: Path, advice: str = "") -> tuple[list[RecordFile], list[DamagedFile]]:
    """The files of a record that can be read, in order of their rows, and what is wrong with the others."""
    pieces: list[RecordFile] = []
    damaged: list[DamagedFile] = []
    others = find_beside(path)                                          # first: each of them may become part of metrics.h5 meanwhile
    for each in (path, *others):
        try:
            pieces.append(_read(each, advice))
        except CheckpointError as error:
            if each == path or each.exists():
                damaged.append(DamagedFile(each, str(error)))
    series = {piece.attributes.get("series") for piece in (pieces if damaged and damaged[0].path == path else pieces[:1])[-1:]}
    return [piece for piece in pieces if piece.attributes.get("series") in series], damaged


def find_flaw(piece: RecordFile, clients: int) -> str | None:
    """In what a file is not laid out as a record of so many clients; None where it is."""
    if missing := [name for name in REQUIRED if name not in piece.arrays]:
        return f"has no '{missing[0]}'"
    bound = {"K": clients, **{letter: len(piece.arrays[name]) for letter, name in GROWING.items() if name in piece.arrays}}
    for name, array in piece.arrays.items():
        letters = SHAPES.get(name, SHAPES.get(name.split("/")[0], ""))
        if letters and (array.ndim != len(letters) or any(letter != "." and bound.setdefault(letter, size) != size
                                                          for letter, size in zip(letters, array.shape, strict=True))):
            return f"'{name}' is {array.shape}, wanted ({', '.join(str(bound.get(letter, letter)) for letter in letters)})"
    return None


def set_aside(path: Path) -> Path | None:
    """Give a file that is of no use another name and return that; None where it is not there."""
    if not path.exists():
        return None
    names = (path.with_name(f"{path.name}.damaged{f'-{number}' if number else ''}") for number in count())
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    return aside


def _read(path: Path, advice: str) -> RecordFile:
    with hdf5.reading(path, CheckpointError, advice) as file:
        groups = sorted({name.split("/")[0] for name in SHAPES} & set(file.members()))
        arrays = {dataset.name.lstrip("/"): file.values(dataset) for group in groups for dataset in file.datasets(group)}
        attributes = file.attributes
    if "rounds/phase" not in arrays:
        raise CheckpointError(f"{path}: dataset 'rounds/phase' is missing, so the file is no record of a run{advice}")
    counted = {name: array.astype(np.int64) for name, array in arrays.items() if array.dtype.kind in "iu" and not name.startswith("samples/")}
    return RecordFile(path, attributes, arrays | counted)


def _write(path: Path, attributes: Mapping[str, Any], columns: Arrays) -> None:
    """With checksums over everything that is read again: HDF5 has none of texts of variable length, and may never come back from reading a damaged one."""
    with atomic.replacing(path) as draft, hdf5.filling(draft, hdf5.LIBVER) as file:
        for name, value in attributes.items():
            values = np.asarray(value)
            file.attrs[name] = _encode_fixed(values) if values.dtype.kind in "OU" else value
        for name, column in columns.items():
            values = _shrink(_encode_fixed(column) if column.dtype.kind in "OU" else column)
            rows = max(1, min(len(values), CHUNK_BYTES // max(1, values[:1].nbytes)))
            checked = {"chunks": (rows, *values.shape[1:]), "compression": "gzip", "compression_opts": 1, "shuffle": True, "fletcher32": True}
            file.create_dataset(name, data=values, **(checked if values.size else {}))
            draft.check()


def _encode_fixed(texts: np.ndarray) -> np.ndarray:
    """Texts as UTF-8 of one length."""
    encoded = np.array([str(text).encode() for text in texts.flat], np.bytes_).reshape(texts.shape)
    return encoded.astype(h5py.string_dtype("utf-8", max(1, encoded.itemsize)))


def _shrink(values: np.ndarray) -> np.ndarray:
    """Whole numbers in the smallest type that holds them all."""
    if values.dtype.kind not in "iu" or not values.size:
        return values
    low, high = int(values.min()), int(values.max())
    return values.astype(np.min_scalar_type(min(low, -1 - high) if low < 0 else high))     # signed only where they have a sign


def _axis(name: str) -> str:
    """The letter of the axis in front, if it grows; else nothing."""
    letter = SHAPES.get(name, SHAPES.get(name.split("/")[0], "."))[0]
    return letter if letter in GROWING else ""


def _cut_since(piece: RecordFile, row: int) -> Arrays:
    """The arrays of a file from a row on."""
    if row <= piece.first:
        return piece.arrays
    kept: dict[str, Any] = {"R": slice(row - piece.first, None)}
    kept |= {letter: piece.arrays[name] >= row for letter, name in ROW.items() if name in piece.arrays}
    return {name: array[kept[_axis(name)]] if _axis(name) in kept else array for name, array in piece.arrays.items()}


def _join(files: Sequence[Arrays]) -> Arrays:
    """The rows of all parts one after the other; where a part lacks a column they are missing, and what does not grow is as the last says that has it."""
    if len(files) == 1:
        return files[0]
    models = sorted({str(model) for part in files for model in part.get(MODELS[0], ())})
    files = [_widen(part, models) for part in files]
    whole = {name: array for part in files for name, array in part.items()}
    return {name: np.concatenate([_column(part, name, array) for part in files]) if _axis(name) else array for name, array in whole.items()}


def _column(file: Arrays, name: str, like: np.ndarray) -> np.ndarray:
    """A column of a part, made of missing values where it has none."""
    rows = len(file.get(GROWING[_axis(name)], ()))
    nothing = MISSING.get(name, -1 if name.endswith("_correct") else np.nan if like.dtype.kind == "f" else 0)
    return file.get(name, np.full((rows, *like.shape[1:]), nothing, like.dtype))


def _widen(file: Arrays, models: Sequence[str]) -> Arrays:
    """The part with a place for each of the federation's own models that any part has."""
    if MODELS[0] not in file:
        return file
    own, correct = [str(model) for model in file[MODELS[0]]], file[MODELS[1]]
    missing = np.full_like(correct[:, 0], -1)
    columns = [correct[:, own.index(model)] if model in own else missing for model in models]
    return file | {MODELS[0]: np.array(models, object), MODELS[1]: np.stack(columns, 1)}
