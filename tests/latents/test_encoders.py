"""Encoders: a client's own features and the common map, of images as the classifier reads them and of images as a generator draws them."""
from types import SimpleNamespace

import pytest
import torch

from hpcfl.contract import JobError
from hpcfl.latents.encoders import LATENTS
from hpcfl.models import fixed_maps
from hpcfl.training.evaluate import extract_features
from hpcfl.training.turns import Modules
from tests.support.in_memory import job, world

COMMON = SimpleNamespace(common_map="dct", common_size=9)


def site_of(found):
    group = found.join()[0]
    return group, found.client_site(group, found.plan[0], 0)


def test_an_own_latent_is_the_feature_of_the_clients_own_classifier():
    found = world(job("fedavg", models={"names": ["cnn1"], "feature_size": 6}))
    group, site = site_of(found)
    latent, client = LATENTS["own"](None, found.problem), group.clients[0]
    assert latent.size == 6 and latent.modules() == {}
    got = latent.encode_training(group, site, client)
    assert torch.equal(got, extract_features(group, site.modules, client, site.holdings[client].train, "test", "advice"))


def test_a_common_latent_is_the_map_of_the_image_whoever_holds_it():
    found = world(job("fedavg"))
    latent, shard = LATENTS["common"](COMMON, found.problem), found.holdings[1].train
    group = next(group for group in found.join() if 1 in group.clients)
    site = found.client_site(group, found.plan[0], 0)
    map_ = fixed_maps.build("dct", found.problem.shape, 9, found.problem.job.run.seed)
    assert latent.size == 9 and latent.modules().keys() == {"map"} and not list(latent.map.parameters())
    got = latent.encode_training(group, site, 1)
    torch.testing.assert_close(got, map_(found.problem.scale.to_symmetric(shard.pixels(slice(None)))))
    assert latent.encode_training(group, site, 1) is got, "neither map nor images change"


def test_both_read_images_as_a_generator_draws_them_and_are_differentiable():
    found = world(job("fedavg", models={"names": ["cnn1"], "feature_size": 6}))
    images = (2 * torch.rand(3, *found.problem.shape, generator=torch.Generator().manual_seed(0)) - 1).requires_grad_()              # in [-1, 1]
    own, common = LATENTS["own"](None, found.problem), LATENTS["common"](COMMON, found.problem)
    model = found.problem.model("cnn1").eval()
    z = own.encode(Modules({"model": model}), images)
    torch.testing.assert_close(z, model.features(found.problem.scale.from_symmetric(images)))
    torch.testing.assert_close(common.encode(Modules(common.modules()), images), common.map(images))
    for latents in (z, common.encode(Modules(common.modules()), images)):
        (gradient,) = torch.autograd.grad(latents.sum(), images)
        assert bool(gradient.any())


def test_own_latents_want_one_feature_size():
    with pytest.raises(JobError, match="models.feature_size = 0"):
        LATENTS["own"](None, world(job("fedavg", models={"feature_size": 0})).problem)
