"""Stream: every random draw as a function of (seed, purpose, client, round), never of rank, time or a global generator."""
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class Stream:
    """A named source of randomness.

    `client` and `round` are -1 where they do not apply. Two Streams with the same four fields give the same draws on any rank and
    after any restart, so checkpoints hold no generator state.
    """

    seed: int
    purpose: str
    client: int = -1
    round: int = -1

    def sequence(self) -> np.random.SeedSequence:
        """The SeedSequence behind both kinds of generator."""
        purpose = int.from_bytes(hashlib.blake2b(self.purpose.encode(), digest_size=8).digest(), "little")
        return np.random.SeedSequence([self.seed, purpose, self.client + 1, self.round + 1])

    def numpy(self) -> np.random.Generator:
        """A fresh NumPy generator at the stream's beginning."""
        return np.random.Generator(np.random.PCG64(self.sequence()))

    def torch(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh torch generator at the stream's beginning, on a device."""
        generator = torch.Generator(device=device)
        generator.manual_seed(int(self.sequence().generate_state(1, np.uint64)[0] >> 1))
        return generator

    def of(self, purpose: str) -> "Stream":
        """A sub-stream for another purpose of the same client and round."""
        return replace(self, purpose=f"{self.purpose}/{purpose}")

    @contextmanager
    def seeding(self) -> Iterator[None]:
        """Library code that draws from torch's global CPU generator (default initialisation) draws from this stream inside the block."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.torch().initial_seed())
            yield
