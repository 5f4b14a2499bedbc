"""Console: progress and one aligned line per round on rank 0; the other ranks speak at WARNING; every rank keeps a log."""
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcfl.federation.state import Place
from hpcfl.runs import outlets
from hpcfl.wording import megabytes_text

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger("hpcfl")
COLUMNS = {"global": 12, "clients": 29, "own": 9}                  # accuracies of a round's line and how wide they are


class Console:
    """What a person sees of a run; silent on all ranks but the server's. `live`: with a bar that redraws itself, for a terminal of its own."""

    def __init__(self, speaks: bool, live: bool):
        self.speaks, self.live = speaks, speaks and live
        self.columns: tuple[str, ...] = ("clients",)
        self._progress: Progress | None = None

    def announce(self, images: int, models: bool, own: bool) -> None:
        """Say once of which models and images the accuracies of all later lines are; `models`: the federation has some; `own`: clients have test images."""
        told = {"global": "global: the federation's own models", "clients": "clients: the models that clients hold, mean [lowest ..highest]",
                "own": "own: the same on held-out images of each client's own"}
        self.columns = tuple(name for name, there in (("global", models), ("clients", True), ("own", own)) if there)
        self.say(f"accuracies in percent, at the end of a round, on the {images} test images. {'; '.join(told[name] for name in self.columns)}")

    def say(self, text: str) -> None:
        """One line on the server's standard output and in the log."""
        log.info(text)
        if self.speaks:
            self._tell(self._print, text)

    def round(self, place: Place, total: int, row: Mapping[str, Any], values: Mapping[str, float]) -> None:
        """One aligned line for a finished round; accuracies in percent where they were measured."""
        loss = np.nanmean(row["metrics"]["loss"]) if "loss" in row["metrics"] else float("nan")
        parts = [f"{place.row + 1:>{len(str(total))}}/{total}  {place.phase.name:<10}", f"loss {loss:7.4f}" if np.isfinite(loss) else " " * 12]
        shown = {"global": f"global {values['global']:5.1f}" if "global" in values else "",
                 "own": f"own {values['personal']:5.1f}" if "personal" in values else "",
                 "clients": f"clients {values['clients']:5.1f} [{values['lowest']:5.1f} ..{values['highest']:5.1f}]" if "clients" in values else ""}
        parts += [shown[name].ljust(COLUMNS[name]) for name in self.columns]
        asked, answered = ((row["conditions"]["answered"] >= least).sum() for least in (0, 1))
        parts += [f"answers {answered:>{len(str(asked))}}/{asked}"] if asked else []
        parts.append(f"up {megabytes_text(row['up'].sum())}  down {megabytes_text(row['down'].sum())}  {row['wall_s']:7.2f} s")
        self._advance(place.row + 1, total)
        self.say("  ".join(parts))

    @contextmanager
    def beating(self, every_s: float, told: Callable[[], tuple[float, str]]) -> Iterator[None]:
        """Inside the block a line every so many seconds (0: none) of a round that lasts longer; told() is (seconds so far, what to say), asked by a thread."""
        if not (self.speaks and every_s):
            yield
            return
        over = threading.Event()
        thread = threading.Thread(target=self._beat, args=(every_s, told, over), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _beat(self, every_s: float, told: Callable[[], tuple[float, str]], over: threading.Event) -> None:
        before_s, due_s = 0.0, every_s
        while not over.wait(min(1.0, every_s / 4)):
            so_far_s, text = told()
            due_s = every_s if so_far_s < before_s else due_s      # another round
            if so_far_s >= due_s:
                self.say(text)
                due_s = (so_far_s // every_s + 1) * every_s
            before_s = so_far_s

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._tell(self._progress.stop)
            self._progress = None

    def _advance(self, done: int, total: int) -> None:
        if not self.live:
            return
        self._tell(self._show, done, total)

    def _show(self, done: int, total: int) -> None:
        if self._progress is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            self._progress = Progress(TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress.add_task("rounds", total=total)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=done)

    def _print(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def _tell(self, telling: Callable[..., None], *what: Any) -> None:
        """Print; an output that goes away ends the printing, not the run."""
        try:
            telling(*what)
            failure: Exception | None = outlets.find_failure(sys.stdout)
        except (OSError, ValueError) as error:                     # a stream of somebody else's, broken or closed
            failure = error
        if failure:
            self.speaks = self.live = False
            log.warning("standard output takes nothing any more (%s); the run goes on, and what it has to say is in its folder log", failure)


class LogFile(logging.FileHandler):
    """A log that says once, where it still can, that its disk takes no more, and goes on trying."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:
        """What logging does with a line that it could not write."""
        if not self._said:
            self._said = True
            log.warning("%s takes no more: %s; the run goes on", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        """Let go of the file, also where it does not take its last lines."""
        with suppress(OSError):
            super().close()


def keep_log(folder: Path, rank: int) -> None:
    """Send this rank's log to log/rank-NNNN.log, and its warnings to standard error as well."""
    screen = logging.StreamHandler()
    screen.setLevel(logging.WARNING)
    screen.setFormatter(logging.Formatter(f"hpcfl: rank {rank}: %(message)s"))
    log.handlers[:] = [screen]
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        (folder / "log").mkdir(parents=True, exist_ok=True)
        file = LogFile(folder / "log" / f"rank-{rank:04d}.log", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        log.warning("%s: no log can be kept there: %s; the run goes on", folder / "log", error.strerror)
    else:
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.handlers.append(file)
