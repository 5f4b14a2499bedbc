"""Bytes are booked by the kind of exchange, those of broadcasts and reductions by their clients too."""
from hpcfl.accounts import EXCHANGES
from hpcfl.wire.traffic import Traffic


def test_nothing_is_carried_at_first_and_kinds_add_up_apart():
    traffic = Traffic()
    assert traffic.sent_bytes == 0 and traffic.carried == dict.fromkeys(EXCHANGES, 0)
    traffic.carry("bcast", 8, clients=3)
    traffic.carry("bcast", 4)
    traffic.carry("gatherv", 5)
    assert traffic.carried == dict.fromkeys(EXCHANGES, 0) | {"bcast": 12, "bcast_by_client": 24, "gatherv": 5}
    assert Traffic().carried["bcast"] == 0, "two ranks share a book"
