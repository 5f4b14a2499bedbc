"""Checkpoints: every rank writes its clients, the server its state; the manifest comes last and makes them count."""
import json
import math
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

import hpcfl
from hpcfl import tree
from hpcfl.errors import CheckpointError, HpcflError
from hpcfl.federation.placement import Past
from hpcfl.federation.state import State
from hpcfl.federation.world import World
from hpcfl.files import atomic, trees
from hpcfl.runs.record import Record, measure_client_seconds
from hpcfl.settings.job import find_differences, read_recorded
from hpcfl.training.group import Group
from hpcfl.wire.communicator import require_server

CHECKPOINT_FORMAT = 2
VERSION = "hpcfl"                                                  # what --may-differ calls the version that wrote a checkpoint
FREE_TO_DIFFER = ("checkpoint.every", "checkpoint.keep", "checkpoint.seconds", "residency.chunk", "residency.folder", "residency.location", "evaluation.batch",
                  "run.name", "timeouts.collective", "timeouts.heartbeat")    # settings that no result depends on; on residency.chunk by rounding, with vmap


def save(folder: Path, world: World, state: State, record: Record, score: float | None) -> None:
    """Bring metrics.h5 up to now, write checkpoints/round-<rows>/, then point LATEST at it; then older ones go,
    but for the last `checkpoint.keep` and the best.

    score: mean accuracy on the clients' validation parts, by which the best is known (never the test set); None where it was not measured.

    Raises: CheckpointError on every rank when one rank's disk does not take its file; the checkpoint before stays the latest.
    """
    comm, target = world.comm, folder / "checkpoints" / f"round-{state.rows:06d}"
    written, failure = {}, None
    try:
        name = f"rank-{comm.rank:04d}.h5"
        written[name] = {"sha256": trees.write_trees(target / name, _iterate_clients(state)), "clients": list(world.mine)}
        if comm.is_server:
            record.append(folder / "metrics.h5")                   # before the manifest: a record may run ahead of its checkpoint, never behind
            written["server.h5"] = {"sha256": trees.write_trees(target / "server.h5", [("server", state.at_server())]), "clients": []}
    except CheckpointError as error:
        failure = str(error)
    gathered = comm.gather((written, failure))
    if comm.is_server:
        reports = require_server(gathered)
        failure = next((text for _, text in reports if text), None)
        if failure is None:
            failure = _seal(folder, target, world, state, record, score, {name: entry for files, _ in reports for name, entry in files.items()})
        else:
            shutil.rmtree(target, ignore_errors=True)
    failure = comm.share(failure)
    if failure:
        raise CheckpointError(failure)


def load(folder: Path, world: World, may_differ: Sequence[str] = ()) -> State | None:
    """The state of the latest checkpoint in a run folder (or of one checkpoint folder), for any number of ranks; None where there is none.

    Raises: CheckpointError naming the file for a checkpoint that is damaged, of another format, or of a job that differs in more than `may_differ`.
    """
    comm = world.comm
    found = comm.share(_read_manifest(folder) if comm.is_server else None)
    if found is None:
        return None
    checkpoint, manifest = Path(found[0]), found[1]
    _check(checkpoint, manifest, world, may_differ)
    files = {client: name for name, entry in manifest["files"].items() for client in entry["clients"]}
    if files.keys() != set(range(world.clients)):
        raise CheckpointError(f"{checkpoint}: holds the states of {len(files)} clients, this job has {world.clients}; federation.clients must not differ. "
                              "Choose another --out")
    for name in sorted({files[client] for client in world.mine} | ({"server.h5"} if comm.is_server else set())):
        _verify(checkpoint / name, manifest["files"][name]["sha256"])
    groups = []
    received: dict[int, dict[str, int]] = {}
    for architecture, clients in world.teams(manifest["rows"] - 1):
        trees: dict[int, tree.Tree] = {}
        for name in sorted({files[client] for client in clients}):
            found = _read(checkpoint / name, [f"{client:06d}" for client in clients if files[client] == name])
            trees |= {int(client): state for client, state in found.items()}
        received |= {client: {name: int(version) for name, version in tree.part(state, "received").items()} for client, state in trees.items()}
        trees = {client: {path: leaf for path, leaf in state.items() if not path.startswith("received/")} for client, state in trees.items()}
        _check_models(checkpoint, architecture, world.modules[architecture]["model"].state_dict(), trees)
        groups.append(world.park(Group.from_states(architecture, trees).to(world.problem.device)))
    server = _read(checkpoint / "server.h5", ["server"])["server"] if comm.is_server else None
    return State(server, tuple(groups), received, manifest["rows"], manifest["version"], manifest["versions"])


def clear(folder: Path, resume_from: Path | None) -> None:
    """Remove what killed processes left half-written or half-removed in a run folder; for its one owner, before anybody writes.

    LATEST names from now on where the run goes on from, if that lies here: later checkpoints may be written anew, and one that LATEST names must not be.
    """
    begun = find_latest(resume_from) if resume_from else None
    if begun and begun.parent.parent.samefile(folder):
        atomic.write_text(folder / "LATEST", f"{begun.name}\n")
    atomic.sweep(folder)
    for path in folder.glob("checkpoints/round-*"):
        if not (path / "manifest.json").is_file():
            shutil.rmtree(path, ignore_errors=True)


def read_past(folder: Path) -> Past | None:
    """What the latest checkpoint in a run folder (or one checkpoint folder) says of where clients were and how long they took; None where there is none.

    A record beside the checkpoints that cannot be read says nothing of how long they took. Raises: CheckpointError where the manifest cannot be read.
    """
    found = _read_manifest(folder)
    if found is None or found[1].get("format") != CHECKPOINT_FORMAT:          # what that means is said where it is loaded
        return None
    manifest, origin = found[1], Path(found[0]).parent.parent
    home = {client: rank for rank in range(manifest["ranks"]) for client in manifest["files"].get(f"rank-{rank:04d}.h5", {"clients": ()})["clients"]}
    try:
        seconds = measure_client_seconds(origin / "metrics.h5", manifest["rows"])
    except CheckpointError:                                        # who resumes from there says so, and goes on without it
        seconds = (math.nan,) * len(home)
    if sorted(home) != list(range(len(seconds))):
        return None
    return Past(tuple(home[client] for client in sorted(home)), manifest["ranks"], manifest["job"]["federation"]["server_rank"], seconds)


def read_place(folder: Path) -> tuple[str, int] | None:
    """Phase and round after which a checkpoint was written; None where it does not say, as those of earlier versions. Raises CheckpointError as `past`."""
    found = _read_manifest(folder)
    return (found[1]["phase"], found[1]["round"]) if found and "phase" in found[1] else None


def find_latest(folder: Path) -> Path | None:
    """The checkpoint to go on from in a run folder: what LATEST names, or the newest where it names none; or the folder itself if it is one."""
    if (folder / "manifest.json").is_file():
        return folder
    named = (folder / "LATEST").read_text(encoding="utf-8", errors="replace").strip() if (folder / "LATEST").is_file() else ""
    if re.fullmatch(r"round-\d{6,}", named):
        return folder / "checkpoints" / named
    return max((path.parent for path in folder.glob("checkpoints/round-*/manifest.json")), default=None)


def way_on_text(folder: Path) -> str:
    """What becomes of a run that ends here, in words."""
    found = find_latest(folder)
    return f"the same command goes on from {found.name}" if found else "there is no checkpoint yet, the same command begins again"


def _seal(folder: Path, target: Path, world: World, state: State, record: Record, score: float | None, files: dict) -> str | None:
    try:
        atomic.write_json(target / "manifest.json", {
            "format": CHECKPOINT_FORMAT, "hpcfl": hpcfl.__version__, "rows": state.rows, "phase": record.rows[-1]["phase"],
            "round": record.rows[-1]["round"], "version": state.version, "versions": state.versions, "ranks": world.comm.size,
            "validation_accuracy": score, "data_sha256": world.corpus.sha256, "files": files, "job": world.job.tables()})
        atomic.write_text(folder / "LATEST", f"{target.name}\n")
    except CheckpointError as error:
        return str(error)
    _prune(target, world.job.checkpoint.keep)
    return None


def _prune(newest: Path, keep: int) -> None:
    """Remove all checkpoints up to the newest but the last `keep` and the one with the best validation accuracy."""
    older = [path for path in newest.parent.glob("round-*") if path.name <= newest.name]
    scores = {path: json.loads((path / "manifest.json").read_bytes())["validation_accuracy"] for path in older if (path / "manifest.json").is_file()}
    best = max((path for path in scores if scores[path] is not None), key=lambda path: (scores[path], path.name), default=newest)
    for path in set(older) - {best, *sorted(scores)[-keep:]}:
        with suppress(OSError):                                    # what does not go now goes later, here or in `clear`
            (path / "manifest.json").unlink(missing_ok=True)       # first: what is half removed is no checkpoint any more
            shutil.rmtree(path)


def _read_manifest(folder: Path) -> tuple[str, dict] | None:
    checkpoint = find_latest(folder)
    if checkpoint is None:
        return None
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        return str(checkpoint), manifest | {"job": read_recorded(manifest.get("job", {}))}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / 'manifest.json'}: cannot be read ({error}); {_find_earlier(checkpoint)}") from None


def _check(checkpoint: Path, manifest: dict, world: World, may_differ: Sequence[str]) -> None:
    readable = manifest.get("format") == CHECKPOINT_FORMAT
    if not readable or (manifest["hpcfl"] != hpcfl.__version__ and VERSION not in may_differ):
        otherwise = f", or, where its results need not be those of one version, allow it with --may-differ {VERSION}" if readable else ""
        raise CheckpointError(f"{checkpoint}: written by hpcfl {manifest.get('hpcfl')} in checkpoint format {manifest.get('format')}, this is hpcfl "
                              f"{hpcfl.__version__} with format {CHECKPOINT_FORMAT}; nothing was changed. Resume with the version that wrote it{otherwise}")
    if manifest["data_sha256"] != world.corpus.sha256:
        raise CheckpointError(f"{checkpoint}: was made with data set '{world.job.data.name}' of SHA-256 {manifest['data_sha256'][:12]}..., the one here is "
                              f"{world.corpus.sha256[:12]}...; resume with the data it was made with")
    changed = [key for key in find_differences(manifest["job"], json.loads(json.dumps(world.job.tables()))) if key not in (*FREE_TO_DIFFER, *may_differ)]
    if changed:
        raise CheckpointError(f"{checkpoint}: belongs to a job that differs in {', '.join(changed)}; nothing was changed. "
                              "Choose another --out, or allow it with "
                              + " ".join(f"--may-differ {key}" for key in changed))


def _check_models(checkpoint: Path, architecture: str, model: tree.Tree, states: Mapping[int, tree.Tree]) -> None:
    """Settings that may differ may make other models of the same names, whose states these are not."""
    wanted = {path: tuple(leaf.shape) for path, leaf in model.items()}
    for client, state in states.items():
        got = {path: tuple(leaf.shape) for path, leaf in tree.part(state, "model").items()}
        if odd := sorted(path for path in got.keys() | wanted.keys() if got.get(path) != wanted.get(path)):
            raise CheckpointError(f"{checkpoint}: '{odd[0]}' of client {client}'s model is {got.get(odd[0], 'missing')}, in this job its {architecture} has "
                                  f"{wanted.get(odd[0], 'none')}; nothing was changed. What the models are made of must not differ: choose another --out")


def _iterate_clients(state: State) -> Iterator[tuple[str, tree.Tree]]:
    """Every client's own Tree, and the versions that it received, one group in memory at a time."""
    for parked in state.groups:
        for client, own in parked.fetch().states().items():
            yield f"{client:06d}", own | tree.join(received={name: torch.tensor(version) for name, version in state.received[client].items()})


def _verify(path: Path, wanted: str) -> None:
    try:
        got = atomic.hash_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {_find_earlier(path.parent)}") from None
    if got != wanted:
        raise CheckpointError(f"{path}: is damaged or truncated: its SHA-256 is {got[:12]}..., "
                              f"the manifest says {wanted[:12]}...; {_find_earlier(path.parent)}")


def _read(path: Path, names: Collection[str]) -> dict[str, tree.Tree]:
    try:
        return trees.read_trees(path, names)
    except HpcflError as error:
        raise CheckpointError(f"{error}; {_find_earlier(path.parent)}") from None


def _find_earlier(checkpoint: Path) -> str:
    others = sorted(path for path in checkpoint.parent.glob("round-*") if path.name < checkpoint.name and (path / "manifest.json").is_file())
    return f"an earlier one is there: --resume {others[-1]}" if others else "no earlier checkpoint is left; start again with --resume never and another --out"
