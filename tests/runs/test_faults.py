"""What goes wrong ends the whole job soon, with a message and an exit code of its own, and never costs what was there before."""
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from hpcfl import __version__, cli
from hpcfl.contract import ClientSite
from hpcfl.data import store
from hpcfl.data.embedded import load_digits
from hpcfl.files import lock
from hpcfl.runs import checkpoint, launch
from hpcfl.training.group import Group
from hpcfl.wire import communicator
from tests.support.fork_server import Forked
from tests.support.tiny_runs import apart, carry_out, checkpoint_of, deterministic, left_half_written, outcome, started, tiny, undisturbed, write_job

RANK = 'import os, time\nfrom pathlib import Path\nrank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0"))\n'
PAUSES = RANK + """
from hpcfl.runs import checkpoint
save = checkpoint.save

def save_and_wait(folder, world, state, *rest):
    save(folder, world, state, *rest)
    if state.rows == 2:
        Path(f"paused-{rank}").touch()
        while not Path("go").exists():
            time.sleep(0.01)
checkpoint.save = save_and_wait
"""
STICKS_WHILE_WRITING = RANK + """
from hpcfl.files import atomic
from hpcfl.files import atomic
sync = atomic.sync

def sync_or_stick(path):
    if "round-000003" in str(path):
        Path(f"writing-{rank}").touch()
        time.sleep(1000)
    sync(path)
atomic.sync = sync_or_stick
"""
RAISES = RANK + """
from hpcfl.algorithms.standalone import Standalone
train = Standalone.train

def stumble(self, group, message, site):
    if site.round == 1 and rank == "{rank}":
        Path("raised").touch()
        raise ZeroDivisionError("broken on purpose")
    return train(self, group, message, site)
Standalone.train = stumble
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The job of this file, its job file, and the folder of a run that nobody disturbed, in one process; any number of ranks gives the same bits."""
    folder = tmp_path_factory.mktemp("whole")
    job = deterministic(tiny("fedvtc", checkpoint={"every": 1, "keep": 2}))
    return job, write_job(folder, job), carry_out(job, folder / "run")


@pytest.fixture
def hpcfl(monkeypatch, capsys):
    """The command line in this process, without MPI: (exit code, what it printed)."""
    monkeypatch.setattr(communicator, "connect", lambda deterministic=False, **how: communicator.Communicator(communicator.Alone(), deterministic))

    def call(*arguments: object) -> tuple[int, str]:
        with undisturbed(), pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return ended.value.code, printed.out + printed.err
    return call


def started_at(process: int) -> str:
    """When a process began, as LOCK has it."""
    return datetime.fromtimestamp(psutil.Process(process).create_time(), UTC).isoformat(timespec="seconds")


def files(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file with its content and when it was last written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def stopped_at(whole, rows: int, folder: Path) -> None:
    """The run of this file as it is when it ends after so many rounds, whyever."""
    save = checkpoint.save

    def save_and_leave(folder, world, state, *rest):
        save(folder, world, state, *rest)
        if state.rows == rows:
            raise InterruptedError
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(checkpoint, "save", save_and_leave)
        carry_out(whole[0], folder)


def resumes_to_the_same_end(whole, folder):
    """Whether the run goes on, here in one process, and ends as if nothing had happened."""
    job, _, undisturbed_run = whole
    carry_out(job, folder)
    found = apart(outcome(folder), outcome(undisturbed_run))
    assert not found, "\n".join(found)
    assert (folder / "STATUS").read_text() == "done\n" and not left_half_written(folder)


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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_all_within_seconds_with_its_own_traceback(rank, tmp_path):
    path = write_job(tmp_path, tiny("standalone", federation={"participation": 1.0}))
    with started(tmp_path, "run", path, "--out", tmp_path / "run", ranks=3, fault=RAISES.format(rank=rank)) as job:
        job.reaches("raised")
        since = time.monotonic()
        assert job.ends() == 1 and time.monotonic() - since < 5, job.text()
        text = job.text()
    assert f"hpcfl: rank {rank}: Traceback" in text and text.count("hpcfl: rank") == 1
    assert "ZeroDivisionError: broken on purpose" in text and ", in stumble" in text
    assert re.fullmatch(rf"failed: ZeroDivisionError on rank {rank}, clients? [\d, -]+: broken on purpose\n", (tmp_path / "run" / "STATUS").read_text())


def test_what_all_ranks_find_wrong_is_said_once_and_mpirun_returns_the_code(tmp_path):
    path = write_job(tmp_path, tiny("standalone"))
    with started(tmp_path, "run", path, "--set", "training.momentun=0.9", "--out", tmp_path / "run", ranks=3) as job:
        assert job.ends() == 2, job.text()
    assert job.text().count("unknown key training.momentun; did you mean 'momentum'?") == 1 and not (tmp_path / "run").exists()


def test_ranks_that_do_not_see_each_other_do_not_start(tmp_path):
    path = write_job(tmp_path, tiny("standalone"))
    with started(tmp_path, "run", path, "--out", tmp_path / "run", environment={"OMPI_COMM_WORLD_SIZE": "4"}) as job:
        assert job.ends() == 3, job.text()
    assert "mpirun of Open MPI started 4 ranks (OMPI_COMM_WORLD_SIZE), but each sees only itself" in job.text() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("setting", "complaint"), [
    ("training.lrr=0.1", "unknown key training.lrr; did you mean 'lr'?"),
    ("trainig.lr=0.1", "unknown section [trainig]; did you mean 'training'?"),
    ("training.lr=fast", "training.lr = 'fast' is not allowed; wanted a number above 0"),
    ("training.epochs=1.5", "training.epochs = 1.5 is not allowed; wanted a whole number of at least 1"),
    ("federation.participation=2", "federation.participation = 2 is not allowed; wanted a number above 0 and at most 1"),
    ("run.deterministic=1", "run.deterministic = 1 is not allowed; wanted true or false"),
    ("algorithm.name=fedvct", "algorithm.name = 'fedvct' is not known; did you mean 'fedvtc'?"),
    ("models.names=['resnet9']", "models.names: 'resnet9' is not in the zoo; did you mean 'resnet8'?"),
    ("learning", "--set 'learning': wanted section.key=value")])
def test_a_job_that_cannot_be_is_usage_and_says_what_is_wanted(setting, complaint, hpcfl, tmp_path):
    path = write_job(tmp_path, tiny("standalone"))
    code, text = hpcfl("run", path, "--set", setting, "--out", tmp_path / "run")
    assert code == 2 and complaint in text and "Traceback" not in text
    assert not (tmp_path / "run" / "job.toml").exists()


def test_a_job_file_that_cannot_be_read_is_usage(hpcfl, tmp_path):
    (tmp_path / "broken.toml").write_text("[run\n")
    assert hpcfl("run", tmp_path / "none.toml") == (2, f"hpcfl: {tmp_path / 'none.toml'}: cannot read the job file: No such file or directory\n")
    code, text = hpcfl("run", tmp_path / "broken.toml")
    assert code == 2 and f"{tmp_path / 'broken.toml'}: not a TOML file" in text


def test_a_wanted_gpu_that_is_not_there_is_the_environment(hpcfl, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, text = hpcfl("run", write_job(tmp_path, tiny("standalone", run={"device": "cuda"})), "--out", tmp_path / "run")
    assert code == 3 and "run.device = 'cuda', but torch sees no CUDA device" in text and "set run.device = 'auto' to use the CPU" in text


def test_the_same_bits_are_not_promised_on_a_gpu(hpcfl, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "choose_device", lambda wanted, local_rank: torch.device("cuda", local_rank))
    code, text = hpcfl("run", write_job(tmp_path, deterministic(tiny("standalone"))), "--out", tmp_path / "run")
    assert code == 2 and "run.deterministic = true promises the same bits" in text and "set run.device = 'cpu'" in text


def test_a_gpu_computes_in_float32_and_not_in_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert launch.choose_device("auto", 3) == torch.device("cuda", 1)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_data_that_are_not_there_say_how_to_get_them(hpcfl, tmp_path, monkeypatch):
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "data"))
    for name, way_out in (("mnist", "get it with: hpcfl data get mnist [--from DIR]"), ("own", "hpcfl data import own --npz FILE"),
                          ("digit", "did you mean 'digits'?")):
        code, text = hpcfl("run", write_job(tmp_path, tiny("standalone", data={"name": name})), "--out", tmp_path / name)
        assert code == 4 and f"data set '{name}' is not in the cache {tmp_path / 'data'}" in text and way_out in text


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


def test_clients_without_images_are_a_matter_of_the_data(hpcfl, tmp_path):
    code, text = hpcfl("run", write_job(tmp_path, tiny("standalone")), "--set", "federation.clients=100", "--out", tmp_path / "run")
    assert code == 4 and "100 clients with data.minimum = 12 images each need 1200, there are" in text


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


@pytest.mark.parametrize(("engine", "whom"), [("sequential", "client 3"), ("vmap", "clients 1, 3")])
def test_the_status_after_an_exception_names_type_rank_and_client(engine, whom, hpcfl, tmp_path, monkeypatch):
    epochs = ClientSite.epochs

    def broken(self, client, *passes):
        for each in epochs(self, client, *passes):
            if client == 3:
                raise RuntimeError("boom")
            yield each
    monkeypatch.setattr(ClientSite, "epochs", broken)
    job = tiny("standalone", federation={"participation": 1.0}, training={"engine": engine})
    code, text = hpcfl("run", write_job(tmp_path, job), "--out", tmp_path / "run")
    assert code == 1 and "RuntimeError: boom" in text
    assert (tmp_path / "run" / "STATUS").read_text() == f"failed: RuntimeError on rank 0, {whom}: boom\n"


def test_several_threads_are_refused_where_the_same_bits_are_promised(hpcfl, tmp_path):
    path = write_job(tmp_path, deterministic(tiny("standalone", run={"threads": 2})))
    for how in (["--out", tmp_path / "run"], ["--dry-run"]):
        code, text = hpcfl("run", path, *how)
        assert code == 2 and "run.deterministic = true promises the same bits, which take one thread for each rank" in text and "got run.threads = 2" in text
    assert hpcfl("run", path, "--set", "run.threads=1", "--out", tmp_path / "run")[0] == 0


def test_a_run_in_python_takes_its_folder_as_a_word_too_and_ends_with_the_way_to_its_report(tmp_path, capsys):
    folder = tmp_path / "a run"
    with undisturbed():
        assert launch.run(tiny("standalone"), communicator.Communicator(communicator.Alone()), str(folder), "auto") == folder
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"done after [\d.]+ (ms|s): {folder}; figures and a page: hpcfl report '{folder}'", lines[-1]), lines[-1]
    assert lines[0].startswith("tiny: standalone on digits, 5 clients on 1 rank(s) of 1 thread, 3 rounds -> ")


def test_a_learning_rate_beyond_reason_is_non_finite_training(hpcfl, tmp_path):
    code, text = hpcfl("run", write_job(tmp_path, tiny("fedavg")), "--set", "training.lr=1e30", "--out", tmp_path / "run")
    assert code == 6 and "phase rounds, round 0: training of client" in text and "Traceback" not in text


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_second_job_on_a_run_folder_is_refused_and_told_of_the_first(ranks, whole, tmp_path):
    folder = tmp_path / "run"
    with started(tmp_path, "run", whole[1], "--out", folder, ranks=ranks, fault=PAUSES) as first:
        first.reaches("paused-0")
        before, holder = files(folder), first.rank(0).pid
        with started(tmp_path / "second", "run", whole[1], "--out", folder, ranks=ranks) as second:
            assert second.ends() == 2, second.text()
        text = " ".join(second.text().split())
        assert text.count(f"{folder}: another run is at work in this folder (process {holder} on {platform.node()}, since {started_at(holder)}); "
                          "wait for it, or choose another --out") == 1
        assert files(folder) == before and first.process.poll() is None
        (tmp_path / "go").touch()
        assert first.ends() == 0, first.text()
    assert not apart(outcome(folder), outcome(whole[2]))


def test_the_lock_of_a_process_that_was_killed_holds_nobody_up(whole, hpcfl, tmp_path):
    folder = tmp_path / "run"
    run = Forked(tmp_path, "run", whole[1], "--out", folder, fault=PAUSES)
    while not (tmp_path / "paused-0").exists():
        assert run.process.is_alive(), run.text()
        time.sleep(0.02)
    run.process.kill()
    run.ends()
    held = json.loads((folder / "LOCK").read_text())
    assert (held["host"], held["pid"]) == (platform.node(), run.process.pid) and abs(datetime.fromisoformat(held["started"]).timestamp() - time.time()) < 60
    code, text = hpcfl("run", whole[1], "--out", folder)
    assert code == 0 and "resumed after round 2 of 4" in text and not apart(outcome(folder), outcome(whole[2]))
    assert json.loads((folder / "LOCK").read_text()) == {"host": platform.node(), "pid": os.getpid(), "started": started_at(os.getpid())}


@pytest.mark.parametrize(("text", "words"), [
    ('{"host": "n1", "pid": 7, "started": "2026-01-02T03:04:05+00:00"}\n', "process 7 on n1, since 2026-01-02T03:04:05+00:00"),
    ("process 7 on n1\n", "process 7 on n1"), ('{"host": "n1"}', '{"host": "n1"}'), ("7", "7"), ("", "")])
def test_who_holds_a_folder_is_said_whoever_wrote_it(text, words):
    assert lock.holder_text(text) == words


def of_another(folder: Path, **written: object) -> None:
    """A run folder whose newest checkpoint says something else of itself."""
    path = checkpoint_of(folder, 4) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | written))
    (folder / "STATUS").write_text("running\n")


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_checkpoint_of_another_format_is_refused_with_both_versions(ranks, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[2], folder)
    of_another(folder, hpcfl="7.8.9", format=99, ranks="in words", files=[])
    before = {path: content for path, content in files(folder).items() if path.parent.name != "log" and path.name != "LOCK"}
    with started(tmp_path, "run", whole[1], "--out", folder, ranks=ranks) as job:
        assert job.ends() == 5, job.text()
    assert job.text().count(f"{checkpoint_of(folder, 4)}: written by hpcfl 7.8.9 in checkpoint format 99, this is hpcfl {__version__} with format "
                            f"{checkpoint.CHECKPOINT_FORMAT}; nothing was changed. Resume with the version that wrote it\n") == 1, job.text()
    assert "--may-differ" not in job.text() and before.items() <= files(folder).items() and not left_half_written(folder)


def test_a_checkpoint_of_another_version_is_refused_unless_that_may_be(whole, hpcfl, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[2], folder)
    of_another(folder, hpcfl="7.8.9")
    code, text = hpcfl("run", whole[1], "--out", folder)
    assert code == 5 and f"written by hpcfl 7.8.9 in checkpoint format {checkpoint.CHECKPOINT_FORMAT}, this is hpcfl {__version__} with" in text
    assert "allow it with --may-differ hpcfl\n" in text
    assert launch.revisit(folder)[1].rows == 4, "to look at it is allowed"
    code, text = hpcfl("run", whole[1], "--out", folder, "--may-differ", "hpcfl")
    assert code == 0 and "resumed after round 4 of 4" in text


def test_a_truncated_checkpoint_is_named_with_an_earlier_one(whole, hpcfl, tmp_path):
    shutil.copytree(whole[2], tmp_path / "run")
    (tmp_path / "run" / "STATUS").write_text("running\n")
    file = checkpoint_of(tmp_path / "run", 4) / "rank-0000.h5"
    os.truncate(file, file.stat().st_size // 2)
    code, text = hpcfl("run", whole[1], "--out", tmp_path / "run")
    assert code == 5 and f"{file}: is damaged or truncated" in text and f"--resume {checkpoint_of(tmp_path / 'run', 3)}" in text


def test_one_rank_with_a_full_disk_ends_the_job_and_the_checkpoint_before_stays(whole, tmp_path):
    """Rank 1 may write no file of more than 30 kB, and its client states are larger."""
    folder = tmp_path / "run"
    stopped_at(whole, 2, folder)
    with started(tmp_path, "run", whole[1], "--out", folder, ranks=2, fault=SMALL_DISK_ON_RANK_1) as job:
        assert job.ends() == 5, job.text()
    assert "checkpoints/round-000003/rank-0001.h5: could not be written: File too large; what was there before is untouched" in " ".join(job.text().split())
    assert (folder / "LATEST").read_text() == "round-000002\n" and (folder / "STATUS").read_text().startswith("failed: ") and not left_half_written(folder)
    resumes_to_the_same_end(whole, folder)


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a file system of so many bytes; skips where that takes rights that we do not have."""
    made = []

    def of(size: int) -> Path:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = shutil.which("mount")
        if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs rights that this process does not have")
        made.append(disk)
        return disk
    yield of
    for disk in made:
        subprocess.run(["umount", "--lazy", disk], check=True)


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


def test_a_gpu_without_memory_for_a_checkpoint_is_not_a_full_disk(whole, hpcfl, tmp_path, monkeypatch):
    def no_memory(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    stopped_at(whole, 1, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Group, "states", no_memory)
        code, text = hpcfl("run", whole[1], "--out", tmp_path / "run")
    assert code == 1 and "CUDA out of memory" in text and "Free space" not in text and "could not be written" not in text
    assert (tmp_path / "run" / "LATEST").read_text() == "round-000001\n" and not left_half_written(tmp_path)
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


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_trained(hpcfl, tmp_path):
    path = write_job(tmp_path, tiny("standalone"))
    (tmp_path / "file").write_text("in the way")
    code, text = hpcfl("run", path, "--out", tmp_path / "file" / "run")
    assert code == 2 and f"{tmp_path / 'file' / 'run'}: cannot write there: Not a directory; choose a writable folder with --out" in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder_is_said(hpcfl, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    code, text = hpcfl("run", write_job(tmp_path, tiny("standalone")), "--out", tmp_path / "closed" / "run")
    assert code == 2 and f"{tmp_path / 'closed' / 'run'}: cannot write there: Permission denied" in text
