"""Atomic: files that are either whole or not there."""
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpcfl.errors import CheckpointError
from hpcfl.files.draft import Draft

WAY_OUT = ("Free space and give the same command again: the run goes on from its last checkpoint; or let it go on in another folder, with "
           "--resume FOLDER --out ANOTHER")


@contextmanager
def replacing(path: Path, otherwise: Callable[[OSError], Exception] | None = None) -> Iterator[Draft]:
    """A file in the making that takes the place of `path`, whole and on the disk, when the block ends well; otherwise nothing is left of it.

    Raises: what `otherwise` makes of an error of the disk (full, read-only), by default a CheckpointError; what was at `path` stays as it was. What the block
    raises is not taken for one.
    """
    otherwise = otherwise or (lambda error: CheckpointError(f"{path}: could not be written: {error.strerror or error}; what was there before is untouched. "
                                                            f"{WAY_OUT}"))
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.part")
    try:
        make_folder(path.parent)
    except OSError as error:
        raise otherwise(error) from error
    try:
        with Draft(temporary, otherwise) as draft:
            yield draft
            draft.check()
            with draft.telling():
                sync(temporary)                                    # some disks refuse only here
                os.replace(temporary, path)
                sync(path.parent)
    finally:
        with suppress(OSError):                                    # a disk that takes nothing gives nothing away either; `sweep` comes later
            temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written anywhere below a folder; for its one owner, before anybody writes."""
    for left in folder.rglob(".*.part"):
        left.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file. Raises CheckpointError as `replacing` does."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file. Raises CheckpointError as `replacing` does."""
    with replacing(path) as draft:
        draft.write(text.encode())


def note(path: Path, text: str) -> None:
    """Replace a short text file; where the disk has no room for a new one, write into the old one, which has. Raises CheckpointError as `replacing` does."""
    try:
        write_text(path, text)
    except CheckpointError as refused:
        try:
            with path.open("r+b", buffering=0) as file:
                file.truncate(file.write(text.encode()))
        except OSError:
            raise refused from None


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path) -> None:
    """A folder, with those above it, that is still there after a power cut."""
    if not folder.exists():                                        # a file in the way is told by whoever writes below it
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
