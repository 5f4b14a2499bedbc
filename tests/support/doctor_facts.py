"""What the doctor might find out where nothing is wrong: ranks on hosts and GPUs that the machine at hand does not have."""
from dataclasses import replace

from hpcfl.doctor.estimate import Estimate, Load
from hpcfl.doctor.findings import OK, Check, Examined
from hpcfl.doctor.probes import Facts
from hpcfl.doctor.run_folder import FolderFacts
from hpcfl.wire.hockney import Timing
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


def wire(bytes_per_s: float = 1e9, latency_s: float = 1e-5) -> list[Timing]:
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
