"""HeteroFL: slices are the leading channels in every round, and narrow ones lie inside wide ones. What it shares with FedRolex is in test_submodel."""
from hpcfl.algorithms.heterofl import HeteroFL
from tests.support.in_memory import job, step, world

MODELS = {"names": ["cnn2_bn"], "sizes": [0, 1, 2], "feature_size": 0}


def test_a_slice_is_the_leading_channels_in_every_round():
    method = step(world(job("heterofl", models=MODELS)), HeteroFL)
    for round_ in (0, 1, 17):
        assert method.shift(round_) == 0
        assert method.kept("cnn2_bn@0.75", round_)["body.conv1.weight"][0].tolist() == list(range(12))                       # of 16


def test_a_narrow_slice_lies_inside_a_wide_one():
    method = step(world(job("heterofl", models=MODELS)), HeteroFL)
    wide, narrow = (method.kept(architecture, 3) for architecture in ("cnn2_bn@0.75", "cnn2_bn@0.5625"))
    assert all(set(small.tolist()) <= set(large.tolist()) for path in wide for small, large in zip(narrow[path], wide[path], strict=True))


def test_the_channels_of_the_image_and_the_classes_are_kept_whole():
    method = step(world(job("heterofl", models=MODELS)), HeteroFL)
    kept = method.kept("cnn2_bn@0.5625", 0)
    assert kept["extractor.conv1.weight"][1].tolist() == [0] and kept["head.weight"][0].tolist() == list(range(10))
