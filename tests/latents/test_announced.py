"""What the server announces and what a client reads from it: the same Gaussians, in every mode."""
import pytest
import torch

from hpcfl.latents.announced import HEADER, AnnouncedGaussians, announce_gaussians, make_empty
from hpcfl.latents.gaussians import cholesky, floor, shrink
from hpcfl.latents.moments import MODES, ClassGaussians, aggregate, measure, needs_full, to_message

CLASSES, SIZE, ABSENT = 4, 5, 2
CPU = torch.device("cpu")


def moments(mode: str) -> ClassGaussians:
    """Moments of 30 samples a class around 10 y, of all classes but one."""
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0, 1, 3]).repeat(30)
    z = torch.randn(90, SIZE, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 2, SIZE) * (1 + y[:, None]) + 10 * y[:, None]
    return aggregate([to_message(measure(z, y, CLASSES, needs_full(mode)), mode)], mode)


def announced(mode: str, minimum: float = 1e-4, target: str = "iso") -> AnnouncedGaussians:
    return AnnouncedGaussians.from_message(announce_gaussians(moments(mode), mode, target, minimum), mode, CPU)


@pytest.mark.parametrize("mode", MODES)
def test_a_message_has_the_parts_and_bytes_of_the_specification(mode):
    message, triangle = announce_gaussians(moments(mode), mode, "iso", 1e-4), SIZE * (SIZE + 1) // 2
    assert {name: (leaf.dtype, leaf.numel()) for name, leaf in message.items()} == {
        "header": (torch.int32, HEADER), "has": (torch.uint8, CLASSES), "mean": (torch.float32, CLASSES * SIZE),
        "spread": (torch.float32, {"shared_diag": SIZE, "class_diag": CLASSES * SIZE, "class_iso": CLASSES, "shared_full": triangle,
                                   "class_full": CLASSES * triangle}[mode])}


def factors(server: ClassGaussians, mode: str, target: str, minimum: float) -> torch.Tensor:
    """What the server would draw with, float64: deviations, or Cholesky factors of the shrunk and floored covariances."""
    kind = MODES[mode]
    covariance = server.spread[None] if kind.shared else server.spread[:, None] if kind.isotropic else server.spread
    if not kind.full:
        return covariance.clamp(min=minimum).sqrt()
    return cholesky(floor(shrink(covariance, server.count.sum()[None] if kind.shared else server.count, target), minimum))


@pytest.mark.parametrize("target", ["iso", "diag"])
@pytest.mark.parametrize("mode", MODES)
def test_a_client_draws_with_the_factors_that_the_server_would_use(mode, target):
    got, want = announced(mode, target=target).factor, factors(moments(mode), mode, target, 1e-4)
    assert got.dtype == torch.float32 and got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_variance_is_that_of_draws(mode):
    read = announced(mode)
    v = read.draw(torch.full((100_000,), 3), torch.randn(100_000, SIZE, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(v.var(0), read.variance[3], rtol=0.03, atol=0)
    torch.testing.assert_close(v.mean(0), read.mean[3], rtol=0, atol=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_inverse_variances_with_mean_one_over_the_known_classes(mode):
    read = announced(mode)
    assert read.has.tolist() == [True, True, False, True] and read.weight.shape == (CLASSES, SIZE)
    assert float(read.weight[read.has].mean()) == pytest.approx(1, rel=1e-6)
    ratio = read.weight * read.variance
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))


@pytest.mark.parametrize("mode", MODES)
def test_before_anybody_said_anything_nothing_is_known_and_all_is_finite(mode):
    empty = make_empty(CLASSES, SIZE, mode)
    assert not empty.has.any() and not empty.mean.any() and not empty.count.any()
    read = AnnouncedGaussians.from_message(announce_gaussians(empty, mode, "iso", 1e-4), mode, CPU)
    assert not read.has.any()
    for name, leaf in vars(read).items():
        assert bool(torch.isfinite(leaf).all()), name
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in vars(empty).items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in vars(moments(mode)).items()}


@pytest.mark.parametrize("mode", MODES)
def test_no_direction_has_less_variance_than_the_floor(mode):
    read = announced(mode, minimum=50.0)
    assert float(read.variance.min()) >= 50.0 * (1 - 1e-6)
    if MODES[mode].full:
        assert float(torch.linalg.svdvals(read.factor).min()) >= 50.0 ** 0.5 * (1 - 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_distance_gives_back_the_noise_of_a_draw(mode):
    read, labels, eps = announced(mode), torch.tensor([0, 3, 1]), torch.randn(3, SIZE)
    torch.testing.assert_close(read.distance(labels, read.draw(labels, eps)), eps.square().sum(1), rtol=1e-3, atol=1e-3)
