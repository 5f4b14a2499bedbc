"""Standalone: everybody trains, nothing moves, and nobody matters to anybody else."""
from tests.support.baselines import CLIENTS, FOUR, went
from tests.support.in_memory import bits, changed


def test_standalone_trains_everybody_and_moves_nothing():
    found = went("standalone")
    assert all(changed(found.state(client, 0), found.state(client)) for client in range(CLIENTS))
    assert all(not sum(account[way].values()) for account in found.accounts for way in ("up", "down"))


def test_a_client_trains_alike_whoever_else_takes_part():
    together = went("standalone")
    subset = went("standalone", federation=FOUR | {"participation": 0.5})
    first, *_ = subset.world.cohort(subset.places[0].phase, 0)
    assert bits(together.state(first, 1)) == bits(subset.state(first, 1))
