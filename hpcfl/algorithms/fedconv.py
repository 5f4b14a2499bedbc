"""FedConv (Shen et al., arXiv 2502.20639, MobiSys 2024): learning on models. The server keeps one global model W; for every size class it compresses W by
convolutions of its weights, clients train what they get as ordinary networks, and the server dilates what comes back by transposed convolutions, a set of
filters for each client, and learns how to average the dilated models.

One round: (1) train W on the public set; (2) tune the compression filters Q_s; (3) clients train W_s and send it back; (4) fine-tune each returned
model on the public set; (5) tune each client's dilation filters R_k; (6) tune the aggregation weights a_k. Every choice of an epoch looks at the public
validation part. What the paper leaves open is a setting here.
"""
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcfl import tree
from hpcfl.contract import (
    Algorithm,
    ClientSite,
    DataError,
    Group,
    JobError,
    Problem,
    ServerSite,
    Totals,
    TrainingError,
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
from hpcfl.resize.averaged import GRANULARITIES, Averaged
from hpcfl.resize.derived import Derived
from hpcfl.resize.filtered import INITS, Filtered
from hpcfl.training.evaluate import apply_in_batches, bind, count_correct
from hpcfl.training.group import OPTIMIZER
from hpcfl.training.losses import cross_entropy, divergence
from hpcfl.tree import Tree

LITTLE = 0.01                                                      # the coverage of weights that a client's model has none of


@dataclass(frozen=True)
class Config:
    """The settings of FedConv; the authors' own values are the defaults where they are known."""

    server_epochs: int = integer(10, 0, meaning="passes of W over the public set before each compression")
    server_lr: float = real(1e-4, 0.0, above=True, meaning="learning rate of these, and of server_finetune (Adam)")
    filter_epochs: int = integer(10, 1, meaning="passes that tune Q_s and R_k in a round")
    first_epochs: int = integer(20, 1, meaning="the same in the first rounds")
    first_rounds: int = integer(5, 0, meaning="how many rounds are the first", unit="rounds")
    filter_lr: float = real(1e-3, 0.0, above=True, meaning="learning rate of filters (Adam)")
    lr_halving: int = integer(25, 0, meaning="time after which filter_lr halves; 0: never", unit="rounds")
    lr_floor: float = real(1e-4, 0.0, meaning="learning rate at which halving ends")
    public_batch: int = integer(32, 1, meaning="batch size of all training at the server", unit="images")
    filter_init: str = choice_of(INITS, "slice", meaning="how filters begin; slice: as leading channels (ours); default: PyTorch's, the published code")
    mlr_passes: int = integer(1, 0, 2, meaning="how often the activation follows a filter; the published code applies it twice")
    server_finetune: int = integer(10, 0, meaning="passes over the public set for each returned model; 0: none, as the paper has it")
    dilation_floor: float = real(0.0, 0.0, 100.0, meaning="share of the public validation part that a dilated model must get right", unit="percent")
    dilation_tries: int = integer(3, 1, meaning="tries with new filters before a client below the floor ends the run")
    weights: str = choice("learned", "code", "mean", meaning="how dilated models are averaged; learned: softmax of logits trained by CE + KL; code: "
                                                             "N(0, 1) at first, not normalised, trained by CE; mean: by n_k")
    first_weights: str = choice("similarity", "coverage", meaning="how learned weights begin; similarity: -KL_k; coverage: the same where the client's "
                                                                  "channels lie, and little elsewhere (ours)")
    granularity: str = choice_of(GRANULARITIES, "element", meaning="what has an averaging weight a_k of its own")
    aggregation_epochs: int = integer(20, 1, meaning="passes over the public set that tune a_k in a round")
    aggregation_lr: float = real(1e-3, 0.0, above=True, meaning="learning rate of a_k (Adam)")
    lambda_kl: float = real(0.1, 0.0, meaning="weight of KL(f(W_prev) || f(W')) in the loss of the aggregation")


class FedConv(Algorithm):
    """One round at the server and at the clients.

    The server's state: "global/..." is W, "small/<architecture>/..." each W_s of this round, "filters/<architecture>/..." Q_s and
    "dilation/<client>/<architecture>/..." R_k.
    """

    config: Config

    def __init__(self, config: Config, problem: Problem):
        """Raises: JobError without a public set or a part of it to select by, for several models, and for widths that differ in more than sizes."""
        super().__init__(config, problem)
        data = problem.job.data
        if data.public_fraction == 0 or data.validation_fraction == 0:
            raise JobError("fedconv needs a public set at the server and a validation part of it to select by; got "
                           f"data.public_fraction = {data.public_fraction:g} and data.validation_fraction = {data.validation_fraction:g}, "
                           "wanted both above 0, for example 0.05 and 0.1")
        self.base = problem.common_base()
        for architecture in self.smaller:
            whole, small = (problem.structure(name).state_dict().keys() for name in (self.base, architecture))
            if alone := sorted(whole ^ small):
                raise JobError(f"fedconv resizes every weight of '{self.base}' to one of '{architecture}', but '{alone[0]}' is in only one of the two: "
                               f"models.feature_size = {problem.job.models.feature_size} is the size at which one of them ends anyway, so that it needs no "
                               "projection; set another models.feature_size, or 0 for each model's own")

    def found(self, site: ServerSite) -> Tree:
        public, held_out = site.require_public()
        if not len(held_out):
            raise DataError(f"the public set has {len(public)} images to learn on and none to select by; raise data.validation_fraction or "
                            "data.public_fraction")
        counts = torch.bincount(public.labels, minlength=self.problem.classes).tolist()
        if 0 in counts:
            raise DataError(f"the public set has {len(public)} images and none of class {counts.index(0)}; FedConv's server learns filters on it and "
                            "needs every class: raise data.public_fraction or data.fraction")
        with self.problem.stream("init").seeding():
            server = tree.join(**{"global": self.problem.model(self.base).state_dict()})
        for architecture in self.smaller:
            filters = self.init_filters(self.build_filters(self.base, architecture), f"filters/{architecture}")
            server |= tree.join(**{f"filters/{architecture}": filters})
        return server

    def prepare(self, server: Tree, site: ServerSite) -> Tree:
        """Steps 1 and 2 of a round."""
        group = group_one(self.base, 0, tree.to(tree.part(server, "global"), self.problem.device))
        if self.config.server_epochs:
            group = self.train_public(site, group, self.problem.structure(self.base), self.config.server_epochs, self.config.server_lr, "server training",
                                      member="the global model", setting="server_lr")
        trained = tree.row(group.part("model"), 0)
        items = {index: tree.join(model=trained, filters=tree.part(server, f"filters/{architecture}")) for index, architecture in enumerate(self.smaller)}
        compressed = {self.smaller[index]: result for index, result in site.spread("compress", items).items()}
        note_signs(site, trained, {architecture: tree.part(result, "model") for architecture, result in compressed.items()})
        new = {path: leaf for path, leaf in server.items() if not path.startswith(("global/", "filters/"))} | tree.join(**{"global": trained})
        for architecture, result in compressed.items():
            new |= tree.join(**{f"small/{architecture}": tree.part(result, "model"), f"filters/{architecture}": tree.part(result, "filters")})
        return new

    def compress(self, items: Mapping[int, Tree], site: ServerSite) -> dict[int, Tree]:
        """Step 2 for some size classes: Q_s = argmin CE(f(compress(W; Q_s))), and the smaller models that they make."""
        count, lr = self.schedule_filters(site.round)
        results = {}
        for index, item in items.items():
            architecture, item = self.smaller[index], tree.to(item, self.problem.device)
            module = self.build_filters(self.base, architecture)
            state = module.derive_state(tree.part(item, "model")) | tree.part(item, "filters")
            group, accuracy = self.tune(site, group_one(architecture, index, state), module, count, lr, f"compression to {architecture}",
                                        member="the filters")
            site.note(f"compression_accuracy {architecture}", float(accuracy))
            results[index] = tree.join(model=derive_model(module, group, 0), filters=take_filters(group, 0))
        return results

    def publish(self, server: Tree) -> Tree:
        return {path: leaf for path, leaf in server.items() if path.startswith(("global/", "small/"))}

    def global_models(self, message: Tree) -> Mapping[str, tuple[str, Tree]]:
        return {self.base: (self.base, tree.part(message, "global"))}

    def receive(self, message: Tree, architecture: str) -> Tree:
        return tree.select_floating(tree.part(message, "global" if architecture == self.base else f"small/{architecture}"))

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        """Step 3; the client knows nothing of compression."""
        received = tree.repeat(tree.to(message, self.problem.device), len(group.clients))
        group, metrics = site.train_model(group.with_part("model", group.part("model") | received), cross_entropy)
        sizes, sent = site.sizes(group), tree.select_floating(group.part("model"))
        return Update(group, Uplink({"models": Uploads({client: tree.join(model=tree.row(sent, index)) | {"samples": sizes[index]}
                                                            for index, client in enumerate(group.clients)})}), metrics)

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        """Steps 4 to 6 of a round."""
        uploads = totals["models"].trees
        items = {client: tree.join(model=tree.part(upload, "model"), filters=tree.part(server, f"dilation/{client}/{self.architecture(client, site)}"))
                 for client, upload in uploads.items()}
        dilation = 2 * self.schedule_filters(site.round)[0]         # epochs, each of about twice the work: the full model, and the filters
        costs = {client: self.config.server_finetune + (dilation if self.architecture(client, site) != self.base else 0) for client in items}
        restored = site.spread("restore", items, costs)
        previous = tree.part(server, "global")
        averaged = self.average(previous, restored, [float(upload["samples"]) for upload in uploads.values()], site)
        new = {path: leaf for path, leaf in server.items() if not path.startswith(("global/", "small/"))} | tree.join(**{"global": averaged})
        for client, result in restored.items():
            new |= tree.join(**{f"dilation/{client}/{self.architecture(client, site)}": tree.part(result, "filters")})
        return new

    def architecture(self, client: int, site: ServerSite) -> str:
        """The architecture that a client trained in this round."""
        return self.problem.architecture(client, site.row)

    def restore(self, items: Mapping[int, Tree], site: ServerSite) -> dict[int, Tree]:
        """Steps 4 and 5 for some clients: their models of full size, R_k, and for learned weights the logits of these models on the public set."""
        by_architecture: dict[str, dict[int, Tree]] = {}
        for client, item in items.items():
            by_architecture.setdefault(self.architecture(client, site), {})[client] = tree.to(item, self.problem.device)
        results: dict[int, Tree] = {}
        for architecture, members in by_architecture.items():
            results |= self.restore_group(architecture, members, site)
        return {client: results[client] for client in items}

    def restore_group(self, architecture: str, items: Mapping[int, Tree], site: ServerSite) -> dict[int, Tree]:
        """`restore` for clients of one architecture, as one Group."""
        module = self.problem.structure(architecture)
        counters = {path: leaf for path, leaf in module.state_dict().items() if not leaf.is_floating_point()}
        group = Group.from_states(architecture, {client: tree.join(model=tree.part(item, "model") | counters) for client, item in items.items()})
        if self.config.server_finetune:
            group = self.train_public(site, group, module, self.config.server_finetune, self.config.server_lr, "fine-tuning of returned models",
                                      member="client", setting="server_lr")
        models = {client: tree.part(own, "model") for client, own in group.states().items()}
        filters: dict[int, Tree] = {}
        if architecture != self.base:
            models, filters = self.dilate(architecture, models, {client: tree.part(item, "filters") for client, item in items.items()}, site)
        structure, (public, _) = self.problem.structure(self.base), site.require_public()

        def logits(client: int) -> Tree:
            return {"logits": apply_in_batches(bind(structure, models[client]), public)} if self.config.weights == "learned" else {}
        return {client: tree.join(model=models[client], filters=filters.get(client, {})) | logits(client) for client in items}

    def dilate(self, architecture: str, models: Mapping[int, Tree], filters: Mapping[int, Tree], site: ServerSite) -> tuple[dict[int, Tree], dict[int, Tree]]:
        """Step 5: R_k = argmin CE(f(dilate(w_k; R_k))) for each client, and the dilated models; a client below the floor tries again from new filters.

        Raises: TrainingError naming the client that stays below the floor.
        """
        config, module = self.config, self.build_filters(architecture, self.base)
        count, lr = self.schedule_filters(site.round)
        left, tuned, dilated, reached = sorted(models), {}, {}, {}
        for attempt in range(config.dilation_tries):
            own = {client: module.derive_state(models[client]) | (filters[client] if filters[client] and not attempt else
                                                                  self.init_filters(module, f"dilation/{architecture}/{attempt}", client))
                   for client in left}
            group = Group.from_states(architecture, {client: tree.join(model=state) for client, state in own.items()})
            group, accuracy = self.tune(site, group, module, count, lr, f"dilation of {architecture}", member="client")
            for row, client in enumerate(group.clients):
                dilated[client], tuned[client], reached[client] = derive_model(module, group, row), take_filters(group, row), float(accuracy[row])
            left = [client for client in left if reached[client] < config.dilation_floor]
            if not left:
                break
        else:
            raise TrainingError(f"server, phase {site.phase}, round {site.round}: the dilated model of client {left[0]} ({architecture}) got "
                                f"{reached[left[0]]:.1f} % of the public validation part right after {config.dilation_tries} tries with new filters, wanted "
                                f"algorithm.dilation_floor = {config.dilation_floor:g} %; raise models.shrinkage, algorithm.first_epochs or "
                                "data.public_fraction, or lower the floor")
        site.book_metrics(tuple(reached), {"dilation_accuracy": torch.tensor(list(reached.values()))})
        return dilated, tuned

    def average(self, previous: Tree, restored: Mapping[int, Tree], samples: list[float], site: ServerSite) -> Tree:
        """Step 6: W' = sum_k (n_k / n) a_k (*) W_k, a tuned by CE(f(W')) + lambda KL(f(W_prev) || f(W')) on the public set."""
        config, device = self.config, self.problem.device
        structure, (public, _) = self.problem.structure(self.base), site.require_public()
        module = Averaged(structure, len(restored), config.granularity, normalised=config.weights != "code").to(device)
        state = module.derive_state([tree.to(tree.part(result, "model"), device) for result in restored.values()], samples)
        loss, context = cross_entropy, {}
        if config.weights == "learned":
            loss = aggregation_loss
            context = {"teacher": apply_in_batches(bind(structure, tree.to(previous, device)), public).log_softmax(1),        # (n, C)
                       "strength": torch.tensor(config.lambda_kl, device=device)}
        state["logits"] = self.init_logits(module, context, restored, site)
        group = group_one(self.base, 0, state)
        if config.weights != "mean":
            group, accuracy = self.tune(site, group, module, config.aggregation_epochs, config.aggregation_lr, "aggregation", loss, context,
                                        "the weights of the global model", "aggregation_lr")
            site.note("aggregation_accuracy", float(accuracy))
        return derive_model(module, group, 0)

    def init_logits(self, module: Averaged, context: Tree, restored: Mapping[int, Tree], site: ServerSite) -> Tensor:
        """l_k = -KL(f(W_prev) || f(W_k)), the mean over the public set; N(0, 1) for `code`, zeros for `mean`.

        `coverage` (ours) adds the log of how much of a weight lies among the leading channels, where `slice` filters put the client's own: what only
        larger clients have is then not averaged with zeros.
        """
        if self.config.weights == "code":
            return torch.randn(module.logits.shape, generator=site.stream("aggregation weights").torch()).to(self.problem.device)
        if self.config.weights == "mean":
            return torch.zeros_like(module.logits)
        logits = [result["logits"].to(self.problem.device).log_softmax(1) for result in restored.values()]
        first = -torch.stack([divergence(context["teacher"], each) for each in logits])[:, None].expand(module.logits.shape).clone()
        if self.config.first_weights == "coverage":
            structures = [self.problem.structure(self.architecture(client, site)) for client in restored]
            shapes = [{path: parameter.shape for path, parameter in structure.named_parameters()} for structure in structures]
            first += torch.stack([module.coverage(each, LITTLE) for each in shapes]).to(first.device).log()
        return first

    @cached_property
    def smaller(self) -> tuple[str, ...]:
        """Every architecture that W is compressed to."""
        return tuple(name for name in self.problem.sizes.every if name != self.base)

    def build_filters(self, source: str, target: str) -> Filtered:
        """The module that resizes one architecture to another."""
        with self.problem.stream("structure").seeding():
            return Filtered(self.problem.structure(source), self.problem.structure(target), self.config.mlr_passes).to(self.problem.device)

    def init_filters(self, module: Filtered, purpose: str, client: int = -1) -> Tree:
        """Untrained filters, drawn from the stream of their purpose."""
        with self.problem.stream(purpose, client).seeding():
            module.reset_parameters(self.config.filter_init)
        return tree.clone({path: parameter.data for path, parameter in module.named_parameters() if parameter.requires_grad})

    def schedule_filters(self, round_: int) -> tuple[int, float]:
        """Epochs and learning rate of Q_s and R_k in a round."""
        config = self.config
        halvings = round_ // config.lr_halving if config.lr_halving else 0
        lr = max(min(config.lr_floor, config.filter_lr), config.filter_lr / 2 ** halvings)
        return (config.first_epochs if round_ < config.first_rounds else config.filter_epochs), lr

    def train_public(self, site: ServerSite, group: Group, module: nn.Module, count: int, lr: float, purpose: str,
                     loss: Callable = cross_entropy, context: Tree | None = None, member: str = "model", out_of: int = 0, setting: str = "filter_lr") -> Group:
        """`count` epochs of Adam on the public set for each model of the group; `out_of`: how many it gets in a round, where these are more.

        `setting`: the one that `lr` comes from.
        """
        public, _ = site.require_public()

        def batches(key: int) -> Iterable[Tree]:
            return iterate_epochs(public, self.config.public_batch, count, site.stream(purpose, key))
        steps = max(count, out_of) * -(-len(public) // self.config.public_batch)
        return site.fit(group, {"model": module}, [Turn(("model",), loss, self.rule("adam", setting, lr))], batches, context=context, keep_optimizer=True,
                        steps=steps * self.problem.job.federation.rounds, work=purpose, member=member)[0]

    def tune(self, site: ServerSite, group: Group, module: nn.Module, count: int, lr: float, purpose: str,
             loss: Callable = cross_entropy, context: Tree | None = None, member: str = "model", setting: str = "filter_lr") -> tuple[Group, Tensor]:
        """The best of `count` epochs for each model by the public validation part, the later one of equals; and its accuracy there in percent, (K,)."""
        best, top = group, torch.full((len(group.clients),), -1.0)
        for epoch in range(count):
            group = self.train_public(site, group, module, 1, lr, f"{purpose} {epoch}", loss, context, member, count, setting)
            accuracy = torch.stack([self.validate(site, module, own) for own in group.states().values()])
            better = accuracy >= top
            chosen = better.to(group.device)
            state = {path: leaf if leaf is best.state[path] else torch.where(chosen.view(-1, *[1] * (leaf.dim() - 1)), leaf, best.state[path])
                     for path, leaf in group.state.items() if not path.startswith(f"{OPTIMIZER}/")}
            best, top = Group(group.architecture, group.clients, state), torch.where(better, accuracy, top)
        return best, top

    def validate(self, site: ServerSite, module: nn.Module, own: Tree) -> Tensor:
        """Accuracy of a model on the public validation part in percent, ()."""
        state, (_, held_out) = tree.part(own, "model"), site.require_public()
        predict = bind(module.structure[0], bind(module, state, "weights")()) if isinstance(module, Derived) else bind(module, state)   # weights are made once
        right = count_correct(predict, held_out, self.problem.classes)
        return 100 * right.sum() / len(held_out)


def aggregation_loss(modules, batch: Tree, context: Tree) -> Tensor:
    """CE(f(W'), y) + lambda KL(softmax f(W_prev) || softmax f(W')), means over the batch."""
    student = modules.model(batch["x"]).log_softmax(1)
    return F.nll_loss(student, batch["y"]) + context["strength"] * divergence(context["teacher"][batch["index"]], student)


def group_one(architecture: str, key: int, model: Tree) -> Group:
    """A group of one model."""
    return Group(architecture, (key,), tree.transform(tree.join(model=model), lambda leaf: leaf.unsqueeze(0)))


def derive_model(module: Derived, group: Group, row: int) -> Tree:
    """The classifier that one row of a group of Derived modules stands for, as a state_dict."""
    return tree.clone(bind(module, tree.part(tree.row(group.state, row), "model"), "weights")())


def take_filters(group: Group, row: int) -> Tree:
    """The filters of one row of a group of Filtered modules."""
    return {path: leaf for path, leaf in tree.part(tree.row(group.state, row), "model").items() if path.startswith("filters.")}


def note_signs(site: ServerSite, whole: Tree, small: Mapping[str, Tree]) -> None:
    """Note the share of negative weights of each parameter, in percent, before compression and after it in each size class."""
    for size, model in {"1": whole, **small}.items():
        for path, leaf in model.items():
            if path.endswith("weight"):
                site.note(f"negative {path} {size}", 100 * float((leaf < 0).float().mean()))


plan = plan_rounds(FedConv)
