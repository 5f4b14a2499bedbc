"""A disk that takes no more, states to write on it, and whether a leaf keeps every bit."""
import errno
import os

import torch

from hpcfl.files import draft

TREES = [("server", {"w": torch.arange(4000.0), "b/c": torch.arange(7)}), ("000001", {f"x{number}": torch.full((30,), number) for number in range(40)})]


def limit_room(monkeypatch, room: int, code: int = errno.ENOSPC) -> list[int]:
    """A disk with room for so many bytes in all writes together; what is left of it."""
    left = [room]

    def pwrite(handle, content, place):
        taken = min(len(content), left[0])
        if not taken:
            raise OSError(code, os.strerror(code))
        left[0] -= taken
        return write(handle, content[:taken], place)
    write = os.pwrite
    monkeypatch.setattr(draft.os, "pwrite", pwrite)
    return left


def have_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Same type, shape and bits."""
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    return not one.numel() or one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))
