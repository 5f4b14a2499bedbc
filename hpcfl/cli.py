"""The command line: run, settings, slurm, report, predict, inspect, information, audit, data, bench, doctor."""
import argparse
import json
import os
import sys
from pathlib import Path

import hpcfl
from hpcfl.arguments import Parser, expand_homes, parse_numbers, parse_residencies
from hpcfl.errors import EnvironmentFault, HpcflError, Interrupted
from hpcfl.files.places import expand_home
from hpcfl.runs import outlets, signals
from hpcfl.settings.sections import DEVICES

DATA_COLUMNS = ("name", "status", "train", "test", "classes", "image", "MB", "")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `hpcfl` and `python -m hpcfl`; ends the process with the exit codes of hpcfl.errors."""
    outlets.open_all()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")            # read when torch is loaded: threads that spin hold the cores that others wait for
    try:
        words = sys.argv[1:] if argv is None else argv
        arguments = _parser().parse_args(words, argparse.Namespace(words=words))
        code = arguments.command(arguments)
    except SystemExit as end:                                      # argparse has printed what was asked for, or what is wrong
        code = end.code
    failure = outlets.find_failure(sys.stdout)
    if failure and failure.errno not in outlets.GONE:
        print(f"hpcfl: standard output takes nothing any more: {failure.strerror}; what is missing there is lost", file=sys.stderr)
        code = code or EnvironmentFault.exit_code
    sys.exit(code)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.ranks:
        from hpcfl.runs import starter
        return starter.start(arguments.ranks, arguments.words)
    stop_requested = bool if arguments.dry_run else signals.listen()                     # before the imports below, which take seconds
    from hpcfl.runs import launch
    from hpcfl.runs.choices import CHOICES
    from hpcfl.runs.guard import run_guarded
    from hpcfl.settings.job import load
    from hpcfl.wire.communicator import connect

    def body() -> int:
        job = load(arguments.job, CHOICES, arguments.set)
        if arguments.dry_run:
            return _dry_run(job, comm, "" if arguments.alone else comm.find_launch_fault())
        engine = connect(deterministic=True, alone=arguments.alone) if job.run.deterministic else comm
        launch.run(job, engine, arguments.out, arguments.resume, tuple(arguments.may_differ), stop_requested)
        return 0
    comm = connect(checked=not arguments.dry_run, alone=arguments.alone)
    if arguments.dry_run and not arguments.alone and _one_of_many(comm):
        return 0
    return run_guarded(body, comm)


def _one_of_many(comm) -> bool:
    """Whether this is one of ranks that do not see each other, and not the one that speaks for all."""
    from hpcfl.wire.launchers import read_launch
    told = read_launch()
    return comm.size == 1 and told is not None and told.rank > 0


def _dry_run(job, comm, refused: str) -> int:
    """Check everything that can be checked without training, and say what would run, and why it would be `refused`."""
    from hpcfl.federation.world import World
    from hpcfl.report import lone_clients
    from hpcfl.runs import devices
    from hpcfl.runs.choices import CHOICES
    from hpcfl.settings import manual
    from hpcfl.wording import count_text
    world = World(job, comm, devices.choose_job_device(job, comm))
    if comm.is_server:
        print(manual.commented(job, CHOICES), end="\n\n")
        for remark in world.corpus.remarks:
            print(f"# {job.data.name}: {remark}")
        for phase in world.plan:
            print(f"# phase {phase.name}: {count_text(phase.rounds, 'round')} of {', '.join(type(step).__name__ for step in phase.steps)}")
        for client, (architecture, rank) in enumerate(zip(world.problem.architectures, world.home, strict=True)):
            print(f"# client {client}: {architecture} on rank {rank}, {len(world.split.train[client])} training images")
        if warning := lone_clients.warning_text(job.algorithm_name, world.averages(world.steps)):
            print(f"# warning: {warning}")
        if refused:
            print(f"# hpcfl run would not start here: {refused}")
    return 0


def _settings(arguments: argparse.Namespace) -> int:
    from hpcfl.runs.choices import CHOICES
    from hpcfl.settings import manual
    found = manual.find(arguments.what, CHOICES) if arguments.what else manual.blocks(CHOICES)
    if arguments.json:
        print(json.dumps({"settings": manual.data(found)}, indent=1))
    elif arguments.markdown:
        print(manual.markdown(found, CHOICES))
    else:
        print(manual.toml(block for block in found if arguments.what or not block.method))
    return 0


def _slurm(arguments: argparse.Namespace) -> int:
    from hpcfl.runs import slurm
    gpus, gpu_type = slurm.parse_gpus(arguments.gpus_per_node, arguments.nodes) if arguments.gpus_per_node else (arguments.gpus, "")
    request = slurm.Request(arguments.nodes, arguments.ranks, gpus, arguments.cpus, arguments.time, arguments.lead, arguments.partition, arguments.srun,
                            arguments.account, arguments.qos, arguments.mem, gpu_type, tuple(arguments.behind))
    job = slurm.check_job(arguments.job, arguments.set, arguments.vary)
    seeds, at_once = slurm.parse_seeds(arguments.array) if arguments.array else ((job.run.seed,), 0)
    sweep = slurm.Sweep(seeds, tuple(map(tuple, arguments.vary)), at_once) if arguments.array or arguments.vary else None
    text = slurm.write_script(arguments.job, job.run.name, request, arguments.set, arguments.out, sweep, slurm.find_environment())
    print(slurm.submit(text) if arguments.submit else text, end="\n" if arguments.submit else "")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from hpcfl.report import labels, recording, run_folders, summary, tables
    runs, skipped = run_folders.find_runs(arguments.runs)
    for line in skipped:
        print(f"hpcfl: skipped {line}", file=sys.stderr)
    out = arguments.out or (arguments.runs[0] if len(arguments.runs) == 1 else runs[0])
    if arguments.trace is not None:
        from hpcfl.report import timeline
        path = timeline.write(runs, expand_home(arguments.trace) if arguments.trace else out / "trace.json")
        print(f"trace: {path} (open it in ui.perfetto.dev or chrome://tracing)")
        return 0
    groups = labels.label_groups([recording.read(run) for run in runs])
    found = {label: [summary.summarise(each) for each in group] for label, group in groups.items()}
    if arguments.json:
        several = {"runs": [{"label": label, **run} for label, group in found.items() for run in group],
                   "over_seeds": [tables.average_seeds(label, group) for label, group in found.items()]}
        print(json.dumps(several if len(runs) > 1 else several["runs"][0], indent=1))
        return 0
    if arguments.format:
        print(tables.FORMATS[arguments.format](found))
        return 0
    from hpcfl.report import page  # here, because matplotlib takes a second to load
    written = page.write(runs, out)
    print(tables.to_text(found))
    print(f"\nreport: {written}")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from hpcfl.analysis import scaling
    wire = scaling.read_wire(arguments.doctor, arguments.latency, arguments.bandwidth)
    found = scaling.predict_table(arguments.run, wire, arguments.ranks, arguments.clients, arguments.phase)
    print(json.dumps(found, indent=1) if arguments.json else scaling.render(found))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from hpcfl.report import hdf5_view
    described = hdf5_view.describe(arguments.file)
    print(json.dumps(described, indent=1) if arguments.json else hdf5_view.render(described))
    return 0


def _information(arguments: argparse.Namespace) -> int:
    from hpcfl.analysis import mutual_information
    found = mutual_information.analyse(arguments.run, arguments.images, arguments.output)
    print(json.dumps(found, indent=1) if arguments.json else mutual_information.render(found))
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from hpcfl.analysis import audit
    found = audit.analyse(arguments.run, arguments.client, arguments.samples, arguments.out)
    print(json.dumps(found, indent=1) if arguments.json else audit.render(found))
    return 0


def _data_list(arguments: argparse.Namespace) -> int:
    from hpcfl.data import store
    from hpcfl.wording import align_rows
    rows = store.list_data_sets()
    print(json.dumps(rows, indent=1) if arguments.json else align_rows([DATA_COLUMNS, *map(_data_row, rows)], words=2))
    return 0


def _data_row(row: dict) -> tuple[str, ...]:
    """The few columns of a data set that fit a terminal; --json has the rest."""
    from hpcfl.data.store import OWN_TERMS
    from hpcfl.wording import list_text, printable_text, range_text
    there = "classes" in row
    numbers = [str(row[key]) if there else "" for key in ("train", "test", "classes")]
    note = {"absent": f"hpcfl data get {row['name']}", "damaged": row.get("problem", "")}.get(row["status"], "")
    if there:
        terms = [] if row.get("licence", OWN_TERMS) == OWN_TERMS else [row["licence"]]
        note = "; ".join([printable_text(list_text(row["names"])), f"{range_text(row['counts']['train'])} training images each", *terms])
    return row["name"], row["status"], *numbers, "x".join(map(str, row["shape"])) if there else "", \
        f"{row['file_bytes'] / 1e6:.1f}" if "file_bytes" in row else "", note


def _data_get(arguments: argparse.Namespace) -> int:
    from hpcfl.data import store
    print(store.get(arguments.name, arguments.source))
    return 0


def _data_import(arguments: argparse.Namespace) -> int:
    from hpcfl.data import store
    convert = store.import_npz if arguments.npz else store.import_folder
    path = convert(arguments.name, arguments.npz or arguments.folder)
    print(f"{store.describe_file(path)}\n{path}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from hpcfl.bench.benches import BENCHES, render
    from hpcfl.runs.guard import run_guarded
    from hpcfl.wire.communicator import connect

    def body() -> int:
        figures = BENCHES[arguments.name](comm, arguments)
        if comm.is_server:
            print(json.dumps(figures, indent=1) if arguments.json else render(figures))
        return 0
    comm = connect()
    return run_guarded(body, comm)


def _doctor(arguments: argparse.Namespace) -> int:
    from hpcfl.doctor import examine
    from hpcfl.runs.guard import run_guarded
    from hpcfl.wire.communicator import connect
    from hpcfl.wire.launchers import read_launch

    def body() -> int:
        examined, code = examine.examine(comm, told, arguments.job, arguments.set, arguments.out), 0
        if examined is not None:
            found = examine.list_findings(examined)
            print(json.dumps(examine.describe_findings(examined, found), indent=1) if arguments.json else examine.render(examined, found), flush=True)
            code = examine.choose_exit_code(found)
        return comm.share(code)                                    # after the printing, which a rank that ends with another code than 0 would cut short
    comm, told = connect(checked=False), read_launch()
    if _one_of_many(comm):
        return 0
    return run_guarded(body, comm)


def _speaking(command):
    """What goes wrong where no rank is guarded (no communicator, or none yet) is printed and becomes the exit code."""
    def wrapped(arguments: argparse.Namespace) -> int:
        try:
            return command(expand_homes(arguments))
        except HpcflError as error:
            print(f"hpcfl: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("hpcfl: interrupted from the keyboard", file=sys.stderr)
            return Interrupted.exit_code
    return wrapped


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="hpcfl", description=hpcfl.__doc__)
    parser.add_argument("--version", action="version", version=f"hpcfl {hpcfl.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="carry out a job (alone, under mpirun or under srun)", epilog="What a job may set, and what it means: hpcfl settings")
    run.add_argument("job", type=Path, help="a job file (TOML); jobs/ holds examples")
    run.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                     help="override a setting; may be given several times; another algorithm.name leaves out what only the job's method has")
    run.add_argument("--out", type=Path, metavar="DIR", help="the run folder itself (default: runs/NAME/UTC-HASH)")
    run.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="auto (default): go on from the last checkpoint of this job if there is one")
    run.add_argument("--may-differ", action="append", default=[], metavar="SECTION.KEY",
                     help="a setting that may differ from the checkpoint's; hpcfl: the version that wrote it")
    where = run.add_mutually_exclusive_group()
    where.add_argument("--ranks", type=int, default=0, metavar="N", help="on so many ranks, by a mpirun that Ctrl-C does not reach: they end with a checkpoint")
    where.add_argument("--alone", action="store_true", help="in this one process, without MPI, whatever the environment says of ranks (a shell of srun's)")
    run.add_argument("--dry-run", action="store_true", help="check the job, print it with every default and who would train where, train nothing")
    run.set_defaults(command=_speaking(_run))

    settings = commands.add_parser("settings", help="what a job may set: meaning, default and allowed values, printed as a job file with comments")
    settings.add_argument("what", nargs="?", default="", metavar="SECTION|METHOD|SETTING",
                          help="for example training, fedvtc, training.lr or lr (default: all sections)")
    shape = settings.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="one object on standard output; of all sections and all methods where nothing is named")
    shape.add_argument("--markdown", action="store_true", help="as jobs/README.md has it; of all sections and all methods where nothing is named")
    settings.set_defaults(command=_speaking(_settings))

    slurm = commands.add_parser("slurm", help="print a job as a script for sbatch, or submit it",
                                epilog="Behind -- come options for sbatch that are not listed here: hpcfl slurm JOB --nodes 2 -- --constraint=a100 --exclusive")
    slurm.add_argument("job", type=Path, help="a job file (TOML)")
    slurm.add_argument("--nodes", type=int, default=1, metavar="N")
    slurm.add_argument("--ranks", type=int, default=0, metavar="R", help="on all nodes together (default: one per GPU, without GPUs one per node)")
    gpus = slurm.add_mutually_exclusive_group()
    gpus.add_argument("--gpus", type=int, default=0, metavar="G", help="on all nodes together (default: none)")
    gpus.add_argument("--gpus-per-node", default="", metavar="[TYPE:]G", help="the same by node, as for sbatch")
    slurm.add_argument("--cpus", type=int, default=0, metavar="C", help="cores of each rank (default: the site's)")
    slurm.add_argument("--time", default="01:00:00", metavar="T", help="limit of one start, as for sbatch (default: 01:00:00)")
    slurm.add_argument("--lead", type=int, default=120, metavar="S", help="seconds from the signal to the time limit (default: 120); a round must fit into it")
    for name, metavar in (("partition", "P"), ("account", "A"), ("qos", "Q")):
        slurm.add_argument(f"--{name}", default="", metavar=metavar, help="as for sbatch (default: the site's)")
    slurm.add_argument("--mem", default="", metavar="SIZE", help="memory of each node, as for sbatch (default: the site's)")
    slurm.add_argument("--srun", default="", metavar="PMI", help="launch by srun --mpi=PMI (pmix, pmi2, ...) instead of mpirun")
    slurm.add_argument("--array", default="", metavar="SEEDS",
                       help="a run for each seed, as for sbatch: 0-2 or 0,5,7; 0-8:2: every second; 0-9%%2: two at once")
    slurm.add_argument("--vary", action="append", nargs="+", default=[], metavar="SECTION.KEY=VALUE",
                       help="a run for each seed with these settings; given several times, so many runs for each seed")
    slurm.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting in every run; may be given several times")
    slurm.add_argument("--out", type=Path, metavar="DIR",
                       help="the run folder, with --array or --vary the folder of the run folders (default: runs/NAME/slurm-NUMBER)")
    slurm.add_argument("--submit", action="store_true", help="hand the script to sbatch instead of printing it")
    slurm.set_defaults(command=_speaking(_slurm), behind=())

    report = commands.add_parser("report", help="figures and one HTML page for one run or several")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder, or a folder with run folders in it; what is none is skipped")
    report.add_argument("--out", type=Path, metavar="DIR", help="where report.html and figures/ go (default: the named folder, of several the first run's)")
    only = report.add_mutually_exclusive_group()
    only.add_argument("--json", action="store_true", help="print the summary as JSON, of several runs also means over seeds, and write nothing")
    only.add_argument("--format", choices=["text", "markdown", "latex", "csv"],
                      help="print a table, but for text of means and deviations over seeds, and write nothing")
    only.add_argument("--trace", nargs="?", const="", metavar="FILE",
                      help="write when each rank did what, for ui.perfetto.dev, and no page (default: trace.json in DIR)")
    report.set_defaults(command=_speaking(_report))

    predict = commands.add_parser("predict", help="what a round of a run would take on other numbers of ranks")
    predict.add_argument("run", type=Path, metavar="RUN", help="a run folder; best of a run on one rank")
    predict.add_argument("--doctor", type=Path, metavar="FILE",
                         help="what `mpirun -n 2 hpcfl doctor --json` printed where the ranks would be: the speed of the wire")
    predict.add_argument("--latency", type=float, metavar="S", help="seconds of an empty message between two ranks, instead of the doctor's")
    predict.add_argument("--bandwidth", type=float, metavar="B", help="bytes per second between two ranks, instead of the doctor's")
    predict.add_argument("--ranks", type=parse_numbers, default="1,2,4,64,512", metavar="N,N,...", help="default: 1,2,4,64,512")
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
                            "clients: rounds and peak memory against the number of clients, by residency.location, a process to a case")
    bench.add_argument("--rounds", type=int, default=0, help="w1: rounds that are timed (0: 15); fedconv, gefl, clients: repetitions (0: 5, 3, 3)")
    bench.add_argument("--deterministic", action="store_true", help="w1: with run.deterministic = true, to see what it costs")
    bench.add_argument("--steps", type=int, default=0,
                       help="vtc: steps of each client that are timed (0: 5 on a CPU, 200 on CUDA); fedconv: steps of an epoch (0: 30, 94); "
                            "gefl: full batches that a client has (0: its images are 600)")
    bench.add_argument("--clients", type=parse_numbers, metavar="N[,N...]",
                       help="gefl: clients (default: 10); clients: one case for each (default: 10,100,1000)")
    bench.add_argument("--residency", type=parse_residencies, metavar="R[,R...]", help="clients: where states lie (default: device,host,disk)")
    bench.add_argument("--chunk", type=int, help="clients: residency.chunk (default: 0 for device, else 20)")
    bench.add_argument("--ranks", type=parse_numbers, metavar="N[,N...]", help="clients: started by mpirun for each case (default: 1)")
    bench.add_argument("--epochs", type=int, default=0, help="gefl: epochs of a generator round (0: 1, published are 5)")
    bench.add_argument("--compile", action="store_true", help="vtc, sampling of gefl: compiled too where that is not done anyway (a minute on a CPU)")
    bench.add_argument("--threads", type=int, default=0, help="per rank; 0: as run.threads = 0")
    bench.add_argument("--device", choices=DEVICES, default=DEVICES[0])
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
