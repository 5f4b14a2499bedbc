"""Devices: the GPU or the cores that are a rank's, and the threads that torch uses of them."""
import os
import platform
from collections import Counter

import torch

from hpcfl.errors import EnvironmentFault, JobError
from hpcfl.federation.world import World
from hpcfl.runs.host_limits import choose_threads, read_quota_cores, read_thread_limit
from hpcfl.settings.job import Job
from hpcfl.wire.communicator import Communicator

WORTH_A_THREAD_FLOPS = 100_000_000                                 # of a batch's forward pass; below, a second thread costs more than it gains (jobs/README.md)


def choose_job_device(job: Job, comm: Communicator) -> torch.device:
    """The device of this rank, with which the job's promises can be kept.

    Raises: EnvironmentFault as `choose_device`; JobError where the same bits are promised and a GPU or several threads would be at work.
    """
    device = choose_device(job.run.device, comm.local_rank)
    if job.run.deterministic and device.type == "cuda":
        raise JobError("run.deterministic = true promises the same bits, which no GPU keeps, but run.device chose one; set run.device = 'cpu', or "
                       "run.deterministic = false")
    if job.run.deterministic and job.run.threads > 1:
        raise JobError(f"run.deterministic = true promises the same bits, which take one thread for each rank, as the libraries below torch share out work, "
                       f"and round, as they find cores free; got run.threads = {job.run.threads}, wanted 0 or 1, or run.deterministic = false")
    return device


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank: the GPU of its local rank modulo those visible, or the CPU.

    Raises: EnvironmentFault where device = "cuda" and torch sees no GPU.
    """
    visible = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cuda" and visible == 0:
        raise EnvironmentFault("run.device = 'cuda', but torch sees no CUDA device (torch.cuda.is_available() is False): wanted a GPU, its driver and a CUDA "
                               "build of torch; set run.device = 'auto' to use the CPU where there is none")
    if visible == 0:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % visible)
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False        # float32 is what its name says, as on a CPU
    return device


def set_threads(job: Job, comm: Communicator) -> None:
    """Have torch use the threads that are this rank's. Called by all ranks."""
    torch.set_num_threads(choose_threads(job.run, count_cores(comm), read_thread_limit()))


def spare_threads(world: World) -> None:
    """Have torch use fewer threads where the largest batch of a classifier does not keep so many busy, unless the job says how many.

    A batch is weighed by the operations of its forward pass, so that the number, on which the last bits hang, follows from the job and the launch alone.
    What a method trains beside classifiers, or all clients at once, is not weighed: then all stay.
    """
    job, sizes = world.job, [len(part) for part in world.split.train]
    weighed = all(networks.keys() <= {"model"} for networks in world.modules.values()) and job.training.engine != "vmap"
    if job.run.threads or not weighed or world.problem.device.type == "cuda":
        return
    flops = max(min(job.training.batch, size) * flops for size, flops in zip(sizes, world.forward_flops, strict=True))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), flops // WORTH_A_THREAD_FLOPS)))


def count_cores(comm: Communicator) -> float:
    """This rank's part of its host's cores: each core is shared by the ranks bound to it, the time that control groups grant by all ranks of the host.

    Called by all ranks.
    """
    host, own, quota = platform.node(), find_bound_cores(), read_quota_cores()
    told = [cores for other, cores in comm.share(comm.gather((host, own))) if other == host]
    sharing = Counter(core for cores in told for core in cores)
    return min(round(sum(1 / sharing[core] for core in own), 6), quota / len(told))


def find_bound_cores() -> set[int]:
    """The cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
