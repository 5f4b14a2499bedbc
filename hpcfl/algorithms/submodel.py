"""Sub-models: each client trains a slice of one global model, and the server averages every element over the clients that trained it."""
import copy
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcfl import tree
from hpcfl.contract import Algorithm, ClientSite, Group, Problem, ServerSite, Sums, Totals, Update, Uplink, choice, flag
from hpcfl.models import zoo
from hpcfl.resize import slices
from hpcfl.tree import Tree

GLOBAL = "global"
OF_CLASSES = ("head.weight", "head.bias")                          # leaves with a row for each class
COUNT_BYTES = 8                                                    # of a client's number of images


@dataclass(frozen=True)
class Config:
    scaler: bool = flag(True, meaning="whether narrow layers are scaled to full-size outputs")
    masked_loss: bool = flag(True, meaning="whether what a client says of classes that it lacks counts neither in its loss nor in the mean")
    weighting: str = choice("images", "clients", meaning="of clients in the mean; images: as FedAvg; clients: all alike, as both papers' code")


class MaskAbsentClasses(nn.Module):
    """Logits, zero for classes that a client has no images of (Diao et al., section 3.3; zero, not -infinity, as in their code)."""

    classes: Tensor

    def __init__(self, classes: int):
        super().__init__()
        self.register_buffer("classes", torch.ones(classes, dtype=torch.bool))

    def forward(self, logits: Tensor) -> Tensor:
        """(B, classes) -> (B, classes)."""
        return logits.masked_fill(~self.classes, 0.0)


class Scaler:
    """y -> y / width at a narrowed layer, before its norm: what is left of the inputs adds up to the size of all (Diao et al., section 3.3).

    Theirs is off in eval mode, where they only have the full-size model, whose width is 1. Here clients evaluate their slices too, which are only right
    with the scale that they were trained with; so it stays on.
    """

    def __init__(self, width: float):
        self.width = width

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output / self.width


def masked_cross_entropy(modules, batch: Tree, context: Tree) -> Tensor:
    """CE of the logits whose missing classes are zero, mean over the batch."""
    return F.cross_entropy(modules.held(modules.model(batch["x"])), batch["y"])


class SubModel(Algorithm):
    """w_k = W[S_k], trained locally; W[i] <- sum_k c_k w_k[i] / sum_k c_k over the clients k whose slice has i, and W[i] stays where none has.

    S_k: the channels of `slices.axes` for the client's architecture and the round. c_k: its images, or 1. Rows of the head for classes that a
    client lacks are not counted for it. Running statistics of norms depend on the width of what lies before them, so they are averaged within each
    width, and the global model has those of the widest (ours; the authors' static BatchNorm lets all clients run the full-size model once more,
    which weak clients cannot). Integer buffers are carried.
    """

    refines = "adopt"

    def __init__(self, config: Config, problem: Problem):
        super().__init__(config, problem)
        self.base = problem.common_base()
        self.structure = problem.structure
        self.kept = lru_cache(maxsize=64)(self._find_kept)              # of a few rounds: a window moves on

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The paths of what is trained."""
        return tuple(path for path, _ in self.structure(self.base).named_parameters())

    @cached_property
    def norm_buffers(self) -> tuple[str, ...]:
        """The paths of what norms measured: floating buffers."""
        return tuple(path for path, leaf in self.structure(self.base).named_buffers() if leaf.is_floating_point())

    @abstractmethod
    def shift(self, round_: int) -> int:
        """The first channel that a slice keeps."""

    def modules(self, architecture: str) -> dict[str, nn.Module]:
        model, full = copy.deepcopy(self.structure(architecture)), self.structure(self.base).state_dict()
        self.kept(architecture, 0)                                 # what cannot be sliced is refused before anything runs
        width = zoo.split_name(architecture)[1]
        for name, layer in model.named_modules():
            narrowed = isinstance(layer, slices.MIXING) and len(layer.weight) < len(full[f"{name}.weight"])
            if self.config.scaler and narrowed and getattr(layer, "groups", 1) == 1:               # a depthwise layer adds up as much as ever
                layer.register_forward_hook(Scaler(width))
        return {"model": model, "held": MaskAbsentClasses(self.problem.classes)}

    def found(self, site: ServerSite) -> Tree:
        with self.problem.stream(f"init/{self.base}").seeding():
            model = self.problem.model(self.base).state_dict()
        statistics = {path: model[path] for path in self.norm_buffers}
        return tree.join(**{GLOBAL: model, **{f"norms/{each}": statistics for each in self.problem.sizes.every}}) | {"round": torch.tensor(0)}

    def join(self, group: Group, site: ClientSite) -> Group:
        """A model, and which classes the client has images of."""
        counts = [torch.bincount(site.holdings[client].train.labels, minlength=self.problem.classes) for client in group.clients]
        held = torch.stack(counts) > 0 if self.config.masked_loss else torch.ones(len(counts), self.problem.classes, dtype=torch.bool)
        return super().join(group, site).with_part("held", {"classes": held})

    def publish(self, server: Tree) -> Tree:
        return server

    def global_models(self, message: Tree) -> Mapping[str, tuple[str, Tree]]:
        return {GLOBAL: (self.base, tree.part(message, GLOBAL))}

    def averages(self, architecture: str) -> tuple[str, ...]:
        return (GLOBAL,)

    def receive(self, message: Tree, architecture: str) -> Tree:
        own = tree.select_floating(tree.part(message, GLOBAL)) | tree.part(message, f"norms/{architecture}")
        return slices.take(own, self.kept(architecture, int(message["round"])))

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        group, metrics = site.train_model(self.adopt(group, message), masked_cross_entropy)
        model, held = tree.select_floating(group.part("model")), group.part("held")["classes"].cpu().double()
        images = self.config.weighting == "images"
        each = site.sizes(group) if images else torch.ones(len(group.clients), dtype=torch.float64)
        weights = {path: each[:, None] * held if path in OF_CLASSES else each for path in model}
        sent_bytes = tree.nbytes(tree.row(model, 0)) + (COUNT_BYTES if images else 0)
        return Update(group, Uplink({group.architecture: Sums.weighted(group.clients, model, weights, sent_bytes=sent_bytes)}), metrics)

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        model, norms = tree.part(server, GLOBAL), tree.part(server, "norms")
        sums, counts = ({path: torch.zeros_like(model[path], dtype=torch.float64) for path in self.parameters} for _ in range(2))
        for architecture, total in sorted(totals.items()):
            kept = self.kept(architecture, int(server["round"]))
            slices.add_to(sums, {path: total.values[path] for path in self.parameters}, kept)
            slices.add_to(counts, {path: total.counts[path].expand_as(total.values[path]) for path in self.parameters}, kept)
            means = {path: mean for path, mean in total.mean().items() if path in self.norm_buffers}
            norms |= tree.join(**{architecture: slices.put(tree.part(norms, architecture), means, kept)})
        means = {path: torch.where(counts[path] > 0, sums[path] / counts[path], model[path]).to(model[path].dtype) for path in self.parameters}
        widest = max(self.problem.sizes.every, key=lambda architecture: zoo.split_name(architecture)[1])
        return tree.join(**{GLOBAL: model | means | tree.part(norms, widest), "norms": norms}) | {"round": server["round"] + 1}

    def refine(self, group: Group, message: Tree, site: ClientSite) -> Update:
        """The cohort goes on with its slice for the next round."""
        return Update(self.adopt(group, message))

    def adopt(self, group: Group, message: Tree) -> Group:
        """The group with its slice of the global model; integer buffers stay its own."""
        received = tree.repeat(tree.to(message, self.problem.device), len(group.clients))
        return group.with_part("model", group.part("model") | received)

    def _find_kept(self, architecture: str, round_: int) -> slices.Axes:
        return slices.find_axes(self.structure(self.base), self.structure(architecture), self.shift(round_))
