"""The moments of parts, merged in any order, are those of all samples together."""
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcfl.latents import moments
from tests.support.laws import LAW

CLASSES, SIZE = 3, 4


@LAW
@given(st.sampled_from(sorted(moments.MODES)), st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), st.integers(0, 2 ** 32 - 1),
       st.floats(-1e4, 1e4), st.randoms(use_true_random=False))
def test_moments_of_parts_in_any_order_are_those_of_the_pooled_data(mode, sizes, seed, offset, chance):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(sum(sizes), SIZE, dtype=torch.float64, generator=generator) + offset
    y = torch.randint(CLASSES, (sum(sizes),), generator=generator)

    def message(z: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return moments.to_message(moments.measure(z, y, CLASSES, moments.needs_full(mode)), mode, dtype=torch.float64)
    parts = [message(*part) for part in zip(z.split(sizes), y.split(sizes), strict=True)]
    merged, pooled = moments.aggregate(chance.sample(parts, len(parts)), mode), moments.aggregate([message(z, y)], mode)
    assert torch.equal(merged.has, pooled.has) and torch.equal(merged.count, pooled.count)
    torch.testing.assert_close(merged.mean, pooled.mean, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(merged.spread, pooled.spread, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(merged.within + merged.between, pooled.within + pooled.between, rtol=1e-9, atol=1e-9)
