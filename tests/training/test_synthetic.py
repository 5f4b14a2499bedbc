"""Synthetic batches: balanced, decided by their stream alone, drawn anew or repeated, with real ones after each pass."""
import pytest
import torch

from hpcfl.streams import Stream
from hpcfl.training.synthetic import draw_synthetic_epochs

CLASSES = torch.tensor([1, 4, 7])


def draw(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return labels.view(-1, 1, 1, 1) + torch.rand(len(labels), 1, 2, 2, generator=generator)


def batches(count: int = 2, per_class: int = 5, batch: int = 4, seed: int = 0, **options) -> list[dict[str, torch.Tensor]]:
    return list(draw_synthetic_epochs(draw, CLASSES, per_class, batch, count, Stream(seed, "synthetic"), **options))


def passes(found: list[dict[str, torch.Tensor]], per_pass: int) -> list[dict[str, torch.Tensor]]:
    return [{name: torch.cat([each[name] for each in found[start:start + per_pass]]) for name in ("x", "y")} for start in range(0, len(found), per_pass)]


def test_every_pass_has_the_same_number_of_images_of_each_class_and_no_other():
    for each in passes(batches(), 4):
        assert torch.bincount(each["y"], minlength=9).tolist() == [0, 5, 0, 0, 5, 0, 0, 5, 0]


def test_images_belong_to_their_labels_and_come_in_shuffled_batches():
    found = batches()
    assert [len(each["y"]) for each in found] == [4, 4, 4, 3] * 2
    assert all(torch.equal(each["x"].floor()[:, 0, 0, 0], each["y"].float()) for each in found)
    assert all(len(each["y"].unique()) > 1 for each in found)


def test_a_last_image_alone_joins_the_batch_before_it():
    assert [len(each["y"]) for each in batches(1, per_class=3)] == [4, 5]
    assert [len(each["y"]) for each in batches(1, per_class=1, batch=1)] == [1, 1, 1]


def test_the_stream_alone_decides():
    torch.manual_seed(1)
    one = batches()
    torch.manual_seed(2)
    other, third = batches(), batches(seed=1)
    assert all(torch.equal(a["x"], b["x"]) and torch.equal(a["y"], b["y"]) for a, b in zip(one, other, strict=True))
    assert not all(torch.equal(a["x"], b["x"]) for a, b in zip(one, third, strict=True))


@pytest.mark.parametrize("resample", [True, False])
def test_later_passes_draw_anew_or_repeat_the_first(resample):
    first, *later = passes(batches(3, resample=resample), 4)
    assert all(torch.equal(each["x"], first["x"]) != resample for each in later)
    assert all(torch.equal(each["y"], first["y"]) != resample for each in later)


def test_real_batches_follow_each_pass():
    found = batches(2, real=lambda epoch: [{"x": torch.full((1, 1, 2, 2), -1.0 - epoch), "y": torch.tensor([epoch])}])
    assert [float(each["x"].flatten()[0]) for each in found if float(each["x"].min()) < 0] == [-1.0, -2.0]
    assert [len(each["y"]) for each in found] == [4, 4, 4, 3, 1] * 2


def test_images_are_drawn_only_when_asked_for():
    asked = []
    source = draw_synthetic_epochs(lambda labels, generator: asked.append(len(labels)) or draw(labels, generator), CLASSES, 1000, 4, 1, Stream(0, "lazy"))
    next(source)
    assert asked == [4]
