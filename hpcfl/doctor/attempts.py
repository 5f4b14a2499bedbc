"""Attempts: a rank tries something, and takes part in the next collective even where that failed; rank 0 learns which ranks failed and why."""
from collections.abc import Callable
from typing import Any

from hpcfl.errors import HpcflError
from hpcfl.wire.communicator import Communicator


def attempt(function: Callable, *arguments: Any) -> tuple[Any, str]:
    """(function(*arguments), "") or (None, what it raised): no fault may keep this rank from the next collective, in which the others wait for it."""
    try:
        return function(*arguments), ""
    except Exception as error:                                     # whatever it is, it becomes a finding
        return None, str(error) if isinstance(error, (HpcflError, OSError)) else f"{type(error).__name__}: {error}"


def gather_attempts(comm: Communicator, value: Any, fault: str) -> tuple[list[Any], dict[int, str]]:
    """At rank 0 the values of the ranks that have one, and by rank the faults of the others; called by all ranks."""
    answers = comm.gather((value, fault)) or []
    return [value for value, fault in answers if not fault], {rank: fault for rank, (_, fault) in enumerate(answers) if fault}
