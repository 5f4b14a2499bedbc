"""Problem: architectures, structures, streams and the settings of the job, as every rank knows them; what a job asks for in vain is refused."""
import pytest
import torch

from hpcfl.contract import JobError
from tests.support.in_memory import bits, job, world


def problem(name: str = "fedavg", **sections):
    return world(job(name, **sections)).problem


def test_clients_have_the_architectures_of_the_job_in_turn():
    found = problem(models={"names": ["mlp2", "cnn1"]}, federation={"clients": 3})
    assert found.architectures == ("mlp2", "cnn1", "mlp2") and found.architecture(1, 5) == "cnn1"


def test_a_structure_is_built_once_and_does_not_move_the_global_generator():
    found = problem()
    before = torch.random.get_rng_state()
    one = found.structure("cnn1")
    assert found.structure("cnn1") is one and torch.equal(torch.random.get_rng_state(), before)


def test_a_model_is_new_and_draws_from_the_stream_around_it():
    found = problem()

    def drawn(client: int):
        with found.stream("init", client).seeding():
            return bits(found.model("mlp2").state_dict())
    assert drawn(0) == drawn(0) != drawn(1)


def test_the_optimiser_is_that_of_the_training_section():
    rule = problem(training={"optimizer": "sgd", "lr": 0.25, "momentum": 0.5}).optimizer()
    assert (rule.name, rule.lr, rule.momentum) == ("sgd", 0.25, 0.5)


def test_rates_are_named_with_their_values():
    assert problem("fedtgp", training={"lr": 0.125}).rates() == "training.lr = 0.125"              # server_lr = 0 means training.lr
    assert problem("fedgh", training={"lr": 0.125}).rates() == "algorithm.server_lr = 0.01 or training.lr = 0.125"


def test_mixed_images_want_a_loss_with_soft_labels():
    found = problem(training={"augment": ["mixup"]})
    assert found.augmentation(soft_labels=True).mixes_labels
    with pytest.raises(JobError, match=r"training.augment = \['mixup'\] mixes images of different classes, but fedavg trains with a loss"):
        found.augmentation()


def test_one_global_model_wants_one_model_of_all_widths():
    assert problem(models={"names": ["cnn2_bn"], "sizes": [0, 1], "feature_size": 6}).common_base() == "cnn2_bn"
    with pytest.raises(JobError, match=r"models.names = \['mlp2', 'cnn1'\] are of 2 models, but fedavg makes one global model"):
        problem().common_base()


def test_exchanged_features_want_one_size():
    assert problem(models={"feature_size": 6}).common_feature_size() == 6
    with pytest.raises(JobError, match="models.feature_size = 0 lets every model keep its own feature size, but fedavg exchanges features"):
        problem(models={"feature_size": 0}).common_feature_size()
