"""Simulation: a run from begin or resume to its end: the loop, evaluated, recorded, checkpointed, and stopped when asked."""
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from hpcfl import checkpoint, tree
from hpcfl.comm import EXCHANGES
from hpcfl.console import Console
from hpcfl.errors import CheckpointError, LayoutError, Stopped
from hpcfl.evaluate import bind, correct, model_of
from hpcfl.federation import Exchange, Place, State, rounds, schedule
from hpcfl.group import Group
from hpcfl.lead import Lead
from hpcfl.ledger import Ledger
from hpcfl.record import Record
from hpcfl.residency import Parked
from hpcfl.world import World

Answers = dict[int, dict[str, np.ndarray]]                         # client -> {"generalization_correct": (C,), ...}
SAMPLES_PER_CLASS, SAMPLED_CLIENTS = 8, 6                          # what the grid of synthetic images shows


class Simulation:
    """One run in one folder, the same on every rank; rank 0 keeps the record."""

    def __init__(self, world: World, folder: Path, console: Console, stop_requested: Callable[[], bool]):
        self.world, self.comm, self.folder, self.console = world, world.comm, folder, console
        self.stop_requested = stop_requested
        self.ledger = Ledger(world.problem.device)
        self.exchange = Exchange(world, self.ledger, self._before_refine)
        self.places, self.ahead = schedule(world), rounds(self.exchange)
        self.record = Record(_attributes(world), _fixed(world) if self.comm.is_server else {}, world.clients, world.comm.size)
        self.score: float | None = None
        self.lines: dict[str, float] = {}
        self.answered: dict[tuple[int, ...], tuple[tuple[weakref.ref, ...], Answers]] = {}         # clients -> their models' leaves, and how they did
        self.sent_bytes, self.carried = 0, dict.fromkeys(EXCHANGES, 0)
        self.lead = Lead()

    def run(self) -> None:
        """Carry the run to its end, from its beginning or from where it was resumed.

        Raises: Stopped after a checkpoint when a signal asked for it, and whatever training, data or the disk raise.
        """
        for state, place in self.ahead:
            self.score = None
            if self._due(place):
                self._evaluate("end", state, self._global_right_answers(state, place))
            end = state.rows == len(self.places)
            if end:
                self._sample(state, place)
            self._finish_round(place)
            stop = self.comm.agree(self.stop_requested())
            if end or stop or state.rows % self.world.job.checkpoint.every == 0:
                with self.ledger("checkpoint"):
                    checkpoint.save(self.folder, self.world, state, self.record, self.score)
            if end or stop:
                self._book_last_checkpoint()
            if stop and not end:
                raise Stopped(f"{self.folder}: stopped on a signal after round {state.rows} of {len(self.places)}; a checkpoint is there, the same command resumes")
            del state                                              # not to be kept beside those of the next round

    def so_far(self) -> tuple[float, str]:
        """Seconds of the round that is open, and in what it spends them at the server."""
        (round_s, seconds), row = self.ledger.so_far(), len(self.record.rows)
        where = f"{row + 1}/{len(self.places)}  {self.places[row].phase.name}" if row < len(self.places) else "after the last round"
        parts = ", ".join(f"{kind} {spent:.1f} s" for kind, spent in seconds.items() if spent >= 0.05)
        return round_s, f"{where}: {round_s:.0f} s so far ({parts})"

    def resume(self, resume_from: Path, may_differ: tuple[str, ...]) -> None:
        """Go on from the last checkpoint in a run folder, or from one checkpoint, with the record up to there.

        Raises: CheckpointError as `checkpoint.load` and `Record.read` do, and where the checkpoint lies elsewhere in the plan.
        """
        state = checkpoint.load(resume_from, self.world, may_differ)
        if self.comm.is_server:
            self.record.read(checkpoint.latest(resume_from).parent.parent / "metrics.h5", state.rows)
            self._check_place(resume_from, state.rows)
        self.ahead = rounds(self.exchange, state)
        self.console.say(f"resumed after round {state.rows} of {len(self.places)}")

    def _check_place(self, resume_from: Path, rows: int) -> None:
        """A plan with other rounds may have another phase at the checkpoint's row; then its state is none of this plan's."""
        last, here = self.record.rows[rows - 1], self.places[rows - 1] if rows <= len(self.places) else None
        if here is None or (last["phase"], last["round"]) != (here.phase.name, here.round):
            place = f"round {here.round + 1} of phase {here.phase.name}" if here else "behind its end"
            raise CheckpointError(f"{resume_from}: its last round, {rows}, was round {last['round'] + 1} of phase {last['phase']}; in this job that is {place}. "
                                  "Resume from an earlier checkpoint, from before the phases part, or choose another --out")

    def _due(self, place: Place) -> bool:
        return place.last or (place.row + 1) % self.world.job.evaluation.every == 0

    def _before_refine(self, state: State, place: Place) -> None:
        if self._due(place):
            self._evaluate("before_refine", state, {})

    def _evaluate(self, stage: str, state: State, global_share: Mapping[str, np.ndarray]) -> None:
        """Right answers per client and class on the official test set and on the client's own parts; nothing is selected by the first two.

        `global_share`: those of the federation's own models, name -> (C,), over this rank's share of the official test set.
        """
        with self.ledger("evaluate"):
            self.answered = {group.clients: (tuple(map(weakref.ref, group.part("model").values())), self._right_answers(group)) for group in state.groups}
            mine = {client: row for _, answers in self.answered.values() for client, row in answers.items()}
        with self.ledger("idle"):
            counts = self.comm.gather((mine, global_share))
        if not self.comm.is_server:
            return
        rows = {client: row for part, _ in counts for client, row in part.items()}
        tables = {name: np.stack([rows[client][name] for client in range(self.world.clients)]) for name in rows[0]}
        models = dict.fromkeys(name for _, share in counts for name in share)            # a rank has a share of some of them
        self.record.evaluate(stage, tables, {name: sum(share[name] for _, share in counts if name in share) for name in models})
        fixed = self.record.fixed
        accuracy = 100 * tables["generalization_correct"].sum(1) / fixed["evaluation/generalization_count"].sum()
        self.lines |= {"accuracy": accuracy.mean(), "lowest": accuracy.min(), "highest": accuracy.max()}
        for name in ("personal", "validation"):
            images = fixed[f"evaluation/{name}_count"].sum(1)
            held = images > 0
            if f"{name}_correct" in tables and held.any():
                self.lines[name] = 100 * float(np.mean(tables[f"{name}_correct"].sum(1)[held] / images[held]))
        self.score = self.lines.get("validation") if stage == "end" else self.score

    def _global_right_answers(self, state: State, place: Place) -> dict[str, np.ndarray]:
        """Those of the models of the phase's last step that has any, over the batches of the official test set that fall to this rank.

        What moves for it, moves once: the next round begins with the same message.

        Raises: LayoutError for a model that is not of its architecture.
        """
        world, batch = self.world, self.world.job.evaluation.batch
        step = next((step for step in reversed(place.phase.steps) if step.overrides("global_models")), None)
        with self.ledger("publish"):
            models = self.exchange.delivery.global_models(step, state) if step else {}
        found = {}
        with self.ledger("evaluate"):
            for name, (architecture, model, first, every) in models.items():
                module = world.problem.structure(architecture)
                if odd := model.keys() ^ module.state_dict().keys():
                    raise LayoutError(f"global model '{name}': '{min(odd)}' is in only one of it and {architecture}; wanted the state_dict of {architecture}")
                predict = bind(module, tree.to(model, world.problem.device))
                found[name] = correct(predict, world.test, world.problem.classes, batch, first, every).numpy()
        return found

    def _right_answers(self, parked: Group | Parked) -> Answers:
        """Those of a group's clients; a group whose models are still those of the last evaluation gives the same again."""
        world, settings = self.world, self.world.job.evaluation
        models, answers = self.answered.get(parked.clients, ((), {}))
        if len(models) and all(before() is leaf for before, leaf in zip(models, parked.part("model").values(), strict=True)):
            return answers
        group, answers = parked.fetch(), {}
        for client in group.clients:
            predict = model_of(group, world.modules[group.architecture], client)
            shards = {"generalization": world.test, "validation": world.holdings[client].validation}
            if settings.personal:
                shards["personal"] = world.personal[client]
            answers[client] = {f"{name}_correct": correct(predict, shard, world.problem.classes, settings.batch).numpy() for name, shard in shards.items()}
        return answers

    def _finish_round(self, place: Place) -> None:
        sent, self.sent_bytes = self.sent_bytes, self.comm.sent_bytes
        carried, self.carried = self.carried, dict(self.comm.carried)
        accounts = self.comm.gather({**self.ledger.close(), "sent_bytes": self.sent_bytes - sent,
                                     "carried": {kind: count - carried[kind] for kind, count in self.carried.items()}})
        if self.comm.is_server:
            self.record.finish_round(place.phase.name, place.round, accounts, self.world.answers(place.phase, place.row))
            row = self.record.rows[-1]
            self.console.round(place, len(self.places), row, self.lines)
            self.lead.watch(row["wall_s"], float(row["seconds"]["checkpoint"].max()))
            self.lines = {}

    def _book_last_checkpoint(self) -> None:
        accounts = self.comm.gather(self.ledger.close())
        if self.comm.is_server:
            self.record.add_late(accounts)
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
            sample = step.draw(group, own, site, SAMPLES_PER_CLASS)
            if sample is not None:
                real = torch.stack([step.seen(group, own, site, images) for images in _real(self.world)])
                brightest = max(1.0, float(sample[0].max()))       # maps of an extractor, which people see as images too, have no upper bound
                drawn[client] = {"synthetic": _bytes(sample[0] / brightest), "has": sample[1].cpu().numpy(), "real": _bytes(real / brightest)}
        gathered = self.comm.gather(drawn)
        if self.comm.is_server:
            samples = {client: part[client] for part in gathered for client in part}
            clients = sorted(samples)
            self.record.samples = {} if not samples else {
                "client": np.array(clients), "synthetic": np.stack([samples[client]["synthetic"] for client in clients]),
                "has": np.stack([samples[client]["has"] for client in clients]), "real": samples[clients[0]]["real"]}


def _attributes(world: World) -> Mapping[str, object]:
    return {"algorithm": world.job.algorithm_name, "name": world.job.run.name, "job": world.job.to_toml(), "clients": world.clients,
            "classes": world.problem.classes, "data_sha256": world.corpus.sha256, "ranks": world.comm.size}


def _fixed(world: World) -> Mapping[str, np.ndarray]:
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


def _real(world: World) -> torch.Tensor:
    """The first images of each class of the official test set, as the classifier reads them, (C, n, Cin, H, W); short classes repeat theirs."""
    shard, rows = world.test, []
    for y in range(world.problem.classes):
        found = (shard.labels == y).nonzero().flatten()
        chosen = found[torch.arange(SAMPLES_PER_CLASS) % max(1, len(found))] if len(found) else torch.zeros(SAMPLES_PER_CLASS, dtype=torch.int64)
        rows.append(shard.pixels(chosen))
    return torch.stack(rows)


def _bytes(images: torch.Tensor) -> np.ndarray:
    """uint8 of images (..., C, H, W) in [0, 1]; of maps with channels that no colour stands for, the first alone or the first three."""
    channels = images.shape[-3]
    images = images[..., :3 if channels > 3 else 1 if channels == 2 else channels, :, :]
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
