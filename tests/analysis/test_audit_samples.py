"""Which images an audit compares: members and others of one class mix, and a pool that nobody trained on."""
import numpy as np
import torch

from hpcfl.analysis.audit_samples import draw_images, draw_replacements, find_unseen, match_classes, take_by_class
from hpcfl.data.shards import Scale, Shard
from hpcfl.federation.world import World
from hpcfl.streams import Stream
from hpcfl.wire.communicator import Communicator
from hpcfl.wire.ranks import Alone
from tests.support.tiny_runs import tiny

STREAM = Stream(0, "test")


def test_members_and_others_are_of_one_class_mix():
    labels, others = torch.tensor([0] * 30 + [1] * 5 + [3]), torch.tensor([0] * 20 + [1] * 20 + [2] * 20)
    mine, theirs = match_classes(labels, others, 99, STREAM)
    assert labels[mine].bincount().tolist() == others[theirs].bincount().tolist() == [20, 5]
    assert len(set(mine.tolist())) == len(set(theirs.tolist())) == 25


def test_at_most_so_many_members_are_drawn_from_all_alike():
    mine, theirs = match_classes(torch.arange(4).repeat(100), torch.arange(4).repeat(100), 60, STREAM)
    assert len(mine) == len(theirs) == 60 and mine.max() > 300 and mine.min() < 100
    assert not torch.equal(mine, match_classes(torch.arange(4).repeat(100), torch.arange(4).repeat(100), 60, STREAM.branch("other"))[0])


def test_the_control_has_the_others_class_mix_as_far_as_the_pool_goes():
    def shard(*counts):
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return Shard(torch.arange(float(len(labels))).view(-1, 1, 1, 1), labels, Scale())
    assert draw_replacements(shard(*[200] * 10), shard(50, 10), STREAM).labels.bincount().tolist() == [50, 10]
    assert draw_replacements(shard(20, 200, 200), shard(50, 10), STREAM).labels.bincount().tolist() == [20, 10]


def test_sets_that_share_no_class_match_in_nothing():
    assert [len(each) for each in match_classes(torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64), 9, STREAM)] == [0, 0]
    assert [len(each) for each in match_classes(torch.zeros(0, dtype=torch.int64), torch.ones(4, dtype=torch.int64), 9, STREAM)] == [0, 0]


def test_images_are_taken_class_by_class_in_the_order_given():
    labels, order = torch.tensor([1, 0, 1, 0, 2]), torch.tensor([4, 3, 2, 1, 0])
    assert take_by_class(labels, order, torch.tensor([1, 2, 0])).tolist() == [3, 2, 0]
    shard = draw_images(Shard(torch.arange(5.0).view(5, 1, 1, 1), labels, Scale()), torch.tensor([9, 1, 1]), STREAM)
    assert shard.labels.tolist() == [0, 0, 1, 2] and sorted(shard.images[:2].flatten().tolist()) == [1, 3]


def test_the_pool_holds_nothing_that_anybody_trained_on():
    world = World(tiny("fedvtc"), Communicator(Alone()), torch.device("cpu"))
    pool, trained = find_unseen(world), [*world.split.train, world.split.public]
    rest = world.corpus.train_images(np.setdiff1d(np.arange(len(world.corpus.train_labels)), np.concatenate(trained)))
    assert len(pool) > 1000 and sorted(image.numpy().tobytes() for image in pool.images) == sorted(image.tobytes() for image in rest)
