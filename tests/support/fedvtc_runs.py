"""What the tests of FedVTC and of its statistics share: the small job, and runs of it that are made once."""
import functools

from hpcfl.algorithms.fedvtc import Config
from tests.support.in_memory import Run, job, run, world

QUICK = {"per_class": 3, "finetune_epochs": 2, "dm_classes": 4, "dm_samples": 4}


def described(settings=None, **sections):
    return job("fedvtc", QUICK | (settings or {}), **sections)


def went(settings=None, **sections) -> Run:
    return run(world(described(settings, **sections)))


def baseline(**settings) -> Run:
    """A run that tests share; they must not change it."""
    defaults = vars(Config()) | QUICK
    return _baseline(tuple(sorted((name, value) for name, value in settings.items() if value != defaults[name])))


@functools.cache
def _baseline(settings) -> Run:
    return went(dict(settings))
