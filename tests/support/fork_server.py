"""Many starts of `hpcfl` at the price of few: a server process imports it once, and each start is a process of its own forked from there."""
import multiprocessing
import os
import sys
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["hpcfl.cli", "hpcfl.runs.launch", "torch._dynamo"])         # with them torch and h5py; no import starts a thread


class Forked:
    """A running `hpcfl ARGUMENTS` in `folder`; `fault` is Python that the process runs before it begins."""

    def __init__(self, folder: Path, *arguments: object, fault: str = ""):
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / "output.txt"
        self.output.write_text("")                                 # here, not in the process: it may be killed before it does anything
        self.process = SERVER.Process(target=begin, args=(folder, [str(argument) for argument in arguments], fault), daemon=True)
        self.process.start()

    def ends(self, within_s: float = 60.0) -> int | None:
        """The exit code, negative for a signal; None while it is still running after so many seconds."""
        self.process.join(within_s)
        return self.process.exitcode

    def text(self) -> str:
        """What it printed."""
        return self.output.read_text(errors="replace")


def begin(folder: Path, arguments: list[str], fault: str) -> None:
    """What the new process does."""
    sys.modules["mpi4py"] = None                                   # one process needs no MPI, and its start takes longer than these runs
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    exec(fault, {})
    sys.argv = ["hpcfl", *arguments]
    from hpcfl import cli
    cli.main()
