"""The audit of a generator: one that copies is found out, one that hardly trained is not, and the losses are those of the step that has them."""
import torch

from hpcfl.algorithms.fedvtc import FineTune
from hpcfl.analysis import audit, audit_generator
from hpcfl.analysis.audit_generator import Sampler
from hpcfl.runs import revisit


def test_a_generator_is_measured_in_pixels_and_in_the_scattering_map(generating, tmp_path):
    generator = audit.analyse(generating, samples=12, out=tmp_path)["generator"]
    assert (generator["phase"], generator["space"], generator["samples"]) == ("finetune", "pixels", 120)
    assert list(generator["mnd"]) == ["pixels", "scattering"] and generator["fid"]["space"] == "scattering"
    for ratios in generator["mnd"].values():
        assert 0 < ratios["samples"]["ratio_mean"] < ratios["real"]["ratio_mean"] < 1.5, "a hardly trained generator draws nothing like a training image"
    assert 0 < generator["fid"]["held_out"] < generator["fid"]["samples"] and 60 < generator["fid"]["images"] <= 120
    for attack in ("nearest", "nearest_calibrated"):
        low, high = generator["attacks"][attack]["auc_interval"]
        assert low < 0.62 and high > 0.38
    assert "no loss of single images" in generator["attacks"]["loss"]["left_out"]


def copying(self, group, message, site, per_class):
    """The client's training images, over and over, in the place of samples."""
    shard = site.holdings[group.clients[0]].train
    images = self.problem.scale.to_unit(shard.pixels())
    has = torch.bincount(shard.labels, minlength=self.problem.classes) > 0
    rows = [images[shard.labels == y] if has[y] else images[:1] for y in range(self.problem.classes)]
    return torch.stack([row[torch.arange(per_class) % len(row)] for row in rows]), has


def test_a_generator_that_copies_a_clients_images_is_found_out(generating, tmp_path, monkeypatch):
    monkeypatch.setattr(FineTune, "draw", copying)
    generator = audit.analyse(generating, client=0, samples=36, out=tmp_path)["generator"]
    assert generator["attacks"]["nearest"]["auc"] > 0.99 and generator["attacks"]["nearest"]["tpr_at_1_percent_fpr"] > 0.9
    assert generator["attacks"]["nearest_calibrated"]["auc"] > 0.99 and generator["attacks"]["nearest"]["unseen_auc"] < 0.7
    assert generator["samples_nearer_than_any_held_out_percent"] == 100
    assert all(ratios["samples"]["ratio_mean"] > 1e4 > 2 > ratios["real"]["ratio_mean"] for ratios in generator["mnd"].values())
    assert generator["fid"]["samples"] < generator["fid"]["held_out"]
    assert all(pair["l2_distance"] == 0 for pair in generator["closest_pairs"]["samples"])


def test_closest_pairs_name_training_images_of_the_audited_client(generating, tmp_path):
    pairs = audit.analyse(generating, client=2, samples=5, out=tmp_path)["generator"]["closest_pairs"]
    world, _ = revisit.revisit(generating)
    for side in pairs.values():
        assert len(side) > 1 and [pair["l2_distance"] for pair in side] == sorted(pair["l2_distance"] for pair in side)
        for pair in side:
            assert pair["training_index"] in world.split.train[2] and world.corpus.train_labels[pair["training_index"]] == pair["class"]


def test_losses_are_those_of_the_step_that_has_them(mapping):
    world, state = revisit.revisit(mapping)
    drawing, judging = (Sampler.find(world, state, 1, verb) for verb in ("draw", "generator_losses"))
    shard = world.holdings[1].train
    assert drawing.group.clients == (1,) and type(drawing.step) is not type(judging.step)
    costs = judging.losses(shard)
    assert costs.shape == (len(shard),) and costs.dtype == torch.float64 and bool(torch.isfinite(costs).all())
    assert drawing.seen(shard).shape[1:] == drawing.draw(1)[0].shape[2:]


def test_the_frechet_distance_takes_samples_in_the_members_class_mix():
    labels = torch.arange(3).repeat_interleave(10)
    features = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)) + 50 * labels[:, None]
    members = torch.tensor([0] * 40 + [2] * 20)
    train = torch.randn(60, 2, generator=torch.Generator().manual_seed(1)) + 50 * members[:, None]
    found = audit_generator._measure_fid(train, features, features, members, labels)
    assert found["images"] == 15 and found["samples"] == found["held_out"] < 20, "10 of class 0, 5 of class 2, none of class 1"
    assert "take more --samples" in audit_generator._measure_fid(train, features[:1], features[:1], members, labels[:1])["left_out"]
