"""Faults that tests of runs share: Python that a rank runs before it begins, a run that ends early, and whether it goes on to the same end."""
from pathlib import Path

import pytest

from hpcfl.runs import checkpoint
from tests.support.tiny_runs import apart, carry_out, left_half_written, outcome

RANK = 'import os, time\nfrom pathlib import Path\nrank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0"))\n'
PAUSES = RANK + """
from hpcfl.runs import checkpoint
save = checkpoint.save

def save_and_wait(folder, world, state, *rest):
    save(folder, world, state, *rest)
    if state.rows == 2:
        Path(f"paused-{rank}").touch()
        while not Path("go").exists():
            time.sleep(0.01)
checkpoint.save = save_and_wait
"""


def files(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file with its content and when it was last written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def stopped_at(whole, rows: int, folder: Path) -> None:
    """The run of this file as it is when it ends after so many rounds, whyever."""
    save = checkpoint.save

    def save_and_leave(folder, world, state, *rest):
        save(folder, world, state, *rest)
        if state.rows == rows:
            raise InterruptedError
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(checkpoint, "save", save_and_leave)
        carry_out(whole[0], folder)


def resumes_to_the_same_end(whole, folder):
    """Whether the run goes on, here in one process, and ends as if nothing had happened."""
    job, _, undisturbed_run = whole
    carry_out(job, folder)
    found = apart(outcome(folder), outcome(undisturbed_run))
    assert not found, "\n".join(found)
    assert (folder / "STATUS").read_text() == "done\n" and not left_half_written(folder)
