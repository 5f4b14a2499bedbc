"""Gaussians can be drawn from whatever the estimate, and draws and divergences are those of the textbook."""
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from hpcfl.errors import NonFiniteError
from hpcfl.latents.announced import AnnouncedGaussians, announce_gaussians
from hpcfl.latents.gaussians import cholesky, compute_factors, distance, draw, floor, kl, oas, precision, shrink
from hpcfl.latents.moments import MODES, ClassGaussians, aggregate, measure, needs_full, to_message

SIZE = 8


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def covariance(size: int = SIZE, seed: int = 0) -> torch.Tensor:
    root = normal(size, size, seed=seed)
    return root @ root.T + torch.eye(size)


def moments_of(z: torch.Tensor, y: torch.Tensor, classes: int, mode: str) -> ClassGaussians:
    return aggregate([to_message(measure(z, y, classes, needs_full(mode)), mode, dtype=torch.float64)], mode)


def factors(moments: ClassGaussians, mode: str, target: str = "iso", minimum: float = 1e-4) -> torch.Tensor:
    """What a client draws with that has read what the server announced of the moments."""
    return AnnouncedGaussians.from_message(announce_gaussians(moments, mode, target, minimum), mode, torch.device("cpu")).factor


def spread_matrix(moments: ClassGaussians, mode: str, label: int) -> torch.Tensor:
    """The covariance (p, p) of one class that draws must reproduce: shrunk and floored where full."""
    kind = MODES[mode]
    spread = moments.spread if kind.shared else moments.spread[label]
    if kind.full:
        return floor(shrink(spread, moments.count.sum() if kind.shared else moments.count[label]))
    return torch.diag(spread.expand(SIZE))


@pytest.mark.parametrize("mode", MODES)
def test_draws_reproduce_mean_and_covariance(mode):
    y = torch.arange(3).repeat(60)
    z = normal(180, SIZE) @ covariance(seed=1) * (1 + y[:, None]) + 5 * y[:, None]
    moments = moments_of(z, y, 3, mode)
    factor = factors(moments, mode)
    for label in range(3):
        labels = torch.full((200_000,), label)
        v = draw(moments.mean, factor, labels, normal(200_000, SIZE, seed=7, dtype=torch.float32))
        assert v.dtype == torch.float32
        want = spread_matrix(moments, mode, label)
        assert float((v.double().T.cov() - want).norm() / want.norm()) < 0.02
        assert float((v.double().mean(0) - moments.mean[label]).norm() / want.trace().sqrt()) < 0.02


def test_each_label_is_drawn_from_its_own_class():
    mean = torch.tensor([[0.0, 0.0], [100.0, 100.0]], dtype=torch.float64)
    labels, eps = torch.tensor([1, 0, 1, 0]), normal(4, 2)
    matrices = torch.stack([torch.eye(2, dtype=torch.float64), torch.tensor([[2.0, 0.0], [1.0, 3.0]], dtype=torch.float64)])
    expected = torch.stack([mean[label] + matrices[label] @ noise for label, noise in zip(labels, eps, strict=True)])
    torch.testing.assert_close(draw(mean, matrices, labels, eps), expected)
    torch.testing.assert_close(draw(mean, matrices[1:], labels, eps), mean[labels] + eps @ matrices[1].T)
    torch.testing.assert_close(draw(mean, torch.tensor([[1.0], [2.0]]), labels, eps), mean[labels] + eps * (labels[:, None] + 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("samples", [0, 1, 3, SIZE - 1])
@pytest.mark.parametrize("target", ["iso", "diag"])
def test_too_few_samples_give_finite_factors_and_draws(mode, samples, target):
    moments = moments_of(normal(samples, SIZE), torch.zeros(samples, dtype=torch.int64), 2, mode)
    factor = factors(moments, mode, target)
    assert bool(torch.isfinite(factor).all())
    assert bool(torch.isfinite(draw(moments.mean, factor, torch.tensor([0, 0]), normal(2, SIZE))).all())


def test_shrinkage_follows_the_formula_and_its_limits():
    matrix, count = covariance(), 20
    trace, square = float(matrix.trace()), float((matrix @ matrix).trace())
    by_hand = min(1.0, ((1 - 2 / SIZE) * square + trace ** 2) / ((count + 1 - 2 / SIZE) * (square - trace ** 2 / SIZE)))
    assert 0 < by_hand < 1 and float(oas(matrix, count)) == pytest.approx(by_hand, rel=1e-12)
    assert float(oas(torch.eye(SIZE, dtype=torch.float64), 1000)) == 1.0
    assert float(oas(torch.zeros(SIZE, SIZE, dtype=torch.float64), 0)) == 1.0
    assert float(oas(matrix, 1e9)) < 1e-6
    assert float(oas(torch.tensor([[2.0]]), 5)) == 1.0
    several = oas(torch.stack([matrix, 2 * matrix]), torch.tensor([20.0, 20.0]))
    assert several.tolist() == pytest.approx([by_hand, by_hand], rel=1e-12)


def test_both_targets_keep_the_trace_and_diag_keeps_each_variance():
    matrix = covariance()
    for target in ("iso", "diag"):
        assert float(shrink(matrix, 20, target).trace()) == pytest.approx(float(matrix.trace()), rel=1e-12)
    torch.testing.assert_close(shrink(matrix, 20, "diag").diagonal(), matrix.diagonal())
    assert float(shrink(matrix, 20, "diag")[0, 1].abs()) < float(matrix[0, 1].abs())
    torch.testing.assert_close(shrink(matrix, 0, "iso"), float(matrix.trace()) / SIZE * torch.eye(SIZE, dtype=torch.float64))


def test_the_floor_is_absolute_or_relative_whichever_is_higher():
    assert floor(torch.zeros(2, 2, dtype=torch.float64)).tolist() == [[1e-4, 0], [0, 1e-4]]
    assert float(floor(1e6 * torch.eye(2, dtype=torch.float64))[0, 0]) == pytest.approx(1e6 + 1.0)


@pytest.mark.parametrize("mode", [mode for mode in MODES if not needs_full(mode)])
def test_no_variance_is_below_the_floor(mode):
    moments = moments_of(torch.zeros(5, SIZE), torch.zeros(5, dtype=torch.int64), 2, mode)
    factor = factors(moments, mode, minimum=0.04)
    assert factor.shape == {"shared_diag": (1, SIZE), "class_diag": (2, SIZE), "class_iso": (2, 1)}[mode]
    torch.testing.assert_close(factor, torch.full_like(factor, 0.2))


def test_cholesky_of_a_positive_matrix_is_the_exact_one_and_asymmetry_is_removed():
    matrix = covariance()
    skew = normal(SIZE, SIZE, seed=3) * 1e-3
    torch.testing.assert_close(cholesky(matrix + skew - skew.T), torch.linalg.cholesky(matrix))


@pytest.mark.parametrize("rank", [1, 4])
def test_cholesky_of_a_singular_matrix_is_as_near_as_the_jitter(rank):
    root = normal(64, rank)
    matrix = root @ root.T
    factor = cholesky(matrix)
    assert float((factor @ factor.T - matrix).norm() / matrix.norm()) < 1e-4


def test_what_no_jitter_repairs_falls_back_to_eigenvalues():
    values = torch.cat([torch.tensor([-3.0, -1e-3], dtype=torch.float64), torch.linspace(1, 4, SIZE - 2, dtype=torch.float64)])
    vectors = [torch.linalg.qr(normal(SIZE, SIZE, seed=seed)).Q for seed in range(4)]
    indefinite = [each @ values.diag() @ each.T for each in vectors]
    whole = torch.stack([covariance(), *indefinite, torch.zeros(SIZE, SIZE, dtype=torch.float64)])
    factor = cholesky(whole, minimum=1e-2)
    clamped = [each @ values.clamp(min=1e-2).diag() @ each.T for each in vectors]
    torch.testing.assert_close(factor @ factor.mT, torch.stack([whole[0], *clamped, 1e-2 * torch.eye(SIZE, dtype=torch.float64)]))
    assert torch.equal(factor, factor.tril()) and bool((factor.diagonal(dim1=1, dim2=2) > 0).all())


def test_factors_are_deviations_of_variances_and_lower_roots_of_covariances():
    variances, matrices = normal(3, SIZE).exp(), torch.stack([covariance(seed=seed) for seed in range(3)])
    torch.testing.assert_close(compute_factors(variances).square(), variances)
    factor = compute_factors(matrices)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.mT, matrices)


def test_a_covariance_with_nan_is_refused():
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        cholesky(torch.full((2, 2), float("nan")))


def divergence(z: torch.Tensor, variance: torch.Tensor, mean: torch.Tensor, factor: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """KL of N(z, diag variance) from the Gaussian of each label, (n,)."""
    diagonal, coupling = (leaf.expand(len(mean), *leaf.shape[1:])[labels] for leaf in precision(factor))
    return kl(variance, distance(mean, factor, labels, z), diagonal.expand_as(variance), coupling)


FACTORS = {"shared deviations": normal(1, SIZE, seed=2).exp(), "deviations": normal(3, SIZE, seed=2).exp(), "one deviation": normal(3, 1, seed=2).exp(),
           "a shared matrix": cholesky(covariance(seed=2))[None], "matrices": cholesky(torch.stack([covariance(seed=seed) for seed in (2, 3, 4)]))}


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
def test_divergence_from_each_class_is_the_one_of_torch_distributions(factor):
    labels = torch.tensor([0, 2, 1, 0, 1, 2])
    z, variance, mean = normal(6, SIZE), normal(6, SIZE, seed=5).exp(), normal(3, SIZE, seed=1)
    matrices = (factor if factor.dim() == 3 else factor.expand(len(factor), SIZE).diag_embed()).expand(3, SIZE, SIZE)[labels]
    want = kl_divergence(MultivariateNormal(z, variance.diag_embed()), MultivariateNormal(mean[labels], scale_tril=matrices))
    torch.testing.assert_close(divergence(z, variance, mean, factor, labels), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factor", [factor for factor in FACTORS.values() if factor.dim() == 2], ids=[name for name in FACTORS if "dev" in name])
def test_divergence_of_a_gaussian_from_itself_is_zero(factor):
    labels, mean = torch.tensor([0, 1, 2]), normal(3, SIZE)
    assert divergence(mean, factor.expand(3, SIZE).square(), mean, factor, labels).abs().max() < 1e-12


def test_coupling_is_zero_for_a_diagonal_matrix_and_positive_for_any_other():
    assert precision(normal(1, SIZE).exp().diag_embed())[1].abs().max() < 1e-12
    assert precision(cholesky(covariance())[None])[1].min() > 0.1


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
def test_distance_gives_back_the_noise_of_a_draw(factor):
    labels, eps, mean = torch.tensor([2, 0, 1, 2]), normal(4, SIZE, seed=6), normal(3, SIZE)
    torch.testing.assert_close(distance(mean, factor, labels, draw(mean, factor, labels, eps)), eps.square().sum(1))
