"""audit: what the models and the generator of a run give away of the images they were trained on, as figures, a table and a picture."""
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcfl.analysis import audit_generator
from hpcfl.analysis.audit_generator import Blocks, Found, attack
from hpcfl.analysis.audit_samples import draw_replacements, find_unseen, match_classes, select_images
from hpcfl.analysis.membership_inference import ALARMS, calibrate, compute_costs, compute_logits, compute_losses
from hpcfl.analysis.reference_models import SMALLEST, train_references
from hpcfl.data.shards import Shard
from hpcfl.errors import JobError
from hpcfl.federation.state import State
from hpcfl.federation.world import World
from hpcfl.runs.launch import revisit
from hpcfl.training.evaluate import bind_model
from hpcfl.training.group import Group
from hpcfl.wording import align_rows, printable_text

AUDIT_FORMAT = 1                                                         # of audit.json, whose key "hpcfl_audit" says that the file is ours to replace
FILES = ("audit.json", "audit-pairs.png")
REFERENCES = 4                                                     # models of each architecture to calibrate by
EPOCHS = 50                                                        # of a reference model at most
CLASSIFIERS = ("client", "architecture", "members", "accuracy", "on others", "AUC by loss", "TPR at 1 %", "AUC of unseen", "calibrated AUC", "TPR at 1 %")
ATTACKS = {"nearest": "distance to the nearest sample", "nearest_calibrated": "the same, calibrated by real images", "loss": "the generator's own loss"}

Reference = Callable[[Tensor], Tensor]                             # images -> logits


def analyse(run: str | Path, client: int | None = None, samples: int = 60, out: str | Path | None = None) -> Found:
    """Audit a run at its last checkpoint, all clients or one, and write audit.json and audit-pairs.png to `out` (default: the run's folder figures).

    Members are training images of these clients, others as many official test images of the same classes, so that to know which classes a client has
    is worth nothing. `samples` are drawn of each class. Models and generator are those that the clients hold; test images are
    read for this measurement alone, nothing is selected by them. A part that cannot be measured is {"left_out": the reason}.
    Raises: as `launch.revisit`; JobError for a client that does not exist, no samples, and a folder that cannot be written or has files of these names
    that no audit wrote.
    """
    if samples < 1:
        raise JobError(f"audit: got --samples {samples}, wanted at least 1 of each class, and some 60 for figures that mean something")
    folder = Path(run) / "figures" if out is None else Path(out)
    world, state = revisit(run)
    if client is not None and not 0 <= client < world.clients:
        raise JobError(f"audit: got --client {client}, but {run} has clients 0 to {world.clients - 1}; without --client all are audited")
    _refuse_foreign(folder)
    clients, pool = range(world.clients) if client is None else (client,), find_unseen(world)
    generator, blocks = audit_generator.measure(world, state, clients, pool, samples)
    found = {"hpcfl_audit": AUDIT_FORMAT, "run": str(Path(run)), "algorithm": world.job.algorithm_name, "data": world.job.data.name, "rounds": state.rows,
             "client": client, "pool_images": len(pool), "classifiers": _classifiers(world, state, clients, pool), "generator": generator}
    return found | {"files": _write(folder, found, blocks)}


def render(found: Mapping[str, Any]) -> str:
    """What `analyse` found as tables for the terminal."""
    whose, classifiers = "all clients" if found["client"] is None else f"client {found['client']}", found["classifiers"]
    rows = [(str(row["client"]), row["architecture"], str(row["loss"]["members"]), *(f"{row['accuracy_percent'][side]:.1f}" for side in ("members", "others")),
             *_attack_text(row["loss"]), _unseen_text(row["loss"]), *_attack_text(row["calibrated"])) for row in classifiers]
    reasons = dict.fromkeys(f"calibrated attack left out: {row['calibrated']['left_out']}" for row in classifiers if "left_out" in row["calibrated"])
    few = any(row["loss"]["resolution"] > ALARMS for row in classifiers)
    notes = ["TPR at 1 % false alarms: with fewer than 100 others, the rate without any"] if few else []
    return "\n".join([
        f"{printable_text(found['run'])}: {found['algorithm']} on {printable_text(found['data'])} after {found['rounds']} rounds. "
        f"Members: training images of {whose}; "
        "others: as many", "official test images of the same classes; unseen: images of the training set that nobody trained on, in the place of members.",
        "An AUC of 0.5 is guessing; 95 % intervals in brackets.", "", "Classifiers", align_rows([CLASSIFIERS, *rows], words=2), *reasons, *notes, "",
        *_generator_lines(found["generator"]), "", f"written: {', '.join(map(printable_text, found['files']))}"])


def _classifiers(world: World, state: State, clients: Sequence[int], pool: Shard) -> list[Found]:
    rows: dict[int, Found] = {}
    wanted = set(clients)
    audited = [parked for parked in state.groups if wanted & set(parked.clients)]
    for architecture in {parked.architecture for parked in audited}:
        groups = [parked for parked in audited if parked.architecture == architecture]
        chosen = [client for parked in groups for client in parked.clients if client in wanted]
        references, told = _references(world, state, architecture, chosen, pool)
        for group in (parked.fetch() for parked in groups):
            rows |= {client: _classifier(world, group, client, pool, references, told) for client in group.clients if client in wanted}
    return [rows[client] for client in sorted(rows)]


def _references(world: World, state: State, architecture: str, clients: Sequence[int], pool: Shard) -> tuple[list[Reference], Found]:
    """Models of the architecture trained on the pool about as the clients were, and what they are; none, and why, where the pool is too small."""
    training, wanted = world.job.training, int(np.median([len(world.holdings[client].train) for client in clients]))
    if len(pool) < max(SMALLEST, wanted / 2):
        return [], {"left_out": f"nobody trained on {len(pool)} images of the training set, and a reference model wants about the {wanted} of a client of "
                                f"{architecture}; a run with data.fraction below 1 leaves some"}
    images, passes = min(wanted, len(pool)), round(training.epochs * state.rows * world.job.federation.participation)
    epochs = max(1, min(EPOCHS, passes))
    models = train_references(world.problem, architecture, pool, images, epochs, REFERENCES)
    return models, {"reference_models": REFERENCES, "reference_images": images, "reference_epochs": epochs}


def _classifier(world: World, group: Group, client: int, pool: Shard, references: Sequence[Reference], told: Found) -> Found:
    shard, test, stream = world.holdings[client].train, world.test, world.problem.stream("audit/members", client)
    mine, theirs = match_classes(shard.labels, test.labels, len(shard), stream)
    members, others = select_images(shard, mine), select_images(test, theirs)
    control = draw_replacements(pool, others, stream.branch("unseen"))
    predict = bind_model(group, world.modules[group.architecture], client)
    sides = (members, others, *([control] if len(control) else []))
    logits = [compute_logits(predict, side) for side in sides]
    spent = [compute_costs(said, side.labels) for said, side in zip(logits, sides, strict=True)]
    right = {name: 100 * int((said.argmax(1) == side.labels).sum()) / len(side) for name, said, side in zip(("members", "others"), logits, sides, strict=False)}
    if references:                                                 # without the control: they may have been trained on it
        told = attack([calibrate(cost, torch.stack([compute_losses(reference, side) for reference in references]))
                         for cost, side in zip(spent[:2], (members, others), strict=True)]) | told
    return {"client": client, "architecture": group.architecture, "accuracy_percent": right, "loss": attack([-cost for cost in spent]), "calibrated": told}


def _attack_text(attack: Found) -> tuple[str, str]:
    if "left_out" in attack:
        return "-", "-"
    low, high = attack["auc_interval"]
    return f"{attack['auc']:.3f} [{low:.3f} .. {high:.3f}]", f"{100 * attack['tpr_at_1_percent_fpr']:.1f} %"


def _unseen_text(attack: Found) -> str:
    return "-" if attack.get("unseen_auc") is None else f"{attack['unseen_auc']:.3f}"


def _generator_lines(found: Found) -> list[str]:
    if "left_out" in found:
        return [f"Generator left out: {found['left_out']}"]
    attacks, fid = found["attacks"], found["fid"]
    rows = [(ATTACKS[name], *_attack_text(attack), _unseen_text(attack)) for name, attack in attacks.items()]
    reasons = [f"{ATTACKS[name]} left out: {attack['left_out']}" for name, attack in attacks.items() if "left_out" in attack]
    likes = [(f"MND in {space}", *(f"{each['ratio_mean']:.3f} ± {each['ratio_sd']:.3f}, {100 * each['share_at_least_1']:.1f} % at least 1" if each else "-"
                                   for each in (ratios["samples"], ratios["real"]))) for space, ratios in found["mnd"].items()]
    if "left_out" in fid:
        reasons.append(f"FID left out: {fid['left_out']}")
    else:
        likes.append((f"FID in {fid['space']}, {fid['images']} to {fid['members']} images", *(f"{fid[side]:.2f}" for side in ("samples", "held_out"))))
    return [f"Generator as client {found['client']} holds it in phase {found['phase']}: {found['samples']} samples against {found['members']} training images; "
            f"distances are L2 in {found['space']}",
            align_rows([("attack", "AUC", "TPR at 1 %", "AUC of unseen"), *rows], words=1), "",
            align_rows([("likeness to training images", "of samples", "of fresh real images"), *likes], words=1), *reasons,
            f"{found['samples_nearer_than_any_held_out_percent']:.1f} % of the samples lie nearer to a training image than any held-out image does"]


def _refuse_foreign(folder: Path) -> None:
    """Raises: JobError where a file would be replaced that no audit wrote."""
    report = folder / FILES[0]
    try:
        there = json.loads(report.read_bytes()) if report.is_file() else None
    except ValueError:
        there = None
    if not (isinstance(there, dict) and "hpcfl_audit" in there):
        for path in (folder / name for name in FILES):
            if path.exists():
                raise JobError(f"{path}: was not written by hpcfl audit and is not overwritten; move it away or choose another --out")


def _write(folder: Path, found: Found, blocks: Blocks) -> list[str]:
    from hpcfl.report import figures, mosaics, page  # here, because matplotlib takes a second to load
    report, pairs = (folder / name for name in FILES)
    try:
        page.replace_file(report, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
        if blocks:
            page.replace_file(pairs, figures.to_png(partial(mosaics.draw_pairs, blocks=blocks)))
        else:
            pairs.unlink(missing_ok=True)                          # of an earlier audit
    except OSError as error:
        raise JobError(f"{folder}: cannot write the audit: {error.strerror or error}; name another folder with --out") from None
    return [str(report), *([str(pairs)] if blocks else [])]
