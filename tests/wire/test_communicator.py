"""Ranks distribute and share out work as one process would; what goes wrong on one is told to those concerned, and nobody is left waiting."""
import os
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from hpcfl.errors import EnvironmentFault, NonFiniteError
from hpcfl.tree import Tree, equal, nbytes
from hpcfl.wire.communicator import Communicator, connect
from hpcfl.wire.launchers import LAUNCHERS, STEPS
from hpcfl.wire.ranks import Alone
from hpcfl.wire.uplink import Sums, Uplink, Uploads
from tests.support.uplinks import CLIENTS, REFERENCE, make_uplink, raised, same_bits, upload
from tests.support.verdict import mpi_assert


def doubled(item: Tree) -> Tree:
    return {"x": 2 * item["x"], "process": torch.tensor(os.getpid())}


def fail_at(value: int, kind: type[Exception], item: Tree) -> Tree:
    if int(item["x"][0]) == value:
        raise kind(f"item {value} cannot be done")
    return item


class Stubborn(Exception):
    """An error that cannot be rebuilt from its arguments."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__("stubborn")


def fail_stubbornly(item: Tree) -> Tree:
    raise Stubborn(1, 2)


def items(count: int) -> dict[int, Tree]:
    return {index: {"x": torch.full((3,), index)} for index in range(count)}


def helping(function):
    """How every rank helps: one function for each item, whatever the verb."""
    return lambda verb, share: {key: function(item) for key, item in share.items()}


def spread(comm: Communicator, function, wanted: dict[int, Tree], seen=lambda results: results):
    """What `seen` makes of the results at the server."""
    return comm.at_server(lambda: seen(comm.spread("work", wanted)), help_with=helping(function))


def test_one_process_is_a_rank_of_its_own():
    comm = Communicator(Alone())
    assert (comm.rank, comm.size, comm.local_rank, comm.local_size, comm.is_server) == (0, 1, 0, 1, True)
    totals = comm.combine(make_uplink([3, 1, 0, 2, 6, 5, 4]))
    assert same_bits(totals["model"], REFERENCE) and list(totals["whole"].trees) == list(range(CLIENTS))
    assert comm.combine(None) == comm.combine(Uplink()) == {}
    tree = {"x": torch.ones(2)}
    assert comm.distribute({(0,): tree})["x"] is tree["x"] and comm.at_server(lambda a, b: a - b, 5, 3) == 2
    assert {key: int(result["x"][0]) for key, result in spread(comm, doubled, items(4)).items()} == {0: 0, 1: 2, 2: 4, 3: 6}
    assert comm.agree(True) and not comm.agree(False) and comm.gather("a") == ["a"] and comm.share("a") == "a"
    comm.barrier()
    assert comm.traffic.sent_bytes == 0


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("deterministic", [False, True])
def test_what_is_carried_does_not_depend_on_the_number_of_ranks(deterministic):
    comm = connect(deterministic)
    clients = [client for client in range(4) if client % comm.size == comm.rank]
    comm.combine(Uplink({"s": Sums.weighted(clients, {"x": torch.zeros(len(clients), 7)}, torch.ones(len(clients))),
                             "u": Uploads({client: {"y": torch.zeros(client + 1)} for client in clients})}) if clients else None)
    spread(comm, doubled, items(2))
    spread(comm, doubled, items(1))                                # stays where it is
    carried = {kind: sum(each[kind] for each in comm.share(comm.gather(comm.traffic.carried))) for kind in comm.traffic.carried}
    sums = 7 * 4 + 8                                               # float32 values and a weight: of each client, or of the total
    moved = 2 * (3 * 8 + 3 * 8 + 8)                                # of each item and each result
    mpi_assert(comm, carried == {"bcast": 0, "bcast_by_client": 0, "reduce": 0 if deterministic else sums, "reduce_by_client": 0 if deterministic else 4 * sums,
                                 "gatherv": 4 * (1 + 2 + 3 + 4) + (4 * sums if deterministic else 0), "send": moved}, f"{carried}")


def test_without_mpi4py_one_process_works_and_a_launcher_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for name in (*LAUNCHERS, *STEPS):
        monkeypatch.delenv(name, raising=False)
    assert connect().size == 1
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(EnvironmentFault, match="mpirun of Open MPI started 2 ranks .* no MPI library that mpi4py can load"):
        connect()


@pytest.mark.parametrize(("environment", "launcher"), [
    ({}, None), ({"OMPI_COMM_WORLD_SIZE": "1"}, None), ({"PMI_SIZE": "1"}, None),
    ({"SLURM_NTASKS": "8"}, None),                                                                  # inside sbatch, not started by srun
    ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"}, None),      # the shell of an interactive allocation
    ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, None),               # mpirun -n 1 inside a step
    ({"PMI_SIZE": ""}, None), ({"PMI_SIZE": "many", "SLURM_STEP_ID": ""}, None), ({"OMPI_COMM_WORLD_SIZE": "-4"}, None),    # what is no number is not set
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun of Open MPI"), ({"PMI_SIZE": "4"}, "mpirun of MPICH"),
    ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, "srun"), ({"SLURM_STEP_NUM_TASKS": "4"}, "srun")])
def test_singletons_instead_of_ranks_are_noticed(environment, launcher):
    check = partial(Communicator(Alone()).check_launch, environment)
    if launcher is None:
        check()
    else:
        with pytest.raises(EnvironmentFault, match=f"{launcher}.* started 4 ranks .*srun --mpi=pmix"):
            check()


def parcels(comm: Communicator) -> dict[tuple[int, ...], Tree]:
    """One Tree for all, one for rank 0 and the last."""
    everybody, last = tuple(range(comm.size)), (0, comm.size - 1)
    found = {everybody: {**upload(3), "none": torch.zeros(0, 4)}}
    return found | {last: found.get(last, {}) | {"own": torch.arange(7.0)}}


@pytest.mark.mpi(min_size=2)
def test_every_rank_gets_the_same_bits_of_what_is_for_it_and_nothing_else():
    comm = connect()
    given = parcels(comm) if comm.is_server else {}
    received = comm.distribute(given)
    wanted = {path: leaf for audience, parcel in parcels(comm).items() if comm.rank in audience for path, leaf in parcel.items()}
    same = all(received[path] is leaf for parcel in given.values() for path, leaf in parcel.items())
    mpi_assert(comm, equal(received, wanted) and same and ("own" in received) == (comm.rank in (0, comm.size - 1)), f"{received}")
    mpi_assert(comm, comm.distribute({}) == {} and equal(comm.distribute(given), wanted))


@pytest.mark.mpi(min_size=2)
def test_sent_bytes_are_the_payload_that_left_the_rank():
    comm = connect()
    uploaded = {"y": torch.zeros(comm.rank + 1)}
    comm.distribute(parcels(comm))
    wanted = sum(nbytes(parcel) * (len(audience) - 1) for audience, parcel in parcels(comm).items())
    mpi_assert(comm, comm.traffic.sent_bytes == (wanted if comm.is_server else 0), f"Bcast: {comm.traffic.sent_bytes}")
    before = comm.traffic.sent_bytes
    comm.combine(Uplink({"s": Sums.weighted([comm.rank], {"x": torch.zeros(1, 4)}, torch.ones(1)), "u": Uploads({comm.rank: uploaded})}))
    sent = comm.traffic.sent_bytes - before
    mpi_assert(comm, sent == (0 if comm.is_server else 4 * 4 + 8 + nbytes(uploaded)), f"Reduce and Gatherv: {sent}")


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_spread_work_comes_back_in_order_from_all_ranks(count):
    comm = connect()
    results = spread(comm, doubled, items(count))
    if not comm.is_server:
        return mpi_assert(comm, results is None)
    processes = {int(result["process"]) for result in results.values()}
    mpi_assert(comm, [(key, result["x"].tolist()) for key, result in results.items()] == [(index, [2 * index] * 3) for index in range(count)]
               and len(processes) == min(comm.size, count), f"{results}")


@pytest.mark.mpi(min_size=1)
def test_every_rank_helps_with_its_own_means_and_the_server_says_when_it_waits():
    comm, waited = connect(), []

    @contextmanager
    def waiting():
        waited.append(True)
        yield
    results = comm.at_server(lambda: comm.spread("name", items(2 * comm.size)), waiting=waiting,
                             help_with=lambda verb, share: {key: {"rank": torch.tensor(comm.rank), verb: item["x"]} for key, item in share.items()})
    mpi_assert(comm, not comm.is_server or ({int(result["rank"]) for result in results.values()} == set(range(comm.size))
               and all(set(result) == {"rank", "name"} for result in results.values()) and len(waited) == (comm.size > 1)), f"{results} {waited}")


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("value", range(5))
def test_an_error_in_spread_work_reaches_the_server_with_type_and_traceback(value):
    comm = connect()
    said = comm.at_server(lambda: raised(NonFiniteError, comm.spread, "work", items(5)), help_with=helping(partial(fail_at, value, NonFiniteError)))
    again = spread(comm, doubled, items(3), len)
    mpi_assert(comm, not comm.is_server or (f"item {value} cannot be done" in said and again == 3 and
               (comm.size == 1 or ("raised on rank " in said and "in fail_at" in said))), f"{said}")


@pytest.mark.mpi(min_size=2)
def test_an_error_that_cannot_travel_is_told_as_text():
    comm = connect()
    said = comm.at_server(lambda: raised(RuntimeError, comm.spread, "work", items(comm.size)), help_with=helping(fail_stubbornly))
    mpi_assert(comm, not comm.is_server or ("Stubborn: stubborn" in said and "in fail_stubbornly" in said), f"{said}")


@pytest.mark.mpi(min_size=1)
def test_work_cannot_be_spread_where_nobody_attends():
    comm = connect()
    alone = raised(RuntimeError, comm.spread, "work", items(2))
    unprepared = comm.at_server(lambda: raised(RuntimeError, comm.spread, "work", items(2)))
    mpi_assert(comm, "inside at_server" in alone and (not comm.is_server or "inside at_server" in unprepared), f"{alone} {unprepared}")


@pytest.mark.mpi(min_size=1)
def test_spread_work_cannot_be_spread_again():
    comm = connect()

    def again(verb: str, shared: dict[int, Tree]) -> dict[int, Tree]:
        comm.spread("more", shared)
        return shared
    said = comm.at_server(lambda: raised(RuntimeError, comm.spread, "work", items(2 * comm.size)), help_with=again)
    results = spread(comm, doubled, items(3), len)
    mpi_assert(comm, not comm.is_server or ("spread('more') was called where the other ranks do not attend" in said and results == 3), f"{said} {results}")


class OnDevice:
    """A leaf that lies elsewhere than in host memory, as far as spread work looks at it."""

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host

    def numel(self) -> int:
        return self.host.numel()

    def element_size(self) -> int:
        return self.host.element_size()

    def to(self, device: str, non_blocking: bool = False) -> torch.Tensor:
        assert device == "cpu"
        return self.host


@pytest.mark.parametrize("count", [1, 3])
def test_results_of_spread_work_lie_in_host_memory_also_where_it_was_not_spread(count):
    results = spread(Communicator(Alone()), lambda item: {"x": OnDevice(item["x"])}, items(count))
    assert all(isinstance(result["x"], torch.Tensor) for result in results.values()) and len(results) == count


@pytest.mark.mpi(min_size=2)
def test_the_other_ranks_go_on_where_the_server_failed_and_say_nothing():
    comm = connect()
    failed = raised(ZeroDivisionError, comm.at_server, lambda: 1 // 0)
    mpi_assert(comm, bool(failed) == comm.is_server and spread(comm, doubled, items(3), len) in (3, None), f"{failed}")


@pytest.mark.mpi(min_size=2)
def test_small_things_are_agreed_gathered_and_shared():
    comm = connect()
    one, none = comm.agree(comm.rank == comm.size - 1), comm.agree(False)
    gathered, shared = comm.gather(comm.rank * 10), comm.share({"rank": comm.rank})
    comm.barrier()
    mpi_assert(comm, one is True and none is False and shared == {"rank": 0}
               and gathered == ([rank * 10 for rank in range(comm.size)] if comm.is_server else None))
