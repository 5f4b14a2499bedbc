"""Checks of a launch on facts that the machine at hand cannot show: GPUs, several hosts, other libraries, too few cores."""
import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hpcfl.doctor import launch_checks
from hpcfl.doctor.findings import OK, PROBLEM, WARNING
from hpcfl.doctor.probes import Facts
from hpcfl.wire.launchers import Launch
from tests.support.doctor_facts import ALONE, GB, LARGE, busy, cpu, examined, gpu, judged, of_a_job, versions
from tests.support.tiny_runs import tiny


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


def test_what_is_unknown_of_gpus_is_not_judged():
    assert launch_checks.check_shared_gpus(examined(cpu(0), cpu(1))) is launch_checks.check_unused_gpus(examined(cpu(0))) is None
