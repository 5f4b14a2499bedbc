"""Simulation: a run from begin or resume to its end: the loop, evaluated, recorded, checkpointed, and stopped when asked."""
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from hpcfl import checkpoint
from hpcfl.console import Console
from hpcfl.errors import Stopped
from hpcfl.evaluate import correct, model_of
from hpcfl.federation import Place, State, begin, rounds, schedule
from hpcfl.ledger import Ledger
from hpcfl.record import Record
from hpcfl.world import World

SAMPLES_PER_CLASS, SAMPLED_CLIENTS = 8, 6                          # what the grid of synthetic images shows


class Simulation:
    """One run in one folder, the same on every rank; rank 0 keeps the record."""

    def __init__(self, world: World, folder: Path, console: Console, stop_requested: Callable[[], bool]):
        self.world, self.comm, self.folder, self.console = world, world.comm, folder, console
        self.stop_requested = stop_requested
        self.ledger = Ledger(world.problem.device)
        self.places = schedule(world)
        self.record = Record(_attributes(world), _fixed(world), world.clients, world.comm.size)
        self.score: float | None = None
        self.lines: dict[str, float] = {}
        self.sent_bytes = 0

    def run(self, resume_from: Path | None, may_differ: tuple[str, ...] = ()) -> None:
        """Carry the run to its end.

        Raises: Stopped after a checkpoint when a signal asked for it, and whatever training, data or the disk raise.
        """
        state = self._start(resume_from, may_differ)
        for state, place in rounds(self.world, state, self.ledger, self._before_refine):
            if self._due(place):
                self._evaluate("end", state)
            end = state.rows == len(self.places)
            if end:
                self._sample(state, place)
            self._finish_round(place)
            stop = self.comm.agree(self.stop_requested())
            if end or stop or state.rows % self.world.job.checkpoint.every == 0:
                with self.ledger("checkpoint"):
                    checkpoint.save(self.folder, self.world, state, self.record, self.score)
            if stop and not end:
                raise Stopped(f"{self.folder}: stopped on a signal after round {state.rows} of {len(self.places)}; a checkpoint is there, the same command resumes")

    def _start(self, resume_from: Path | None, may_differ: tuple[str, ...]) -> State:
        state = checkpoint.load(resume_from, self.world, may_differ) if resume_from else None
        if state is None:
            return begin(self.world)
        if self.comm.is_server:
            origin = resume_from if (resume_from / "LATEST").is_file() else resume_from.parent.parent
            self.record.read(origin / "metrics.h5", state.rows)
        self.console.say(f"resumed after round {state.rows} of {len(self.places)}")
        return state

    def _due(self, place: Place) -> bool:
        return place.last or (place.row + 1) % self.world.job.evaluation.every == 0

    def _before_refine(self, state: State, place: Place) -> None:
        if self._due(place):
            self._evaluate("before_refine", state)

    def _evaluate(self, stage: str, state: State) -> None:
        """Right answers per client and class on the official test set and on the client's own parts; nothing is selected by the first two."""
        with self.ledger("evaluate"):
            mine = {client: row for group in state.groups for client, row in self._right_answers(group).items()}
        with self.ledger("idle"):
            counts = self.comm.gather(mine)
        if not self.comm.is_server:
            return
        rows = {client: row for part in counts for client, row in part.items()}
        tables = {name: np.stack([rows[client][name] for client in range(self.world.clients)]) for name in rows[0]}
        self.record.evaluate(stage, tables)
        fixed = self.record.fixed
        accuracy = 100 * tables["generalization_correct"].sum(1) / fixed["evaluation/generalization_count"].sum()
        self.lines |= {"accuracy": accuracy.mean(), "lowest": accuracy.min(), "highest": accuracy.max()}
        for name in ("personal", "validation"):
            images = fixed[f"evaluation/{name}_count"].sum(1)
            held = images > 0
            if f"{name}_correct" in tables and held.any():
                self.lines[name] = 100 * float(np.mean(tables[f"{name}_correct"].sum(1)[held] / images[held]))
        self.score = self.lines.get("validation") if stage == "end" else self.score

    def _right_answers(self, group) -> dict[int, dict[str, np.ndarray]]:
        world, settings = self.world, self.world.job.evaluation
        answers = {}
        for client in group.clients:
            predict = model_of(group, world.modules[group.architecture], client)
            shards = {"generalization": world.test, "validation": world.holdings[client].validation}
            if settings.personal:
                shards["personal"] = world.holdings[client].test
            answers[client] = {f"{name}_correct": correct(predict, shard, world.problem.classes, settings.batch).numpy() for name, shard in shards.items()}
        return answers

    def _finish_round(self, place: Place) -> None:
        before, self.sent_bytes = self.sent_bytes, self.comm.sent_bytes
        accounts = self.comm.gather({**self.ledger.close(), "sent_bytes": self.sent_bytes - before})
        if self.comm.is_server:
            self.record.finish_round(place.phase.name, place.round, accounts)
            self.console.round(place, len(self.places), self.record.rows[-1], self.lines)
            self.lines = {}

    def _sample(self, state: State, place: Place) -> None:
        """Synthetic images beside real ones, for people to look at."""
        step, drawn = place.phase.steps[-1], {}
        if not step.overrides("draw"):
            return
        message = self.comm.from_server(step.publish, state.server)
        for group in state.groups:
            if group.clients[0] < SAMPLED_CLIENTS:
                site = self.world.client_site(group, place.phase, place.round)
                sample = step.draw(group, step.receive(message, group.architecture), site, SAMPLES_PER_CLASS)
                if sample is not None:
                    drawn[group.clients[0]] = _bytes(sample[0]), sample[1].cpu().numpy()
        gathered = self.comm.gather(drawn)
        if self.comm.is_server:
            samples = {client: part[client] for part in gathered for client in part}
            samples = {client: samples[client] for client in sorted(samples)}
            self.record.samples = {} if not samples else {"client": np.array(list(samples)), "synthetic": np.stack([images for images, _ in samples.values()]),
                                   "has": np.stack([has for _, has in samples.values()]), "real": _bytes(_real(self.world))}


def _attributes(world: World) -> Mapping[str, object]:
    return {"algorithm": world.job.algorithm_name, "name": world.job.run.name, "job": world.job.to_toml(), "clients": world.clients,
            "classes": world.problem.classes, "data_sha256": world.corpus.sha256, "ranks": world.comm.size}


def _fixed(world: World) -> Mapping[str, np.ndarray]:
    """What does not change during a run: the partition, the clients, how many images each accuracy is over."""
    labels, classes, problem = world.corpus.train_labels, world.problem.classes, world.problem
    def counts(part):
        return np.stack([np.bincount(labels[indices], minlength=classes) for indices in part]).astype(np.int64)
    with problem.stream("count").seeding():
        parameters = {name: sum(p.numel() for p in problem.model(name).parameters()) for name in set(problem.architectures)}
    split = world.split
    tables = {f"partition/{name}": counts(getattr(split, name)) for name in ("train", "validation", "test")}
    return tables | {
        "clients/architecture": np.array(problem.architectures, dtype=object), "clients/rank": np.array(world.home),
        "clients/parameters": np.array([parameters[name] for name in problem.architectures]),
        "evaluation/generalization_count": np.bincount(world.corpus.test_labels, minlength=classes),
        "evaluation/personal_count": tables["partition/test"], "evaluation/validation_count": tables["partition/validation"]}


def _real(world: World) -> torch.Tensor:
    """The first images of each class of the official test set, (C, n, Cin, H, W) in [0, 1]; short classes repeat theirs."""
    shard, rows = world.test, []
    for y in range(world.problem.classes):
        found = (shard.labels == y).nonzero().flatten()
        chosen = found[torch.arange(SAMPLES_PER_CLASS) % max(1, len(found))] if len(found) else torch.zeros(SAMPLES_PER_CLASS, dtype=torch.int64)
        rows.append(world.problem.scale.to_unit(shard.pixels(chosen)))
    return torch.stack(rows)


def _bytes(images: torch.Tensor) -> np.ndarray:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
