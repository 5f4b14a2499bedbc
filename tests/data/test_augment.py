"""Augmentation: what each word does to images and labels, that only the stream decides it, and runs of the real loop with each of them."""
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from hpcfl.contract import ClientSite
from hpcfl.data import augment
from hpcfl.data.augment import AUGMIX, AUTOAUGMENT, CHAINS, DEPTH, OF_BATCHES, OF_IMAGES, SEVERITY, Augmentation, augmix, crop_flip
from hpcfl.data.shards import PLAIN, Scale, Shard, iterate_epochs
from hpcfl.errors import DataError, JobError
from hpcfl.streams import Stream
from tests.support.in_memory import bits, finite, job, run, world

WORDS = (*OF_IMAGES, *OF_BATCHES)
STREAM = Stream(0, "batches", client=1, round=2)
MLPS = {"names": ["mlp2", "mlp3"], "feature_size": 6}              # without running statistics


def noise(count=20, channels=3, size=32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8))


def shard(count=20, scale=None):
    """Images whose label is their index."""
    return Shard(noise(count, size=8), torch.arange(count), scale or Scale("unit"))


def batches(words, count=20, batch=8, stream=STREAM, alpha=1.0, times=1):
    return list(iterate_epochs(shard(count), batch, times, stream, Augmentation(words, count, alpha)))


def rows(word, images, seed=0):
    """Uniform numbers as a word takes them, one row per image."""
    return np.random.default_rng(seed).random((len(images), OF_IMAGES[word][1]))


def outcomes(images):
    return Counter(image.numpy().tobytes() for image in images)


def by_index(found):
    return {int(index): x for batch in found for index, x in zip(batch["index"], batch["x"], strict=True)}


# crop_flip


def test_crop_flip_is_a_window_of_the_padded_image_mirrored_for_low_draws():
    images = noise(40)
    draws = rows("crop_flip", images)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    for image, around, (down, right, mirror) in zip(crop_flip(images, draws).numpy(), padded, draws, strict=True):
        window = around[:, int(9 * down):int(9 * down) + 32, int(9 * right):int(9 * right) + 32]
        assert np.array_equal(image, window[:, :, ::-1] if mirror < 0.5 else window)


def test_crop_flip_in_the_middle_is_the_image_or_its_mirror():
    images = noise(2)
    straight, mirrored = crop_flip(images, np.array([[0.5, 0.5, 0.9], [0.5, 0.5, 0.1]]))
    assert torch.equal(straight, images[0]) and torch.equal(mirrored, images[1].flip(-1))


def test_crop_flip_in_a_corner_leaves_black_where_the_image_ends():
    images = noise(1) | 1                                          # no black of its own
    shifted = crop_flip(images, np.array([[0.0, 0.999, 0.9]]))[0]
    assert torch.equal(shifted[:, 4:, :-4], images[0, :, :-4, 4:])
    assert not shifted[:, :4].any() and not shifted[:, :, -4:].any()


def test_every_place_of_the_window_is_as_likely_as_the_others():
    place = torch.zeros(1, 1, 17, 17, dtype=torch.uint8)
    place[..., 8, 8] = 1
    found = outcomes(Augmentation(("crop_flip",)).images(place.expand(8100, 1, 17, 17), STREAM))
    assert len(found) == 81 and min(found.values()) > 60 and max(found.values()) < 145       # 100 each, but for chance


# autoaugment and augmix, against torchvision's own classes


@pytest.mark.parametrize("channels", [1, 3])
def test_autoaugment_makes_of_an_image_what_torchvision_does_and_as_often(channels):
    from torchvision.transforms import v2
    image = noise(1, channels, seed=3) // 2 + 30
    ours, theirs, policy = 8000, 1000, v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    found = outcomes(Augmentation(("autoaugment",)).images(image.expand(ours, channels, 32, 32), STREAM))
    with STREAM.seeding():
        wanted = outcomes(policy(image[0]) for _ in range(theirs))
    assert len(wanted) > 60 and wanted.keys() <= found.keys()
    assert max(abs(found[key] / ours - wanted[key] / theirs) for key in found) < 0.03
    assert found.most_common(1)[0][0] == wanted.most_common(1)[0][0] == image.numpy().tobytes()          # most often nothing happens to this image


def test_the_policy_of_autoaugment_is_that_of_torchvision():
    from torchvision.transforms import v2
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)._policies
    assert tuple(tuple((name, chance, level or 0) for name, chance, level in pair) for pair in policy) == augment.CIFAR10


def chain(operation, level, negative, m=1.0, depth=1, chains=1):
    """The draws of AugMix with m, and with all weight on equal chains of one operation."""
    step = [(list(AUGMIX).index(operation) + 0.5) / len(AUGMIX), (level + 0.5) / SEVERITY, 0.25 if negative else 0.75]
    return np.array([[m, *[0.7] * chains, *[0.0] * (CHAINS - chains), *[(depth - 0.5) / DEPTH] * CHAINS, *step * CHAINS * DEPTH]])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_operations_of_augmix_are_those_of_torchvision(channels):
    from torchvision.transforms import v2

    class OneChain(v2.AugMix):
        def _sample_dirichlet(self, params):                       # all weight on the chain; torchvision keeps this apart for tests
            return torch.tensor([[0.0, 1.0]]) if params.shape[-1] == 2 else torch.ones_like(params)
    image = noise(1, channels, seed=3) // 2 + 30
    policy = OneChain(mixture_width=1, chain_depth=1)
    with STREAM.seeding():
        wanted = outcomes(policy(image[0]) for _ in range(1500))
    found = outcomes(augmix(image, chain(name, level, negative))[0] for name in AUGMIX for level in range(SEVERITY) for negative in (False, True))
    assert found.keys() == wanted.keys() and len(found) >= 33


def test_a_chain_of_augmix_is_as_deep_as_was_drawn():
    image = noise(1)
    shifted = [augmix(image, chain("TranslateX", 2, False, depth=depth)) for depth in (1, 2, 3)]
    for before, after in zip([image, *shifted], shifted, strict=False):
        assert not torch.equal(before, after) and torch.equal(augmix(before, chain("TranslateX", 2, False)), after)


def test_augmix_is_the_convex_combination_of_the_image_and_its_chains():
    images = noise(6, seed=5)
    draws = rows("augmix", images, seed=2)
    alone = []
    for number in range(CHAINS):                                   # each chain by itself: m = 1, all weight on it
        only = draws.copy()
        only[:, 0], only[:, 1:1 + CHAINS] = 1.0, np.eye(CHAINS)[number] * 0.5
        alone.append(augmix(images, only).double().numpy())
    exponential = -np.log(1 - draws[:, 1:1 + CHAINS])
    weights, m = exponential / exponential.sum(1, keepdims=True), draws[:, 0].reshape(-1, 1, 1, 1)
    want = (1 - m) * images.double().numpy() + m * sum(weights[:, number].reshape(-1, 1, 1, 1) * alone[number] for number in range(CHAINS))
    assert np.abs(augmix(images, draws).double().numpy() - want).max() <= 0.5001             # what rounding to uint8 takes


def test_augmix_without_its_chains_is_the_image_whatever_they_do():
    images = noise(8)
    draws = rows("augmix", images)
    draws[:, 0] = 0.0
    assert torch.equal(augmix(images, draws), images)


def test_augmix_does_not_darken_what_its_operations_leave_alone():
    images = noise(50)
    images[:, :, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)                         # their contrast is at its most already
    assert torch.equal(AUGMIX["AutoContrast"](images, 0, False, "bilinear"), images)
    draws = np.repeat(chain("AutoContrast", 0, False, chains=CHAINS), 50, axis=0)
    draws[:, 0] = np.linspace(0, 1, 50)
    assert torch.equal(augmix(images, draws), images)


def test_the_magnitudes_of_both_policies_grow_with_the_level():
    image = noise(1, seed=3) // 2 + 30
    for name, operation in (AUTOAUGMENT | {f"{name} of AugMix": operation for name, operation in AUGMIX.items()}).items():
        if operation.signed:
            apart = [int((operation(image, level, False, "nearest").int() - image.int()).abs().sum()) for level in (0, 2, 9)]
            assert apart[0] == 0 and 0 < apart[1] < apart[2], name


# One image and the others


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("word", OF_IMAGES)
def test_an_image_becomes_the_same_whatever_lies_beside_it(word, channels, monkeypatch):
    images, augmentation = noise(40, channels), Augmentation((word,))
    together = augmentation.images(images, STREAM)
    assert torch.equal(augmentation.images(images[:11], STREAM), together[:11])
    others = torch.cat([images[:20], noise(20, channels, seed=9)])
    assert torch.equal(augmentation.images(others, STREAM)[:20], together[:20])
    monkeypatch.setattr(augment, "BLOCK", 7)
    assert torch.equal(augmentation.images(images, STREAM), together)


@pytest.mark.parametrize("word", OF_IMAGES)
def test_every_image_has_draws_of_its_own(word):
    assert len(outcomes(Augmentation((word,)).images(noise(1).expand(60, 3, 32, 32), STREAM))) > 25


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("word", OF_IMAGES)
def test_images_stay_uint8_of_their_shape_and_are_not_written_to(word, channels, size):
    images = noise(300, channels, size)
    before, made = images.clone(), Augmentation((word,)).images(images, STREAM)
    assert torch.equal(images, before) and made.dtype == torch.uint8 and made.shape == images.shape
    assert made.min() < 5 and made.max() > 250


def test_words_act_in_their_order():
    images = noise(30)
    crop, policy = (Augmentation((word,)).images for word in ("crop_flip", "autoaugment"))
    one, other = (Augmentation(words).images(images, STREAM) for words in (("crop_flip", "autoaugment"), ("autoaugment", "crop_flip")))
    assert torch.equal(one, policy(crop(images, STREAM), STREAM)) and torch.equal(other, crop(policy(images, STREAM), STREAM))
    assert not torch.equal(one, other)


def test_images_that_are_scaled_already_are_refused():
    with pytest.raises(DataError, match="augmix.*float32.*uint8"):
        Augmentation(("augmix",)).images(torch.rand(2, 3, 8, 8), STREAM)


@pytest.mark.parametrize("word", OF_IMAGES)
def test_no_images_stay_no_images(word):
    assert list(iterate_epochs(shard(0), 4, 1, STREAM, Augmentation((word,)))) == []


# mixup and cutmix


@pytest.mark.parametrize("word", OF_BATCHES)
def test_soft_labels_share_one_between_an_image_and_the_one_before_it(word):
    for plain, batch in zip(batches(()), batches((word,)), strict=True):
        share = batch["y"].gather(1, plain["y"][:, None])[:, 0]
        assert batch["y"].shape == (len(plain["y"]), 20) and batch["y"].dtype == torch.float32
        assert torch.allclose(batch["y"].sum(1), torch.ones(len(share))) and len(share.unique()) == 1
        assert torch.allclose(batch["y"].gather(1, plain["y"].roll(1)[:, None])[:, 0], 1 - share)
        assert torch.equal(batch["index"], plain["index"])


def test_mixup_is_the_convex_combination_that_its_labels_tell():
    shares = []
    for plain, batch in zip(batches(()), batches(("mixup",)), strict=True):
        share = float(batch["y"][0, plain["y"][0]])
        assert torch.allclose(batch["x"], share * plain["x"] + (1 - share) * plain["x"].roll(1, 0), atol=1e-6)
        shares.append(share)
    assert len(set(shares)) == len(shares) and all(0 < share < 1 for share in shares)


def test_cutmix_is_a_box_of_the_image_before_as_large_as_its_labels_tell():
    areas = []
    for plain, batch in zip(batches((), 60), batches(("cutmix",), 60), strict=True):
        own, other = (torch.isclose(batch["x"], x).all(1) for x in (plain["x"], plain["x"].roll(1, 0)))                    # (B, H, W)
        share = float(batch["y"][0, plain["y"][0]])
        box = (~own).any(0)
        assert bool((own | other).all()) and torch.equal(box, box.any(1)[:, None] & box.any(0))                           # a rectangle
        assert float(box.double().mean()) == pytest.approx(1 - share)
        areas.append(share)
    assert len(set(areas)) > 3


def test_a_small_alpha_mixes_little_and_a_large_one_in_halves():
    def shares(alpha):
        return torch.tensor([float(batch["y"].max()) for batch in batches(("mixup",), 40, 4, alpha=alpha, times=3)])
    assert shares(0.01).median() > 0.99 and shares(200.0).max() < 0.65


# Streams


@pytest.mark.parametrize("word", WORDS)
def test_augmentation_follows_from_the_stream_and_leaves_global_generators_alone(word):
    first = batches((word,))
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for one, other in zip(first, batches((word,)), strict=True):
        assert bits(one) == bits(other)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1]) and before[2] == random.getstate()
    for stream in (Stream(1, "batches", 1, 2), Stream(0, "batches", 2, 2), Stream(0, "batches", 1, 3)):
        before, after = (by_index(found) for found in (first, batches((word,), stream=stream)))
        assert sum(torch.equal(before[index], after[index]) for index in before) < 20


@pytest.mark.parametrize("word", OF_IMAGES)
def test_every_epoch_augments_anew(word):
    found = batches((word,), batch=20, times=2)
    first, second = (batch["x"][batch["index"].argsort()] for batch in found)
    assert sum(torch.equal(one, other) for one, other in zip(first, second, strict=True)) < 10


@pytest.mark.parametrize("word", WORDS)
def test_augmentation_does_not_change_the_order_of_the_images(word):
    assert [batch["index"].tolist() for batch in batches((word,), times=2)] == [batch["index"].tolist() for batch in batches((), times=2)]


def test_images_are_augmented_before_they_are_scaled():
    scale = Scale("standard", 12, (0.2, 0.5, 0.7), (0.1, 0.3, 0.25))
    own = Shard(noise(30, size=8) | 1, torch.arange(30), scale)
    black = scale(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))[0, :, 0, 0]
    (batch,) = iterate_epochs(own, 30, 1, STREAM, Augmentation(("crop_flip",)))
    corners = batch["x"][:, :, ::11, ::11].flatten(2)              # (B, C, 4)
    assert int((corners == black[:, None]).all(1).any(1).sum()) > 20


def test_without_words_images_are_those_of_the_shard_to_the_bit():
    own = shard(20, Scale("standard", 12, (0.2, 0.5, 0.7), (0.1, 0.3, 0.25)))
    for batch in iterate_epochs(own, 8, 2, STREAM, PLAIN):
        assert bits(batch) == bits({"x": own.pixels(batch["index"]), "y": own.labels[batch["index"]], "index": batch["index"]})


# Jobs


def test_a_job_takes_every_word_and_no_other():
    for word in WORDS:
        assert job("fedavg", training={"augment": [word]}).training.augment == (word,)
    assert job("fedavg", training={"augment": [*OF_IMAGES, "cutmix"]}).training.augment == (*OF_IMAGES, "cutmix")
    assert job("fedavg").training.augment == ()
    with pytest.raises(JobError) as refusal:
        job("fedavg", training={"augment": ["mix_up"]})
    assert all(word in str(refusal.value) for word in WORDS) and "did you mean 'mixup'" in str(refusal.value)


@pytest.mark.parametrize("words", [["mixup", "crop_flip"], ["cutmix", "autoaugment"], ["mixup", "cutmix"], ["crop_flip", "crop_flip"], ["mixup", "mixup"],
                                   "crop_flip", [1], [["mixup"]], ["none"]])
def test_a_job_refuses_words_twice_and_what_follows_a_mixture(words):
    with pytest.raises(JobError, match="training.augment.*each once.*at most one, at the end"):
        job("fedavg", training={"augment": words})


@pytest.mark.parametrize("engine", ["sequential", "vmap"])
@pytest.mark.parametrize("words", [*[[word] for word in WORDS], ["crop_flip", "mixup"]])
def test_a_round_with_augmentation_trains_otherwise_and_to_finite_weights(words, engine):
    one_round = {"federation": {"clients": 3, "rounds": 1}, "data": {"fraction": 0.05}}
    found, plain = (run(world(job("fedavg", training={"augment": augment, "engine": engine}, **one_round))) for augment in (words, []))
    for client in range(3):
        assert finite(found.state(client)) and bits(found.state(client)) != bits(plain.state(client))
        assert found.metric("loss", 0)[client] != plain.metric("loss", 0)[client]


@pytest.mark.parametrize("words", [["crop_flip", "mixup"], ["cutmix"], ["augmix"], ["autoaugment"]])
def test_a_client_alone_trains_as_in_a_group(words):
    def trained(participation):
        return run(world(job("standalone", models=MLPS | {"names": ["cnn1"]}, training={"augment": words}, data={"fraction": 0.05},
                             federation={"clients": 4, "rounds": 1, "participation": participation})))
    together, alone = trained(1.0), trained(0.25)
    (client,) = alone.world.cohort(alone.places[0].phase, 0)
    assert bits(together.state(client)) == bits(alone.state(client))


@pytest.mark.parametrize("name", ["fedproto", "fedtgp", "fedprox", "fml", "avgkd", "fedgen"])
def test_methods_whose_loss_reads_classes_refuse_mixed_labels_and_take_the_rest(name):
    own = {"federation": {"clients": 2, "rounds": 2}, "data": {"fraction": 0.05}}
    with pytest.raises(JobError, match=f"training.augment.*mixup.*{name}.*crop_flip"):
        world(job(name, training={"augment": ["mixup"]}, **own))
    found, plain = (run(world(job(name, training={"augment": words}, **own))) for words in (["crop_flip"], []))
    for client in range(2):
        before, after = (each.metric("loss", 1)[client] for each in (plain, found))
        assert before != after


def test_only_training_sees_augmented_images():
    def prototypes(words):
        still = {"augment": words, "lr": 1e-30}                    # so that the weights stay as they are, and only the images could differ
        return run(world(job("fedproto", models=MLPS, training=still, federation={"clients": 2, "rounds": 1}, data={"fraction": 0.05})))
    found, plain = prototypes(["crop_flip"]), prototypes([])
    assert bits(found.states[-1].server) == bits(plain.states[-1].server)
    assert found.metric("loss", 0) != plain.metric("loss", 0)


def test_a_step_that_does_not_train_has_the_images_as_they_are():
    built = world(job("fedavg", training={"augment": ["crop_flip", "mixup"]}))
    site = ClientSite(built.problem, built.holdings, {}, "rounds", 0)
    for batch in site.epochs(0, 1, 16):
        assert torch.equal(batch["x"], built.holdings[0].train.pixels(batch["index"])) and batch["y"].dtype == torch.int64


def test_torchvision_is_not_imported_before_something_needs_it():
    code = "import sys, hpcfl.cli, hpcfl.federation.world; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


@pytest.mark.gpu
@pytest.mark.parametrize("word", OF_IMAGES)
def test_images_are_augmented_where_they_lie(word):
    images = noise(200)
    found = Augmentation((word,)).images(images.cuda(), STREAM)
    same = (found.cpu() == Augmentation((word,)).images(images, STREAM)).double().mean()
    assert found.is_cuda and found.dtype == torch.uint8 and same > (0.999 if word == "crop_flip" else 0.95)
