"""Verdicts on what a run meets: the wire between the ranks, the run folder, and the job, one small function for each thing to check."""
from hpcfl.doctor.findings import OK, PROBLEM, WARNING, Check, Examined, Finding
from hpcfl.wording import byte_text, count_text, duration_text, numbers_text, reasons_text

SLOW_S, SLOW_BYTES_PER_S = 1e-3, 1e8                               # of a Bcast of 8 bytes, of the largest that is timed: slower than Gigabit Ethernet
LITTLE_BYTES = 1e9                                                 # of disk
KEPT_BESIDE = 2                                                    # checkpoints there beside checkpoint.keep: the best, and the one being written
MUCH = 0.5                                                         # of a round, between the ranks
CROWDED = 1.5                                                      # times as long for want of a core: more is no figure to believe


def check_wire(examined: Examined) -> Finding:
    """Whether what travels between the ranks is as fast as it should be."""
    if examined.ranks == 1:
        return Finding("wire", OK, "one rank: nothing travels")
    small, large = (pick(row["rank_bytes"] for row in examined.wire) for pick in (min, max))
    took = {row["collective"]: row["median_s"] for row in examined.wire if row["rank_bytes"] == small}
    rate = {row["collective"]: large / row["median_s"] for row in examined.wire if row["rank_bytes"] == large}
    text = f"{', '.join(f'{name} {duration_text(seconds)}' for name, seconds in took.items())} for {byte_text(small)} of each rank; " \
           f"{', '.join(f'{name} {byte_text(per_s)}/s' for name, per_s in rate.items())} for {byte_text(large)}"
    if took["Bcast"] <= SLOW_S and rate["Bcast"] >= SLOW_BYTES_PER_S:
        return Finding("wire", OK, text)
    crowded = min(facts.cores for facts in examined.facts) < 1
    return Finding("wire", WARNING, f"{text}: slow", "first give every rank a core of its own" if crowded else
                   "see that MPI takes the fast network (UCX_NET_DEVICES; for TCP --mca btl_tcp_if_include), and that nothing else keeps the cores busy")


def check_run_folder(examined: Examined) -> Finding:
    """Whether every rank can write in the run folder, and as much as the job will."""
    folder, estimate = examined.folder, examined.estimate
    if folder.fault:
        return Finding("run folder", PROBLEM, f"{folder.folder}: rank 0 cannot write there: {folder.fault}", "choose a writable folder with --out")
    if folder.unwritable:
        return Finding("run folder", PROBLEM, reasons_text(folder.unwritable), "choose with --out a folder where every rank can write")
    kind = f" ({folder.file_system})" if folder.file_system else ""
    text = f"{folder.folder}{kind}: {byte_text(folder.free_bytes)} free; " \
           f"{byte_text(folder.written_bytes)} of HDF5 by each rank written, flushed and read back in " \
           f"{duration_text(folder.write_s)}"
    needed = estimate.state_bytes * (examined.job.checkpoint.keep + KEPT_BESIDE) if estimate and examined.job else 0
    if needed > folder.free_bytes:
        return Finding("run folder", PROBLEM, f"{text}; the checkpoints of this job may take {byte_text(needed)}",
                       "free space, choose another --out, or lower checkpoint.keep")
    if folder.free_bytes < LITTLE_BYTES:
        return Finding("run folder", WARNING, text, "free space, or choose another --out")
    return Finding("run folder", OK, text)


def check_same_folder(examined: Examined) -> Finding | None:
    """Whether all ranks see one and the same folder."""
    if examined.folder.fault or examined.ranks == 1:
        return None
    if examined.folder.unseen:
        return Finding("same folder", PROBLEM, f"{examined.folder.folder}: {reasons_text(examined.folder.unseen)}",
                       "that path leads to different places: choose with --out a folder on a file system that all hosts share, by its absolute path")
    return Finding("same folder", OK, "what rank 0 writes all others see, and it sees what they write")


def check_locks(examined: Examined) -> Finding | None:
    """Whether a second run in the folder would be noticed."""
    told = examined.folder.locks
    if examined.folder.fault or not told:
        return None
    lacking = {rank: answer for rank, answer in told.items() if answer != "refused"}
    if lacking:
        return Finding("locks", WARNING, f"a lock that rank 0 holds was asked for: {reasons_text(lacking)}; a second run in this folder may not be noticed",
                       "never start two runs in one folder, or choose a file system on which flock holds between hosts (Lustre: mount option flock)")
    hosts = {facts.rank: facts.host for facts in examined.facts}
    elsewhere = any(hosts.get(rank) != hosts.get(0) for rank in told)
    return Finding("locks", OK, f"what rank 0 locks is locked for {'all hosts' if elsewhere else 'other processes of its host'}: a second run here is refused")


def check_renames(examined: Examined) -> Finding | None:
    """Whether readers find a file whole while it is replaced."""
    folder = examined.folder
    if folder.fault:
        return None
    if folder.torn:
        return Finding("renames", WARNING, f"while rank 0 replaced a file {count_text(folder.replaced, 'time')}: "
                                           f"{reasons_text(folder.torn)}; a checkpoint that is cut "
                       "short may be damaged", "choose another file system with --out")
    found = f" and found whole by others in {count_text(folder.reads, 'read')}" if folder.reads else ""
    return Finding("renames", OK, f"a file was replaced {count_text(folder.replaced, 'time')}{found}")


def check_job(examined: Examined) -> Finding | None:
    """Whether the job could begin here, and gives every rank something to do."""
    if examined.job_faults is None:
        return None
    if examined.estimate is None or examined.job is None:
        return Finding("job", PROBLEM, reasons_text(examined.job_faults or examined.silent), "mend what it names; hpcfl run JOB --dry-run tries the same")
    described, estimate = examined.job, examined.estimate
    text = f"{described.run.name}: {described.algorithm_name} on {described.data.name}, {count_text(estimate.clients, 'client')} on " \
           f"{count_text(examined.ranks, 'rank')}"
    idle = [rank for rank, load in enumerate(estimate.loads) if not load.clients and not (rank == 0 and described.federation.server_rank == "dedicated")]
    if idle:
        return Finding("job", WARNING, f"{text}; {numbers_text(idle)} would host none and wait",
                       f"start at most {count_text(examined.ranks - len(idle), 'rank')}")
    return Finding("job", OK, text)


def check_round(examined: Examined) -> Finding | None:
    """The share of a round that would go into communication."""
    estimate = examined.estimate
    if estimate is None:
        return None
    busiest, load = max(enumerate(estimate.loads), key=lambda entry: entry[1].train_s)
    work = ", ".join(f"{count_text(count, 'batch', 'es')} of {name} at {duration_text(load.batch_s[name])}" for name, count in load.batches.items())
    wire = f"Bcast of a model of each architecture, {byte_text(estimate.down_bytes)} in {duration_text(estimate.down_s)}, {estimate.up_by} of " \
           f"{byte_text(estimate.up_bytes)} of each rank in {duration_text(estimate.up_s)}, small calls {duration_text(estimate.small_s)}"
    text = f"an estimate: {estimate.wire_share:.1%} of a round is spent between the ranks ({wire}); " \
           f"{duration_text(estimate.train_s)} is local training on rank " \
           f"{busiest}, which has most of it ({work}). Not in it: what a method sends instead of models or trains beside classifiers, the server's work, " \
           "evaluation, checkpoints; hpcfl report shows what a run measured"
    # Ranks that were started on one core wait for each other in a run too; that is told of the cores, and the estimate is right.
    others = {facts.rank: load.crowding * min(1.0, facts.cores) for facts, load in zip(examined.facts, estimate.loads, strict=True)}
    rank, times = max(others.items(), key=lambda each: each[1])
    if times > CROWDED:
        return Finding("round", WARNING, f"{text}. Others kept the cores busy meanwhile: "
                                         f"for want of a core the batches of rank {rank} took {times:.2g} times as "
                       "long as they need, so do not believe these figures", "repeat it while nothing else runs here (uptime shows "
                       "the load), or on cores that are yours alone (sbatch --exclusive)")
    if estimate.wire_share > MUCH:
        return Finding("round", WARNING, text, "fewer ranks, more local work between rounds (training.epochs), or a faster network")
    return Finding("round", OK, text)


RUN_CHECKS: tuple[Check, ...] = (check_wire, check_run_folder, check_same_folder, check_locks, check_renames, check_job, check_round)
