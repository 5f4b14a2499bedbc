"""Audit of a generator: how well it can be attacked, and how near its samples come to training images and to real ones."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcfl.analysis import likeness
from hpcfl.analysis.audit_samples import draw_images, draw_replacements, match_classes, select_images, take_by_class
from hpcfl.analysis.membership_inference import calibrate, measure_nearest, threshold_attack
from hpcfl.contract import Algorithm, ClientSite, Problem
from hpcfl.data.shards import Shard
from hpcfl.federation.state import State, schedule
from hpcfl.federation.world import World
from hpcfl.models import fixed_maps
from hpcfl.training.evaluate import BATCH, apply_in_batches
from hpcfl.training.group import Group
from hpcfl.tree import Tree

POINTS = 1000                                                      # training images that a generator is audited on, as in GeFL's measure of memorisation
REFERENCES = 4                                                     # sets of real images to calibrate by
FEATURES = 128                                                     # of the scattering map, where its classes are nearest to Gaussians
PAIRS = 8
SAME = 1e-4                                                        # of brightness: to a generator's range and back is rounding, maps are not
TITLES = {"samples": "training, nearest sample", "held_out": "training, nearest held-out"}

Found = dict[str, Any]                                             # what JSON can carry; {"left_out": reason} where something could not be measured
Blocks = Mapping[str, tuple[np.ndarray, np.ndarray]]               # title -> pairs of uint8 images (n, 2, c, h, w) and their distances (n,)


@dataclass(frozen=True, eq=False)
class Sampler:
    """A generator as one client meets it: a step that has a verb for it, and what the step needs."""

    step: Algorithm
    group: Group                                                   # of that client alone
    message: Tree
    site: ClientSite

    @staticmethod
    def find(world: World, state: State, client: int, verb: str) -> "Sampler | None":
        """The last step so far that overrides a verb, with what it needs; None where no step does."""
        able = [(step, place) for place in schedule(world)[:state.rows] for step in place.phase.steps if step.overrides(verb)]
        if not able:
            return None
        step, place = able[-1]
        group = next(group for group in state.groups if client in group.clients).fetch().select([client])
        return Sampler(step, group, step.receive(step.publish(state.at_server()), group.architecture), world.client_site(group, place.phase, place.round))

    def draw(self, per_class: int) -> tuple[Tensor, Tensor] | None:
        """Samples (C, per_class, c, h, w) and which classes have any, (C,)."""
        return self.step.draw(self.group, self.message, self.site, per_class)

    def seen(self, shard: Shard) -> Tensor:
        """Real images in the space of the samples, (n, c, h, w)."""
        return apply_in_batches(lambda x: self.step.seen(self.group, self.message, self.site, x), shard)

    def losses(self, shard: Shard) -> Tensor:
        """The generator's own loss of each image, (n,) float64 on the host."""
        return self.step.generator_losses(self.group, self.message, self.site, shard).cpu()


def measure(world: World, state: State, clients: Sequence[int], pool: Shard, per_class: int) -> tuple[Found, Blocks]:
    """The figures of the generator that the first of the clients holds against training images of all of them, and the closest pairs to draw.

    Samples, held-out test images and sets of the pool (images that nobody trained on) are equally many of each class. Distances are L2 in the space
    of the samples: brightness in [0, 1], or maps.
    """
    sampler, judge = (Sampler.find(world, state, clients[0], verb) for verb in ("draw", "generator_losses"))
    drawn = sampler.draw(per_class) if sampler else None
    if sampler is None or drawn is None or not bool(drawn[1].any()):
        return {"left_out": f"{world.job.algorithm_name} has no generator of images or of maps of them at this checkpoint"}, {}
    problem, test, device = world.problem, world.test, world.problem.device
    counts = torch.bincount(test.labels, minlength=problem.classes).clamp(max=per_class) * drawn[1].to(device)
    held_out = draw_images(test, counts, problem.stream("audit/held out"))
    samples = torch.cat([own[:count] for own, count in zip(drawn[0].to(device), counts.tolist(), strict=True)])        # sample i of the class of held_out[i]
    images, labels = (torch.cat([getattr(world.holdings[client].train, name) for client in clients]) for name in ("images", "labels"))
    known = (counts > 0)[labels].nonzero().flatten()
    mine, theirs = match_classes(labels[known], test.labels, POINTS, problem.stream("audit/points"))
    members, others = select_images(Shard(images, labels, problem.scale), known[mine]), select_images(test, theirs)
    if len(members) < 2:
        return {"left_out": f"of the {int((counts > 0).sum())} classes that can be compared the clients have {len(members)} training images"}, {}

    train, fresh = sampler.seen(members), sampler.seen(held_out)
    reals = _draw_reals(sampler, pool, counts, problem)
    brightness = problem.scale.to_unit(held_out.pixels())
    views = _choose_spaces(problem, fresh.shape == brightness.shape and torch.allclose(fresh, brightness, atol=SAME))
    sets = {name: [view(each) for each in (train, fresh, samples, *reals[:1])] for name, view in views.items()}
    space, last = next(iter(views)), list(views)[-1]
    pairs = {name: likeness.find_closest(train, each, PAIRS) for name, each in (("samples", samples), ("held_out", fresh))}
    indices = np.concatenate([world.split.train[client] for client in clients])[known[mine].cpu().numpy()]
    found = {
        "client": clients[0], "phase": sampler.site.phase, "space": space, "samples_per_class": per_class, "samples": len(samples), "members": len(members),
        "attacks": _attack_generator(sampler, judge, members, others, pool, samples, reals),
        "mnd": {name: {"samples": asdict(likeness.mnd(each[0], each[1], each[2])), "real": asdict(likeness.mnd(each[0], each[1], each[3])) if reals else None}
                for name, each in sets.items()},
        "fid": {"space": last} | _measure_fid(sets[last][0], sets[last][1], sets[last][2], members.labels, held_out.labels),
        "samples_nearer_than_any_held_out_percent": 100 * float((measure_nearest(samples, train) < measure_nearest(fresh, train).min()).double().mean()),
        "closest_pairs": {name: [{"training_index": int(indices[point]), "class": int(members.labels[point]), "l2_distance": distance}
                                 for point, distance in zip(each.points.tolist(), each.distances.tolist(), strict=True)] for name, each in pairs.items()}}
    return found, _pair_images(train, {"samples": samples, "held_out": fresh}, pairs)


def _draw_reals(sampler: Sampler, pool: Shard, counts: Tensor, problem: Problem) -> list[Tensor]:
    """Sets of the pool with as many images of each class as there are samples, in their space; none where the pool is too small."""
    if bool((torch.bincount(pool.labels, minlength=len(counts)) < counts).any()):
        return []
    return [sampler.seen(draw_images(pool, counts, problem.stream("audit/references", round_=number))) for number in range(REFERENCES)]


def _choose_spaces(problem: Problem, images: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """The spaces that likeness is measured in: of images their brightness and a map that needs no training, of maps themselves alone."""
    if not images:
        return {"maps": lambda maps_: maps_.flatten(1)}
    scattering = fixed_maps.build("scattering", problem.shape, FEATURES).to(problem.device)

    @torch.no_grad()
    def features(brightness: Tensor) -> Tensor:
        return torch.cat([scattering(2 * block - 1) for block in brightness.split(BATCH)])
    return {"pixels": lambda brightness: brightness.flatten(1), "scattering": features}


def _attack_generator(sampler: Sampler, judge: Sampler | None, members: Shard, others: Shard, pool: Shard, samples: Tensor, reals: Sequence[Tensor]) -> Found:
    """By the nearest sample, calibrated, and by the generator's loss: GAN-Leaks (Chen et al., CCS 2020, arXiv 1909.03935).

    There a generator trained on other data calibrates; real images of the pool, as many as samples, stand in for it (ours).
    `unseen_auc`: the attack on images of the pool in the place of the members; it is 0.5 but for what tells the training set from the test set.
    """
    unseen = draw_replacements(pool, others, sampler.site.problem.stream("audit/unseen"))
    sides = [members, others, *([unseen] if len(unseen) else [])]
    points = [sampler.seen(side) for side in sides]
    distances = [measure_nearest(each, samples) for each in points]
    found = {"nearest": attack([-distance for distance in distances])}
    if reals:
        found["nearest_calibrated"] = attack([calibrate(distance, torch.stack([measure_nearest(each, real) for real in reals]))
                                                for distance, each in zip(distances[:2], points[:2], strict=True)])
    else:
        found["nearest_calibrated"] = {"left_out": "too few images of a class are left that nobody trained on; take fewer --samples, "
                                                   "or a run with data.fraction below 1"}
    everything = Shard(torch.cat([side.images for side in sides]), torch.cat([side.labels for side in sides]), members.scale)
    found["loss"] = {"left_out": "this generator has no loss of single images"} if judge is None else \
        attack((-judge.losses(everything)).split([len(side) for side in sides]))
    return found


def attack(scores: Sequence[Tensor]) -> Found:
    """The attack on the scores of members (n,) against others (m,), and `unseen_auc`, that of a third set in the place of the members, if there is one."""
    members, others, *unseen = scores
    return asdict(threshold_attack(members, others)) | {"unseen_auc": threshold_attack(unseen[0], others).auc if unseen else None}


def _measure_fid(train: Tensor, fresh: Tensor, samples: Tensor, members: Tensor, labels: Tensor) -> Found:
    """Frechet distances to the members of samples and of held-out images, as many of both (classes `labels`) as can be had in the members' class mix."""
    have, want = (each.bincount(minlength=1 + int(labels.max())).double() for each in (labels, members))
    counts = (want * (have / want)[want > 0].min() + 1e-9).long()  # the class that the samples are shortest of says how many of the others fit
    chosen = take_by_class(labels, torch.arange(len(labels), device=labels.device), counts)
    if len(chosen) < 2:
        return {"left_out": f"of {len(labels)} samples {len(chosen)} are in the members' class mix; take more --samples"}
    return {"members": len(train), "images": len(chosen), "samples": likeness.fid(train, samples[chosen]), "held_out": likeness.fid(train, fresh[chosen])}


def _pair_images(train: Tensor, sides: Mapping[str, Tensor], pairs: Mapping[str, likeness.Pairs]) -> Blocks:
    """The closest pairs as images; maps as the mean of their channels, from black to white over those of the training images that are drawn."""
    images = {name: torch.stack([train[each.points], sides[name][each.others]], 1) for name, each in pairs.items()}    # each (n, 2, c, h, w)
    shades = torch.cat([each[:, 0].mean(1) for each in images.values()])
    if train.shape[1] not in (1, 3) or any(bool((each < 0).any() or (each > 1).any()) for each in images.values()):
        low, width = shades.min(), (shades.max() - shades.min()).clamp_min(likeness.GUARD)
        images = {name: ((each.mean(2, keepdim=True) - low) / width).clamp(0, 1) for name, each in images.items()}
    return {TITLES[name]: ((each * 255).round().byte().cpu().numpy(), pairs[name].distances.cpu().numpy()) for name, each in images.items()}
