"""SLURM: a job as a script for sbatch, which survives its time limit by checkpoints and requeueing; slurm/ holds two such scripts to start from."""
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcfl.errors import EnvironmentFault, JobError
from hpcfl.runs.choices import CHOICES
from hpcfl.settings.job import Job, load

DAY_S, HOUR_S, MINUTE_S = 86_400, 3_600, 60
TIMES = {                                                          # the forms of sbatch --time, as seconds of their numbers
    r"(\d+)": (MINUTE_S,), r"(\d+):(\d+)": (MINUTE_S, 1), r"(\d+):(\d+):(\d+)": (HOUR_S, MINUTE_S, 1),
    r"(\d+)-(\d+)": (DAY_S, HOUR_S), r"(\d+)-(\d+):(\d+)": (DAY_S, HOUR_S, MINUTE_S), r"(\d+)-(\d+):(\d+):(\d+)": (DAY_S, HOUR_S, MINUTE_S, 1)}
WORDS = (                                                          # fields of Request that a site has names for: the form, and what is wanted
    ("partition", r"[\w.,-]*", "a name as `sinfo` shows it"), ("account", r"[\w.,-]*", "a name as `sacctmgr show associations` shows it"),
    ("qos", r"[\w.,-]*", "a name as `sacctmgr show qos` shows it"), ("mem", r"(\d+[KMGT]?)?", "memory of each node, for example 64G"),
    ("srun", r"\w*", "one of the types that `srun --mpi=list` shows, for example pmix"))
OWN = {                                                            # options of sbatch that are worked out from these of `hpcfl slurm`
    **dict.fromkeys(("--nodes", "-N"), "--nodes"), **dict.fromkeys(("--ntasks", "-n", "--ntasks-per-node"), "--ranks"),
    **dict.fromkeys(("--cpus-per-task", "-c"), "--cpus"), **dict.fromkeys(("--time", "-t"), "--time"), "--signal": "--lead",
    **dict.fromkeys(("--array", "-a"), "--array")}
COMMENT = 48                                                       # the column of comments in a script

OPENING = """\
#!/usr/bin/env bash
# {what} under SLURM: `sbatch THIS-FILE`, in the folder from which the paths below start.
# At the signal before the time limit (--signal, in seconds) the round in progress ends with a checkpoint, the job is requeued, and it goes on in the same
# run folder until it is done.
"""

BODY = """\
# From here on nothing needs to be edited.
launcher= interrupted= outlived=
pause=10                                        # seconds between two looks at whether the launcher outlives the run
status() { stat -c '%i %y' "$out/STATUS" 2>/dev/null; }      # of the run folder; it is replaced whenever it changes
ended() { [[ $(status) != "$before" && $(<"$out/STATUS") != running ]]; }
checkpoint() { cat "$out/LATEST" 2>/dev/null; }
before=$(status) resumed=$(checkpoint)
pass_on() {                                     # by the launcher to all ranks, as soon as they listen: neither it nor they would survive it earlier or later
    while kill -0 "$launcher" 2>/dev/null; do
        [[ $(status) != "$before" && $(<"$out/STATUS") == running ]] && kill -USR1 "$launcher" && return
        sleep 1
    done
}
guard() {                                       # a launcher that cannot reach a host waits for it, for as long as the network is down, also after the run
    local looks=0
    while sleep "$pause" && kill -0 "$launcher" 2>/dev/null; do
        ended && looks=$((looks + 1)) || looks=0
        [[ $looks -le 6 ]] || { kill -USR2 $$; return; }
    done
}
trap 'interrupted=yes; pass_on &' USR1
trap 'interrupted=yes outlived=yes; kill -KILL "$launcher"' USR2

this=$SLURM_JOB_ID
[[ ! $SLURM_ARRAY_TASK_ID ]] || this=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID      # the number alone may mean the whole array
printf '%s: job %s, start %d, on %s: %s -> %s\\n' "$(date -u +%FT%TZ)" "$this" "$((${SLURM_RESTART_COUNT:-0} + 1))" "$SLURM_JOB_NODELIST" "$job" "$out"
[[ ${#modules[@]} == 0 ]] || module load "${modules[@]}" || exit 3
[[ ! $venv ]] || source "$venv/bin/activate" || exit 3
HPCFL_SIGNAL_LEAD_S=$(sed -n 's/^#SBATCH --signal=B:USR1@\\([0-9]*\\).*/\\1/p' "$0")
export HPCFL_SIGNAL_LEAD_S                      # with it hpcfl can say when its rounds are too long for it

"${launch[@]}" "${container[@]}" hpcfl run "$job" "${settings[@]}" --out "$out" &
launcher=$!
guard &
[[ ! $interrupted ]] || { interrupted=; pass_on & }     # it came before there was anybody to pass it on to

code=0
wait "$launcher" || code=$?
while [[ $interrupted && $code -gt 128 ]]; do   # it was the signal that ended the wait, the launcher is still at work
    interrupted= code=0
    wait "$launcher" || code=$?
done
if [[ $outlived ]]; then
    printf 'the run has ended and its launcher has not, so it was killed\\n'
    code=0                                      # STATUS says how the run ended
fi
if [[ $code == 0 && $(<"$out/STATUS") != done ]]; then       # Open MPI's way of losing a node: it goes on elsewhere if it has come anywhere
    [[ $(checkpoint) == "$resumed" ]] && code=1 || code=75
    printf 'the launcher ended without an error before the run was done; did it lose a node? STATUS: %s\\n' "$(<"$out/STATUS")"
fi
printf '%s: job %s ended with exit code %d\\n' "$(date -u +%FT%TZ)" "$this" "$code"
if [[ $code == 75 ]]; then                      # there is a checkpoint to go on from; every other code is an end, good or bad
    scontrol requeue "$this" || printf 'not requeued; to go on by hand, set out=%q above and submit again\\n' "$out"
fi
exit "$code"
"""


@dataclass(frozen=True)
class Request:
    """What is asked of SLURM; nodes, ranks and GPUs over all nodes together.

    Raises: JobError for what SLURM would refuse or what would waste a GPU.
    """

    nodes: int = 1
    ranks: int = 0                                                 # 0: one per GPU, without GPUs one per node
    gpus: int = 0
    cpus: int = 0                                                  # per rank; 0: what the site gives
    time: str = "01:00:00"
    lead_s: int = 120                                              # from the signal to the time limit
    partition: str = ""                                            # the site's default; so are account, qos and mem
    srun: str = ""                                                 # the PMI for srun; without one mpirun is the launcher
    account: str = ""
    qos: str = ""
    mem: str = ""                                                  # of each node
    gpu_type: str = ""                                             # any
    others: tuple[str, ...] = ()                                   # options for sbatch, word by word

    def __post_init__(self):
        for name, least in (("nodes", 1), ("ranks", 0), ("gpus", 0), ("cpus", 0), ("lead_s", 1)):
            if getattr(self, name) < least:
                raise JobError(f"--{name.removesuffix('_s')} {getattr(self, name)}: wanted a whole number of at least {least}")
        for name in ("gpus", "ranks"):
            if getattr(self, name) % self.nodes:
                raise JobError(f"--{name} {getattr(self, name)} on {self.nodes} nodes: wanted a multiple of {self.nodes}, equally many on each node")
        if 0 < self.ranks < self.gpus:
            raise JobError(f"--ranks {self.ranks} with {self.gpus} GPUs: {self.gpus - self.ranks} would stay idle, as a rank uses one GPU; "
                           f"wanted --ranks {self.gpus} or a multiple of it, or fewer --gpus")
        if self.gpus and self.ranks % self.gpus:
            raise JobError(f"--ranks {self.ranks} with {self.gpus} GPUs: wanted a multiple of {self.gpus}, equally many on each GPU")
        for name, form, wanted in WORDS:
            if not re.fullmatch(form, getattr(self, name), re.ASCII):
                raise JobError(f"--{name} {getattr(self, name)!r}: wanted {wanted}")
        for number, word in enumerate(self.others):
            if not word.isprintable() or not (number or word.startswith("-")):
                raise JobError(f"{word!r} behind --: wanted options of sbatch, for example -- --constraint=a100 --exclusive")
            if own := OWN.get(word.partition("=")[0]):
                raise JobError(f"{word} behind --: the script stands on it; wanted {own} before the --")
        if self.lead_s >= (limit_s := parse_seconds(self.time)):
            raise JobError(f"--lead {self.lead_s} with --time {self.time}: the signal would come before the job starts; wanted less than {limit_s} s")

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node."""
        return (self.ranks or self.gpus or self.nodes) // self.nodes

    def header(self, name: str, tasks: int = 0, at_once: int = 0) -> list[str]:
        """The lines for sbatch; `tasks`: of an array, 0 for no array; `at_once`: so many of them at most, 0 for no limit."""
        gpus, limit = self.gpus // self.nodes, f"%{at_once}" if at_once else ""
        options = {"job-name": re.sub(r"[^\w.+-]", "_", name), "nodes": self.nodes, "ntasks-per-node": self.ranks_per_node,
                   "cpus-per-task": self.cpus, "gpus-per-node": f"{self.gpu_type}:{gpus}" if self.gpu_type else gpus, "mem": self.mem,
                   "partition": self.partition, "account": self.account, "qos": self.qos, "time": self.time,
                   "signal": f"B:USR1@{self.lead_s}", "array": f"0-{tasks - 1}{limit}" if tasks else "", "output": f"%x-{'%A_%a' if tasks else '%j'}.out"}
        lines = [*(f"--{option}={value}" for option, value in options.items() if value), "--requeue", "--open-mode=append"]
        for word in self.others:
            if word.startswith("-"):
                lines.append(shlex.quote(word))
            else:                                                  # the value of the option before it
                lines[-1] += f" {shlex.quote(word)}"
        return [f"#SBATCH {line}" for line in lines]

    def launch(self) -> str:
        """The launcher and its options, for bash."""
        if self.srun:                                              # srun takes neither the cores from sbatch nor the others' end from a dead rank by itself
            return f'(srun --mpi={self.srun} --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}" --wait=60)'
        return '(mpirun -n "$SLURM_NTASKS" --bind-to none)'        # hpcfl divides the cores that a node gives the job among its ranks


@dataclass(frozen=True)
class Sweep:
    """A job once for every variant and seed, `at_once` at most (0: all); a variant is the settings ("section.key=value") that it changes.

    Raises: JobError where two would share a run folder.
    """

    seeds: tuple[int, ...]
    variants: tuple[tuple[str, ...], ...] = ()
    at_once: int = 0

    def __post_init__(self):
        for what, names in (("seed", self.seeds), ("variant", tuple(map(self.folder, self.variants)))):
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise JobError(f"{what} {twice} is there twice, and both would have one run folder; wanted each once")

    @staticmethod
    def folder(variant: Sequence[str]) -> str:
        """The name of a variant, also as a folder."""
        return re.sub(r"[^\w.,=+-]+", "_", ",".join(variant)).strip("_")

    def script(self, folder: str) -> list[str]:
        """Bash that chooses seed and variant of an array's task; `folder` is quoted for bash already."""
        lines = ["# The sweep: seeds first, then variants. Another number of either changes --array above.",
                 f"seeds=({' '.join(map(str, self.seeds))})", "seed=${seeds[SLURM_ARRAY_TASK_ID % ${#seeds[@]}]}", 'settings+=(--set "run.seed=$seed")']
        if not self.variants:
            return [*lines, f"out={folder}/seed-$seed"]
        lines.append("case $((SLURM_ARRAY_TASK_ID / ${#seeds[@]})) in")
        for number, variant in enumerate(self.variants):
            lines.append(f"    {number}) variant={shlex.quote(self.folder(variant))}; settings+=({_sets(variant)}) ;;")
        return [*lines, "esac", 'settings+=(--set "run.name=$variant")', f"out={folder}/$variant/seed-$seed"]


def check_job(path: Path, settings: Sequence[str], variants: Sequence[Sequence[str]] = ()) -> Job:
    """The job without a variant, after every variant was read too: a mistake shows here and not at the end of the queue.

    Raises: JobError as `load` does.
    """
    for variant in variants:
        load(path, CHOICES, [*settings, *variant, f"run.name={Sweep.folder(variant)}"])
    return load(path, CHOICES, settings)


def write_script(job: Path, name: str, request: Request, settings: Sequence[str] = (), out: Path | None = None,
                 sweep: Sweep | None = None, venv: str = "") -> str:
    """The script for sbatch of a job file whose job is called `name`, with `settings` ("section.key=value") changed.

    out: the run folder, of a sweep the folder of its run folders; by default runs/<name>/slurm-<number of the job>. venv: the virtual environment of hpcfl.
    """
    tasks = len(sweep.seeds) * max(1, len(sweep.variants)) if sweep else 0
    number = "SLURM_ARRAY_JOB_ID" if sweep else "SLURM_JOB_ID"
    folder = shlex.quote(str(out)) if out else f"{shlex.quote(str(Path('runs', name)))}/slurm-${number}"
    site = [("modules=()", "for `module load`, for example modules=(openmpi)"),
            (f"venv={shlex.quote(venv)}", "with hpcfl; empty where modules or container have it"),
            ("container=()", "what starts a command inside it, for example container=(apptainer exec --nv hpcfl.sif)")]
    lines = [*request.header(name, tasks, sweep.at_once if sweep else 0), "", "# The site: three lines to edit.",
             *(f"{line:<{COMMENT}}# {comment}" for line, comment in site), "",
             "# The job.", f"job={shlex.quote(str(job))}", f"settings=({_sets(settings)})", f"launch={request.launch()}",
             *(sweep.script(folder) if sweep else [f"out={folder}"]), ""]
    return OPENING.format(what="A sweep of hpcfl runs" if sweep else "An hpcfl run") + "\n".join(lines) + "\n" + BODY


def submit(text: str) -> str:
    """Hand a script to sbatch and return what it says.

    Raises: EnvironmentFault where there is no sbatch or it refuses.
    """
    try:
        answer = subprocess.run(["sbatch"], input=text, encoding="utf-8", errors="surrogateescape", capture_output=True, check=False)
    except FileNotFoundError:
        raise EnvironmentFault("there is no sbatch in PATH; submit on a login node of the cluster, or leave --submit out to print the script") from None
    if answer.returncode:
        raise EnvironmentFault(f"sbatch refuses the script: {answer.stderr.strip()}; without --submit the script is printed, to be edited and submitted")
    return answer.stdout.strip()


def parse_seconds(time: str) -> int:
    """A time limit as sbatch takes it (minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on), in seconds.

    Raises: JobError for any other text, and for no time at all.
    """
    for form, units in TIMES.items():
        found = re.fullmatch(form, time, re.ASCII)
        if found and (total := sum(int(number) * unit for number, unit in zip(found.groups(), units, strict=True))):
            return total
    raise JobError(f"--time {time!r}: wanted minutes, hours:minutes:seconds or days-hours, for example --time 8:00:00")


def parse_seeds(text: str) -> tuple[tuple[int, ...], int]:
    """(seeds, how many at once or 0) from what sbatch --array takes: numbers and ranges, perhaps with a step or a limit, "0-2,7,10-20:5%2".

    Raises: JobError for any other text and for an empty range.
    """
    listed, limited, at_once = text.partition("%")
    if limited and not re.fullmatch(r"0*[1-9]\d*", at_once, re.ASCII):
        raise JobError(f"--array {text!r}: wanted behind the % how many runs may be at work at once, for example --array 0-9%2")
    found: list[int] = []
    for part in listed.split(","):
        told = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part.strip(), re.ASCII)
        first, last, step = (int(told[1]), int(told[2] or told[1]), int(told[3] or 1)) if told else (1, 0, 1)
        if first > last or step == 0:
            raise JobError(f"--array {text!r}: {part!r} is no seed and no range of seeds; wanted for example --array 0-2, 0,5,7 or 0-8:2 (every second)")
        found += range(first, last + 1, step)
    return tuple(found), int(at_once or 0)


def parse_gpus(per_node: str, nodes: int) -> tuple[int, str]:
    """(GPUs over all nodes, their type or "") from what sbatch --gpus-per-node takes, "4" or "a100:4".

    Raises: JobError for any other text.
    """
    told = re.fullmatch(r"(?:([A-Za-z][\w.-]*):)?(\d+)", per_node, re.ASCII)
    if not told:
        raise JobError(f"--gpus-per-node {per_node!r}: wanted a number or type:number, for example 4 or a100:4")
    return int(told[2]) * nodes, told[1] or ""


def find_environment() -> str:
    """The virtual environment that this process runs in, empty where that is none to activate."""
    return sys.prefix if Path(sys.prefix, "bin", "activate").is_file() else ""


def _sets(settings: Sequence[str]) -> str:
    return " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
