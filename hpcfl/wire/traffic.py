"""Traffic: the bytes that left a rank, and those that each kind of exchange carried."""
from dataclasses import dataclass, field

from hpcfl.accounts import EXCHANGES


@dataclass
class Traffic:
    """What a rank booked of its exchanges so far.

    `sent_bytes` is the payload that left this rank: a broadcast counts once per receiver at rank 0, a reduction or gathering once at every other rank;
    headers are not counted.
    `carried` has for each of EXCHANGES the payload itself, the same for any number of ranks, one included: at rank 0 each leaf of a broadcast and each
    total of a reduction once, and these again times the clients that it is for or from, from which it follows how many ranks they reach; what spread work
    takes and gives; at every rank what its clients bring to a gathering.
    """

    sent_bytes: int = 0
    carried: dict[str, int] = field(default_factory=lambda: dict.fromkeys(EXCHANGES, 0))

    def carry(self, kind: str, count: int, clients: int = 0) -> None:
        """Book the payload of an exchange, for a broadcast or a reduction with the number of clients that it is for or from."""
        self.carried[kind] += count
        if clients:
            self.carried[f"{kind}_by_client"] += count * clients
