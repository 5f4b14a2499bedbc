"""The command line: run, slurm, report, predict, inspect, information, audit, data, bench, doctor."""
import argparse
import json
import sys
from pathlib import Path

import hpcfl
from hpcfl import signals
from hpcfl.errors import HpcflError

DATA_COLUMNS = ("name", "status", "train", "test", "classes", "image", "MB", "")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `hpcfl` and `python -m hpcfl`; ends the process with the exit codes of hpcfl.errors."""
    arguments = _parser().parse_args(argv)
    sys.exit(arguments.command(arguments))


def _run(arguments: argparse.Namespace) -> int:
    stop_requested = signals.listen()                              # before the imports below, which take seconds
    from hpcfl import launch
    from hpcfl.algorithms import CONFIGS
    from hpcfl.comm import connect
    from hpcfl.job import load

    def body() -> int:
        job = load(arguments.job, CONFIGS, arguments.set)
        if arguments.dry_run:
            return _dry_run(job, comm)
        engine = connect(deterministic=True) if job.run.deterministic else comm
        launch.run(job, engine, arguments.out, arguments.resume, tuple(arguments.may_differ), stop_requested)
        return 0
    comm = connect()
    return launch.guarded(body, comm)


def _dry_run(job, comm) -> int:
    """Check everything that can be checked without training, and say what would run."""
    from hpcfl import launch
    from hpcfl.world import World, resolved
    job = resolved(job, comm.size)
    world = World(job, comm, launch.choose_device(job.run.device, comm.local_rank))
    if comm.is_server:
        print(job.to_toml())
        for phase in world.plan:
            print(f"# phase {phase.name}: {phase.rounds} round(s) of {', '.join(type(step).__name__ for step in phase.steps)}")
        for client, (architecture, rank) in enumerate(zip(world.problem.architectures, world.home, strict=True)):
            print(f"# client {client}: {architecture} on rank {rank}, {len(world.split.train[client])} training images")
    return 0


def _slurm(arguments: argparse.Namespace) -> int:
    from hpcfl import slurm
    request = slurm.Request(arguments.nodes, arguments.ranks, arguments.gpus, arguments.cpus, arguments.time, arguments.lead, arguments.partition,
                            arguments.srun)
    job = slurm.checked(arguments.job, arguments.set, arguments.vary)
    seeds = slurm.seeds(arguments.array) if arguments.array else (job.run.seed,)
    sweep = slurm.Sweep(seeds, tuple(map(tuple, arguments.vary))) if arguments.array or arguments.vary else None
    text = slurm.script(arguments.job, job.run.name, request, arguments.set, arguments.out, sweep, slurm.environment())
    print(slurm.submit(text) if arguments.submit else text, end="\n" if arguments.submit else "")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from hpcfl import report
    if arguments.trace is not None:
        from hpcfl import trace
        path = trace.write(arguments.runs, Path(arguments.trace) if arguments.trace else (arguments.out or arguments.runs[0]) / "trace.json")
        print(f"trace: {path} (open it in ui.perfetto.dev or chrome://tracing)")
        return 0
    if arguments.json:
        summaries = [report.summary(run) for run in arguments.runs]
        print(json.dumps(summaries[0] if len(summaries) == 1 else summaries, indent=1))
        return 0
    page = report.write(arguments.runs, arguments.out or arguments.runs[0])
    print(report.table(arguments.runs))
    print(f"report: {page}")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from hpcfl import predict
    wire = predict.wire_of(arguments.doctor, arguments.latency, arguments.bandwidth)
    found = predict.table(arguments.run, wire, arguments.ranks, arguments.clients, arguments.phase)
    print(json.dumps(found, indent=1) if arguments.json else predict.render(found))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from hpcfl import inspect
    described = inspect.describe(arguments.file)
    print(json.dumps(described, indent=1) if arguments.json else inspect.render(described))
    return 0


def _information(arguments: argparse.Namespace) -> int:
    from hpcfl import information
    found = information.analyse(arguments.run, arguments.images, arguments.output)
    print(json.dumps(found, indent=1) if arguments.json else information.render(found))
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from hpcfl import audit
    found = audit.analyse(arguments.run, arguments.client, arguments.samples, arguments.out)
    print(json.dumps(found, indent=1) if arguments.json else audit.render(found))
    return 0


def _data_list(arguments: argparse.Namespace) -> int:
    from hpcfl.data import store
    from hpcfl.report import aligned
    rows = store.listing()
    print(json.dumps(rows, indent=1) if arguments.json else aligned([DATA_COLUMNS, *map(_data_row, rows)], words=2))
    return 0


def _data_row(row: dict) -> tuple[str, ...]:
    """The few columns of a data set that fit a terminal; --json has the rest."""
    there = "classes" in row
    numbers = [str(row[key]) if there else "" for key in ("train", "test", "classes")]
    note = {"absent": f"hpcfl data get {row['name']}", "damaged": row.get("problem", "")}.get(row["status"], row.get("licence", ""))
    return row["name"], row["status"], *numbers, "x".join(map(str, row["shape"])) if there else "", f"{row['file_bytes'] / 1e6:.1f}" if "file_bytes" in row else "", note


def _data_get(arguments: argparse.Namespace) -> int:
    from hpcfl.data import store
    print(store.get(arguments.name, arguments.source))
    return 0


def _data_import(arguments: argparse.Namespace) -> int:
    from hpcfl.data import store
    convert = store.import_npz if arguments.npz else store.import_folder
    print(convert(arguments.name, arguments.npz or arguments.folder))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from hpcfl import bench, launch
    from hpcfl.comm import connect

    def body() -> int:
        figures = bench.BENCHES[arguments.name](comm, arguments)
        if comm.is_server:
            print(json.dumps(figures, indent=1) if arguments.json else bench.render(figures))
        return 0
    comm = connect()
    return launch.guarded(body, comm)


def _doctor(arguments: argparse.Namespace) -> int:
    from hpcfl import doctor, launch
    from hpcfl.comm import connect
    from hpcfl.launchers import launched

    def body() -> int:
        examined, code = doctor.examine(comm, told, arguments.job, arguments.set, arguments.out), 0
        if examined is not None:
            found = doctor.findings(examined)
            print(json.dumps(doctor.described(examined, found), indent=1) if arguments.json else doctor.render(examined, found), flush=True)
            code = doctor.exit_code(found)
        return comm.share(code)                                    # after the printing, which a rank that ends with another code than 0 would cut short
    comm, told = connect(checked=False), launched()
    if comm.size == 1 and told and told.rank > 0:                  # of ranks that do not see each other one speaks for all
        return 0
    return launch.guarded(body, comm)


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(map(int, text.split(",")))
    if min(numbers) < 1:
        raise ValueError
    return numbers


def _residencies(text: str) -> tuple[str, ...]:
    from hpcfl.residency import RESIDENCIES
    if not RESIDENCIES.keys() >= set(text.split(",")):
        raise ValueError
    return tuple(text.split(","))


def _speaking(command):
    """What goes wrong where no rank is guarded (no communicator, or none yet) is printed and becomes the exit code."""
    def wrapped(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except HpcflError as error:
            print(f"hpcfl: {error}", file=sys.stderr)
            return error.exit_code
    return wrapped


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hpcfl", description=hpcfl.__doc__)
    parser.add_argument("--version", action="version", version=f"hpcfl {hpcfl.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="carry out a job (alone, under mpirun or under srun)")
    run.add_argument("job", type=Path, help="a job file (TOML); jobs/ holds examples")
    run.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                     help="override a setting; may be given several times; another algorithm.name leaves out what only the job's method has")
    run.add_argument("--out", type=Path, metavar="DIR", help="the run folder itself (default: runs/NAME/UTC-HASH)")
    run.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="auto (default): go on from the last checkpoint of this job if there is one")
    run.add_argument("--may-differ", action="append", default=[], metavar="SECTION.KEY",
                     help="a setting that may differ from the checkpoint's; hpcfl: the version that wrote it")
    run.add_argument("--dry-run", action="store_true", help="check the job, print it with every default and who would train where, train nothing")
    run.set_defaults(command=_speaking(_run))

    slurm = commands.add_parser("slurm", help="print a job as a script for sbatch, or submit it")
    slurm.add_argument("job", type=Path, help="a job file (TOML)")
    slurm.add_argument("--nodes", type=int, default=1, metavar="N")
    slurm.add_argument("--ranks", type=int, default=0, metavar="R", help="on all nodes together (default: one per GPU, without GPUs one per node)")
    slurm.add_argument("--gpus", type=int, default=0, metavar="G", help="on all nodes together (default: none)")
    slurm.add_argument("--cpus", type=int, default=0, metavar="C", help="cores of each rank (default: the site's)")
    slurm.add_argument("--time", default="01:00:00", metavar="T", help="limit of one start, as for sbatch (default: 01:00:00)")
    slurm.add_argument("--lead", type=int, default=120, metavar="S", help="seconds from the signal to the time limit (default: 120); a round must fit into it")
    slurm.add_argument("--partition", default="", metavar="P")
    slurm.add_argument("--srun", default="", metavar="PMI", help="launch by srun --mpi=PMI (pmix, pmi2, ...) instead of mpirun")
    slurm.add_argument("--array", default="", metavar="SEEDS", help="a run for each seed, for example 0-2 or 0,5,7")
    slurm.add_argument("--vary", action="append", nargs="+", default=[], metavar="SECTION.KEY=VALUE",
                       help="a run for each seed with these settings; given several times, so many runs for each seed")
    slurm.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting in every run; may be given several times")
    slurm.add_argument("--out", type=Path, metavar="DIR",
                       help="the run folder, with --array or --vary the folder of the run folders (default: runs/NAME/slurm-NUMBER)")
    slurm.add_argument("--submit", action="store_true", help="hand the script to sbatch instead of printing it")
    slurm.set_defaults(command=_speaking(_slurm))

    report = commands.add_parser("report", help="figures and one HTML page for one run or several")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    report.add_argument("--out", type=Path, metavar="DIR", help="where report.html and figures/ go (default: the first run folder)")
    only = report.add_mutually_exclusive_group()
    only.add_argument("--json", action="store_true", help="print the summary as JSON and write nothing")
    only.add_argument("--trace", nargs="?", const="", metavar="FILE",
                      help="write when each rank did what, for ui.perfetto.dev, and no page (default: trace.json in DIR)")
    report.set_defaults(command=_speaking(_report))

    predict = commands.add_parser("predict", help="what a round of a run would take on other numbers of ranks")
    predict.add_argument("run", type=Path, metavar="RUN", help="a run folder; best of a run on one rank")
    predict.add_argument("--doctor", type=Path, metavar="FILE", help="what `mpirun -n 2 hpcfl doctor --json` printed where the ranks would be: the speed of the wire")
    predict.add_argument("--latency", type=float, metavar="S", help="seconds of an empty message between two ranks, instead of the doctor's")
    predict.add_argument("--bandwidth", type=float, metavar="B", help="bytes per second between two ranks, instead of the doctor's")
    predict.add_argument("--ranks", type=_numbers, default="1,2,4,64,512", metavar="N,N,...", help="default: 1,2,4,64,512")
    predict.add_argument("--clients", type=int, metavar="K", help="so many clients, those of the run over and over (default: those of the run)")
    predict.add_argument("--phase", metavar="NAME", help="of a run in phases (default: the one that took longest)")
    predict.add_argument("--json", action="store_true", help="one object on standard output")
    predict.set_defaults(command=_speaking(_predict))

    inspect = commands.add_parser("inspect", help="what an HDF5 file holds")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(command=_speaking(_inspect))

    information = commands.add_parser("information", help="bits about labels and images in a run's global model and in smaller ones made of it")
    information.add_argument("run", type=Path, metavar="RUN", help="a run folder of fedconv, heterofl or fedrolex with a checkpoint")
    information.add_argument("--images", type=int, default=2000, help="of the official test set; memory grows with their square")
    information.add_argument("--output", choices=["logits", "features"], default="logits", help="what of the models is looked at")
    information.add_argument("--json", action="store_true")
    information.set_defaults(command=_speaking(_information))

    audit = commands.add_parser("audit", help="what a run's models and generator give away of their training images, and how real its samples look")
    audit.add_argument("run", type=Path, metavar="RUN", help="a run folder with a checkpoint, of any method")
    audit.add_argument("--client", type=int, metavar="K", help="audit this client alone, against its own training images")
    audit.add_argument("--samples", type=int, default=60, metavar="N", help="drawn of each class from the generator (default: 60)")
    audit.add_argument("--out", type=Path, metavar="DIR", help="where audit.json and audit-pairs.png go (default: the run's folder figures)")
    audit.add_argument("--json", action="store_true")
    audit.set_defaults(command=_speaking(_audit))

    data = commands.add_parser("data", help="data sets: list, get, import").add_subparsers(required=True, metavar="ACTION")
    listing = data.add_parser("list", help="data sets that are there or can be had")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(command=_speaking(_data_list))
    get = data.add_parser("get", help="convert a named data set once into the cache (HPCFL_DATA)")
    get.add_argument("name")
    get.add_argument("--from", dest="source", type=Path, metavar="DIR", help="the official files (folder or archive); without it they are downloaded")
    get.set_defaults(command=_speaking(_data_get))
    own = data.add_parser("import", help="convert data of your own into the cache")
    own.add_argument("name")
    kind = own.add_mutually_exclusive_group(required=True)
    kind.add_argument("--npz", type=Path, metavar="FILE", help="arrays x_train, y_train, x_test, y_test")
    kind.add_argument("--folder", type=Path, metavar="DIR", help="DIR/train/CLASS/*.png and DIR/test/CLASS/*.png")
    own.set_defaults(command=_speaking(_data_import))

    bench = commands.add_parser("bench", help="benchmarks on the real loop")
    bench.add_argument("name", choices=["w1", "vtc", "fedconv", "gefl", "clients"],
                       help="w1: FedAvg of ten small clients; vtc: generator and classifier steps, eager against compiled; "
                            "fedconv: the server's steps, validation excluded, and its rounds, spread over the ranks; "
                            "gefl: rounds of generator and headers beside bare PyTorch, and samples per second; "
                            "clients: rounds and peak memory against the number of clients, by clients.residency, a process to a case")
    bench.add_argument("--rounds", type=int, default=0, help="w1: rounds that are timed (0: 15); fedconv, gefl, clients: repetitions (0: 5, 3, 3)")
    bench.add_argument("--deterministic", action="store_true", help="w1: with run.deterministic = true, to see what it costs")
    bench.add_argument("--steps", type=int, default=0,
                       help="vtc: steps of each client that are timed (0: 5 on a CPU, 200 on CUDA); fedconv: steps of an epoch (0: 30, 94); "
                            "gefl: full batches that a client has (0: its images are 600)")
    bench.add_argument("--clients", type=_numbers, metavar="N[,N...]", help="gefl: clients (default: 10); clients: one case for each (default: 10,100,1000)")
    bench.add_argument("--residency", type=_residencies, metavar="R[,R...]", help="clients: where states lie (default: device,host,disk)")
    bench.add_argument("--chunk", type=int, help="clients: clients.chunk (default: 0 for device, else 20)")
    bench.add_argument("--ranks", type=_numbers, metavar="N[,N...]", help="clients: started by mpirun for each case (default: 1)")
    bench.add_argument("--epochs", type=int, default=0, help="gefl: epochs of a generator round (0: 1, published are 5)")
    bench.add_argument("--compile", action="store_true", help="vtc, sampling of gefl: compiled too where that is not done anyway (a minute on a CPU)")
    bench.add_argument("--threads", type=int, default=0, help="per rank; 0: cores / ranks on the node")
    bench.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    bench.add_argument("--json", action="store_true")
    bench.set_defaults(command=_speaking(_bench))

    doctor = commands.add_parser("doctor", help="check launch, hosts, devices, wire and run folder (alone, under mpirun or under srun)",
                                 description="Checks what a run would meet and says what to do about it; exit code 3 where a run could not work.")
    doctor.add_argument("job", type=Path, nargs="?", help="a job file: check it too, and estimate the share of its rounds that goes into communication")
    doctor.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting of the job; may be given several times")
    doctor.add_argument("--out", type=Path, metavar="RUNFOLDER", help="the run folder whose file system is tried (default: runs)")
    doctor.add_argument("--json", action="store_true", help="one object on standard output")
    doctor.set_defaults(command=_speaking(_doctor))
    return parser
