"""Whatever the scheme, every image of the federation has one owner and one use, and the same seed deals the same."""
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from hpcfl.data.partition import SCHEMES, partition_samples
from hpcfl.errors import DataError
from hpcfl.settings.job import Data
from tests.support.laws import LAW

CLASSES = 6
SETTINGS = st.builds(Data, partition=st.sampled_from(sorted(SCHEMES)), fraction=st.floats(0.5, 1.0), public_fraction=st.sampled_from([0.0, 0.1, 0.4]),
                     validation_fraction=st.floats(0.0, 0.3), test_fraction=st.floats(0.0, 0.3), alpha=st.floats(0.3, 10.0), spread=st.floats(0.0, 1.0),
                     classes_per_client=st.integers(1, 3), minimum=st.integers(1, 3))


@LAW
@given(SETTINGS, st.lists(st.integers(0, CLASSES - 1), min_size=60, max_size=200).map(np.array), st.integers(1, CLASSES), st.integers(0, 1000))
def test_every_image_has_one_owner_and_one_use(data, labels, clients, seed):
    try:
        found = partition_samples(labels, clients, data, seed)
    except DataError:                                              # what cannot be dealt is refused, which other tests look at
        assume(False)
    parts = [*found.train, *found.validation, *found.test, found.public, found.public_validation]
    dealt = np.concatenate(parts)
    assert len(np.unique(dealt)) == len(dealt) == round(data.fraction * len(labels))
    assert dealt.min() >= 0 and dealt.max() < len(labels) and all((np.diff(part) > 0).all() for part in parts)
    for split in ("train", "validation", "test"):
        assert found.counts(labels, CLASSES, split).sum(1).tolist() == [len(part) for part in getattr(found, split)]
    again = partition_samples(labels, clients, data, seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, [*again.train, *again.validation, *again.test, again.public, again.public_validation],
                                                                 strict=True))
