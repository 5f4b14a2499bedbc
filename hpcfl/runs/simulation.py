"""Simulation: a run from begin or resume to its end: the loop, evaluated, recorded, checkpointed, and stopped when asked."""
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from hpcfl.accounts import EXCHANGES
from hpcfl.errors import CheckpointError, Stopped
from hpcfl.federation.exchange import Exchange
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.loop import rounds
from hpcfl.federation.state import Place, State, schedule
from hpcfl.federation.world import World
from hpcfl.files import metrics
from hpcfl.files.metrics import DamagedFile
from hpcfl.runs import checkpoint
from hpcfl.runs.console import Console
from hpcfl.runs.examination import Examination
from hpcfl.runs.pace import Pace
from hpcfl.runs.record import Record
from hpcfl.runs.signal_lead import Lead
from hpcfl.wire.communicator import require_server
from hpcfl.wording import numbers_text

log = logging.getLogger("hpcfl")

SAMPLES_PER_CLASS, SAMPLED_CLIENTS = 8, 6                          # what the grid of synthetic images shows


class Simulation:
    """One run in one folder, the same on every rank; rank 0 keeps the record."""

    def __init__(self, world: World, folder: Path, console: Console, stop_requested: Callable[[], bool]):
        self.world, self.comm, self.folder, self.console = world, world.comm, folder, console
        self.stop_requested = stop_requested
        self.ledger = Ledger(world.problem.device)
        self.exchange = Exchange(world, self.ledger, self._before_refine)
        self.places, self.ahead = schedule(world), rounds(self.exchange)
        self.record = Record(_describe_run(world), _describe_fixed(world) if self.comm.is_server else {}, world.clients, world.comm.size)
        self.score: float | None = None
        self.lines: dict[str, float] = {}
        self.examination = Examination(world, self.ledger)
        self.sent_bytes, self.carried = 0, dict.fromkeys(EXCHANGES, 0)
        self.lead, self.pace = Lead(), Pace(world.job.checkpoint.seconds)

    def run(self) -> None:
        """Carry the run to its end, from its beginning or from where it was resumed.

        Raises: Stopped after a checkpoint when a signal asked for it, and whatever training, data or the disk raise.
        """
        for state, place in self.ahead:
            self.score = None
            if self._due(place):
                self._evaluate("end", state, self._count_global_right(state, place))
            end = state.rows == len(self.places)
            if end:
                self._sample(state, place)
            self._finish_round(place)
            stop = self.comm.agree(self.stop_requested())
            due = end or stop or state.rows % self.world.job.checkpoint.every == 0
            if due or (self.world.job.checkpoint.seconds and self.comm.agree(self.comm.is_server and self.pace.due)):
                with self.ledger("checkpoint"), self.pace.saving():
                    checkpoint.save(self.folder, self.world, state, self.record, self.score)
            if end or stop:
                self._book_last_checkpoint()
            if stop and not end:
                raise Stopped(f"{self.folder}: stopped on a signal after round {state.rows} of {len(self.places)}; a checkpoint is there, the same command "
                              "goes on")
            del state                                              # not to be kept beside those of the next round
        if self.comm.is_server:
            self.record.gather(self.folder / "metrics.h5")

    def so_far(self) -> tuple[float, str]:
        """Seconds of the round that is open, and in what it spends them at the server."""
        (round_s, seconds), row = self.ledger.so_far(), len(self.record.rows)
        where = f"{row + 1}/{len(self.places)}  {self.places[row].phase.name}" if row < len(self.places) else "after the last round"
        parts = ", ".join(f"{kind} {spent:.1f} s" for kind, spent in seconds.items() if spent >= 0.05)
        return round_s, f"{where}: {round_s:.0f} s so far ({parts})"

    def resume(self, resume_from: Path, may_differ: tuple[str, ...]) -> None:
        """Go on from the last checkpoint in a run folder, or from one checkpoint, with the record up to there.

        What cannot be used of the record is set aside, if it lies in this run's folder, and said.
        Raises: CheckpointError as `checkpoint.load` and `Record.read` do, and where the checkpoint lies elsewhere in the plan.
        """
        state = checkpoint.load(resume_from, self.world, may_differ)
        if state is None:
            raise CheckpointError(f"{resume_from}: holds no checkpoint to go on from; --resume never begins anew, in an empty folder")
        if self.comm.is_server:
            record = require_server(checkpoint.find_latest(resume_from)).parent.parent / "metrics.h5"
            damaged = self.record.read(record, state.rows, [(place.phase.name, place.round) for place in self.places])
            self._check_place(resume_from, state.rows)
            self._set_aside(damaged, ours=record.parent.resolve() == self.folder.resolve())
        self.ahead = rounds(self.exchange, state)
        self.console.say(f"resumed after round {state.rows} of {len(self.places)}")

    def _check_place(self, resume_from: Path, rows: int) -> None:
        """A plan with other rounds may have another phase at the checkpoint's row; then its state is none of this plan's."""
        recorded = self.record.rows[rows - 1]
        last, here = checkpoint.read_place(resume_from) or (recorded["phase"], recorded["round"]), self.places[rows - 1] if rows <= len(self.places) else None
        if here is None or last != (here.phase.name, here.round):
            place = f"round {here.round + 1} of phase {here.phase.name}" if here else "behind its end"
            raise CheckpointError(f"{resume_from}: its last round, {rows}, was round {last[1] + 1} of phase {last[0]}; in this job that is {place}. "
                                  "Resume from an earlier checkpoint, from before the phases part, or choose another --out")

    def _set_aside(self, damaged: Sequence[DamagedFile], ours: bool) -> None:
        for each in damaged:
            aside = metrics.set_aside(each.path) if ours else None
            log.warning("%s%s", each.reason, f"; it is called {aside.name} from now on" if aside else "")
        if self.record.lost:
            log.warning("the figures of %s are lost, what was learned in them is not: the run goes on from its checkpoint",
                        numbers_text([row + 1 for row in self.record.lost], "round", " to "))
        if self.record.left_out:
            log.warning("the %s accuracies of the rounds before are left out of the record: they are over other images than this job's",
                        " and ".join(self.record.left_out))

    def _due(self, place: Place) -> bool:
        return place.last or (place.row + 1) % self.world.job.evaluation.every == 0

    def _before_refine(self, state: State, place: Place) -> None:
        if self._due(place):
            self._evaluate("before_refine", state, {})

    def _evaluate(self, stage: str, state: State, models: Mapping[str, np.ndarray]) -> None:
        """Right answers per client and class on the official test set and on the client's own parts; nothing is selected by the first two.

        `models`: those of the federation's own models, name -> (C,).
        """
        mine = self.examination.count_of_clients(state.groups)
        with self.ledger("idle"):
            counts = self.comm.gather(mine)
        if not self.comm.is_server:
            return
        rows = {client: row for part in require_server(counts) for client, row in part.items()}
        tables = {name: np.stack([rows[client][name] for client in range(self.world.clients)]) for name in rows[0]}
        self.record.evaluate(stage, tables, models)
        fixed = self.record.fixed
        accuracy = 100 * tables["generalization_correct"].sum(1) / fixed["evaluation/generalization_count"].sum()
        self.lines |= {"clients": accuracy.mean(), "lowest": accuracy.min(), "highest": accuracy.max()}
        if models:
            self.lines["global"] = 100 * float(np.mean([right.sum() for right in models.values()])) / fixed["evaluation/generalization_count"].sum()
        for name in ("personal", "validation"):
            images = fixed[f"evaluation/{name}_count"].sum(1)
            held = images > 0
            if f"{name}_correct" in tables and held.any():
                self.lines[name] = 100 * float(np.mean(tables[f"{name}_correct"].sum(1)[held] / images[held]))
        self.score = self.lines.get("validation") if stage == "end" else self.score

    def _count_global_right(self, state: State, place: Place) -> dict[str, np.ndarray]:
        """Those of the models of the phase's last step that has any.

        What moves for it, moves once: the next round begins with the same message.
        """
        step = next((step for step in reversed(place.phase.steps) if step.overrides("global_models")), None)
        with self.ledger("publish"):
            models = self.exchange.delivery.global_models(step, state) if step else {}
        return self.examination.count_of_federation(models)

    def _finish_round(self, place: Place) -> None:
        sent, self.sent_bytes = self.sent_bytes, self.comm.traffic.sent_bytes
        carried, self.carried = self.carried, dict(self.comm.traffic.carried)
        accounts = self.comm.gather({**self.ledger.close(), "sent_bytes": self.sent_bytes - sent,
                                     "carried": {kind: count - carried[kind] for kind, count in self.carried.items()}})
        if self.comm.is_server:
            self.record.finish_round(place.phase.name, place.round, require_server(accounts), self.world.ask(place.phase, place.row))
            row = self.record.rows[-1]
            self.console.round(place, len(self.places), row, self.lines)
            self.lead.watch(row["wall_s"], float(row["seconds"]["checkpoint"].max()))
            self.lines = {}

    def _book_last_checkpoint(self) -> None:
        accounts = self.comm.gather(self.ledger.close())
        if self.comm.is_server:
            self.record.add_late(require_server(accounts))
            self.record.write(self.folder / "metrics.h5")

    def _sample(self, state: State, place: Place) -> None:
        """Synthetic images beside real ones, for people to look at."""
        step, drawn = place.phase.steps[-1], {}
        if not step.overrides("draw"):
            return
        message = self.exchange.publish(step, state, self.world.architectures(range(min(SAMPLED_CLIENTS, self.world.clients)), place.row))
        shown = [(parked, client) for parked in state.groups for client in parked.clients if client < SAMPLED_CLIENTS]
        for parked, client in shown:
            group = parked.fetch().select([client])
            site, own = self.world.client_site(group, place.phase, place.round), self.exchange.delivery.download(message, group.architecture)
            with self.world.problem.stream("sample", client).seeding():
                sample = step.draw(group, own, site, SAMPLES_PER_CLASS)
            if sample is not None:
                real = torch.stack([step.seen(group, own, site, images) for images in _take_real_images(self.world)])
                brightest = max(1.0, float(sample[0].max()))       # maps of an extractor, which people see as images too, have no upper bound
                drawn[client] = {"synthetic": _to_bytes(sample[0] / brightest), "has": sample[1].cpu().numpy(), "real": _to_bytes(real / brightest)}
        gathered = self.comm.gather(drawn)
        if self.comm.is_server:
            samples = {client: part[client] for part in require_server(gathered) for client in part}
            clients = sorted(samples)
            self.record.samples = {} if not samples else {
                "client": np.array(clients), "synthetic": np.stack([samples[client]["synthetic"] for client in clients]),
                "has": np.stack([samples[client]["has"] for client in clients]), "real": samples[clients[0]]["real"]}


def _describe_run(world: World) -> Mapping[str, object]:
    return {"algorithm": world.job.algorithm_name, "name": world.job.run.name, "job": world.job.to_toml(), "clients": world.clients,
            "classes": world.problem.classes, "data_sha256": world.corpus.sha256, "data_source": world.corpus.source, "ranks": world.comm.size,
            "plan": json.dumps(_describe_plan(world))}


def _describe_plan(world: World) -> list[dict[str, object]]:
    """The phases: what their last refinement does to the clients' models, and how many clients average each part."""
    refining = {phase.name: [step.refines for step in phase.steps if step.overrides("refine")] for phase in world.plan}
    return [{"phase": phase.name, "rounds": phase.rounds, "refines": (refining[phase.name] or [None])[-1],
             "averages": world.averages(phase.steps)} for phase in world.plan]


def _describe_fixed(world: World) -> Mapping[str, np.ndarray]:
    """What does not change during a run: the partition, the clients, how many images each accuracy is over."""
    classes, problem = world.problem.classes, world.problem
    with problem.stream("count").seeding():
        parameters = {name: sum(p.numel() for p in problem.model(name).parameters()) for name in set(problem.architectures)}
    tables = {f"partition/{name}": world.split.counts(world.corpus.train_labels, classes, name) for name in ("train", "validation", "test")}
    return tables | {
        "clients/architecture": np.array(problem.architectures, dtype=object), "clients/rank": np.array(world.home),
        "clients/parameters": np.array([parameters[name] for name in problem.architectures]),
        "clients/forward_flops": np.array(world.forward_flops),
        "clients/memory_bytes": np.array([problem.sizes.memory(name) for name in problem.architectures]),
        "evaluation/generalization_count": np.bincount(world.corpus.test_labels, minlength=classes),
        "evaluation/personal_count": tables["partition/test"], "evaluation/validation_count": tables["partition/validation"]}


def _take_real_images(world: World) -> torch.Tensor:
    """The first images of each class of the official test set, as the classifier reads them, (C, n, Cin, H, W); short classes repeat theirs."""
    shard, rows = world.test, []
    for y in range(world.problem.classes):
        found = (shard.labels == y).nonzero().flatten()
        chosen = found[torch.arange(SAMPLES_PER_CLASS) % max(1, len(found))] if len(found) else torch.zeros(SAMPLES_PER_CLASS, dtype=torch.int64)
        rows.append(shard.pixels(chosen))
    return torch.stack(rows)


def _to_bytes(images: torch.Tensor) -> np.ndarray:
    """uint8 of images (..., C, H, W) in [0, 1]; of maps with channels that no colour stands for, the first alone or the first three."""
    channels = images.shape[-3]
    images = images[..., :3 if channels > 3 else 1 if channels == 2 else channels, :, :]
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
