"""Under SLURM a run outlives its time limit, its nodes and its signals: the printed scripts, with stand-ins for SLURM and on a real one."""
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from hpcfl import cli
from hpcfl.errors import JobError
from hpcfl.report import summary, tables
from hpcfl.runs import slurm
from hpcfl.runs.slurm import Request, Sweep
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_cluster import started as cluster_started
from tests.support.tiny_runs import apart, outcome, started, tiny, undisturbed, write_job

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = {                                                       # the scripts that lie in slurm/, as arguments of `hpcfl slurm`
    "hpcfl.sbatch": ["--nodes", "2"],
    "sweep.sbatch": ["--nodes", "2", "--array", "0-2", "--vary", "algorithm.dm=off", "--vary", "algorithm.dm=cycle", "algorithm.noise=0.5"]}
STAND_INS = {                                                      # of the commands that a script calls; "run folder" stands for the one of hpcfl
    "mpirun": """#!/bin/bash
printf '%s\\0' "$@" >arguments
printf '%s' "$HPCFL_SIGNAL_LEAD_S" >lead
touch launched
out=${*: -1}
until [[ -e listen ]]; do sleep 0.02; done
trap 'touch signalled; exit 75' USR1
mkdir -p "$out"
echo running >"$out/new" && mv "$out/new" "$out/STATUS"
until [[ -s end ]]; do sleep 0.02; done
[[ -e leave ]] || echo done >"$out/STATUS"
exit "$(<end)"
""",
    "scontrol": "#!/bin/bash\nprintf '%s ' \"$@\" >>requeued\nexit \"$(cat refuse 2>/dev/null || echo 0)\"\n",
    "module": "#!/bin/bash\nprintf '%s ' \"$@\" >modules\nuntil [[ -e loaded ]]; do sleep 0.02; done\n"}
AWKWARD = ["run.name=it's \"this\" $HOME", 'models.names=["cnn1", "mlp2"]', "run.name=two\nlines", "run.name=`id`\\"]
PACE = """
import os, time
from pathlib import Path
from hpcfl.runs.simulation import Simulation
finish = Simulation._finish_round

def finish_in_time(self, place):
    time.sleep(0 if Path("go").exists() else {round_s})
    if self.comm.rank == 1 and place.row == {raises_in}:
        raise ZeroDivisionError("broken on purpose")
    if place.row == len(self.places) - 1 and {waits}:
        Path("last").touch()
        while not Path("go").exists():
            time.sleep(0.02)
    finish(self, place)
Simulation._finish_round = finish_in_time
"""


def printed(*arguments: object, capsys) -> tuple[int, str, str]:
    """What `hpcfl slurm` ends with and prints."""
    with undisturbed(), pytest.raises(SystemExit) as end:
        cli.main(["slurm", *map(str, arguments)])
    return end.value.code, *capsys.readouterr()


class StandIn:
    """A script under bash, with stand-ins for SLURM and the launcher."""

    def __init__(self, folder: Path, text: str, listens: bool = True, **variables: str):
        for name, body in STAND_INS.items():
            (folder / name).write_text(body)
            (folder / name).chmod(0o755)
        (folder / "script").write_text(text)
        self.folder = folder
        if listens:
            (folder / "listen").touch()
        environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", **variables}
        with (folder / "output").open("w") as output:
            self.process = subprocess.Popen(["bash", "script"], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def reaches(self, name: str) -> None:
        """Wait for a file."""
        until = time.monotonic() + 20
        while not (self.folder / name).exists():
            assert time.monotonic() < until and self.process.poll() is None, f"'{name}' did not come"
            time.sleep(0.01)

    def ends(self, code: int | None = None) -> tuple[int, str]:
        """Exit code and output; `code` is what the launcher then ends with."""
        if code is not None:
            self.reaches("launched")
            (self.folder / "end").write_text(str(code))
        return self.process.wait(timeout=20), self.read("output")

    def read(self, name: str) -> str:
        """A file that a stand-in wrote; empty where it did not."""
        return (self.folder / name).read_text() if (self.folder / name).exists() else ""

    def arguments(self) -> list[str]:
        """What hpcfl would be started with."""
        whole = self.read("arguments").split("\0")[:-1]
        return whole[whole.index("hpcfl") + 1:]


def script(**how) -> str:
    return slurm.write_script(Path("a job.toml"), "it", Request(), **how)


def test_a_request_fills_the_lines_for_sbatch():
    lines = Request(nodes=2, ranks=8, gpus=4, cpus=6, time="1-12:00:00", lead_s=300, partition="gpu,long").header("MNIST, twice", tasks=3)
    assert [line.removeprefix("#SBATCH --") for line in lines] == [
        "job-name=MNIST__twice", "nodes=2", "ntasks-per-node=4", "cpus-per-task=6", "gpus-per-node=2", "partition=gpu,long", "time=1-12:00:00",
        "signal=B:USR1@300", "array=0-2", "output=%x-%A_%a.out", "requeue", "open-mode=append"]


def test_what_is_not_asked_for_is_left_to_the_site():
    lines = Request().header("it")
    assert "#SBATCH --ntasks-per-node=1" in lines and "#SBATCH --output=%x-%j.out" in lines
    assert not [line for line in lines if any(word in line for word in ("cpus", "gpus", "partition", "array", "account", "qos", "mem"))]


def test_what_a_site_asks_for_reaches_sbatch(capsys):
    code, text, _ = printed(REPOSITORY / "jobs" / "fedvtc-digits.toml", "--nodes", 2, "--gpus-per-node", "a100:2", "--account", "ab12",
                            "--qos=high", "--mem", "64G", "--array", "0-9%2", "--", "--constraint=a100|h100", "--exclusive",
                            "--mail-type", "END,FAIL", "-x", "n[1-3]", capsys=capsys)
    lines = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert code == 0 and lines > {"--ntasks-per-node=2", "--gpus-per-node=a100:2", "--account=ab12", "--qos=high", "--mem=64G", "--array=0-9%2",
                                  "'--constraint=a100|h100'", "--exclusive", "--mail-type END,FAIL", "-x 'n[1-3]'"}


def test_an_option_that_a_command_does_not_know_is_told_with_the_usage_of_that_command(capsys):
    for command, *words in (("slurm", "JOB", "--acount", "ab12"), ("run", "JOB", "--nodes", "2"), ("data get", "mnist", "--npz")):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command.split(), *words])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.startswith(f"usage: hpcfl {command} [-h]"), error
        assert f"hpcfl {command}: error: unrecognized arguments: {words[1]}" in error


def test_what_is_behind_two_dashes_belongs_to_sbatch_under_slurm_alone():
    arguments = cli._parser().parse_args(["slurm", "JOB", "--nodes", "2", "--", "--nodelist=n1", "--", "-v"])
    assert (arguments.nodes, arguments.behind) == (2, ["--nodelist=n1", "--", "-v"]) and cli._parser().parse_args(["slurm", "JOB"]).behind == ()
    assert cli._parser().parse_args(["run", "--", "--odd-name"]).job == Path("--odd-name")


@pytest.mark.parametrize(("asked", "ranks_per_node"), [({"nodes": 3}, 1), ({"nodes": 2, "gpus": 8}, 4), ({"nodes": 2, "gpus": 2, "ranks": 8}, 4)])
def test_there_is_a_rank_for_each_gpu_or_node_unless_more_are_wanted(asked, ranks_per_node):
    assert Request(**asked).ranks_per_node == ranks_per_node


@pytest.mark.parametrize(("asked", "said"), [
    ({"nodes": 0}, "--nodes 0: wanted a whole number of at least 1"), ({"lead_s": 0}, "--lead 0: wanted"), ({"cpus": -1}, "--cpus -1: wanted"),
    ({"nodes": 2, "ranks": 3}, "--ranks 3 on 2 nodes: wanted a multiple of 2"), ({"nodes": 2, "gpus": 3}, "--gpus 3 on 2 nodes"),
    ({"gpus": 4, "ranks": 2}, "2 would stay idle"), ({"gpus": 2, "ranks": 3}, "--ranks 3 with 2 GPUs: wanted a multiple of 2"),
    ({"account": "a b"}, "--account 'a b': wanted a name"), ({"qos": "\n"}, "--qos"),
    ({"mem": "much"}, "--mem 'much': wanted memory of each node, for example 64G"),
    ({"others": ("exclusive",)}, "'exclusive' behind --: wanted options of sbatch"), ({"others": ("--x=a\nb",)}, "behind --: wanted options"),
    ({"others": ("--exclusive", "--array=0-3")}, "--array=0-3 behind --: the script stands on it; wanted --array before the --"),
    ({"others": ("-N", "3")}, "wanted --nodes before the --"), ({"partition": "a b"}, "--partition 'a b'"),
    ({"partition": "a\n#SBATCH --nodes=9"}, "--partition"), ({"srun": "pmix; id"}, "--srun 'pmix; id'"),
    ({"time": "soon"}, "--time 'soon': wanted minutes"), ({"time": "0"}, "--time '0'"), ({"time": "1:00:00\n"}, "--time"),
    ({"time": "00:02:00", "lead_s": 120}, "the signal would come before the job starts; wanted less than 120 s")])
def test_a_request_that_cannot_be_met_is_refused_with_what_to_ask_for(asked, said):
    with pytest.raises(JobError) as refused:
        Request(**asked)
    assert said in str(refused.value)


@pytest.mark.parametrize(("time_", "seconds"), [("90", 5400), ("90:30", 5430), ("01:02:03", 3723), ("2-03", 183_600), ("2-03:30", 185_400),
                                                ("1-00:00:01", 86_401)])
def test_time_limits_are_read_as_sbatch_reads_them(time_, seconds):
    assert slurm.parse_seconds(time_) == seconds


@pytest.mark.parametrize(("text", "seeds", "at_once"), [
    ("0-2,7, 5", (0, 1, 2, 7, 5), 0), ("0-8:2", (0, 2, 4, 6, 8), 0), ("0-9:3", (0, 3, 6, 9), 0), ("0-3%2", (0, 1, 2, 3), 2),
    ("1,10-20:5,3%10", (1, 10, 15, 20, 3), 10)])
def test_seeds_are_what_arrays_of_sbatch_are(text, seeds, at_once):
    assert slurm.parse_seeds(text) == (seeds, at_once)


def test_a_sweep_of_which_two_run_at_once_has_a_task_for_each_seed_and_variant():
    seeds, at_once = slurm.parse_seeds("0-8:2%2")
    text = script(sweep=Sweep(seeds, (("training.lr=0.1",), ("training.lr=0.2",)), at_once))
    assert "#SBATCH --array=0-9%2\n" in text and "seeds=(0 2 4 6 8)\n" in text


@pytest.mark.parametrize("text", ["0-9%", "0-9%0", "0-9%two", "0-9%2%3", "0-9%-1"])
def test_a_limit_of_runs_at_once_that_is_none_is_refused(text):
    with pytest.raises(JobError, match="how many runs may be at work at once"):
        slurm.parse_seeds(text)


@pytest.mark.parametrize(("text", "gpus"), [("4", (8, "")), ("a100:2", (4, "a100")), ("nvidia_h100.80:1", (2, "nvidia_h100.80"))])
def test_gpus_of_each_node_are_counted_over_all_nodes(text, gpus):
    assert slurm.parse_gpus(text, 2) == gpus


@pytest.mark.parametrize("text", ["four", "a100", "a100:", "4:a100", "-1", "a b:4"])
def test_gpus_of_each_node_that_are_no_number_are_refused(text):
    with pytest.raises(JobError, match="--gpus-per-node .*: wanted a number or type:number"):
        slurm.parse_gpus(text, 2)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,", "0-8:0", "5:2", "0-8:", "-1"])
def test_what_is_no_list_of_seeds_is_refused(text):
    with pytest.raises(JobError, match="is no seed and no range of seeds"):
        slurm.parse_seeds(text)


@pytest.mark.parametrize("sweep", [{"seeds": (1, 2, 1)}, {"seeds": (0,), "variants": (("a.b=x/y",), ("a.b=x y",))}])
def test_runs_that_would_share_a_folder_are_refused(sweep):
    with pytest.raises(JobError, match="is there twice, and both would have one run folder"):
        Sweep(**sweep)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--set", "training.momentun=0.9"], "unknown key training.momentun; did you mean 'momentum'?"),
    (["--vary", "training.lr=0.1", "--vary", "training.lr=quick"], "training.lr = 'quick' is not allowed"), (["--vary", "lr"], "wanted section.key=value"),
    (["--vary", *(f"training.lr=0.{digit * 12}" for digit in "123456789")], "at most 200 bytes"),
    (["--array", "1,1"], "seed 1 is there twice"), (["--gpus-per-node", "many"], "--gpus-per-node 'many'"), (["--nodes", "0"], "--nodes 0")])
def test_mistakes_show_before_anything_waits_in_a_queue(arguments, said, capsys):
    code, out, error = printed(REPOSITORY / "jobs" / "fedvtc-digits.toml", *arguments, capsys=capsys)
    assert (code, out) == (2, "") and error.startswith("hpcfl: ") and said in error and "Traceback" not in error


def test_submitting_without_sbatch_says_where_to_submit(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, error = printed(REPOSITORY / "jobs" / "fedvtc-digits.toml", "--submit", capsys=capsys)
    assert code == 3 and "there is no sbatch in PATH; submit on a login node" in error


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_scripts_of_the_repository_are_what_the_command_prints(name, monkeypatch, capsys):
    monkeypatch.setattr(slurm, "find_environment", lambda: ".venv")
    monkeypatch.chdir(REPOSITORY)
    code, text, _ = printed("jobs/fedvtc-digits.toml", *EXAMPLES[name], capsys=capsys)
    assert code == 0 and (REPOSITORY / "slurm" / name).read_text() == text


def test_a_script_activates_the_environment_that_printed_it(capsys):
    _, text, _ = printed(REPOSITORY / "jobs" / "fedvtc-digits.toml", capsys=capsys)
    venv = next(line for line in text.splitlines() if line.startswith("venv=")).split()[0].removeprefix("venv=").strip("'")
    assert venv == (sys.prefix if Path(sys.prefix, "bin", "activate").exists() else "")


def test_settings_and_paths_reach_hpcfl_letter_by_letter(tmp_path):
    run = StandIn(tmp_path, slurm.write_script(Path("my 'job'.toml"), "it", Request(lead_s=77), AWKWARD, Path("$out put/\"a\"")))
    assert run.ends(0)[0] == 0
    assert run.arguments() == ["run", "my 'job'.toml", *(word for setting in AWKWARD for word in ("--set", setting)), "--out", "$out put/\"a\""]
    assert run.read("lead") == "77" and run.read("arguments").split("\0")[:2] == ["-n", "4"] and not run.read("requeued")


def test_runs_of_a_job_have_a_folder_that_stays_when_it_is_requeued(tmp_path):
    run = StandIn(tmp_path, slurm.write_script(Path("job.toml"), "it's mine", Request()))
    run.ends(0)
    assert run.arguments() == ["run", "job.toml", "--out", "runs/it's mine/slurm-17"]


@pytest.mark.parametrize(("code", "requeued"), [(75, "requeue 17 "), (0, ""), (1, ""), (5, ""), (137, "")])
def test_only_a_run_that_was_stopped_with_a_checkpoint_is_requeued(code, requeued, tmp_path):
    run = StandIn(tmp_path, script())
    assert run.ends(code)[0] == code and run.read("requeued") == requeued


@pytest.mark.parametrize(("before", "after", "code"), [("", "round-000001", 75), ("round-000001", "round-000002", 75), ("", "", 1),
                                                       ("round-000001", "round-000001", 1)])
def test_a_launcher_that_ends_without_an_error_before_the_run_is_done_goes_on_if_it_came_anywhere(before, after, code, tmp_path):
    (tmp_path / "leave").touch()
    latest = tmp_path / "runs" / "it" / "slurm-17" / "LATEST"
    latest.parent.mkdir(parents=True)
    if before:
        latest.write_text(f"{before}\n")
    run = StandIn(tmp_path, script())
    run.reaches("launched")
    if after:
        latest.write_text(f"{after}\n")
    ended, text = run.ends(0)
    assert ended == code and "before the run was done; did it lose a node? STATUS: running" in text
    assert run.read("requeued") == ("requeue 17 " if code == 75 else "")


@pytest.mark.parametrize(("status", "came_on", "code"), [("done", True, 0), ("stopped: on a signal", True, 75), ("failed: a message is lost", True, 75),
                                                         ("failed: a message is lost", False, 1)])
def test_a_launcher_that_outlives_its_run_is_killed_and_the_job_ends_as_the_run_did(status, came_on, code, tmp_path):
    run = StandIn(tmp_path, script().replace("pause=10 ", "pause=0.05 "))
    run.reaches("runs/it/slurm-17/STATUS")
    time.sleep(0.6)
    assert run.process.poll() is None, "the run is at work"
    folder = tmp_path / "runs" / "it" / "slurm-17"
    if came_on:
        (folder / "LATEST").write_text("round-000001\n")
    (folder / "STATUS.part").write_text(f"{status}\n")
    os.replace(folder / "STATUS.part", folder / "STATUS")
    ended, text = run.ends()
    assert ended == code and "the run has ended and its launcher has not, so it was killed" in text
    assert run.read("requeued") == ("requeue 17 " if code == 75 else "")
    assert ("STATUS: failed: a message is lost" in text) == status.startswith("failed"), text


def test_a_launcher_that_only_takes_its_time_behind_the_run_is_not_killed(tmp_path):
    run = StandIn(tmp_path, script().replace("pause=10 ", "pause=0.2 "))
    run.reaches("runs/it/slurm-17/STATUS")
    (tmp_path / "runs" / "it" / "slurm-17" / "STATUS").write_text("done\n")
    time.sleep(0.5)
    code, text = run.ends(6)
    assert code == 6 and "killed" not in text


def test_a_site_that_does_not_requeue_is_told_how_to_go_on(tmp_path):
    (tmp_path / "refuse").write_text("1")
    code, text = StandIn(tmp_path, script(out=Path("my run"))).ends(75)
    assert code == 75 and "not requeued; to go on by hand, set out=my\\ run above and submit again" in text


@pytest.mark.parametrize("task", range(4))
def test_each_task_of_an_array_has_its_seed_its_settings_and_its_folder(task, tmp_path):
    sweep = Sweep((4, 9), (("training.lr=0.1",), ("training.lr=0.2", 'models.names=["cnn1", "a b"]')))
    run = StandIn(tmp_path, script(settings=["run.seed=0"], sweep=sweep), SLURM_ARRAY_JOB_ID="16", SLURM_ARRAY_TASK_ID=str(task))
    assert run.ends(75)[0] == 75
    seed, names = (4, 9)[task % 2], ("training.lr=0.1", "training.lr=0.2,models.names=_cnn1_,_a_b")
    arguments = run.arguments()
    assert [value for word, value in pairwise(arguments) if word == "--set"] == [
        "run.seed=0", f"run.seed={seed}", *sweep.variants[task // 2], f"run.name={names[task // 2]}"]
    assert arguments[-1] == f"runs/it/slurm-16/{names[task // 2]}/seed-{seed}" and run.read("requeued") == f"requeue 16_{task} "


@pytest.mark.parametrize("times", [1, 3])
def test_the_signal_goes_on_to_the_launcher_and_its_exit_code_counts(times, tmp_path):
    run = StandIn(tmp_path, script())
    run.reaches("runs/it/slurm-17/STATUS")
    for _ in range(times):
        run.process.send_signal(signal.SIGUSR1)
    code, text = run.ends()
    assert code == 75 and run.read("requeued") == "requeue 17 " and (tmp_path / "signalled").exists() and "ended with exit code 75" in text


@pytest.mark.parametrize("left", ["", "running", "stopped: for now"])
def test_the_signal_waits_until_the_ranks_of_this_start_listen(left, tmp_path):
    if left:                                                       # by a start before, which was killed or stopped
        (tmp_path / "runs" / "it" / "slurm-17").mkdir(parents=True)
        (tmp_path / "runs" / "it" / "slurm-17" / "STATUS").write_text(f"{left}\n")
    run = StandIn(tmp_path, script(), listens=False)
    run.reaches("launched")
    run.process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    assert run.process.poll() is None
    (tmp_path / "listen").touch()
    assert run.ends()[0] == 75 and run.read("requeued") == "requeue 17 "


def test_a_signal_after_the_end_of_the_run_changes_nothing(tmp_path):
    run = StandIn(tmp_path, script())
    run.reaches("runs/it/slurm-17/STATUS")
    (tmp_path / "runs" / "it" / "slurm-17" / "STATUS").write_text("done\n")
    run.process.send_signal(signal.SIGUSR1)
    time.sleep(1.2)
    assert run.ends(0)[0] == 0 and not (tmp_path / "signalled").exists() and not run.read("requeued")


def test_a_signal_during_the_modules_waits_for_the_launcher(tmp_path):
    run = StandIn(tmp_path, script().replace("modules=()", "modules=(gcc mpi)").replace("container=()", "container=(within 'the box')"))
    run.reaches("modules")
    run.process.send_signal(signal.SIGUSR1)
    (tmp_path / "loaded").touch()
    assert run.ends()[0] == 75 and run.read("requeued") == "requeue 17 " and run.read("modules") == "load gcc mpi "
    assert run.read("arguments").split("\0")[4:7] == ["within", "the box", "hpcfl"]


# From here on with a real SLURM. What takes long begins before the first of these tests and is looked at last.

@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_started() as running:
        yield running


class Submitted:
    """A job that the cluster carries out: two nodes, one rank on each, FedVTC on embedded digits."""

    def __init__(self, cluster: Cluster, folder: Path, request: Request, rounds: int, sweep: Sweep | None = None, round_s: float = 0.3, raises_in: int = -1,
                 waits: bool = False):
        self.cluster, self.folder = cluster, folder
        path = write_job(folder, tiny("fedvtc", federation={"rounds": rounds}, checkpoint={"every": 1, "keep": 1}, evaluation={"every": 50}))
        (folder / "fault").mkdir()
        (folder / "fault" / "sitecustomize.py").write_text(PACE.format(round_s=round_s, raises_in=raises_in, waits=waits))
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "fault"), os.environ.get("PYTHONPATH")]))}
        text = slurm.write_script(path, "it", request, out=folder / "run", sweep=sweep, venv=slurm.find_environment())
        self.number = cluster.submit(text, folder, environment)

    def waits_for(self, condition) -> None:
        """Wait until something is so."""
        until = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < until, f"{self.cluster.job(self.number)}\n{self.text()}"
            time.sleep(0.1)

    def gone_after_restart(self) -> None:
        """Wait until the job is requeued and nothing of its first start is left, which might otherwise finish the run in its place."""
        self.waits_for(lambda: self.cluster.job(self.number)["Restarts"] == "1")
        self.waits_for(lambda: not self.cluster.processes(str(self.folder / "run"), f"slurmstepd: [{self.number}."))

    def text(self) -> str:
        """What all its starts printed so far."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("it-*.out")))


@pytest.fixture(scope="module")
def long_run(cluster, tmp_path_factory) -> Submitted:
    """90 s of rounds under a time limit of a minute, of which SLURM leaves between 5 and 35 s until the signal; without delay after two of them."""
    return Submitted(cluster, tmp_path_factory.mktemp("long run"), Request(nodes=2, time="1", lead_s=25), rounds=60, round_s=1.5)


@pytest.fixture(scope="module")
def widowed(cluster, tmp_path_factory) -> Submitted:
    """A job in its last round, of whose nodes one does not answer any more; SLURM needs half a minute to believe it."""
    job = Submitted(cluster, tmp_path_factory.mktemp("widowed"), Request(nodes=2, partition="frail"), rounds=3, waits=True)
    job.waits_for((job.folder / "last").exists)
    cluster.kill_node("n4")
    return job


@pytest.mark.slurm
@pytest.mark.usefixtures("long_run", "widowed")
def test_sbatch_accepts_what_the_command_prints(cluster, tmp_path, capsys):
    job = write_job(tmp_path / "a folder", tiny("fedvtc", run={"name": "it's \"one\""}))
    for arguments in ([], ["--nodes", "2", "--ranks", "4", "--cpus", "1", "--time", "0-1:30", "--lead", "600", "--partition", "frail"],
                      ["--nodes", "2", "--gpus", "2", "--ranks", "4", "--srun", "pmix"],
                      ["--gpus-per-node", "1", "--mem", "1M", "--array", "0-8:2%2", "--", "--exclusive", "--mail-type", "NONE", "--comment=it's a | b"],
                      ["--array", "0-2", "--vary", "training.lr=0.1", "--vary", "training.lr=0.2"]):
        code, text, error = printed(job, "--set", "run.name=it's 2", "--out", tmp_path / "out put", *arguments, capsys=capsys)
        assert code == 0, error
        cluster.call("sbatch", "--test-only", text=text)


@pytest.mark.slurm
@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_a_signal_that_comes_while_the_ranks_start_is_not_lost(launcher, cluster, tmp_path):
    if launcher == "srun" and (refused := subprocess.run(["srun", "--mpi=pmix", "true"], env=cluster.environment, capture_output=True, text=True,
                                                         check=False)).returncode:
        pytest.skip(f"this SLURM has no PMIx (Debian: apt-get install libpmix-dev): {refused.stderr.splitlines()[0]}")
    job = Submitted(cluster, tmp_path, Request(nodes=2, srun="pmix" if launcher == "srun" else ""), rounds=6)
    job.waits_for(lambda: "start 1" in job.text())
    cluster.signal(job.number)
    cluster.reaches(job.number, "COMPLETED", restarts=1)
    assert "on 2 rank(s)" in job.text() and "of 7; a checkpoint is there" in job.text() and job.text().count("ended with exit code 75") == 1, job.text()
    assert "ended with exit code 0" in job.text() and (tmp_path / "run" / "STATUS").read_text() == "done\n"


@pytest.mark.slurm
def test_a_job_whose_launcher_loses_a_node_before_slurm_does_goes_on(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, Request(nodes=2), rounds=3, waits=True)
    job.waits_for((tmp_path / "last").exists)
    daemons = [(each, each.environ()) for each in cluster.processes("prted", "orted")]
    next(each for each, variables in daemons if (variables.get("SLURM_JOB_ID"), variables.get("SLURMD_NODENAME")) == (job.number, "n2")).kill()
    job.gone_after_restart()
    (tmp_path / "go").touch()
    cluster.reaches(job.number, "COMPLETED", restarts=1)
    assert "did it lose a node?" in job.text() and "resumed after round" in job.text() and (tmp_path / "run" / "STATUS").read_text() == "done\n", job.text()


@pytest.mark.slurm
def test_a_job_that_fails_is_not_requeued(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, Request(nodes=2), rounds=10, raises_in=1)
    assert cluster.reaches(job.number, "FAILED")["Restarts"] == "0"
    assert "hpcfl: rank 1: Traceback" in job.text() and "broken on purpose" in job.text()


@pytest.mark.slurm
def test_a_signal_in_the_last_round_does_not_requeue(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, Request(nodes=2), rounds=1, waits=True)
    job.waits_for((tmp_path / "last").exists)
    cluster.signal(job.number)
    time.sleep(1)                                                  # the ranks are told in the launcher's own time
    (tmp_path / "go").touch()
    assert cluster.reaches(job.number, "COMPLETED")["Restarts"] == "0"
    assert "ended with exit code 0" in job.text() and (tmp_path / "run" / "STATUS").read_text() == "done\n"


@pytest.mark.slurm
@pytest.mark.costly
def test_a_sweep_of_three_seeds_is_one_array_and_one_table(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, Request(nodes=2), rounds=12, sweep=Sweep((0, 1, 2)))
    job.waits_for((tmp_path / "run" / "seed-2" / "LATEST").exists)
    cluster.signal(f"{job.number}_2")
    restarts = [cluster.reaches(f"{job.number}_{task}", "COMPLETED")["Restarts"] for task in range(3)]
    assert restarts == ["0", "0", "1"], "the others go on untouched"
    found = [summary.summarise(tmp_path / "run" / f"seed-{seed}") for seed in range(3)]
    headings, *rows = [line.split() for line in tables.to_text({"fedavg": found}).split("\n\n")[0].splitlines()]
    assert [row[headings.index("seed")] for row in rows] == ["0", "1", "2"] and {row[headings.index("status")] for row in rows} == {"done"}
    assert all(each["rounds"] == 13 and each["ranks"] == 2 for each in found)
    assert len({json.dumps(each["accuracy"]["generalization"]) for each in found}) == 3


@pytest.mark.slurm
def test_a_job_whose_node_goes_down_is_requeued_and_goes_on(cluster, widowed):
    widowed.gone_after_restart()
    cluster.begin_node("n4")
    (widowed.folder / "go").touch()
    cluster.reaches(widowed.number, "COMPLETED", restarts=1)
    text = widowed.text()
    assert "resumed after round 3 of 4" in text and "exit code 75" not in text and text.count("exit code 0") == 1, text


@pytest.mark.slurm
@pytest.mark.costly
def test_a_run_longer_than_its_time_limit_ends_as_if_there_were_none(cluster, long_run, tmp_path):
    with started(tmp_path, "run", long_run.folder / "job.toml", "--out", tmp_path / "run", ranks=2) as undisturbed_run:
        assert undisturbed_run.ends() == 0, undisturbed_run.text()
    cluster.reaches(long_run.number, "RUNNING", restarts=2)
    (long_run.folder / "go").touch()
    restarts = int(cluster.reaches(long_run.number, "COMPLETED")["Restarts"])
    text = long_run.text()
    assert text.count("ended with exit code 75") == restarts == text.count("resumed after round") and text.count("ended with exit code 0") == 1, text
    assert not apart(outcome(long_run.folder / "run"), outcome(tmp_path / "run"))
