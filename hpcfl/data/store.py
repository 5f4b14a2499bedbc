"""Store: the cache of data sets: fetch or import each once, however many processes ask, and list them.

Integrity is checked in two steps, so that starting a run costs no second reading of the data: the SHA-256 over all pixels and labels is compared
when a file is written and whenever its size or modification time is not that of the last comparison (kept in a stamp beside it); and every chunk
carries HDF5's Fletcher-32 checksum, which is compared each time the chunk is read.
"""
import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from hpcfl.data import archive, arrays, sources
from hpcfl.data.classes import list_remarks, name_classes
from hpcfl.data.embedded import EMBEDDED
from hpcfl.data.sources import PUBLISHED, Labelled
from hpcfl.errors import DataError
from hpcfl.files.atomic import replacing
from hpcfl.files.places import expand_home
from hpcfl.wording import did_you_mean, nearest, printable_text, range_text

OWN_TERMS = "as the source says"                                   # the licence of data that somebody imported
ALIKE = 0.6                                                        # how much of a name must be that of another data set to be taken for a slip
ROWS = 20                                                          # classes that are shown one by one
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)          # a file system without locks: two conversions then do the same work twice


def find_folder() -> Path:
    """The cache folder: $HPCFL_DATA, else the user's cache folder of the platform."""
    named = os.environ.get("HPCFL_DATA")
    return expand_home(named) if named else Path(platformdirs.user_cache_dir("hpcfl"))


def find_path(name: str) -> Path:
    """Where a data set lies or would lie in the cache.

    Raises: DataError for a name that is not lower-case letters, digits, '_' and '-'.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,99}", name):
        raise DataError(f"data set name {name!r} is not allowed; wanted up to 100 lower-case letters, digits, '_' and '-', for example 'cifar10'")
    return find_folder() / f"{name}.h5"


def get(name: str, source: str | Path | None = None) -> Path:
    """A published data set in the cache, read from `source` (a folder or archive already downloaded) or else downloaded; does nothing if it is there.

    Raises: DataError for an unknown name, a failed download, a damaged source, a cache that cannot be written, or a file in the cache that is damaged,
    is not the published data set, or holds other data than `source`.
    """
    if name not in PUBLISHED:
        raise DataError(f"'{name}' cannot be fetched{did_you_mean(nearest(name, PUBLISHED, ALIKE))}; there are {', '.join(PUBLISHED)}. "
                        + ("It is built in: just use it" if name in EMBEDDED else f"Own data: hpcfl data import {name} --npz FILE"))
    target, published = find_path(name), PUBLISHED[name]
    if not target.exists():
        with _locking(name):
            if not target.exists():                                # another process may have been faster
                origin = published.origin if source is None else f"{published.origin} ({source})"
                _install(target, _fetch(name, published, source), origin, published.licence)
    elif source is not None and check(target).sha256 != archive.compute_digest(published.read(_require_existing(Path(source)))):
        raise DataError(f"{target}: '{name}' is there already, from {check(target).source}, and holds other data than {source}; it is left as it was. "
                        f"Delete that file and run again: hpcfl data get {name} --from {source}")
    check(target)
    return target


def import_npz(name: str, file: str | Path) -> Path:
    """Bring an .npz file (arrays x_train, y_train, x_test, y_test) into the cache under a name of its own.

    Raises: DataError as `arrays.read_npz` does, and where the name already stands for other data.
    """
    return _import(name, Path(file), arrays.read_npz)


def import_folder(name: str, directory: str | Path) -> Path:
    """Bring a folder (or .zip) of train/CLASS/*.png|jpg and test/CLASS/* (or val/) into the cache under a name of its own.

    Raises: DataError as `sources.read_folder` does, and where the name already stands for other data.
    """
    return _import(name, Path(directory), sources.read_folder)


def list_data_sets() -> list[dict[str, Any]]:
    """Every data set that is embedded, cached or can be fetched, one dict each.

    Keys: name and status ("embedded", "cached", "damaged", "absent"); for the first two also train, test, classes, shape, names and counts of the classes; for
    cached ones file_bytes, sha256, notes, path; source and licence where known; problem for damaged ones.
    """
    rows: list[dict[str, Any]] = [{"name": name, "status": "embedded", **_describe_sizes(make())} for name, make in EMBEDDED.items()]
    cached = {file.stem: file for file in sorted(find_folder().glob("*.h5"))}
    rows += [_describe_cached(name, file) for name, file in cached.items()]
    absent = {name: published for name, published in PUBLISHED.items() if name not in cached}
    rows += [{"name": name, "status": "absent", "source": published.origin, "licence": published.licence} for name, published in absent.items()]
    return rows


def describe_file(target: Path) -> str:
    """What a file in the cache holds, for people: images, values, classes with their counts, and what differs from the source."""
    header = check(target)
    low, high = archive.read_value_range(target)
    width = max(len("class"), *map(len, header.names[:ROWS]))
    rows = list(zip(header.names, *header.counts.values(), strict=True))
    lines = [f"{header.name}: {header.train} training and {header.test} test images of {' x '.join(map(str, header.shape))} (channels x height x width), "
             f"uint8 from {low} to {high}, from {header.source}", f"  {'class':<{width}}  train  test"]
    lines += [f"  {name:<{width}}  {train:>5}  {test:>4}" for name, train, test in rows[:ROWS]]
    if rest := rows[ROWS:]:
        train, test = (range_text([row[column] for row in rest]) for column in (1, 2))
        lines.append(f"  and {len(rest)} more, with {train} training and {test} test images each")
    lines += [f"note: {note}" for note in (*header.notes, *list_remarks(header.names, header.counts))]
    return "\n".join(map(printable_text, lines))


def check(target: Path) -> archive.Header:
    """The header of a file in the cache, after making sure that its contents are what they were when it was written.

    The comparison of all bytes (0.4 to 2 GB/s) happens only where the file's size or modification time differs from its stamp; in a cache
    without a stamp that cannot be written to, at every call.

    Raises: DataError naming the file, also where it has the name of a published data set and holds another.
    """
    header = archive.read_header(target)
    published = PUBLISHED.get(target.stem)
    if published and not (header.name == target.stem and header.source.startswith(published.origin)):
        raise DataError(f"{target}: is not the published '{target.stem}': it was made as '{header.name}' from {header.source}; to keep it, import it under "
                        f"another name. Delete the file and run: hpcfl data get {target.stem} [--from DIR]")
    stamp, current = target.with_name(f".{target.stem}.verified"), _stamp_text(target)
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != current:
        archive.verify(target)
        _write_stamp(stamp, current)
    return header


def _fetch(name: str, published: sources.Published, source: str | Path | None) -> Labelled:
    if source is not None:
        return published.read(_require_existing(Path(source)))
    with tempfile.TemporaryDirectory(dir=find_folder(), prefix=f".{name}.") as scratch:
        try:
            published.download(Path(scratch))
        except (OSError, RuntimeError) as error:                   # urllib's errors are OSErrors; torchvision raises RuntimeError
            raise DataError(f"{name}: could not be downloaded ({error}). Without a network, copy the official files here and run: "
                            f"hpcfl data get {name} --from FOLDER") from error
        return published.read(Path(scratch))


def _import(name: str, source: Path, read: Callable[[Path], Labelled]) -> Path:
    if name in EMBEDDED:
        raise DataError(f"'{name}' is built in; import under another name")
    if name in PUBLISHED:
        raise DataError(f"'{name}' is the name of a published data set; import under another name, for example own_{name}. "
                        f"The published one: hpcfl data get {name} [--from DIR]")
    target = find_path(name)
    data = read(_require_existing(source))
    with _locking(name):
        if not target.exists():
            _install(target, data, str(source.resolve()), OWN_TERMS)
    header = check(target)
    if (header.sha256, header.names) != (archive.compute_digest(data), name_classes(data.names, data.classes)):
        raise DataError(f"{target}: '{name}' already holds other data, or names its classes otherwise; it is left as it was. "
                        "Choose another name, or delete that file first")
    return target


def _require_existing(source: Path) -> Path:
    if not source.exists():
        raise DataError(f"{source}: does not exist")
    return source


@contextmanager
def _locking(name: str) -> Iterator[None]:
    """Inside the block no other process converts the same data set; the lock ends with the process, however that ends."""
    try:
        find_folder().mkdir(parents=True, exist_ok=True)
        lock = open(find_folder() / f".{name}.lock", "w", encoding="utf-8")  # noqa: SIM115  # closed below, outside of what is told as unwritable
    except OSError as error:
        raise _explain_unwritable(error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise _explain_unwritable(error) from error
        yield


def _install(target: Path, data: Labelled, source: str, licence: str) -> None:
    """Write under a temporary name, flush, read back, rename: the file is there whole or not at all."""
    for left in target.parent.glob(f".{target.stem}.*.part"):      # of a process that was killed; we hold the lock
        left.unlink(missing_ok=True)
    with replacing(target, _explain_unwritable) as draft:
        archive.write(draft, target.stem, data, source, licence)
        archive.verify(draft.path)


def _explain_unwritable(error: OSError) -> DataError:
    return DataError(f"the cache {find_folder()} cannot be written ({error.strerror or error}); free space there, or name another folder: "
                     "export HPCFL_DATA=FOLDER")


def _stamp_text(target: Path) -> str:
    status = target.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _write_stamp(stamp: Path, content: str) -> None:
    """A stamp for the next start; where the cache is for reading only, that one verifies again."""
    with suppress(DataError), replacing(stamp, _explain_unwritable) as draft:
        draft.write(content.encode())


def _describe_sizes(data: Labelled) -> dict[str, Any]:
    counts = {split: np.bincount(getattr(data, f"{split}_labels"), minlength=data.classes).tolist() for split in archive.SPLITS}
    return {"train": len(data.train_labels), "test": len(data.test_labels), "classes": data.classes, "shape": list(data.train_images.shape[1:]),
            "names": list(name_classes(data.names, data.classes)), "counts": counts}


def _describe_cached(name: str, file: Path) -> dict[str, Any]:
    try:
        header = check(file)
    except DataError as error:
        return {"name": name, "status": "damaged", "problem": str(error), "path": str(file)}
    return {"name": name, "status": "cached", "train": header.train, "test": header.test, "classes": header.classes, "shape": list(header.shape),
            "names": list(header.names), "counts": {split: list(counts) for split, counts in header.counts.items()}, "notes": list(header.notes),
            "file_bytes": file.stat().st_size, "sha256": header.sha256, "source": header.source, "licence": header.licence, "path": str(file)}
