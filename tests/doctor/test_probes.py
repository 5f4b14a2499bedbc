"""What one rank finds out: the compiler, a process that may crash, facts about itself and its device, and the seconds of the wire."""
import shutil

import psutil
import pytest
import torch

from hpcfl.doctor import probes
from hpcfl.errors import EnvironmentFault
from hpcfl.wire.communicator import Alone, Communicator, connect
from tests.support.verdict import mpi_assert


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


@pytest.mark.mpi(min_size=2)
def test_the_wire_is_timed_in_seconds_that_all_collectives_take():
    comm = connect()
    rows = probes.time_wire(comm)
    wanted = {(name, size) for name in ("Bcast", "Reduce", "Gatherv") for size in probes.SIZES} if comm.is_server else set()
    mpi_assert(comm, {(row["collective"], row["rank_bytes"]) for row in rows} == wanted, f"{rows}")
    mpi_assert(comm, all(0 < row["median_s"] < 5 and row["repetitions"] >= probes.FEWEST_LAPS for row in rows) and comm.traffic.sent_bytes == 0, f"{rows}")


@pytest.mark.mpi(min_size=2)
def test_too_much_for_rank_0_is_not_sent(monkeypatch):
    comm = connect()
    monkeypatch.setattr(probes, "MOST_BYTES", comm.size * probes.SIZES[1])
    mpi_assert(comm, {row["rank_bytes"] for row in probes.time_wire(comm)} == (set(probes.SIZES[:2]) if comm.is_server else set()))


def test_one_rank_has_no_wire():
    assert probes.time_wire(Communicator(Alone())) == []
