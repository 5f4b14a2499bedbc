"""Uplinks combine as one process would add them: by reductions among those who bring a sum, and what ranks disagree on all of them raise."""
import pytest
import torch

from hpcfl.errors import LayoutError
from hpcfl.tree import equal
from hpcfl.wire import combining
from hpcfl.wire.combining import check_alike, make_header
from hpcfl.wire.communicator import Communicator, connect
from hpcfl.wire.uplink import Sums, Uplink, Uploads
from tests.support.uplinks import CLIENTS, REFERENCE, contribution, make_uplink, near, raised, same_bits, upload
from tests.support.verdict import mpi_assert

SPLITS = {"round_robin": lambda client, size: client % size, "backwards": lambda client, size: (CLIENTS - client) % size,
          "blocks": lambda client, size: client * size // CLIENTS, "all_on_last": lambda client, size: size - 1}


def mine(comm: Communicator, split: str = "round_robin") -> list[int]:
    return [client for client in range(CLIENTS) if SPLITS[split](client, comm.size) == comm.rank]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_combined_uplinks_are_those_of_one_process(deterministic, split):
    comm = connect(deterministic)
    totals = comm.combine(make_uplink(mine(comm, split)))
    if not comm.is_server:
        return mpi_assert(comm, totals is None)
    uploads = totals["whole"].trees
    agrees = same_bits if deterministic else near
    mpi_assert(comm, agrees(totals["model"], REFERENCE) and list(uploads) == list(range(CLIENTS))
               and all(equal(uploads[client], upload(client)) for client in uploads), f"{totals}")


def test_the_order_of_summation_shows_in_the_bits_of_the_example():
    forward = sum(contribution(client).total().values["weight"] for client in range(CLIENTS))
    backward = sum(contribution(client).total().values["weight"] for client in reversed(range(CLIENTS)))
    assert torch.equal(forward, REFERENCE.values["weight"]) and not torch.equal(forward, backward)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_name_that_only_some_ranks_host_is_combined_all_the_same(deterministic):
    comm = connect(deterministic)
    hosted = Uplink({"model/last": contribution(2), "uploads/last": Uploads({2: upload(2)}), "empty": Uploads({})})
    totals = comm.combine(hosted if comm.rank == comm.size - 1 else None)
    nothing = comm.combine(None)
    good = totals is None and nothing is None if not comm.is_server else \
        near(totals["model/last"], contribution(2).total()) and equal(totals["uploads/last"].trees[2], upload(2)) \
        and totals["empty"] == Uploads({}) and list(totals) == sorted(totals) and nothing == {}
    mpi_assert(comm, good)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("deterministic", [False, True])
def test_ranks_that_disagree_all_raise_and_can_go_on(deterministic):
    comm = connect(deterministic)
    last = comm.size - 1

    def bring(columns: int) -> Uplink:
        return Uplink({"m": Sums.weighted([comm.rank], {"a": torch.ones(1), "fc.weight": torch.ones(1, 2, columns)}, torch.ones(1))})
    shapes = raised(LayoutError, comm.combine, bring(4 if comm.rank == last else 3))
    kinds = raised(LayoutError, comm.combine, bring(3) if comm.rank < last else Uplink({"m": Uploads({0: {}})}))
    twice = raised(LayoutError, comm.combine, Uplink({"m": Uploads({5: {}})}))
    mpi_assert(comm, f"rank {last}: 'fc.weight' of 'm' is (2, 4), rank 0 has (2, 3)" in shapes
               and f"rank {last}: 'm' is Uploads, rank 0 has Sums" in kinds and "rank 1: client 5 uploads 'm' here and on rank 0" in twice,
               f"{shapes} | {kinds} | {twice}")
    combined = comm.combine(bring(3))
    mpi_assert(comm, not comm.is_server or float(combined["m"].values["a"]) == comm.size)


@pytest.mark.mpi(min_size=2)
def test_a_sum_too_long_for_one_reduction_travels_in_pieces(monkeypatch):
    monkeypatch.setattr(combining, "REDUCE_FLOATS", 7)
    comm = connect()
    totals = comm.combine(make_uplink(mine(comm)))
    mpi_assert(comm, not comm.is_server or near(totals["model"], REFERENCE))


@pytest.mark.mpi(min_size=2)
def test_sums_of_float64_leaves_travel_in_float64_and_others_are_rounded_once():
    comm = connect()

    def of(client: int, dtype: torch.dtype) -> Sums:
        return Sums.weighted([client], {"x": torch.full((1, 3), 1 / 3 + client, dtype=dtype)}, torch.tensor([0.1]))
    totals = comm.combine(Uplink({"exact": of(comm.rank, torch.float64), "short": of(comm.rank, torch.float32), "half": of(comm.rank, torch.bfloat16)}))
    wanted = {name: sum((of(rank, dtype) for rank in range(1, comm.size)), of(0, dtype)).total().values["x"]
              for name, dtype in (("exact", torch.float64), ("short", torch.float32), ("half", torch.bfloat16))}
    own = of(0, torch.float32).total().values["x"]
    good = not comm.is_server or bool(
        torch.allclose(totals["exact"].values["x"], wanted["exact"], rtol=1e-15, atol=0)
        and all(((totals[name].values["x"] - wanted[name]).abs() <= (comm.size - 1) * 2 ** -24 * (wanted[name] - own).abs()).all()
                for name in ("short", "half"))
        and not torch.equal(totals["short"].values["x"], wanted["short"]))               # a comparison that nothing could fail would compare nothing
    mpi_assert(comm, good, f"{totals} {wanted}")


@pytest.mark.mpi(min_size=2)
def test_ranks_that_disagree_on_a_type_all_raise():
    comm = connect()
    last, dtype = comm.size - 1, torch.float64 if comm.rank == comm.size - 1 else torch.float32
    said = raised(LayoutError, comm.combine, Uplink({"m": Sums.weighted([comm.rank], {"a": torch.ones(1, 2, dtype=dtype)}, torch.ones(1))}))
    mpi_assert(comm, f"rank {last}: 'a' of 'm' is (2,) in torch.float64, rank 0 has (2,) in torch.float32" in said, said)


@pytest.mark.mpi(min_size=2)
def test_only_those_who_bring_a_sum_send_it():
    comm = connect()
    name = f"model {comm.rank % 2}"
    totals = comm.combine(Uplink({name: Sums.weighted([comm.rank], {"x": torch.full((1, 4), 2.0)}, torch.ones(1))}))
    brought = {each: [float(rank % 2 == int(each[-1])) for rank in range(comm.size)] for each in ("model 0", "model 1")}
    good = totals is None or {each: total.values["x"].tolist() for each, total in totals.items()} == {each: [2 * sum(of)] * 4 for each, of in brought.items()}
    mpi_assert(comm, good and comm.traffic.sent_bytes == (0 if comm.is_server else 4 * 4 + 8), f"{totals} {comm.traffic.sent_bytes}")


def test_ranks_that_disagree_are_named_with_path_and_shapes():
    def bring(*shape):
        return Sums.weighted([0], {"a": torch.ones(1, 2), "fc.weight": torch.ones(1, *shape)}, torch.ones(1))
    brought = [{}, {"m": bring(3, 4)}, {"m": bring(3, 4)}, {"m": bring(3, 5)}]
    headers = [{name: make_header(piece) for name, piece in each.items()} for each in brought]

    def layouts(name):
        return [each[name].layout() if name in each else None for each in brought]
    with pytest.raises(LayoutError, match=r"rank 3: 'fc.weight' of 'm' is \(3, 5\), rank 1 has \(3, 4\)"):
        check_alike(headers, layouts)
    check_alike(headers[:3], layouts)
    with pytest.raises(LayoutError, match="rank 1: 'm' is Sums, rank 0 has Uploads"):
        check_alike([{"m": make_header(Uploads({0: {}}))}, *headers[1:3]], layouts)
    with pytest.raises(LayoutError, match="rank 1: client 5 uploads 'm' here and on rank 0"):
        check_alike([{"m": make_header(Uploads({5: {}}))}, {"m": make_header(Uploads({6: {}, 5: {}}))}], layouts)
