"""Lead: whether a signal that comes a known time before the end leaves room for the round in progress and its checkpoint."""
import logging
import math
import os
from collections.abc import Mapping

from hpcfl.errors import EnvironmentFault

VARIABLE = "HPCFL_SIGNAL_LEAD_S"                                   # the job script exports it: seconds between its signal and its time limit
MARGIN = 1.5                                                       # the next round may take longer than all before it
GRAIN_S = 10                                                       # what is advised is a multiple of this
log = logging.getLogger("hpcfl")


class Lead:
    """The announced lead against the longest round and the longest checkpoint so far; without an announcement it never speaks.

    Raises: EnvironmentFault where the variable holds no number of seconds.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ):
        text = environment.get(VARIABLE, "")
        try:
            self.lead_s = float(text) if text else math.inf
        except ValueError:
            self.lead_s = math.nan
        if not self.lead_s >= 0:
            raise EnvironmentFault(f"{VARIABLE} = {text!r}: wanted the seconds between the signal and the time limit, for example 120; correct or unset it")
        self._enough_s, self._round_s, self._checkpoint_s = self.lead_s, 0.0, 0.0

    def watch(self, round_s: float, checkpoint_s: float) -> None:
        """Take note of a round and of the checkpoint before it; warns with the number to set, once for each such number."""
        self._round_s, self._checkpoint_s = max(self._round_s, round_s), max(self._checkpoint_s, checkpoint_s)
        needed_s = GRAIN_S * math.ceil(MARGIN * (self._round_s + self._checkpoint_s) / GRAIN_S)
        if needed_s > self._enough_s:
            log.warning("the signal comes %g s before the time limit, which is too short: a round takes up to %.1f s here and a checkpoint %.1f s, "
                        "and a run that is killed in a round loses it and is not requeued. Set --signal=B:USR1@%d in the job script (hpcfl slurm --lead %d)",
                        self.lead_s, self._round_s, self._checkpoint_s, needed_s, needed_s)
            self._enough_s = needed_s
