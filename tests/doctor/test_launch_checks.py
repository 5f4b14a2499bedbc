"""Verdicts of the doctor on facts that the machine at hand cannot show: GPUs, several hosts, other libraries, slow wires, odd file systems."""
import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hpcfl.doctor import examine, launch_checks, run_checks
from hpcfl.doctor.estimate import Estimate, Load
from hpcfl.doctor.findings import OK, PROBLEM, WARNING, Check, Examined
from hpcfl.doctor.probes import Facts
from hpcfl.doctor.run_folder import FolderFacts
from hpcfl.wire.launchers import Launch
from tests.support.tiny_runs import tiny

GB = 10 ** 9
VERSIONS = {"hpcfl": "0.1.0", "python": "3.11.7", "torch": "2.9.1+cu128", "numpy": "2.0", "h5py": "3.12", "HDF5": "1.14", "mpi4py": "4.1.2",
            "mpi": "Open MPI v5.0.11", "mpi standard": "MPI 3.1"}
ALONE = {"mpi": "no MPI library that mpi4py can load", "mpi standard": ""}
FOLDER = FolderFacts("runs", file_system="ext4", free_bytes=100 * GB, written_bytes=1 << 20, write_s=0.01, replaced=100, reads=1000)


def cpu(rank: int, **changes) -> Facts:
    """A rank with two of its host's eight cores; four ranks on a host."""
    place = rank % 4
    first = {"compiler": "g++", "compiler_fault": "", "device_buffers": "", "mpirun": "mpirun (Open MPI) 5.0.11"} if place == 0 else \
        dict.fromkeys(("compiler", "compiler_fault", "device_buffers", "mpirun"))
    facts = Facts(rank=rank, host=f"n{1 + rank // 4}", local_rank=place, versions=VERSIONS, parallel_hdf5=False, device="cpu", device_fault="",
                  device_name="x86_64", device_id="", visible_gpus=0, has_driver=False, device_free_bytes=None, cores=2.0,
                  bound_cores=(2 * place, 2 * place + 1), launcher_cores=8, quota_cores=None, memory_left_bytes=32 * GB, resident_bytes=GB // 2, **first)
    return replace(facts, **changes)


def gpu(rank: int, number: int, **changes) -> Facts:
    """A rank on one GPU of a host that has four."""
    facts = cpu(rank, device=f"cuda:{number}", device_name="H100", device_id=f"{rank // 4}{number}-5f3c", visible_gpus=4, has_driver=True,
                device_free_bytes=70 * GB, device_buffers=None if rank % 4 else "it was ended by SIGSEGV")
    return replace(facts, **changes)


def versions(**changes: str) -> dict[str, str]:
    return {name: version for name, version in {**VERSIONS, **changes}.items() if version}


def wire(bytes_per_s: float = 1e9, latency_s: float = 1e-5) -> list[dict]:
    return [{"collective": name, "rank_bytes": size, "median_s": latency_s + size / bytes_per_s, "repetitions": 9}
            for size in (8, 4_000_000) for name in ("Bcast", "Reduce", "Gatherv")]


def examined(*facts: Facts, **changes) -> Examined:
    """What was found out where nothing but the facts of the ranks is out of the way."""
    others = facts[1:] or facts
    folder = replace(FOLDER, locks={each.rank: "refused" for each in others})
    return replace(Examined(len(facts), Launch("srun", "SLURM_STEP_NUM_TASKS", len(facts), 0), facts, {}, wire(), folder), **changes)


def busy(clients: int = 1, needed_bytes: int = GB) -> Load:
    return Load({"cnn1": clients}, {"cnn1": 10 * clients}, {"cnn1": 0.1}, needed_bytes) if clients else Load({}, {}, {}, 0)


LARGE = busy(needed_bytes=20 * GB)


def of_a_job(*loads: Load, **changes) -> dict:
    """What is found out besides where a job is given: four tenths of a round are spent between the ranks unless `changes` say otherwise."""
    estimate = Estimate(clients=8, loads=loads, down_bytes=1000, up_bytes=2000, up_by="Reduce", down_s=0.1, up_s=0.2, small_s=0.1, train_s=0.6, state_bytes=GB)
    return {"job": tiny("fedavg"), "job_faults": {}, "estimate": replace(estimate, **changes)}


def judged(check: Check, facts: Examined) -> tuple[str, str]:
    found = check(facts)
    assert found is not None and bool(found.fix) == (found.verdict != OK), found
    return found.verdict, f"{found.text} -> {found.fix}"


@pytest.mark.parametrize("facts", [
    examined(*map(cpu, range(8))), examined(*(gpu(rank, rank % 4) for rank in range(8))), examined(cpu(0, launcher_cores=2)),
    examined(*map(cpu, range(8)), **of_a_job(*[busy()] * 8))], ids=["cpu", "gpu", "alone", "job"])
def test_nothing_is_wrong_where_nothing_is_wrong(facts):
    found = examine.list_findings(facts)
    assert not [finding for finding in found if finding.verdict != OK] and examine.choose_exit_code(found) == 0
    assert examine.render(facts, found).endswith(f"hpcfl doctor, {len(facts.facts)} rank{'s' * (facts.ranks > 1)}: 0 problems, 0 warnings")


def test_the_oldest_supported_versions_are_those_of_setup_py():
    tree = ast.parse((Path(__file__).parents[2] / "setup.py").read_text())
    values = {node.arg: node.value for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    torch = next(name for name in ast.literal_eval(values["install_requires"]) if re.match(r"torch\b", name))
    oldest = {name: ".".join(map(str, numbers)) for name, numbers in (("python", launch_checks.PYTHON), ("torch", launch_checks.TORCH))}
    assert ast.literal_eval(values["python_requires"]) == f">={oldest['python']}" and torch == f"torch>={oldest['torch']}"


@pytest.mark.parametrize(("check", "facts", "verdict", "words"), [
    (launch_checks.check_mpi_library, [cpu(0), cpu(4, versions=versions(mpi="MPICH 4.2"))], WARNING,
     "rank 0: Open MPI v5.0.11 (MPI 3.1) through mpi4py 4.1.2;"),
    (launch_checks.check_mpi_library, [cpu(0, versions=versions(**ALONE))], WARNING, "hpcfl runs in one process only -> load the site's MPI module"),
    (launch_checks.check_mpirun, [cpu(0, mpirun="HYDRA build details:")], WARNING, "HYDRA build details:, but mpi4py loads Open MPI v5.0.11"),
    (launch_checks.check_mpirun, [cpu(0, mpirun="HYDRA", versions=versions(mpi="MVAPICH2 2.3"))], OK, "in PATH: HYDRA"),
    (launch_checks.check_mpirun, [cpu(0, mpirun="HYDRA", versions=versions(**ALONE))], OK, "in PATH: HYDRA"),
    (launch_checks.check_mpirun, [cpu(0, mpirun="")], OK, "none in PATH"),
    (launch_checks.check_hosts, [cpu(0), cpu(1), cpu(2), cpu(4), cpu(6)], OK, "n1: ranks 0-2; n2: ranks 4, 6"),
    (launch_checks.check_software, [cpu(0), cpu(1, versions=versions(torch="2.6.0"))], PROBLEM,
     "n1: torch 2.6.0; hpcfl needs 2.7 -> install torch 2.7 or later"),
    (launch_checks.check_software, [cpu(0, versions=versions(python="3.9.2"))], PROBLEM, "n1: python 3.9.2; hpcfl needs 3.11"),
    (launch_checks.check_software, [cpu(0), cpu(4, versions=versions(torch="2.10.0"))], WARNING, "rank 4: hpcfl 0.1.0, python 3.11.7, torch 2.10.0"),
    (launch_checks.check_hdf5, [cpu(0), cpu(1, parallel_hdf5=True)], WARNING, "rank 1: HDF5 1.14, parallel, through h5py 3.12; hpcfl writes one file per rank"),
    (launch_checks.check_devices, [gpu(0, 0), gpu(1, 1, device_fault="all CUDA devices are busy")], PROBLEM, "rank 1: all CUDA devices are busy"),
    (launch_checks.check_devices, [gpu(0, 0), gpu(1, 1), cpu(4)], WARNING, "rank 1: cuda:1 (H100, 01-5f3c); rank 4: cpu (x86_64); ranks on a CPU keep"),
    (launch_checks.check_devices, [cpu(0, has_driver=True)], WARNING, "torch sees no GPU although there is a driver for one: n1"),
    (launch_checks.check_shared_gpus, [gpu(0, 0), gpu(1, 0), gpu(2, 1), gpu(4, 0)], WARNING, "ranks 0-1: H100 00-5f3c of n1; ranks on one GPU take turns"),
    (launch_checks.check_unused_gpus, [gpu(0, 0), gpu(1, 1), *(gpu(4 + n, n) for n in range(4))], WARNING,
     "2 of 4 on n1 -> start as many ranks on a host as it has GPUs"),
    (launch_checks.check_device_buffers, [gpu(0, 0), gpu(1, 1)], OK, "no: a process that tried: it was ended by SIGSEGV; hpcfl does not need it"),
    (launch_checks.check_device_buffers, [gpu(0, 0, device_buffers="yes")], OK, "yes: MPI reads and writes GPU memory"),
    (launch_checks.check_compiler, [cpu(0), cpu(4, compiler_fault="'g++' is not in PATH")], WARNING, "rank 4: 'g++' is not in PATH; training runs uncompiled"),
])
def test_what_is_odd_about_a_launch_is_said_with_the_way_out(check, facts, verdict, words):
    found, text = judged(check, examined(*facts))
    assert found == verdict and words in text, text


def sharing(count: int, cores: int, **changes) -> list[Facts]:
    """So many ranks of one host, all bound to the same cores."""
    part = min(cores, changes.get("quota_cores", cores)) / count
    return [cpu(rank, host="n1", cores=part, bound_cores=tuple(range(cores)), **changes) for rank in range(count)]


@pytest.mark.parametrize(("facts", "verdict", "words"), [
    (sharing(4, 1, launcher_cores=8), PROBLEM, "4 ranks on 1 core; for each rank 0.25, and 1 thread, while 7 more cores of the host are idle: all"),
    (sharing(4, 1, launcher_cores=1), WARNING, "start at most 1 rank here, or ask for more cores (sbatch and srun --cpus-per-task=N). mpirun --oversubscribe"),
    (sharing(4, 2, launcher_cores=2), WARNING, "4 ranks on 2 cores; for each rank 0.5, and 1 thread: all takes 2 times as long as on cores of their own"),
    (sharing(1, 1, launcher_cores=64), WARNING, "while 63 more cores of the host are idle -> mpirun --bind-to none, or srun --cpus-per-task=64"),
    (sharing(2, 64, launcher_cores=64, quota_cores=4.0), OK, "control groups grant the time of 4; for each rank 2, and 2 threads"),
    (sharing(2, 64, launcher_cores=64, thread_limit=8), OK, "for each rank 32, and 8 threads (OMP_NUM_THREADS = 8)"),
    (sharing(8, 64, launcher_cores=64, quota_cores=4.0), WARNING, "for each rank 0.5"),
    (sharing(2, 8, launcher_cores=8), OK, "2 ranks on 8 cores; for each rank 4, and 4 threads"),
    ([gpu(0, 0, cores=1.0, bound_cores=(0,), launcher_cores=64)], OK, "1 rank on 1 core"),
])
def test_too_few_cores_are_a_warning_and_a_problem_where_others_are_idle(facts, verdict, words):
    found, text = judged(launch_checks.check_cores, examined(*facts))
    assert found == verdict and words in text, text


def test_hosts_on_which_others_are_at_work_are_a_warning():
    found, text = judged(launch_checks.check_load, examined(cpu(0, load=9.6, host_cores=8), cpu(4, load=9.0, host_cores=8)))
    assert found == WARNING and text.startswith("n1: 9.6 processes want its 8 cores: others are at work there; a run takes longer")
    assert launch_checks.check_load(examined(cpu(4, load=9.0, host_cores=8))) is None, "the doctor's own rank is no load"


def test_threads_that_a_job_asks_for_want_cores():
    job = tiny("fedavg")
    job = replace(job, run=replace(job.run, threads=6))
    found, text = judged(launch_checks.check_cores, examined(*sharing(2, 8, launcher_cores=8), job=job))
    assert found == WARNING and text.endswith("run.threads = 4, or more cores: --cpus-per-task=6")


@pytest.mark.parametrize(("facts", "verdict", "words"), [
    (examined(cpu(0), cpu(1), **of_a_job(LARGE, LARGE)), PROBLEM, "n1: 32 GB left beside 2 ranks of 500 MB, and the job may need 40 GB"),
    (examined(cpu(0), cpu(1, host="n2"), **of_a_job(LARGE, LARGE)), OK, "n2: 32 GB left beside 1 rank of 500 MB, of which the job may need 20 GB"),
    (examined(gpu(0, 0), gpu(1, 0), **of_a_job(busy(needed_bytes=40 * GB), busy())), PROBLEM, "rank 0: 35 GB left on cuda:0, and the job may need 40 GB"),
    (examined(cpu(0), cpu(1, memory_left_bytes=GB // 2)), WARNING, "n1: 500 MB left beside 2 ranks"),
])
def test_memory_is_that_of_a_host_for_all_its_ranks_and_of_a_gpu_for_those_that_share_it(facts, verdict, words):
    found, text = judged(launch_checks.check_memory, facts)
    assert found == verdict and words in text, text


@pytest.mark.parametrize(("launch", "verdict", "words"), [
    (None, OK, "2 ranks, by a launcher that does not tell"),
    (Launch("srun", "SLURM_NTASKS", 2, 0), OK, "srun started 2 ranks (SLURM_NTASKS) and MPI sees as many"),
    (Launch("srun", "SLURM_NTASKS", 4, 0), WARNING, "MPI sees 2: there may be several runs side by side -> Launch with the mpirun that belongs")])
def test_ranks_that_see_only_some_of_the_others_are_noticed(launch, verdict, words):
    found, text = judged(launch_checks.check_launch, examined(cpu(0), cpu(1), launch=launch))
    assert found == verdict and words in text, text


@pytest.mark.parametrize(("check", "changes", "verdict", "words"), [
    (run_checks.check_wire, {"wire": wire(latency_s=2e-3)}, WARNING, "Bcast 2 ms, Reduce 2 ms, Gatherv 2 ms for 8 B of each rank"),
    (run_checks.check_wire, {"wire": wire(bytes_per_s=1e7)}, WARNING, "Bcast 10 MB/s"),
    (run_checks.check_wire, {"wire": wire()}, OK, "Bcast 998 MB/s, Reduce 998 MB/s, Gatherv 998 MB/s for 4 MB"),
    (run_checks.check_run_folder, {"folder": replace(FOLDER, unwritable={1: "No space left on device"})}, PROBLEM, "rank 1: No space left on device"),
    (run_checks.check_run_folder, {"folder": replace(FOLDER, free_bytes=GB // 2)}, WARNING, "runs (ext4): 500 MB free"),
    (run_checks.check_run_folder, {"folder": replace(FOLDER, free_bytes=3 * GB), **of_a_job(LARGE, LARGE)}, PROBLEM,
     "the checkpoints of this job may take 4 GB"),
    (run_checks.check_same_folder, {"folder": replace(FOLDER, unseen={1: "not there"})}, PROBLEM,
     "runs: rank 1: not there -> that path leads to different places"),
    (run_checks.check_locks, {"folder": replace(FOLDER, locks={1: "granted"})}, WARNING, "rank 1: granted; a second run in this folder may not be noticed"),
    (run_checks.check_locks, {"folder": replace(FOLDER, locks={1: "refused"})}, OK, "locked for all hosts"),
    (run_checks.check_renames, {"folder": replace(FOLDER, torn={1: "read 7 of 4096"})}, WARNING, "replaced a file 100 times: rank 1: read 7 of 4096"),
    (run_checks.check_job, {"job_faults": {0: "no such data set", 1: "no such data set"}}, PROBLEM, "no such data set -> mend what it names"),
    (run_checks.check_job, of_a_job(busy(2), busy(0)), WARNING, "8 clients on 2 ranks; rank 1 would host none and wait -> start at most 1 rank"),
    (run_checks.check_round, of_a_job(busy(1), busy(2)), OK, "40.0% of a round is spent between the ranks (Bcast of a model of each architecture, 1 kB"),
    (run_checks.check_round, of_a_job(busy(1), busy(2)), OK, "600 ms is local training on rank 1, which has most of it (20 batches of cnn1 at 100 ms)"),
    (run_checks.check_round, of_a_job(busy(), busy(), train_s=0.1), WARNING, "80.0% of a round"),
    (run_checks.check_round, of_a_job(busy(), replace(busy(), crowding=20.0)), WARNING, "for want of a core the batches of rank 4 took 20 times as long as"),
    (run_checks.check_round, of_a_job(busy(), replace(busy(), crowding=20.0)), WARNING, "-> repeat it while nothing else runs here"),
    (run_checks.check_round, of_a_job(busy(), replace(busy(), crowding=1.2)), OK, "40.0% of a round"),
])
def test_what_a_run_would_meet_on_two_hosts(check, changes, verdict, words):
    found, text = judged(check, examined(cpu(0), cpu(4), **changes))
    assert found == verdict and words in text, text


def test_ranks_that_share_a_core_among_themselves_wait_in_a_run_too():
    shared, loads = [cpu(rank, cores=0.5, bound_cores=(0,)) for rank in range(2)], [replace(busy(), crowding=2.0)] * 2
    assert judged(run_checks.check_round, examined(*shared, **of_a_job(*loads)))[0] == OK
    assert judged(run_checks.check_round, examined(*shared, **of_a_job(*[replace(busy(), crowding=4.0)] * 2)))[0] == WARNING


def test_a_dedicated_server_without_clients_is_not_idle():
    given = of_a_job(busy(0), busy(8))
    job = given["job"]
    dedicated = given | {"job": replace(job, federation=replace(job.federation, server_rank="dedicated"))}
    assert judged(run_checks.check_job, examined(cpu(0), cpu(1), **dedicated))[0] == OK


def test_what_is_unknown_is_not_judged():
    assert launch_checks.check_shared_gpus(examined(cpu(0), cpu(1))) is launch_checks.check_unused_gpus(examined(cpu(0))) is None
    unwritable = examined(cpu(0), cpu(1), folder=FolderFacts("runs", "Read-only file system"))
    assert [check(unwritable) for check in run_checks.RUN_CHECKS[2:]] == [None] * 5


def test_where_no_rank_can_tell_that_is_all_there_is_to_say():
    found = examine.list_findings(Examined(2, None, (), {0: "broken", 1: "broken"}, wire(), FOLDER))
    assert [(finding.name, finding.verdict, finding.text) for finding in found] == [("ranks", PROBLEM, "ranks 0-1: broken")]
    assert examine.choose_exit_code(found) == 3
