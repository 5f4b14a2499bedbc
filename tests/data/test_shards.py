"""Shards: ranges, resizing and batches of uint8 images."""
import numpy as np
import pytest
import torch

from hpcfl.data import corpora, shards
from hpcfl.data.shards import Scale, Shard, iterate_epochs
from hpcfl.errors import DataError
from hpcfl.streams import Stream

STANDARD = Scale("standard", mean=(0.2, 0.5, 0.7), std=(0.1, 0.3, 0.25))
SCALES = {"symmetric": Scale("symmetric"), "unit": Scale("unit"), "standard": STANDARD}


def noise(count=20, channels=3, size=6):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, channels, size, size), dtype=np.uint8))


def shard(count=20, scale=SCALES["symmetric"]):
    return Shard(noise(count), torch.arange(count), scale)


@pytest.mark.parametrize(("values", "ends"), [("symmetric", (-1.0, 1.0)), ("unit", (0.0, 1.0))])
def test_black_and_white_are_exactly_the_ends_of_the_range(values, ends):
    x = Scale(values)(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    assert x.dtype == torch.float32 and tuple(x.flatten().tolist()) == ends


def test_standard_values_have_mean_zero_and_deviation_one_per_channel():
    images = noise(3000)[:, :, ::2] // torch.tensor([1, 2, 5], dtype=torch.uint8).view(3, 1, 1)
    x = Scale.from_images(images.numpy(), "standard")(images).double()
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6)


def test_a_constant_channel_does_not_divide_by_zero():
    scale = Scale.from_images(np.full((4, 1, 2, 2), 51, dtype=np.uint8), "standard")
    assert scale.std == (1.0,) and scale(torch.full((1, 1, 2, 2), 51, dtype=torch.uint8)).abs().max() < 1e-6


def test_fit_does_not_depend_on_the_order_of_the_images():
    images = noise(2500).numpy()
    assert Scale.from_images(images, "standard") == Scale.from_images(images[::-1], "standard")


@pytest.mark.parametrize("values", sorted(SCALES))
def test_ranges_convert_into_each_other(values):
    scale, images = SCALES[values], noise()
    x, symmetric, unit = scale(images), SCALES["symmetric"](images), SCALES["unit"](images)
    assert torch.allclose(scale.from_symmetric(symmetric), x, atol=1e-5)
    assert torch.allclose(scale.to_symmetric(x), symmetric, atol=1e-5)
    assert torch.allclose(scale.to_unit(x), unit, atol=1e-6)


@pytest.mark.parametrize("values", sorted(SCALES))
def test_to_unit_never_leaves_zero_to_one(values):
    x = SCALES[values].to_unit(torch.linspace(-20, 20, 300).view(-1, 3, 1, 1))
    assert x.min() == 0 and x.max() == 1


@pytest.mark.parametrize("values", sorted(SCALES))
def test_gradients_pass_through_from_symmetric_under_vmap(values):
    scale = SCALES[values]
    x = torch.rand(2, 4, 3, 5, 5) - 0.5
    slopes = torch.func.vmap(torch.func.grad(lambda v: scale.from_symmetric(v).sum()))(x)
    slope = {"symmetric": [1.0] * 3, "unit": [0.5] * 3, "standard": [0.5 / s for s in STANDARD.std]}[values]
    assert torch.allclose(slopes, torch.tensor(slope).view(3, 1, 1).expand_as(x))


def test_float_images_pass_unchanged():
    x = torch.rand(2, 3, 4, 4)
    assert Scale("symmetric", size=8)(x) is x


@pytest.mark.parametrize("values", sorted(SCALES))
def test_resizing_keeps_a_flat_image_flat(values):
    flat = torch.full((2, 3, 28, 28), 77, dtype=torch.uint8)
    scale = SCALES[values]
    resized = Scale(values, 32, scale.mean, scale.std)(flat)
    assert resized.shape == (2, 3, 32, 32)
    assert torch.allclose(resized, scale(flat)[:, :, :1, :1].expand_as(resized), atol=1e-5)


def test_shrinking_averages_thin_lines_instead_of_missing_them():
    lines = ((torch.arange(32) % 4 == 0) * 255).to(torch.uint8).expand(1, 1, 32, 32)                 # bilinear samples alone fall between them
    inner = Scale("unit", 8)(lines)[..., 1:-1]
    assert (inner - 0.25).abs().max() < 0.15


def test_scaling_leaves_the_uint8_images_as_they_were():
    images = noise()
    before = images.clone()
    Scale("symmetric")(images)
    assert torch.equal(images, before)


def test_a_range_that_does_not_exist_is_refused():
    with pytest.raises(DataError, match="signed"):
        Scale("signed")
    with pytest.raises(DataError, match="Scale.from_images"):
        Scale("standard")
    with pytest.raises(DataError, match="at least one image"):
        Scale.from_images(np.empty((0, 1, 2, 2), dtype=np.uint8), "standard")


def test_images_and_labels_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="make no shard"):
        Shard(noise(3), torch.arange(4), SCALES["unit"])
    with pytest.raises(DataError, match="int32"):
        Shard(noise(3), torch.arange(3, dtype=torch.int32), SCALES["unit"])


def test_pixels_come_by_index_by_slice_or_all():
    own = shard(5)
    everything = own.pixels()
    assert len(own) == 5 and own.images.dtype == torch.uint8 and everything.shape == (5, 3, 6, 6)
    assert torch.equal(own.pixels(torch.tensor([4, 0, 4])), everything[[4, 0, 4]])
    assert torch.equal(own.pixels(slice(1, 3)), everything[1:3])


def test_load_gives_each_part_its_own_images_by_one_read():
    corpus = corpora.open_corpus("random")
    parts = [np.array([7, 3]), np.array([], dtype=np.int64), np.array([999, 3, 0])]
    loaded = shards.load(corpus, parts, SCALES["unit"], "cpu")
    assert [len(own) for own in loaded] == [2, 0, 3]
    for own, indices in zip(loaded, parts, strict=True):
        assert own.images.dtype == torch.uint8
        assert np.array_equal(own.images.numpy(), corpus.train_images(indices)) and own.labels.tolist() == corpus.train_labels[indices].tolist()


def test_an_epoch_brings_every_image_once_with_its_label():
    own = shard(23)
    batches = list(iterate_epochs(own, 5, 3, Stream(0, "batches")))
    assert [len(batch["y"]) for batch in batches] == [5, 5, 5, 5, 3] * 3
    for epoch in range(3):
        y = torch.cat([batch["y"] for batch in batches[5 * epoch:5 * epoch + 5]])
        x = torch.cat([batch["x"] for batch in batches[5 * epoch:5 * epoch + 5]])
        assert sorted(y.tolist()) == list(range(23))
        assert torch.equal(x, own.pixels(y))                       # the label is the image's index


def test_batches_follow_from_the_stream_alone():
    def order(stream):
        return torch.cat([batch["y"] for batch in iterate_epochs(shard(), 4, 2, stream)]).tolist()
    torch.manual_seed(1)
    first = order(Stream(0, "batches", client=1, round=2))
    torch.manual_seed(2)
    assert first == order(Stream(0, "batches", client=1, round=2))
    assert first != order(Stream(0, "batches", client=1, round=3)) and first != order(Stream(0, "batches", client=2, round=2))
    assert first[:20] != first[20:]


@pytest.mark.parametrize(("count", "batch", "sizes"), [
    (11, 5, [5, 6]), (10, 5, [5, 5]), (9, 5, [5, 4]), (6, 5, [6]), (1, 5, [1]), (3, 1, [1, 1, 1]), (3, 2, [3]), (4, 9, [4]), (0, 4, [])])
def test_a_last_batch_of_one_joins_the_batch_before(count, batch, sizes):
    assert [len(found["y"]) for found in iterate_epochs(shard(count), batch, 1, Stream(0, "batches"))] == sizes


@pytest.mark.parametrize("device, may_overlap", [("cpu", False), ("cuda", True)])
def test_only_copies_to_a_gpu_may_overlap(device, may_overlap, monkeypatch):
    """The host would read half a copy."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, where, non_blocking=False: asked.append((str(where), non_blocking)) or self)
    shard().to(device)
    assert asked == [(device, may_overlap)] * 2


@pytest.mark.gpu
def test_batches_are_the_same_on_a_gpu():
    on_cpu, on_gpu = (list(iterate_epochs(shard().to(device), 7, 1, Stream(0, "batches"))) for device in ("cpu", "cuda"))
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert other["x"].is_cuda and torch.equal(one["y"], other["y"].cpu())
        assert torch.allclose(one["x"], other["x"].cpu())
