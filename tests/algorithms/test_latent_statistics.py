"""Statistics of latents: sums and uploads give the same Gaussians, what the server sees of a client, and classes that are not everywhere."""
import numpy as np
import pytest
import torch

from hpcfl.errors import JobError
from hpcfl.federation.world import World
from hpcfl.latents.moments import MODES
from hpcfl.wire.uplink import Sums, Uploads
from tests.support.fedvtc_runs import baseline, described, went
from tests.support.in_memory import finite, run, world

CLASSES, SIZE, CLIENTS = 10, 6, 3                                  # of the small job


class Overheard:
    """What ranks brought to each combination."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uplinks = []
        combine = world.comm.combine
        monkeypatch.setattr(world.comm, "combine", lambda uplink: [self.uplinks.append(uplink), combine(uplink)][1])

    def pieces(self) -> list:
        return [piece for uplink in self.uplinks for piece in uplink.pieces.values()]


@pytest.mark.parametrize("latent", ["own", "common"])
def test_by_sums_the_server_never_sees_one_clients_statistics(latent, monkeypatch):
    followed = world(described({"statistics": "sums", "latent": latent, "common_size": SIZE}))
    overheard = Overheard(followed, monkeypatch)
    assert finite(run(followed).states[-1].server)
    assert overheard.pieces() and all(isinstance(piece, Sums) for piece in overheard.pieces())


def test_no_class_below_the_minimum_count_is_uploaded(monkeypatch):
    followed = world(described({"min_count": 5}))
    overheard = Overheard(followed, monkeypatch)
    run(followed)
    uploads = [upload for piece in overheard.pieces() if isinstance(piece, Uploads) for upload in piece.trees.values()]
    rare = [bool((upload["counts"] == 0).any()) for upload in uploads]
    assert all(int(upload["counts"][upload["counts"] > 0].min()) >= 5 for upload in uploads) and any(rare)
    assert all(not upload["means"][upload["counts"] == 0].any() for upload in uploads)


@pytest.mark.parametrize("min_count", [1, 5])
@pytest.mark.parametrize("mode", MODES)
def test_sums_give_the_statistics_of_uploads(mode, min_count):
    one, other = (baseline(covariance=mode, statistics=form, min_count=min_count).states[1].server for form in ("sums", "uploads"))
    assert torch.equal(one["has"], other["has"]) and torch.equal(one["count"], other["count"])
    for name in ("mean", "spread"):                                # uploads are cast to float32
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_sums_give_the_statistics_of_uploads_of_common_latents_too(mode):
    one, other = (baseline(covariance=mode, statistics=form, latent="common", common_size=SIZE).states[-1].server for form in ("sums", "uploads"))
    for name in ("mean", "spread", "count"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_sums_cannot_leave_out_the_spread_between_clients():
    with pytest.raises(JobError, match="between_client"):
        world(described({"statistics": "sums", "between_client": False}))


@pytest.mark.parametrize("settings", [*({"covariance": mode} for mode in MODES), {"statistics": "sums", "covariance": "class_full"}], ids=str)
def test_a_class_of_an_earlier_cohort_keeps_its_value(settings):
    found = went(settings, federation={"clients": 3, "rounds": 4, "participation": 0.34}, data={"partition": "disjoint"})
    labels, had = found.world.corpus.train_labels, torch.zeros(CLASSES, dtype=torch.bool)
    kept = 0
    for place, before, after in zip(found.places[:4], found.states, found.states[1:], strict=False):
        (client,) = found.world.cohort(place.phase, place.row)
        held = torch.from_numpy(np.bincount(labels[found.world.split.train[client]], minlength=CLASSES) > 0)
        old = had & ~held
        had, kept = had | held, kept + int(old.sum())
        assert torch.equal(after.server["has"], had)
        assert torch.equal(after.server["mean"][old], before.server["mean"][old]) and bool(after.server["mean"][old].any(1).all())
        if not MODES[settings["covariance"]].shared:
            assert torch.equal(after.server["spread"][old], before.server["spread"][old])
        assert not torch.equal(after.server["mean"][held], before.server["mean"][held])
    assert kept > 0, "every cohort held all classes known before it"
