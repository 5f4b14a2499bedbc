"""Ranks combine, broadcast and share out work as one process would; what goes wrong on one is told to those concerned, and nobody is left waiting."""
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from hpcfl.errors import EnvironmentFault, LayoutError, NonFiniteError
from hpcfl.tree import Tree, equal, nbytes
from hpcfl.wire import communicator as wire
from hpcfl.wire import launchers, ranks
from hpcfl.wire.communicator import Alone, Communicator, connect
from hpcfl.wire.launchers import LAUNCHERS, STEPS
from hpcfl.wire.uplink import Sums, Total, Uplink, Uploads
from tests.support.verdict import mpi_assert

CLIENTS = 7
SPLITS = {"round_robin": lambda client, size: client % size, "backwards": lambda client, size: (CLIENTS - client) % size,
          "blocks": lambda client, size: client * size // CLIENTS, "all_on_last": lambda client, size: size - 1}


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


def mine(comm: Communicator, split: str = "round_robin") -> list[int]:
    return [client for client in range(CLIENTS) if SPLITS[split](client, comm.size) == comm.rank]


def statistics_of(clients: list[int]) -> Uplink | None:
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


REFERENCE = sum((contribution(client) for client in range(1, CLIENTS)), contribution(0)).total()


def test_one_process_is_a_rank_of_its_own():
    comm = Communicator(Alone())
    assert (comm.rank, comm.size, comm.local_rank, comm.local_size, comm.is_server) == (0, 1, 0, 1, True)
    totals = comm.combine(statistics_of([3, 1, 0, 2, 6, 5, 4]))
    assert same_bits(totals["model"], REFERENCE) and list(totals["whole"].trees) == list(range(CLIENTS))
    assert comm.combine(None) == comm.combine(Uplink()) == {}
    tree = {"x": torch.ones(2)}
    assert comm.distribute({(0,): tree})["x"] is tree["x"] and comm.at_server(lambda a, b: a - b, 5, 3) == 2
    assert {key: int(result["x"][0]) for key, result in spread(comm, doubled, items(4)).items()} == {0: 0, 1: 2, 2: 4, 3: 6}
    assert comm.agree(True) and not comm.agree(False) and comm.gather("a") == ["a"] and comm.share("a") == "a"
    comm.barrier()
    assert comm.sent_bytes == 0


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("deterministic", [False, True])
def test_what_is_carried_does_not_depend_on_the_number_of_ranks(deterministic):
    comm = connect(deterministic)
    clients = [client for client in range(4) if client % comm.size == comm.rank]
    comm.combine(Uplink({"s": Sums.weighted(clients, {"x": torch.zeros(len(clients), 7)}, torch.ones(len(clients))),
                             "u": Uploads({client: {"y": torch.zeros(client + 1)} for client in clients})}) if clients else None)
    spread(comm, doubled, items(2))
    spread(comm, doubled, items(1))                                # stays where it is
    carried = {kind: sum(each[kind] for each in comm.share(comm.gather(comm.carried))) for kind in comm.carried}
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


@pytest.mark.parametrize("account", [True, False])
def test_mpi_starts_where_home_is_not_set_and_tmpdir_takes_no_files(account, tmp_path, monkeypatch):
    """Open MPI ends a process without HOME before hpcfl could say anything."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(launchers.tempfile, "gettempdir", lambda: str(tmp_path))
    if not account:                                                # a user number of a container's that no account belongs to
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setenv("TMPDIR", "/proc")                           # where nobody can make a file: Open MPI dies of it
    connect(checked=False)
    assert os.environ["TMPDIR"] == str(tmp_path)
    assert os.environ["HOME"] == (os.path.expanduser("~") if account else str(tmp_path))


def test_where_no_folder_takes_temporary_files_that_is_said(monkeypatch):
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/proc']")
    monkeypatch.setattr(launchers.tempfile, "gettempdir", none)
    with pytest.raises(EnvironmentFault, match=r"no folder takes temporary files \(No usable .*\); set TMPDIR to one that does"):
        connect()


def test_abort_ends_the_process_with_the_code():
    code = "from hpcfl.wire.communicator import Alone, Communicator\ntry:\n    Communicator(Alone()).abort(6)\nfinally:\n    print('went on')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 6 and "went on" not in ended.stdout, ended.stderr


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_combined_statistics_are_those_of_one_process(deterministic, split):
    comm = connect(deterministic)
    totals = comm.combine(statistics_of(mine(comm, split)))
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
    monkeypatch.setattr(wire, "REDUCE_FLOATS", 7)
    comm = connect()
    totals = comm.combine(statistics_of(mine(comm)))
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
    mpi_assert(comm, good and comm.sent_bytes == (0 if comm.is_server else 4 * 4 + 8), f"{totals} {comm.sent_bytes}")


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


@pytest.mark.mpi(min_size=3)
def test_there_may_be_more_parts_of_the_ranks_than_communicators_are_kept(monkeypatch):
    monkeypatch.setattr(ranks, "AUDIENCES", 1)
    comm = connect()
    for turn in range(6):
        other = 1 + turn % (comm.size - 1)
        received = comm.distribute({(0, other): {"turn": torch.tensor(turn)}})
        mpi_assert(comm, (comm.rank not in (0, other) and received == {}) or int(received["turn"]) == turn, f"{turn}: {received}")


@pytest.mark.mpi(min_size=2)
def test_sent_bytes_are_the_payload_that_left_the_rank():
    comm = connect()
    uploaded = {"y": torch.zeros(comm.rank + 1)}
    comm.distribute(parcels(comm))
    wanted = sum(nbytes(parcel) * (len(audience) - 1) for audience, parcel in parcels(comm).items())
    mpi_assert(comm, comm.sent_bytes == (wanted if comm.is_server else 0), f"Bcast: {comm.sent_bytes}")
    before = comm.sent_bytes
    comm.combine(Uplink({"s": Sums.weighted([comm.rank], {"x": torch.zeros(1, 4)}, torch.ones(1)), "u": Uploads({comm.rank: uploaded})}))
    sent = comm.sent_bytes - before
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


@pytest.mark.mpi(min_size=2)
def test_local_ranks_number_the_ranks_of_a_host():
    comm = connect()
    hosts = comm.share(comm.gather((os.uname().nodename, comm.local_rank, comm.local_size)))
    local = [number for host, number, _ in hosts if host == os.uname().nodename]
    mpi_assert(comm, sorted(local) == list(range(comm.local_size)), f"{hosts}")
