"""Places: paths as people write them, in the environment, on the command line and in jobs."""
from pathlib import Path

from hpcfl.errors import JobError


def expand_home(path: str | Path) -> Path:
    """The path with ~ and ~USER at its beginning replaced by the home folder.

    Raises: JobError where there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise JobError(f"{path}: there is no home folder that '{Path(path).parts[0]}' stands for; write the folder out in full") from None
