"""Checks of what a run meets, on facts that the machine at hand cannot show: slow wires, odd file systems, jobs that leave ranks idle."""
from dataclasses import replace

import pytest

from hpcfl.doctor import run_checks
from hpcfl.doctor.findings import OK, PROBLEM, WARNING
from hpcfl.doctor.run_folder import FolderFacts
from tests.support.doctor_facts import FOLDER, GB, LARGE, busy, cpu, examined, judged, of_a_job, wire


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


def test_a_folder_where_rank_0_cannot_write_is_judged_once():
    unwritable = examined(cpu(0), cpu(1), folder=FolderFacts("runs", "Read-only file system"))
    assert [check(unwritable) for check in run_checks.RUN_CHECKS[2:]] == [None] * 5
