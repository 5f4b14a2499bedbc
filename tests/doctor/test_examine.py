"""`hpcfl doctor` as users start it: on one rank and on four, in set-ups that are broken, with ranks that fail, and on a job that then runs."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpcfl import cli
from hpcfl.doctor import examine
from hpcfl.doctor.findings import OK, PROBLEM, Examined
from hpcfl.wire import communicator
from tests.support import doctor_facts
from tests.support.doctor_facts import busy, cpu, gpu, of_a_job
from tests.support.tiny_runs import outcome, started, tiny, undisturbed, write_job

NAMES = ["MPI library", "launch", "mpirun", "hosts", "software", "HDF5", "devices", "CUDA-aware MPI", "compiler", "cores", "memory", "wire", "run folder",
         "same folder", "locks", "renames", "job", "round"]
OF_A_JOB = {"job", "round"}
RANK = 'import os\nrank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))\n'
PILED_UP = RANK + """
if rank is not None:
    from hpcfl.wire import communicator
    connect = communicator.connect
    def connect_on_one_core(*arguments, **named):                  # not before: four processes would load torch on one core
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return connect(*arguments, **named)
    communicator.connect = connect_on_one_core
"""
EACH_FAILS_IN_ITS_WAY = RANK + """
if rank == "1":
    from hpcfl.doctor import probes
    def look_around(*arguments):
        raise RuntimeError("broken on purpose")
    probes.look_around = look_around
if rank == "2":
    os.makedirs("elsewhere")
    os.chdir("elsewhere")
if rank == "3":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""


@pytest.fixture
def doctor(monkeypatch, capsys):
    """The command in this process, without MPI: (exit code, what it printed as one line)."""
    monkeypatch.setattr(communicator, "connect", lambda deterministic=False, **how: communicator.Communicator(communicator.Alone(), deterministic))

    def call(*arguments: object) -> tuple[int, str]:
        with undisturbed(), pytest.raises(SystemExit) as ended:
            cli.main(["doctor", *map(str, arguments)])
        return ended.value.code, " ".join(capsys.readouterr().out.split())
    return call


def examined(folder: Path, *arguments: object, code: int = 0, **launch) -> dict:
    """What `hpcfl doctor --json` printed on its standard output, after it ended with a code."""
    with started(folder, "doctor", *arguments, "--json", **launch) as process:
        assert process.ends() == code, process.text()
        text = process.text()
    return json.JSONDecoder().raw_decode(text[text.index("{"):])[0]                      # behind it mpirun says that a rank did not end with 0


def verdict(found: dict, name: str) -> str:
    """One finding as a line."""
    finding = next(finding for finding in found["findings"] if finding["name"] == name)
    return "{verdict}: {text} -> {fix}".format(**finding)


def names(found: dict) -> list[str]:
    """Those of the findings, less the ones that only GPUs give rise to."""
    return [finding["name"] for finding in found["findings"] if finding["name"] in NAMES]


def test_one_rank_is_looked_at_and_nothing_is_left_behind(tmp_path):
    with started(tmp_path, "doctor") as process:
        assert process.ends() == 0, process.text()
        lines = process.text().splitlines()
    told = [line[9:24].strip() for line in lines if line.startswith(("ok ", "warning "))]
    assert [name for name in told if name in NAMES] == [name for name in NAMES if name not in OF_A_JOB | {"same folder"}]
    assert "ok       launch          without a launcher: one rank" in lines and "ok       wire            one rank: nothing travels" in lines
    assert lines[-1].startswith("hpcfl doctor, 1 rank: 0 problems, ") and max(map(len, lines)) <= 150
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output.txt"]


def test_four_ranks_are_looked_at_together(tmp_path):
    found = examined(tmp_path, "--out", tmp_path / "new" / "run", ranks=4)
    assert names(found) == [name for name in NAMES if name not in OF_A_JOB]
    assert found["verdict"] in ("ok", "warning") and found["exit_code"] == 0 and not (tmp_path / "new").exists()
    assert found["ranks"] == 4 and [facts["rank"] for facts in found["by_rank"]] == [0, 1, 2, 3] and found["launch"]["ranks"] == 4
    assert verdict(found, "launch").startswith("ok: mpirun of Open MPI started 4 ranks (OMPI_COMM_WORLD_SIZE) and MPI sees as many")
    assert verdict(found, "hosts").endswith(": ranks 0-3 -> ")
    timed = {(row["collective"], row["rank_bytes"]) for row in found["wire"] if row["median_s"] > 0}
    assert timed == {(name, size) for name in ("Bcast", "Reduce", "Gatherv") for size in (8, 4096, 262144, 4194304)}
    assert found["folder"]["locks"] == dict.fromkeys("123", "refused") and found["folder"]["reads"] > 0 and not found["folder"]["torn"]


def test_the_estimated_bytes_of_federated_averaging_are_those_that_a_run_moves(tmp_path):
    job = write_job(tmp_path / "job", tiny("fedavg", federation={"participation": 1.0, "rounds": 1}))
    found = examined(tmp_path, job, "--set", "training.epochs=2", ranks=2)
    estimate = found["estimate"]
    assert names(found) == NAMES and found["job"]["training"]["epochs"] == 2
    assert sum(sum(load["clients"].values()) for load in estimate["loads"]) == 5 and 0 < estimate["wire_share"] < 1
    with started(tmp_path, "run", job, "--out", tmp_path / "run", ranks=2) as process:
        assert process.ends() == 0, process.text()
    server, other = outcome(tmp_path / "run").metrics["bytes/transported"][0].tolist()
    assert other == estimate["up_bytes"] and server == 2 * estimate["down_bytes"], "before training and, for the evaluation, after it"


def test_ranks_that_do_not_see_each_other_are_a_problem_that_one_of_them_tells(tmp_path):
    found = examined(tmp_path, environment={"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, code=3)
    assert verdict(found, "launch") == (
        "problem: mpirun of Open MPI started 4 ranks (OMPI_COMM_WORLD_SIZE), but each sees only itself: there would be 4 runs side by side instead of one -> "
        "Launch with the mpirun that belongs to the MPI library of mpi4py, or with srun --mpi=pmix (srun --mpi=list shows what the site offers); mpi4py must "
        "be installed and find its MPI library on every node. To run one process here, whatever launched the shell that it is started from: hpcfl run --alone")
    assert found["verdict"] == "problem" and found["exit_code"] == 3
    with started(tmp_path, "doctor", environment={"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}) as process:
        assert process.ends() == 0 and process.text() == ""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="there are no two cores of which one can idle")
def test_ranks_piled_up_on_one_core_while_another_is_idle_are_a_problem(tmp_path):
    found = examined(tmp_path, ranks=4, fault=PILED_UP, code=3)
    text = verdict(found, "cores")
    assert text.startswith("problem: ") and "4 ranks on 1 core; for each rank 0.25, and 1 thread, while " in text
    assert "--bind-to none, or srun --cpus-per-task=" in text
    assert [finding["name"] for finding in found["findings"] if finding["verdict"] == "problem"] == ["cores"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be taken away here")
def test_too_few_cores_for_a_launch_are_a_warning(tmp_path):
    found = examined(tmp_path, ranks=2, fault="import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n")
    text = verdict(found, "cores")
    assert text.startswith("warning: ") and "2 ranks on 1 core; for each rank 0.5, and 1 thread: all takes 2 times as long" in text
    assert "start at most 1 rank here, or ask for more cores (sbatch and srun --cpus-per-task=N). mpirun --oversubscribe lets more ranks start" in text


def test_a_run_folder_that_cannot_be_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("in the way")
    found = examined(tmp_path, "--out", tmp_path / "file" / "run", ranks=2, code=3)
    text = verdict(found, "run folder")
    assert text.startswith(f"problem: {tmp_path / 'file' / 'run'}: rank 0 cannot write there: [Errno 20] Not a directory")
    assert text.endswith(" -> choose a writable folder with --out")
    assert found["wire"], "the other checks go on"


@pytest.fixture
def read_only(tmp_path):
    """A folder in which nobody can write, root included; skips where mounting takes rights that we do not have."""
    folder, mount = tmp_path / "read-only", shutil.which("mount")
    folder.mkdir(mode=0o555)
    mounted = os.geteuid() == 0
    if mounted and (mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True, check=False).returncode):
        pytest.skip("root may write in every folder but on a read-only file system, and mounting one is not allowed here")
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_read_only_run_folder_is_a_problem(read_only, doctor):
    for folder in (read_only, read_only / "run"):
        code, text = doctor("--out", folder)
        assert code == 3 and f"problem run folder {folder}: rank 0 cannot write there: [Errno " in text, text
    assert not list(read_only.iterdir())


def test_a_missing_compiler_is_a_warning(tmp_path):
    programs = str(Path(sys.executable).parent)
    if shutil.which("g++", path=programs):
        pytest.skip("the compiler lies beside Python")
    found = examined(tmp_path, environment={"PATH": programs, "CXX": ""})
    text = verdict(found, "compiler")
    assert text.startswith("warning: rank 0: 'g++' (CXX if set, else g++) is not in PATH; training runs uncompiled") and "apt-get install g++" in text
    assert found["exit_code"] == 0


def test_ranks_that_fail_are_named_and_keep_nobody_waiting(tmp_path):
    """Rank 1 cannot look around, the path of the run folder leads rank 2 to another place, and rank 3 may write no file as large as a checkpoint."""
    job = write_job(tmp_path / "job", tiny("fedavg"))
    found = examined(tmp_path, job, "--out", "run", ranks=4, fault=EACH_FAILS_IN_ITS_WAY, code=3)
    assert verdict(found, "ranks").startswith("problem: rank 1: RuntimeError: broken on purpose -> ")
    assert verdict(found, "same folder").startswith("problem: run: rank 2: what rank 0 wrote does not appear within 5 s -> that path leads to different places")
    text = verdict(found, "run folder")
    assert text.startswith("problem: rank 3: ") and "could not be written: File too large" in text
    assert verdict(found, "job").startswith("problem: ") and found["estimate"] is None
    assert [facts["rank"] for facts in found["by_rank"]] == [0, 2, 3] and len(found["wire"]) == 12
    assert found["folder"]["locks"] == dict.fromkeys("13", "refused") and found["folder"]["reads"] > 0 and not found["folder"]["torn"]
    assert not (tmp_path / "run").exists() and not list((tmp_path / "elsewhere").iterdir()), "what was tried has left nothing behind"


def test_a_job_that_could_not_begin_is_a_problem(doctor, tmp_path, monkeypatch):
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "data"))
    job = write_job(tmp_path, tiny("fedavg"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for setting, reason in (("training.momentun=0.9", "unknown key training.momentun; did you mean 'momentum'?"),
                            ("data.name=mnist", "get it with: hpcfl data get mnist"), ("run.device=cuda", "torch sees no CUDA device"),
                            ("federation.clients=100", "100 clients with data.minimum = 12 images each need 1200")):
        code, text = doctor(job, "--set", setting, "--out", tmp_path / "run")
        assert code == 3 and "problem job " in text and reason in text and "Traceback" not in text, text


@pytest.mark.parametrize("facts", [
    doctor_facts.examined(*map(cpu, range(8))), doctor_facts.examined(*(gpu(rank, rank % 4) for rank in range(8))),
    doctor_facts.examined(cpu(0, launcher_cores=2)),
    doctor_facts.examined(*map(cpu, range(8)), **of_a_job(*[busy()] * 8))], ids=["cpu", "gpu", "alone", "job"])
def test_nothing_is_wrong_where_nothing_is_wrong(facts):
    found = examine.list_findings(facts)
    assert not [finding for finding in found if finding.verdict != OK] and examine.choose_exit_code(found) == 0
    assert examine.render(facts, found).endswith(f"hpcfl doctor, {len(facts.facts)} rank{'s' * (facts.ranks > 1)}: 0 problems, 0 warnings")


def test_where_no_rank_can_tell_that_is_all_there_is_to_say():
    found = examine.list_findings(Examined(2, None, (), {0: "broken", 1: "broken"}, doctor_facts.wire(), doctor_facts.FOLDER))
    assert [(finding.name, finding.verdict, finding.text) for finding in found] == [("ranks", PROBLEM, "ranks 0-1: broken")]
    assert examine.choose_exit_code(found) == 3
