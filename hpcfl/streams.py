"""Stream: every random draw as a function of (seed, purpose, client, round), never of rank, time or a global generator."""
import hashlib
import random
from collections.abc import Callable, Iterator
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

    def branch(self, purpose: str) -> "Stream":
        """A sub-stream for another purpose of the same client and round."""
        return replace(self, purpose=f"{self.purpose}/{purpose}")

    def seeds(self) -> Iterator[int]:
        """Endless seeds for the global generators, in the stream's order."""
        generator = self.numpy()
        while True:
            yield int(generator.integers(2 ** 63))

    @contextmanager
    def seeding(self) -> Iterator[None]:
        """Inside the block, code that draws from a global generator (default initialisation, a library) draws from this stream."""
        with keeping_generators():
            sow(self.torch().initial_seed())
            yield


def find_generators() -> tuple[torch.Generator, ...]:
    """torch's global generators: the CPU's, and the GPUs' once CUDA is in use; waking CUDA would cost a run on the CPU memory of every GPU."""
    return torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())


def sow(seed: int) -> None:
    """Seed the global generators of torch, NumPy and Python, and no others: torch.manual_seed would also seed a CUDA that nobody uses yet."""
    for generator in find_generators():
        generator.manual_seed(seed)
    np.random.seed(seed % 2 ** 32)
    random.seed(seed)


@contextmanager
def keeping_generators() -> Iterator[None]:
    """Global generators go on after the block from where they were before it."""
    of_torch, of_numpy, of_python = [(generator, generator.get_state()) for generator in find_generators()], np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        for generator, state in of_torch:
            generator.set_state(state)
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def sow_and_watch(seed: int) -> Callable[[], bool]:
    """Sow, and give a function that says whether anybody has drawn from a global generator since; the function itself may draw."""
    def read_state() -> tuple[object, ...]:
        states = (generator.get_state().numpy().tobytes() for generator in find_generators())
        return random.random(), np.random.random(), *states        # to copy the states of these two takes ten times as long
    sow(seed)
    sown = read_state()
    sow(seed)
    return lambda: read_state() != sown
