"""Guard: an error on any rank ends the whole job at once, with the exit code of its kind."""
import logging
import sys
import time
import traceback
from collections.abc import Callable

from hpcfl.errors import HpcflError, Interrupted, Stopped
from hpcfl.wire.communicator import Communicator

log = logging.getLogger("hpcfl")


def run_guarded(body: Callable[[], int], comm: Communicator) -> int:
    """Run `body` and return the exit code of the process; an error ends the whole job at once, with this rank's message or traceback.

    Where all ranks fail alike the server speaks first and the abort takes the others along before they repeat it.
    """
    try:
        return body()
    except Stopped as error:
        if comm.is_server:
            print(f"hpcfl: {error}", flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        text, code = "interrupted from the keyboard", Interrupted.exit_code
    except HpcflError as error:
        text, code = str(error), error.exit_code
        log.debug("raised at", exc_info=True)
    except Exception as error:
        text, code = traceback.format_exc(), getattr(error, "exit_code", 1)
    if not comm.is_server:
        time.sleep(0.5)
    print(f"hpcfl: rank {comm.rank}: {text}" if comm.size > 1 else f"hpcfl: {text}", file=sys.stderr, flush=True)
    if comm.size > 1:
        comm.abort(code)
    return code
