"""FedDF (Lin et al., NeurIPS 2020, arXiv 2006.07242): FedAvg within each architecture, then the ensemble of all models is distilled into each average.

The server distils on its public images (data.public_fraction); their labels are never looked at, not even to end training, which is judged by the same
divergence from the ensemble on what is held out of them (ours; the authors stop by validation accuracy). Lin et al. and GeFL take the images from
another data set, here they come from the federation's own.
"""
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from hpcfl import tree
from hpcfl.algorithms.fedavg import FedAvg
from hpcfl.contract import (
    ClientSite,
    Group,
    JobError,
    Problem,
    ServerSite,
    Sums,
    Totals,
    Turn,
    Update,
    Uplink,
    Uploads,
    choice,
    choice_of,
    integer,
    plan_rounds,
    real,
)
from hpcfl.data.shards import iterate_epochs
from hpcfl.training.evaluate import apply_in_batches, bind
from hpcfl.training.losses import divergence
from hpcfl.tree import Tree

ENSEMBLES: dict[str, Callable[[Tensor], Tensor]] = {               # logits of K models (K, n, C) to log-probabilities (n, C)
    "logits": lambda logits: logits.mean(0).log_softmax(1),
    "probabilities": lambda logits: logits.log_softmax(2).logsumexp(0) - math.log(len(logits))}


@dataclass(frozen=True)
class Config:
    teachers: str = choice("clients", "architectures", meaning="who teaches: all returned models (the paper), or their averages (GeFL)")
    ensemble: str = choice_of(ENSEMBLES, "logits", meaning="what of the teachers is averaged; the paper takes logits")
    steps: int = integer(1000, 1, meaning="most steps for each architecture in a round; the paper 10,000")
    batch: int = integer(128, 1, meaning="batch size of the distillation, the paper's", unit="images")
    lr: float = real(1e-3, 0.0, above=True, meaning="learning rate of the distillation (Adam), along half a cosine to 0; the paper's")
    stage: int = integer(100, 1, meaning="steps of one rate, after which what is held out is looked at; the authors' code", unit="steps")
    patience: int = integer(300, 0, meaning="steps without a lower divergence that end the distillation; 0: none do; the paper 1,000", unit="steps")


def distillation_loss(modules, batch: Tree, context: Tree) -> Tensor:
    """KL(ensemble || student), mean over the batch."""
    return divergence(batch["teacher"], modules.model(batch["x"]).log_softmax(1))


class FedDF(FedAvg):
    """theta_m <- mean over the clients of m, then argmin of KL(softmax(mean_k f_k(x)) || softmax(f_m(x))) over public x (the paper's Algorithm 3)."""

    config: Config

    def __init__(self, config: Config, problem: Problem):
        """Raises: JobError without a public set."""
        super().__init__(config, problem)
        if problem.job.data.public_fraction == 0:
            raise JobError("feddf distils on public images at the server; got data.public_fraction = 0, wanted it above 0, for example 0.05")

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        update = super().train(group, message, site)
        if self.config.teachers == "architectures":
            return update
        sizes, models = site.sizes(group), tree.select_floating(update.group.part("model"))
        uploads = {client: tree.join(model=tree.row(models, index)) | {"samples": sizes[index]} for index, client in enumerate(group.clients)}
        return Update(update.group, Uplink({"models": Uploads(uploads)}), update.metrics)

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        every = self.problem.sizes.every
        if self.config.teachers == "architectures":
            averages = super().aggregate(server, totals, site)
            teachers = {every.index(name): (name, tree.part(averages, name)) for name in totals}
        else:
            uploads = totals["models"].trees
            owned = {client: self.problem.architecture(client, site.row) for client in uploads}
            averages = super().aggregate(server, sum_uploads(uploads, owned), site)
            teachers = {client: (owned[client], tree.part(upload, "model")) for client, upload in uploads.items()}
        items = {key: tree.join(model=model) | {"architecture": torch.tensor(every.index(name))} for key, (name, model) in teachers.items()}
        logits = tree.stack([tree.to(own, self.problem.device) for own in site.spread("predict", items).values()])          # (K, n, C)
        ensemble = tree.transform(logits, ENSEMBLES[self.config.ensemble])
        students = site.spread("distil", {index: tree.join(model=tree.part(averages, name), teacher=ensemble) for index, name in enumerate(every)})
        return tree.join(**{every[index]: model for index, model in students.items()})

    def predict(self, items: Mapping[int, Tree], site: ServerSite) -> dict[int, Tree]:
        """Logits of some models on the public images and on those held out of them, (n, C)."""
        shards = dict(zip(("public", "held_out"), site.require_public(), strict=True))
        found = {}
        for key, item in items.items():
            structure = self.problem.structure(self.problem.sizes.every[int(item["architecture"])])
            predict = bind(structure, tree.to(tree.part(item, "model"), self.problem.device))
            found[key] = {name: apply_in_batches(predict, shard) for name, shard in shards.items() if len(shard)}
        return found

    def distil(self, items: Mapping[int, Tree], site: ServerSite) -> dict[int, Tree]:
        """Some averages taught by the ensemble: each as it was when closest to it on the held-out images, or as it is at the end where there are none."""
        return {index: self.teach(index, tree.to(item, self.problem.device), site) for index, item in items.items()}

    def teach(self, index: int, item: Tree, site: ServerSite) -> Tree:
        """One average, taught; it never ends further from the ensemble than it began. Training ends early when `patience` steps have brought nothing."""
        config, architecture, teacher = self.config, self.problem.sizes.every[index], tree.part(item, "teacher")
        group = Group(architecture, (index,), tree.repeat(tree.join(model=tree.part(item, "model")), 1))
        best, best_steps, lowest = group, 0, self.measure_divergence(group, teacher, site)
        for done in range(0, config.steps, config.stage):
            count = min(config.stage, config.steps - done)
            group = self.train_stage(group, done, count, teacher["public"], site)
            reached = self.measure_divergence(group, teacher, site)
            if reached < lowest or "held_out" not in teacher:
                best, best_steps, lowest = group, done + count, reached
            if config.patience and done + count - best_steps >= config.patience:
                break
        site.note(f"distillation_steps {architecture}", best_steps)
        site.note(f"distillation_divergence {architecture}", lowest)
        return tree.row(best.part("model"), 0)

    def train_stage(self, group: Group, done: int, count: int, teacher: Tensor, site: ServerSite) -> Group:
        """`count` steps of Adam on public images, its moments going on from the stage before."""
        def batches(index: int) -> Iterator[Tree]:
            passes = iterate_epochs(site.require_public()[0], self.config.batch, count, site.stream(f"distillation {done}", index))
            for batch in islice(passes, count):
                yield {"x": batch["x"], "teacher": teacher[batch["index"]]}
        lr = self.config.lr * (1 + math.cos(math.pi * done / self.config.steps)) / 2
        modules = {"model": self.problem.structure(group.architecture)}
        return site.fit(group, modules, [Turn(("model",), distillation_loss, self.rule("adam", "lr", lr))], batches, keep_optimizer=True,
                        steps=self.config.steps * self.problem.job.federation.rounds, work=f"distillation from step {done}",
                        member="the average of architecture")[0]

    def measure_divergence(self, group: Group, teacher: Tree, site: ServerSite) -> float:
        """KL(ensemble || student) on the held-out public images, where there are any, else on the others."""
        public, held_out = site.require_public()
        part, shard = ("held_out", held_out) if "held_out" in teacher else ("public", public)
        predict = bind(self.problem.structure(group.architecture), tree.row(group.part("model"), 0))
        return float(divergence(teacher[part], apply_in_batches(predict, shard).log_softmax(1)))


def sum_uploads(uploads: Mapping[int, Tree], owned: Mapping[int, str]) -> Totals:
    """The sums that FedAvg averages by, of whole uploads; owned: client -> its architecture."""
    members = {name: [client for client in uploads if owned[client] == name] for name in sorted(set(owned.values()))}
    return {name: Sums.weighted(clients, tree.stack([tree.part(uploads[client], "model") for client in clients]),
                                torch.stack([uploads[client]["samples"] for client in clients])).total() for name, clients in members.items()}


plan = plan_rounds(FedDF)
