"""What goes wrong ends the whole job soon, with a message and an exit code of its own, and never costs what was there before."""
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from hpcfl.contract import ClientSite
from hpcfl.data import store
from hpcfl.data.embedded import load_digits
from tests.support.faults import PAUSES, RANK, resumes_to_the_same_end, stopped_at
from tests.support.fork_server import Forked
from tests.support.tiny_runs import apart, carry_out, checkpoint_of, left_half_written, outcome, started, tiny, write_job

STICKS_WHILE_WRITING = RANK + """
from hpcfl.files import atomic
sync = atomic.sync

def sync_or_stick(path):
    if "round-000003" in str(path):
        Path(f"writing-{rank}").touch()
        time.sleep(1000)
    sync(path)
atomic.sync = sync_or_stick
"""
SMALL_DISK_ON_RANK_1 = RANK + """
import resource
from hpcfl.runs import checkpoint
save = checkpoint.save

def save_in_little_space(*arguments):
    if rank == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    save(*arguments)
checkpoint.save = save_in_little_space
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_and_the_run_resumes(rank, whole, tmp_path):
    with started(tmp_path, "run", whole[1], "--out", tmp_path / "run", ranks=2, fault=PAUSES) as job:
        job.reaches("paused-0")
        job.reaches("paused-1")
        other = job.rank(1 - rank)
        job.rank(rank).kill()
        assert job.ends() not in (0, 75)
        psutil.wait_procs([other], timeout=10)
        assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE, "a rank outlived the job"
    assert (tmp_path / "run" / "STATUS").read_text() == "running\n"
    resumes_to_the_same_end(whole, tmp_path / "run")


def test_a_job_killed_while_it_writes_resumes_from_the_checkpoint_before(whole, tmp_path):
    folder = tmp_path / "run"
    with started(tmp_path, "run", whole[1], "--out", folder, ranks=2, fault=STICKS_WHILE_WRITING) as job:
        job.reaches("writing-0")
        job.reaches("writing-1")
        job.end_all()
    assert len(left_half_written(folder)) == 2 and (folder / "LATEST").read_text() == "round-000002\n"
    resumes_to_the_same_end(whole, folder)


@pytest.mark.parametrize(("number", "receiver", "times"), [(signal.SIGUSR1, "launcher", 2), (signal.SIGUSR1, "rank", 1), (signal.SIGTERM, "rank", 2)])
def test_a_signal_stops_the_job_after_a_checkpoint_with_exit_code_75(number, receiver, times, whole, tmp_path):
    folder = tmp_path / "run"
    with started(tmp_path, "run", whole[1], "--out", folder, ranks=2, fault=PAUSES) as job:
        job.reaches("paused-0")
        job.reaches("paused-1")
        for _ in range(times):
            (job.process if receiver == "launcher" else job.rank(1)).send_signal(number)
            time.sleep(0.2)                                        # a launcher passes signals on in its own time
        (tmp_path / "go").touch()
        assert job.ends() == 75, job.text()
        assert "stopped on a signal after round 3 of 4; a checkpoint is there, the same command goes on" in job.text()
    assert (folder / "STATUS").read_text().startswith("stopped: ") and (folder / "LATEST").read_text() == "round-000003\n"
    if receiver == "launcher":                                     # the same command, on another number of ranks
        with started(tmp_path / "again", "run", whole[1], "--out", folder, ranks=3) as job:
            assert job.ends() == 0 and "resumed after round 3 of 4" in job.text(), job.text()
        assert not apart(outcome(folder), outcome(whole[2]))
    else:
        resumes_to_the_same_end(whole, folder)


def test_a_signal_stops_a_process_without_mpi_too(whole, tmp_path):
    with started(tmp_path, "run", whole[1], "--out", tmp_path / "run", fault=PAUSES) as job:
        job.reaches("paused-0")
        job.process.send_signal(signal.SIGTERM)
        (tmp_path / "go").touch()
        assert job.ends() == 75, job.text()
    resumes_to_the_same_end(whole, tmp_path / "run")


@pytest.mark.parametrize("damage", ["truncated", "one byte changed"])
def test_a_damaged_data_file_is_named_and_nothing_is_trained(damage, hpcfl, tmp_path, monkeypatch):
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "data"))
    data = load_digits()
    np.savez(tmp_path / "own.npz", x_train=data.train_images, y_train=data.train_labels, x_test=data.test_images, y_test=data.test_labels)
    file = store.import_npz("own", tmp_path / "own.npz")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content if damage == "one byte changed" else content[:len(content) // 2])
    code, text = hpcfl("run", write_job(tmp_path, tiny("standalone", data={"name": "own"})), "--out", tmp_path / "run")
    assert code == 4 and str(file) in text and "Traceback" not in text and not (tmp_path / "run" / "metrics.h5").exists()


def test_nan_in_own_data_is_refused_at_the_door(hpcfl, tmp_path, monkeypatch):
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "data"))
    data = load_digits()
    images = data.train_images / 255
    images[7, 0, 3, 3] = np.nan
    np.savez(tmp_path / "own.npz", x_train=images, y_train=data.train_labels, x_test=data.test_images / 255, y_test=data.test_labels)
    code, text = hpcfl("data", "import", "own", "--npz", tmp_path / "own.npz")
    assert code == 4 and str(tmp_path / "own.npz") in text and "x_train" in text and "NaN" in text
    assert not list((tmp_path / "data").glob("*.h5")) and not left_half_written(tmp_path)


def test_training_that_goes_non_finite_names_client_phase_and_round(hpcfl, tmp_path, monkeypatch):
    """Client 3 alone meets an infinite image, in the second round."""
    epochs = ClientSite.epochs

    def poisoned(self, client, *passes):
        for each in epochs(self, client, *passes):
            yield each | {"x": each["x"] / (0 if (client, self.round) == (3, 1) else 1)}
    monkeypatch.setattr(ClientSite, "epochs", poisoned)
    job = tiny("standalone", federation={"participation": 1.0}, checkpoint={"every": 1, "keep": 5})
    code, text = hpcfl("run", write_job(tmp_path, job), "--out", tmp_path / "run")
    assert code == 6 and "phase rounds, round 1: training of client 3 reached NaN or infinity" in text and "Traceback" not in text
    assert "the loss of client 3 was nan before its first step: what it received, or its data or loss, is at fault, not its training" in text
    assert (tmp_path / "run" / "STATUS").read_text().startswith("failed: phase rounds, round 1: training of client 3 ")
    monkeypatch.setattr(ClientSite, "epochs", epochs)
    carry_out(job, tmp_path / "run")                               # the round before is still there
    assert not apart(outcome(tmp_path / "run"), outcome(carry_out(job, tmp_path / "never poisoned")))


def test_a_learning_rate_beyond_reason_is_non_finite_training(hpcfl, tmp_path):
    code, text = hpcfl("run", write_job(tmp_path, tiny("fedavg")), "--set", "training.lr=1e30", "--out", tmp_path / "run")
    assert code == 6 and "phase rounds, round 0: training of client" in text and "Traceback" not in text


def test_one_rank_with_a_full_disk_ends_the_job_and_the_checkpoint_before_stays(whole, tmp_path):
    """Rank 1 may write no file of more than 30 kB, and its client states are larger."""
    folder = tmp_path / "run"
    stopped_at(whole, 2, folder)
    with started(tmp_path, "run", whole[1], "--out", folder, ranks=2, fault=SMALL_DISK_ON_RANK_1) as job:
        assert job.ends() == 5, job.text()
    assert "checkpoints/round-000003/rank-0001.h5: could not be written: File too large; what was there before is untouched" in " ".join(job.text().split())
    assert (folder / "LATEST").read_text() == "round-000002\n" and (folder / "STATUS").read_text().startswith("failed: ") and not left_half_written(folder)
    resumes_to_the_same_end(whole, folder)


def test_a_full_disk_ends_the_run_and_the_checkpoint_before_stays(whole, small_disk, tmp_path):
    stopped_at(whole, 2, tmp_path / "stopped")
    needed = sum(path.stat().st_size + 8192 for path in (tmp_path / "stopped").rglob("*"))
    disk = small_disk(needed + sum(path.stat().st_size for path in checkpoint_of(tmp_path / "stopped", 2).iterdir()) // 2)
    shutil.copytree(tmp_path / "stopped", disk / "run")
    with started(tmp_path, "run", whole[1], "--out", disk / "run") as job:
        assert job.ends() == 5, job.text()
    assert "could not be written: No space left on device; what was there before is untouched. Free space and give the same" in job.text(), job.text()
    assert "let it go on in another folder, with --resume FOLDER --out ANOTHER" in job.text()
    assert (disk / "run" / "STATUS").read_text().startswith("failed: ") and "No space left on device" in (disk / "run" / "STATUS").read_text()
    carry_out(whole[0], tmp_path / "another", resume=disk / "run")
    assert not apart(outcome(tmp_path / "another"), outcome(whole[2]))
    assert "Traceback" not in job.text() and not left_half_written(disk / "run") and (disk / "run" / "LATEST").read_text() == "round-000002\n"
    shutil.copytree(disk / "run", tmp_path / "run")
    resumes_to_the_same_end(whole, tmp_path / "run")


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.9])
def test_wherever_a_small_disk_becomes_full_the_run_ends_with_exit_code_5(share, whole, small_disk, tmp_path):
    """A run that begins on it: HDF5 used to crash while it closed what it could not flush, here in metrics.h5, there in the states."""
    needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in whole[2].rglob("*") if path.is_file())
    disk = small_disk(int(share * needed))
    run = Forked(tmp_path, "run", whole[1], "--out", disk / "run")
    assert run.ends() == 5, run.text()
    assert "could not be written: No space left on device" in run.text() and "Traceback" not in run.text() and not left_half_written(disk)
    assert (disk / "run" / "STATUS").read_text().startswith("failed: ") and not (tmp_path / "core").exists()
    shutil.copytree(disk / "run", tmp_path / "run")
    resumes_to_the_same_end(whole, tmp_path / "run")


@pytest.mark.parametrize("limit", [3_000, 12_000, 24_000])
def test_a_limit_on_the_size_of_files_ends_the_run_with_exit_code_5(limit, whole, tmp_path):
    run = Forked(tmp_path, "run", whole[1], "--out", tmp_path / "run", fault=f"""
import resource
from hpcfl.runs.simulation import Simulation
run = Simulation.run
def limited(self):
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    run(self)
Simulation.run = limited""")
    assert run.ends() == 5, run.text()
    assert "could not be written: File too large" in run.text() and not left_half_written(tmp_path)
    assert (tmp_path / "run" / "STATUS").read_text().startswith("failed: ")
    resumes_to_the_same_end(whole, tmp_path / "run")


@pytest.mark.parametrize("command", ["report", "trace", "audit"])
def test_a_full_disk_is_one_line_of_each_command_that_writes(command, whole, hpcfl, small_disk, tmp_path):
    disk = small_disk(8192)
    (disk / "fill").write_bytes(bytes(4096))
    arguments = {"report": ("report", whole[2], "--out", disk), "trace": ("report", whole[2], "--trace", disk / "trace.json"),
                 "audit": ("audit", whole[2], "--client", 0, "--samples", 1, "--out", disk)}[command]
    code, text = hpcfl(*arguments)
    assert code == 2 and f"cannot write the {command}: No space left on device; name another f" in text and "Traceback" not in text
    assert not left_half_written(disk)
    code, text = hpcfl(*(tmp_path / f"free-{each.name}" if isinstance(each, Path) and each.is_relative_to(disk) else each for each in arguments))
    assert code == 0, text


def test_a_full_disk_under_the_cache_is_one_line_and_its_way_out_works(hpcfl, small_disk, tmp_path, monkeypatch):
    data = load_digits()
    np.savez(tmp_path / "own.npz", x_train=data.train_images, y_train=data.train_labels, x_test=data.test_images, y_test=data.test_labels)
    disk = small_disk(60_000)
    monkeypatch.setenv("HPCFL_DATA", str(disk))
    code, text = hpcfl("data", "import", "own", "--npz", tmp_path / "own.npz")
    assert code == 4 and f"the cache {disk} cannot be written (No space left on device); free space there, or name another folder: export" in text
    assert not left_half_written(disk) and not list(disk.glob("*.h5"))
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "elsewhere"))
    assert hpcfl("data", "import", "own", "--npz", tmp_path / "own.npz")[0] == 0
    file = tmp_path / "elsewhere" / "own.h5"
    file.write_bytes(file.read_bytes()[:5000])
    code, text = hpcfl("data", "import", "own", "--npz", tmp_path / "own.npz")
    assert code == 4 and f"{file}: cannot be read as HDF5" in text and "Delete it and get or import it again" in text
    file.unlink()
    assert hpcfl("data", "import", "own", "--npz", tmp_path / "own.npz")[0] == 0


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Inside the block nobody, not even root, writes what he comes to through the folder; skips where that takes rights that we do not have."""
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "--bind", folder, folder], capture_output=True, check=False).returncode:
        pytest.skip("mounting a folder read-only needs rights that this process does not have")
    try:
        subprocess.run([mount, "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_folder_that_becomes_read_only_ends_the_run_and_the_checkpoint_before_stays(ranks, whole, tmp_path):
    folder = tmp_path / "run"
    with started(tmp_path, "run", whole[1], "--out", folder, ranks=ranks, fault=PAUSES) as job:
        job.reaches("paused-0")
        with read_only(folder):
            (tmp_path / "go").touch()
            assert job.ends() == 5, job.text()
            again = Forked(tmp_path / "again", "run", whole[1], "--out", folder)
            assert again.ends() == 2 and f"{folder}: cannot write there: Read-only file system" in again.text(), again.text()
    text = job.text()
    assert "could not be written: Read-only file system; what was there before is untouched" in text and "Traceback" not in text
    assert (folder / "LATEST").read_text() == "round-000002\n" and (folder / "STATUS").read_text() == "running\n"
    resumes_to_the_same_end(whole, folder)
