"""FedVTC (Niu, Dong, Qin, arXiv 2508.01669): clients share the mean and covariance of their features, train a variational transposed-convolution
generator (VTC) that decodes such features into images, and fine-tune their own models on what it draws from the global class Gaussians.

One round of a client: it trains the classifier f_k = h_k o g_k with alignment to the global means, measures the moments of its features, trains the VTC
psi_k by reconstruction + KL + distribution matching, and sends the moments (and psi_k). The server merges them to one Gaussian N(c^y, Sigma) of each
class and averages psi. After the last round every client fine-tunes f_k on images psi(v), v ~ N(c^y, Sigma). What the paper leaves open is a setting
here; section numbers are those of the specification.
"""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain, count, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcfl import tree
from hpcfl.algorithms.latent_statistics import DescribeLatents, Latents, LocalMoments, SendMeans, SendMoments, SendScatter, take_means
from hpcfl.contract import (
    ClientSite,
    Group,
    JobError,
    Phase,
    Plan,
    Problem,
    ServerSite,
    Sums,
    Totals,
    Turn,
    Update,
    Uplink,
    choice,
    choice_of,
    flag,
    integer,
    real,
)
from hpcfl.data.shards import iterate_epochs
from hpcfl.generators.vtc import VTC
from hpcfl.latents.announced import AnnouncedGaussians
from hpcfl.latents.encoders import LATENTS
from hpcfl.latents.gaussians import TARGETS, kl
from hpcfl.latents.matching import MATCHINGS
from hpcfl.latents.moments import MODES, Moments
from hpcfl.models.fixed_maps import MAPS
from hpcfl.training.evaluate import bind
from hpcfl.training.losses import cross_entropy, prototype_distance
from hpcfl.training.synthetic import Draw, draw_synthetic_epochs
from hpcfl.tree import Tree

BETAS = (0.5, 0.999)                                               # Adam's for psi and sigma_k, as unofficial implementations have them
SCOPES = {"all": None, "head": lambda path: path.startswith("model/head.")}                # which parameters fine-tuning trains


@dataclass(frozen=True)
class Config:
    """The settings of FedVTC; the paper's own choices are the defaults where they are known."""

    latent: str = choice_of(LATENTS, "own", meaning="own: g_k(x), the paper's; common: a fixed map that all clients share, ours")
    common_map: str = choice_of(MAPS, "dct", meaning="of latent = common: which map")
    common_size: int = integer(64, 2, meaning="of latent = common: number of features p (64: 8 x 8 low frequencies for dct)")
    covariance: str = choice_of(MODES, "shared_diag", meaning="which covariance: of each class or shared by all; all of it, its diagonal, or one number")
    statistics: str = choice("uploads", "sums", meaning="uploads: one phase, and the server sees each client; sums: two phases, and it sees sums only")
    between_client: bool = flag(True, meaning="whether the spread of the clients' means belongs to the covariance")
    min_count: int = integer(1, 1, meaning="a class with fewer images is not sent: the mean of one image is that image", unit="images")
    alignment: float = real(0.1, 0.0, meaning="weight of the alignment in the classifier's loss, lambda")
    warmup: int = integer(10, 0, meaning="time in which lambda rises linearly from 0", unit="rounds")
    frozen_head_init: bool = flag(False, meaning="the same random head for all clients at the start: a shared basis for free")
    vtc_sync: str = choice("fedavg", "none", meaning="whether the VTC's weights psi are averaged at the server")
    vtc_sync_every: int = integer(1, 1, meaning="interval of that average", unit="rounds")
    vtc_weights: str = choice("counts", "uniform", meaning="of clients in that average")
    vtc_epochs: int = integer(1, 1, meaning="passes of the VTC over a client's images in a round, E_v")
    vtc_steps: int = integer(0, 0, meaning="steps of the VTC in a round instead, the same for small and large shards; 0: vtc_epochs passes")
    vtc_batch: int = integer(64, 1, meaning="batch size of the VTC", unit="images")
    vtc_lr: float = real(1e-3, 0.0, above=True, meaning="learning rate of the VTC (Adam)")
    vtc_clip: float = real(10.0, 0.0, meaning="bound on the gradient norm of the VTC; 0: none")
    sigma_source: str = choice("empirical", "learnable", meaning="where sigma_k in v = z + sigma_k * eps comes from")
    sigma_lr: float = real(1e-5, 0.0, above=True, meaning="of sigma_source = learnable: its learning rate")
    noise: float = real(1.0, 0.0, meaning="factor on sigma_k in training; 1: the paper's; 0: a plain decoder")
    loss_reduction: str = choice("sum", "mean", meaning="over pixels in L_rc; sum: the paper's squared norm")
    beta_kl: float = real(1.0, 0.0, meaning="weight of L_KL in the VTC's loss")
    beta_dm: float = real(1.0, 0.0, meaning="weight of L_DM in the VTC's loss")
    beta_tv: float = real(0.0, 0.0, meaning="weight of the total variation in the VTC's loss; it is not in the paper")
    dm: str = choice_of(MATCHINGS, "mean", "off", meaning="which distribution matching L_DM is; the paper's formula is unknown")
    dm_classes: int = integer(10, 1, meaning="classes in each step of L_DM")
    dm_samples: int = integer(16, 2, meaning="samples per class in each step of L_DM")
    dm_whiten: bool = flag(True, meaning="whether L_DM weighs features by their inverse variance")
    variance_floor: float = real(1e-2, 0.0, above=True, meaning="smallest variance on the client")
    server_floor: float = real(1e-4, 0.0, above=True, meaning="smallest variance of the server's covariance")
    shrink_target: str = choice_of(TARGETS, "iso", meaning="target of the shrinkage (OAS)")
    truncate: float = real(0.0, 0.0, meaning="bound on |eps| when drawing; 0: none")
    clip_nonneg: bool = flag(False, meaning="whether drawn latents pass a ReLU")
    finetune: str = choice("final", "every_round", meaning="when clients fine-tune on synthetic images: once behind the last round, or in every round")
    finetune_scope: str = choice_of(SCOPES, "all", meaning="what fine-tuning trains")
    finetune_epochs: int = integer(50, 1, meaning="passes of fine-tuning over the synthetic images, E_ft")
    per_class: int = integer(200, 1, meaning="synthetic images of a class in a pass, M_syn", unit="images")
    finetune_batch: int = integer(50, 1, meaning="batch size of fine-tuning", unit="images")
    finetune_lr: float = real(0.0, 0.0, meaning="learning rate of fine-tuning; 0: training.lr")
    resample: bool = flag(True, meaning="whether each pass draws new images")
    ft_real: bool = flag(False, meaning="whether a pass over the client's own images follows each synthetic pass")
    ft_norm: str = choice("frozen", "train", meaning="running statistics of norm layers while fine-tuning")
    offload: bool = flag(False, meaning="keep the VTC in host memory except while it trains or draws")


VTC_PARTS = ("generator", "deviation", "optimizer/generator", "optimizer/deviation")        # of a client's state


class Deviation(nn.Module):
    """A learnable sigma_k: the log of its variance over the empirical one, (p,), so that it starts from there and follows the features."""

    def __init__(self, size: int):
        super().__init__()
        self.log_ratio = nn.Parameter(torch.zeros(size))


class VTCStep(DescribeLatents):
    """What the steps with a generator share: the network, its start, its averaging, and drawing from it."""

    config: Config

    def modules(self, architecture: str) -> dict[str, nn.Module]:
        networks = super().modules(architecture) | {"generator": VTC(self.latent.size, self.problem.shape)}
        return networks | ({"deviation": Deviation(self.latent.size)} if self.config.sigma_source == "learnable" else {})

    def join(self, group: Group, site: ClientSite) -> Group:
        """Each client its own classifier; the same generator everywhere, from one common stream, so that it need not be sent."""
        group = super().join(group, site)
        if group.part("generator"):
            return group
        with self.problem.stream("generator").seeding():
            group = group.with_common_part("generator", VTC(self.latent.size, self.problem.shape).state_dict())
        if self.config.sigma_source == "learnable":
            group = group.with_common_part("deviation", Deviation(self.latent.size).state_dict())
        if self.config.frozen_head_init:
            classes, size = group.part("model")["head.weight"].shape[1:]
            with self.problem.stream("head").seeding():            # nothing but the head: what comes before it differs between architectures
                head = nn.Linear(size, classes).state_dict()
            group = group.with_part("model", group.part("model") | tree.repeat({f"head.{path}": leaf for path, leaf in head.items()}, len(group.clients)))
        return group

    def publish(self, server: Tree) -> Tree:
        """The class Gaussians, and psi where it was averaged."""
        return super().publish(server) | tree.join(generator=tree.part(server, "generator"))

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        """The class Gaussians, and the mean of the psi_k that came; an older psi is not published again."""
        if not totals and not tree.part(server, "generator"):
            return server
        new = {path: leaf for path, leaf in super().aggregate(server, totals, site).items() if not path.startswith("generator/")}
        return new | tree.join(generator=tree.transform(totals["generator"].mean(), Tensor.float) if "generator" in totals else {})

    def adopt(self, group: Group, message: Tree) -> Group:
        """The group with the averaged generator, where the message brings one."""
        generator = tree.part(message, "generator")
        return group.with_common_part("generator", tree.to(generator, self.problem.device)) if generator else group

    def split_group(self, group: Group) -> tuple[Group, Tree]:
        """The group as far as the classifier needs it, and what only the VTC needs; with `offload` that rests in host memory."""
        classifying = reduce(Group.without, VTC_PARTS, group)
        resting = {path: leaf for path, leaf in group.state.items() if path not in classifying.state}
        return classifying, tree.to(resting, "cpu" if self.config.offload else self.problem.device)

    def draw(self, group: Group, message: Tree, site: ClientSite, per_class: int) -> tuple[Tensor, Tensor]:
        gaussians, client = self.read_gaussians(message, site), group.clients[0]
        generate, images = self.generate(self.adopt(group, message), gaussians, site, client), []
        generator = site.stream("sample", client).torch(self.problem.device)
        for y in range(self.problem.classes):
            images.append(generate(torch.full((per_class,), y, device=self.problem.device), generator))
        return self.problem.scale.to_unit(torch.stack(images)), gaussians.has

    def generate(self, group: Group, gaussians: AnnouncedGaussians, site: ClientSite, client: int) -> Draw:
        """x' = psi_k(v), v ~ N(c^y, Sigma) (3.2 generation), in the classifier's range."""
        config, own = self.config, tree.row(group.part("generator"), group.row_of[client])
        psi = bind(site.modules["generator"], tree.to(own, self.problem.device))

        def draw(labels: Tensor, generator: torch.Generator) -> Tensor:
            eps = torch.randn(len(labels), self.latent.size, generator=generator, device=labels.device)
            eps = eps.clamp(-config.truncate, config.truncate) if config.truncate else eps
            v = gaussians.draw(labels, eps)
            return self.problem.scale.from_symmetric(psi(v.relu() if config.clip_nonneg else v))
        return draw


def aligned_loss(modules, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
    """CE + lambda A(z, y): features drawn to the global prototypes, weighted by inverse variance (3.1)."""
    z = modules.model.features(batch["x"])                                                  # (B, p)
    alignment = prototype_distance(z, batch["y"], context["mean"], context["has"], context["weight"])
    return F.cross_entropy(modules.model.head(z), batch["y"]) + context["strength"] * alignment, {"alignment": alignment}


class FedVTC(VTCStep):
    """One round at a client: classifier, moments (of its own latents), VTC; what goes up."""

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        gaussians = self.read_gaussians(message, site)
        group, vtc = self.split_group(self.adopt(group, message))
        group, metrics = self.train_classifier(group, gaussians, site)
        latents = self.encode(group, site)
        local = self.measure(latents, site)
        uplink = self.upload(local) if self.config.latent == "own" else Uplink()
        if bool(gaussians.has.any()):
            whole = replace(group, state=group.state | tree.to(vtc, self.problem.device))
            whole, measured = self.train_generator(whole, latents, local, gaussians, site)
            group, vtc = self.split_group(whole)
            metrics |= measured
            if self.sends_generator(site):
                weights = site.sizes(group) if self.config.vtc_weights == "counts" else torch.ones(len(group.clients), dtype=torch.float64)
                uplink += Uplink({"generator": Sums.weighted(group.clients, tree.part(vtc, "generator"), weights, weights_sent=False)})
        return Update(replace(group, state=group.state | vtc), uplink, metrics)

    def sends_generator(self, site: ClientSite) -> bool:
        """Whether psi_k goes up this round: every vtc_sync_every rounds, and after the last."""
        config, rounds = self.config, self.problem.job.federation.rounds
        return config.vtc_sync == "fedavg" and ((site.round + 1) % config.vtc_sync_every == 0 or site.round + 1 == rounds)

    def train_classifier(self, group: Group, gaussians: AnnouncedGaussians, site: ClientSite) -> tuple[Group, dict[str, Tensor]]:
        """L_f = CE + lambda(t) A(z, y) (3.1); CE alone where no class Gaussians are known in the features' own space."""
        config = self.config
        if config.latent == "common" or config.alignment == 0 or not bool(gaussians.has.any()):
            return site.train_model(group, cross_entropy)
        strength = config.alignment * (min(1.0, site.round / config.warmup) if config.warmup else 1.0)
        context = {"mean": gaussians.mean, "weight": gaussians.weight, "has": gaussians.has, "strength": torch.tensor(strength, device=gaussians.mean.device)}
        return site.train_model(group, aligned_loss, context)

    def train_generator(self, group: Group, latents: Latents, local: LocalMoments, gaussians: AnnouncedGaussians, site: ClientSite
                        ) -> tuple[Group, dict[str, Tensor]]:
        """E_v epochs of Adam on psi_k, and on sigma_k where it is learnable; f_k is frozen (3.3)."""
        config = self.config
        rule = self.rule("adam", "vtc_lr", betas=BETAS, clip=config.vtc_clip, clip_setting=f"algorithm.vtc_clip = {config.vtc_clip:g}")
        turns = [Turn(("generator",), self.generator_loss, rule)]
        if config.sigma_source == "learnable":
            turns.append(Turn(("deviation",), self.generator_loss, self.rule("adam", "sigma_lr", betas=BETAS)))
        deviations = {client: self.find_deviation(local[client]) for client in group.clients}

        def batches(client: int) -> Iterator[Tree]:
            return self.generator_batches(client, latents[client], deviations[client], gaussians, site)
        context = {"mean": gaussians.mean, "variance": gaussians.variance, "precision": gaussians.precision, "coupling": gaussians.coupling,
                   "least": gaussians.mean.new_tensor(config.variance_floor ** 0.5),
                   "weight": gaussians.weight if config.dm_whiten else torch.ones_like(gaussians.weight)}
        images = max(len(site.holdings[client].train) for client in group.clients)
        steps = (config.vtc_steps or config.vtc_epochs * -(-images // config.vtc_batch)) * self.problem.job.federation.rounds
        group, measured = site.fit(group, turns, batches, context=context, keep_optimizer=config.vtc_sync == "none", steps=steps)
        measured["vtc_loss"] = measured.pop("loss")
        return group, measured

    def find_deviation(self, local: Moments) -> Tensor:
        """sigma_k, the local standard deviation for each class (C, p), floored: of each class in the class modes, else pooled within classes."""
        scatter = local.scatter.diagonal(dim1=-2, dim2=-1) if self.full else local.scatter                  # (C, p)
        pooled = self.config.covariance.startswith("shared")
        variance = (scatter.sum(0) / local.count.sum()).expand_as(scatter) if pooled else scatter / local.count.clamp(min=1).unsqueeze(1)
        return variance.clamp_min(self.config.variance_floor).sqrt().float()

    def generator_batches(self, client: int, z: Tensor, deviation: Tensor, gaussians: AnnouncedGaussians, site: ClientSite) -> Iterator[Tree]:
        """Passes over the client's images with their latents and the noise of each step; latents of the announced classes for L_DM."""
        config, shard, device = self.config, site.holdings[client].train, z.device
        generator, away = site.stream("vtc", client).torch(device), gaussians.distance(shard.labels, z)
        present = gaussians.has.nonzero().flatten()

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, z.shape[1], generator=generator, device=device)
        passes = range(config.vtc_epochs) if config.vtc_steps == 0 else count()
        orders = (torch.randperm(len(shard), generator=generator, device=device).split(config.vtc_batch) for _ in passes)
        for indices in islice(chain.from_iterable(orders), config.vtc_steps or None):
            y = shard.labels[indices]
            batch = {"x": self.problem.scale.to_symmetric(shard.pixels(indices)), "y": y, "z": z[indices], "eps": normal(len(indices)),
                     "deviation": deviation[y], "away": away[indices], "has": gaussians.has[y]}
            if config.dm != "off":
                chosen = present[torch.randperm(len(present), generator=generator, device=device)[:config.dm_classes]]
                labels = chosen.repeat_interleave(config.dm_samples)
                batch |= {"classes": chosen, "v": gaussians.draw(labels, normal(len(labels))), "fresh": gaussians.draw(labels, normal(len(labels)))}
            yield batch

    def generator_loss(self, modules, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
        """L_e = L_rc + beta_kl D_KL + beta_dm L_DM (3.3), divided by the number of pixels so that Adam and clipping see one scale for all images."""
        config, z, y, deviation = self.config, batch["z"], batch["y"], batch["deviation"]
        if config.sigma_source == "learnable":
            deviation = deviation * (0.5 * modules.deviation.log_ratio).exp()
            deviation = torch.maximum(deviation, context["least"])                          # not clamp: it stops the slope on the floor
        images = modules.generator(z + config.noise * deviation * batch["eps"])             # v = z + sigma_k * eps, (B, C, H, W)
        pixels = images[0].numel()
        error = (images - batch["x"]).square().flatten(1)                                   # (B, pixels)
        reconstruction = (error.sum(1) if config.loss_reduction == "sum" else error.mean(1)).mean()
        held = batch["has"]
        divergence = (kl(deviation.square(), batch["away"], context["precision"][y], context["coupling"][y]) * held).sum() / held.sum().clamp_min(1)
        loss = reconstruction + config.beta_kl * divergence
        measured = {"reconstruction": reconstruction, "kl": divergence}
        if config.dm != "off":
            measured["dm"] = self.match_latents(modules, batch, context)
            loss = loss + config.beta_dm * measured["dm"]
        if config.beta_tv:
            loss = loss + config.beta_tv * (images.diff(dim=2).abs().sum() + images.diff(dim=3).abs().sum()) / len(images)
        return loss / pixels, measured

    def match_latents(self, modules, batch: Tree, context: Tree) -> Tensor:
        """L_DM over the classes of this step: what encoding the generated images gives, against the global Gaussians (3.5)."""
        classes, size = batch["classes"], self.latent.size
        features = self.latent.encode(modules, modules.generator(batch["v"])).view(len(classes), -1, size)              # (Y, M, p)
        return MATCHINGS[self.config.dm](features, batch["v"].view_as(features), batch["fresh"].view_as(features), context["mean"][classes],
                                         context["variance"][classes].sqrt(), context["weight"][classes])


class FedVTCBySums(FedVTC):
    """FedVTC's round where the server sees nothing but sums: counts and sums in the place of each client's moments."""

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        update = super().train(group, message, site)
        kept = Uplink({name: sums for name, sums in update.uplink.pieces.items() if name != "moments"})
        return replace(update, uplink=kept + self.upload_sums(update.group, site))

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        return take_means(super().aggregate(server, totals, site), totals)


class FineTune(VTCStep):
    """Each client on its own: draw a class-balanced synthetic set and train f_k on it by cross-entropy, psi frozen (3.6, 3.7)."""

    refines = "finetune"

    def refine(self, group: Group, message: Tree, site: ClientSite) -> Update:
        config, gaussians = self.config, self.read_gaussians(message, site)
        whole = self.adopt(group, message)
        classes = gaussians.has.nonzero().flatten()
        if not len(classes):
            return Update(whole)
        group, vtc = self.split_group(whole)

        def batches(client: int) -> Iterator[Tree]:
            def real(epoch: int) -> Iterable[Tree]:
                return iterate_epochs(site.holdings[client].train, config.finetune_batch, 1, site.stream(f"real/{epoch}", client))
            return draw_synthetic_epochs(self.generate(whole, gaussians, site, client), classes, config.per_class, config.finetune_batch,
                                         config.finetune_epochs, site.stream("finetune", client), resample=config.resample,
                                         real=real if config.ft_real else None)
        rule = self.problem.optimizer()
        if config.finetune_lr:
            rule = replace(rule, lr=config.finetune_lr, rate_setting=f"algorithm.finetune_lr = {config.finetune_lr:g}")
        turn = Turn(("model",), cross_entropy, rule, SCOPES[config.finetune_scope])
        times = self.problem.job.federation.rounds if config.finetune == "every_round" else 1
        steps = config.finetune_epochs * -(-len(classes) * config.per_class // config.finetune_batch) * times
        group, metrics = site.fit(group, [turn], batches, frozen_norm=config.ft_norm == "frozen", steps=steps)
        return Update(replace(group, state=group.state | vtc), metrics=metrics)


def plan(config: Config, problem: Problem) -> Plan:
    """Own latents: rounds, then fine-tuning. Common latents: moments once, rounds, then fine-tuning.

    Raises: JobError for statistics = "sums" without between_client.
    """
    sums, common, finetune = config.statistics == "sums", config.latent == "common", FineTune(config, problem)
    if sums and not config.between_client:
        raise JobError("algorithm.between_client = false needs to know each client's own scatter, which algorithm.statistics = 'sums' hides; "
                       "set between_client = true, or statistics = 'uploads'")
    scatter = (SendScatter(config, problem),) if sums else ()
    learning = (FedVTC(config, problem),) if common else (FedVTCBySums(config, problem), *scatter) if sums else (FedVTC(config, problem),)
    each = (finetune,) if config.finetune == "every_round" else ()
    rounds = Phase("rounds", problem.job.federation.rounds, learning + each)
    share = SendMeans(config, problem) if sums else SendMoments(config, problem)
    first = (Phase("statistics", 1, (share, *scatter), everyone=True),) if common else ()
    last = (Phase("finetune", 1, (finetune,), everyone=True),) if config.finetune == "final" else ()
    return (*first, rounds, *last)
