"""What the doctor measures: the compiler, a process that may crash, what the system leaves to a process, the run folder, the wire and a job's round."""
import itertools
import shutil
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from hpcfl.doctor import estimate, probes, run_folder
from hpcfl.errors import CheckpointError, EnvironmentFault
from hpcfl.federation.world import World
from hpcfl.runs import host_limits
from hpcfl.wire.communicator import Alone, Communicator, connect
from hpcfl.wire.launchers import Launch, read_launch
from tests.support.tiny_runs import tiny
from tests.support.verdict import mpi_assert

WIRE = [{"collective": "Bcast", "rank_bytes": size, "median_s": seconds} for size, seconds in ((8, 1.0), (108, 2.0), (1000, 4.0))]


def world(**changes) -> World:
    return World(tiny("fedavg", **changes), Communicator(Alone()), torch.device("cpu"))


def test_the_compiler_that_torch_compile_would_call_is_tried_on_what_it_would_get(monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("no g++ in PATH")
    monkeypatch.delenv("CXX", raising=False)
    assert probes.try_compiler("cpu") == "g++"
    monkeypatch.setenv("CXX", "g++ -I/nowhere")
    assert probes.try_compiler("cpu") == "g++ -I/nowhere"
    monkeypatch.setattr(probes.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    with pytest.raises(EnvironmentFault, match="'g.*' does not compile what torch.compile gives it: .*error: Python.h: No such file"):
        probes.try_compiler("cpu")


@pytest.mark.parametrize(("kind", "variable", "reason"), [
    ("cpu", "no-such-compiler", r"'no-such-compiler' \(CXX if set, else g\+\+\) is not in PATH"), ("cpu", "false", "does not compile .*: exit code 1"),
    ("cuda", "", "triton is not installed"), ("cuda", "no-such-compiler", "'no-such-compiler' .* is not in PATH")])
def test_what_a_compiler_lacks_is_named(kind, variable, reason, monkeypatch):
    monkeypatch.setenv("CXX" if kind == "cpu" else "CC", variable)
    monkeypatch.setattr(probes, "TRITON", ("torch",) if variable else ("no-such-distribution",))
    with pytest.raises(EnvironmentFault, match=reason):
        probes.try_compiler(kind)


def test_mpi_moves_host_memory_in_a_process_of_its_own():
    assert probes.try_device_buffers("cpu") == "yes"


@pytest.mark.parametrize(("code", "told"), [
    ("import os; os.kill(os.getpid(), 11)", "it was ended by SIGSEGV"), ("import time; time.sleep(99)", "it did not end within 1 s"),
    ("raise ValueError('no buffer')", "ValueError: no buffer"), ("raise SystemExit(4)", "exit code 4")])
def test_a_process_that_crashes_takes_nobody_along(code, told, monkeypatch):
    monkeypatch.setattr(probes, "CARRY", code)
    monkeypatch.setattr(probes, "LIMIT_S", 1)
    assert probes.try_device_buffers("cuda:0") == told


@pytest.mark.gpu
def test_on_a_gpu_the_answer_is_yes_or_how_the_process_ended():
    told = probes.try_device_buffers("cuda:0")
    assert told == "yes" or told.startswith("it was ended by") or "Error" in told, told


def test_what_a_rank_finds_out_about_itself():
    facts = probes.look_around(Communicator(Alone()), "cpu", 1.5)
    assert (facts.rank, facts.device, facts.device_fault, facts.cores, facts.device_buffers) == (0, "cpu", "", 1.5, "")
    assert facts.versions["torch"] == torch.__version__ and "mpi standard" not in facts.versions
    assert len(facts.bound_cores) == len(psutil.Process().cpu_affinity()) and 0 < facts.memory_left_bytes <= psutil.virtual_memory().total


def test_a_device_that_is_not_there_is_a_fact_and_no_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = probes.look_around(Communicator(Alone()), "cuda", 1.0)
    assert facts.device == "" and facts.device_fault.startswith("run.device = 'cuda', but torch sees no CUDA device")


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups in a folder: a function that writes /proc/self/cgroup and the files named."""
    def of(own: str, **files: str) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(host_limits, "OWN_GROUPS", tmp_path / "own")
        monkeypatch.setattr(host_limits, "GROUPS", tmp_path / "groups")
    return of


def test_limits_of_control_groups_of_version_2_hold_from_the_own_group_up_to_the_root(groups):
    groups("0::/job/step\n", **{"cpu.max": "max 100000", "job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000", "job/memory.max": "3000",
                                "job/memory.current": "2500", "job/memory.stat": "anon 2000\ninactive_file 400\n", "job/step/memory.max": "max",
                                "job/step/memory.current": "2500"})
    assert host_limits.read_quota_cores() == 1.5 and host_limits.read_memory_left_bytes() == 900


def test_limits_of_control_groups_of_version_1(groups):
    groups("4:memory:/slurm/job\n3:cpuset:/\n1:cpu,cpuacct:/slurm\n0::/\n", **{
        "cpu/slurm/cpu.cfs_quota_us": "400000", "cpu/slurm/cpu.cfs_period_us": "100000", "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
        "memory/slurm/job/memory.limit_in_bytes": "5000", "memory/slurm/job/memory.usage_in_bytes": "4000", "memory/memory.limit_in_bytes": str(2 ** 63 - 4096),
        "memory/memory.usage_in_bytes": "4000"})
    assert host_limits.read_quota_cores() == 4.0 and host_limits.read_memory_left_bytes() == 1000


def test_without_control_groups_the_host_is_the_limit(groups):
    groups("0::/elsewhere\n")
    assert host_limits.read_quota_cores() == float("inf") and host_limits.read_memory_left_bytes() > 10 ** 6


def test_the_launcher_has_the_cores_of_the_parent_or_what_slurm_grants():
    parents = len(psutil.Process().parent().cpu_affinity())
    assert host_limits.read_launcher_cores({}) == parents and host_limits.read_launcher_cores({"SLURM_CPUS_ON_NODE": "1"}) == 1
    for told in ("9999", "", "8(x2)"):
        assert host_limits.read_launcher_cores({"SLURM_CPUS_ON_NODE": told}) == parents


@pytest.mark.parametrize(("environment", "launch"), [
    ({}, None), ({"SLURM_NTASKS": "4"}, None), ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}, Launch("srun", "SLURM_NTASKS", 4, 3)),
    ({"PMI_SIZE": "2", "PMI_RANK": "1", "SLURM_STEP_NUM_TASKS": "1"}, Launch("mpirun of MPICH or Intel MPI", "PMI_SIZE", 2, 1))])
def test_what_a_launcher_says(environment, launch):
    assert read_launch(environment) == launch


@pytest.mark.mpi(min_size=2)
def test_the_wire_is_timed_in_seconds_that_all_collectives_take():
    comm = connect()
    rows = probes.time_wire(comm)
    wanted = {(name, size) for name in ("Bcast", "Reduce", "Gatherv") for size in probes.SIZES} if comm.is_server else set()
    mpi_assert(comm, {(row["collective"], row["rank_bytes"]) for row in rows} == wanted, f"{rows}")
    mpi_assert(comm, all(0 < row["median_s"] < 5 and row["repetitions"] >= probes.FEWEST_LAPS for row in rows) and comm.sent_bytes == 0, f"{rows}")


@pytest.mark.mpi(min_size=2)
def test_too_much_for_rank_0_is_not_sent(monkeypatch):
    comm = connect()
    monkeypatch.setattr(probes, "MOST_BYTES", comm.size * probes.SIZES[1])
    mpi_assert(comm, {row["rank_bytes"] for row in probes.time_wire(comm)} == (set(probes.SIZES[:2]) if comm.is_server else set()))


def test_one_rank_has_no_wire():
    assert probes.time_wire(Communicator(Alone())) == []


def test_a_folder_is_looked_at_and_left_as_it_was(tmp_path):
    facts = run_folder.examine(Communicator(Alone()), tmp_path / "new" / "run")
    assert (facts.fault, facts.unwritable, facts.unseen, facts.torn, facts.locks) == ("", {}, {}, {}, {0: "refused"})
    assert facts.free_bytes > 0 and facts.write_s > 0 and facts.replaced > 0 and not list(tmp_path.iterdir())
    (tmp_path / "kept").mkdir()
    run_folder.examine(Communicator(Alone()), tmp_path / "kept")
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


@pytest.mark.mpi(min_size=2)
def test_ranks_see_one_folder_and_the_lock_in_it(tmp_path):
    comm = connect()
    facts = run_folder.examine(comm, comm.share(tmp_path) / "run")
    if comm.is_server:
        assert (facts.fault, facts.unwritable, facts.unseen, facts.torn) == ("", {}, {}, {})
        assert facts.locks == dict.fromkeys(range(1, comm.size), "refused") and facts.reads > 0 and not list(tmp_path.iterdir())
    else:
        assert facts is None


def test_a_lock_is_refused_granted_or_not_to_be_had(tmp_path):
    file = tmp_path / "LOCK"
    with run_folder.hold(file):
        assert run_folder.ask_for_lock(file) == "refused"
    assert run_folder.ask_for_lock(file) == "granted"
    assert "No such file or directory" in run_folder.ask_for_lock(tmp_path / "none")


@pytest.mark.parametrize("atomic", [True, False])
def test_a_reader_notices_a_file_that_is_not_replaced_at_once(atomic, tmp_path, monkeypatch):
    """The writer replaces as the doctor does, or takes the old file away first and writes the new one piece by piece."""
    monkeypatch.setattr(run_folder, "RENAMING_S", 0.2)
    file, over = tmp_path / "LATEST", threading.Event()

    def write_in_place():
        with file.open("w") as handle:
            for _ in range(run_folder.REPEATED):
                handle.write("00000001")
                handle.flush()
                time.sleep(1e-5)                                   # lets go of the interpreter, so that the reader meets what is half written

    def keep_writing():
        while not over.is_set():
            run_folder.replace(file, 1) if atomic else write_in_place()
    run_folder.replace(file, 0)
    writer = threading.Thread(target=keep_writing)
    writer.start()
    count, fault = run_folder.keep_reading(file)
    over.set()
    writer.join()
    assert count > 0 and (fault == "" if atomic else "of 4096 characters" in fault), fault


def test_what_does_not_appear_is_not_waited_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SEEN_WITHIN_S", 0.05)
    with pytest.raises(CheckpointError, match="it is not there"):
        run_folder.wait_for((tmp_path / "none").is_file, "it is not there")
    run_folder.wait_for(tmp_path.is_dir, "it is not there")


def test_a_collective_takes_what_lies_between_or_beyond_those_that_were_timed():
    assert [estimate.interpolate_seconds(WIRE, "Bcast", count) for count in (0, 4, 8, 58, 108, 554, 1000, 3000)] == [0, 1, 1, 1.5, 2, 3, 4, 12]
    assert estimate.interpolate_seconds(WIRE, "Reduce", 100) == estimate.interpolate_seconds([], "Bcast", 100) == 0


def test_the_load_of_a_rank_is_its_clients_their_batches_and_the_time_of_each():
    here = world(federation={"clients": 5, "rounds": 3}, training={"batch": 8, "epochs": 2})
    load, parts = estimate.measure_load(here), [here.split.train[client] for client in range(5)]
    assert load.clients == {"mlp2": 3, "cnn1": 2}
    for architecture, clients in (("mlp2", (0, 2, 4)), ("cnn1", (1, 3))):
        group = next(group for group in here.join() if group.clients == clients)
        steps = sum(len(list(here.client_site(group, here.plan[0], 0).epochs(client, 2, 8))) for client in clients)
        assert load.batches[architecture] == steps and 0 < load.batch_s[architecture] < 5
    assert load.train_s == pytest.approx(sum(load.batches[name] * load.batch_s[name] for name in load.batches))
    assert load.needed_bytes > sum(map(len, parts)) * 64, "images of 1x8x8, and more"


def test_a_load_says_how_long_its_batches_took_for_want_of_a_core(monkeypatch):
    told = iter([(2.0, 1.0), (3.0, 20.0)])
    monkeypatch.setattr(estimate, "core_seconds", lambda: next(told))
    assert estimate.measure_load(world()).crowding == 20                # 1 s of work, and 19 of waiting
    monkeypatch.setattr(estimate, "core_seconds", lambda: (0.0, 0.0))
    assert estimate.measure_load(world()).crowding == 1                 # a system that does not tell


def test_a_process_knows_how_long_it_had_a_core_and_how_long_it_waited(tmp_path, monkeypatch):
    for task, text in (("7", "1500000000 2500000000 3\n"), ("8", "500000000 0 1\n"), ("9", "")):
        (tmp_path / task).mkdir()
        (tmp_path / task / "schedstat").write_text(text)
    (tmp_path / "10").mkdir()                                      # a thread that is gone by now
    monkeypatch.setattr(host_limits, "TASKS", tmp_path)
    assert host_limits.read_core_seconds() == (2.0, 2.5)
    monkeypatch.setattr(host_limits, "TASKS", tmp_path / "none")
    assert host_limits.read_core_seconds() == (0.0, 0.0)


def test_clients_that_train_beside_each_other_share_the_time_of_a_batch(monkeypatch):
    here, seconds = world(training={"engine": "vmap"}), itertools.count()
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))     # each step takes a second, whoever takes it
    assert [estimate.time_batch(here, "mlp2", 4, clients) for clients in (1, 16)] == [1, 1 / 16]


def test_a_round_costs_most_where_a_rank_has_most_to_do_and_nothing_where_nothing_travels():
    loads = tuple(estimate.Load({"cnn1": count}, {"cnn1": 10 * count}, {"cnn1": 0.1}, 0) for count in (1, 3))
    found = estimate.estimate_round(world(federation={"participation": 0.5}), loads, WIRE)
    assert found.train_s == pytest.approx(0.5 * 3) and found.up_by == "Reduce" and found.small_s == estimate.SMALL_CALLS and 0 < found.wire_share < 1
    alone = estimate.estimate_round(World(tiny("standalone"), Communicator(Alone()), torch.device("cpu")), loads, WIRE)
    assert (alone.down_bytes, alone.up_bytes, alone.down_s, alone.up_s) == (0, 0, 0, 0)
    gathering = estimate.estimate_round(world(run={"deterministic": True}, federation={"participation": 1.0}), loads, WIRE)
    assert gathering.up_by == "Gatherv" and gathering.up_bytes == 3 * estimate.count_model_bytes(world(), "cnn1")


def test_whatever_is_raised_becomes_words():
    def fail(error: Exception) -> None:
        raise error
    assert probes.attempt(fail, CheckpointError("as it is")) == (None, "as it is") and probes.attempt(fail, KeyError("x")) == (None, "KeyError: 'x'")
    assert probes.attempt(divmod, 7, 2) == ((3, 1), "")
