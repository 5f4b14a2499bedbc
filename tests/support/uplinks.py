"""What clients of a toy send up, of many types and layouts, and what it must come to."""
import torch

from hpcfl.tree import Tree, equal
from hpcfl.wire.uplink import Sums, Total, Uplink, Uploads

CLIENTS = 7


def contribution(client: int) -> Sums:
    """What a client sends: sizes over many orders of magnitude, so that the order of summation shows in the bits."""
    generator = torch.Generator().manual_seed(client)
    weight = torch.randn(1, 3, 50, generator=generator) * 10.0 ** (client - 3)
    values = {"weight": weight, "none": torch.zeros(1, 0), "scale": torch.rand(1, generator=generator)}
    return Sums.weighted([client], values, torch.tensor([client + 0.1]))


def upload(client: int) -> Tree:
    """Every client another layout, in all kinds of types."""
    generator = torch.Generator().manual_seed(client)
    return {"float": torch.randn(client + 1, 3, generator=generator), "half": torch.full((client,), 1.5, dtype=torch.bfloat16),
            "whole": torch.tensor(client), "flags": torch.arange(5) > client, "strided": torch.randn(4, 5, generator=generator).T}


def make_uplink(clients: list[int]) -> Uplink | None:
    """None where a rank hosts nobody."""
    each = [Uplink({"model": contribution(client), "whole": Uploads({client: upload(client)})}) for client in clients]
    return sum(each, Uplink()) if each else None


def same_bits(one: Total, other: Total) -> bool:
    return equal(one.values, other.values) and equal(one.counts, other.counts)


def near(one: Total, other: Total) -> bool:
    """Sums of float32 leaves to a few of their roundings, counts to the last digits of float64."""
    def close(here: Tree, there: Tree, tolerance: float) -> bool:
        return here.keys() == there.keys() and all(torch.allclose(leaf, there[path], rtol=tolerance, atol=tolerance) for path, leaf in here.items())
    return close(one.values, other.values, 1e-6) and close(one.counts, other.counts, 1e-12)


def raised(kind: type[Exception], function, *args) -> str:
    """The text of the error that the call raises, with its notes; empty where it raises none."""
    try:
        function(*args)
    except kind as error:
        return "\n".join([str(error), *getattr(error, "__notes__", [])])
    return ""


REFERENCE = sum((contribution(client) for client in range(1, CLIENTS)), contribution(0)).total()
