"""Images of noise are the same for a stream, of all classes in turn, and all that clients have to train on."""
import torch

from hpcfl.bench.noise import NoiseWorld, draw_noise
from hpcfl.wire.communicator import Communicator
from hpcfl.wire.ranks import Alone
from tests.support.tiny_runs import tiny


def test_clients_have_images_of_their_own_and_none_to_select_by():
    world = NoiseWorld(tiny("fedavg"), Communicator(Alone()), torch.device("cpu"), 12)
    first, second = world.holdings[0], world.holdings[1]
    assert len(first.train) == len(second.train) == 12 and len(first.validation) == 0
    assert first.train.images.dtype == torch.uint8 and first.train.images.shape[1:] == world.problem.shape
    assert first.train.labels.tolist() == [number % 10 for number in range(12)] and not torch.equal(first.train.images, second.train.images)


def test_a_stream_gives_the_same_images_again():
    problem = NoiseWorld(tiny("fedavg"), Communicator(Alone()), torch.device("cpu"), 1).problem
    one, again, other = (draw_noise(problem, problem.stream(purpose), 3) for purpose in ("public", "public", "validation"))
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)
