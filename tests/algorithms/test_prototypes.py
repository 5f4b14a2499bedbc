"""Prototypes of each client: the mean features of the classes it has, in NumPy, and how the server reads them."""
import numpy as np
import torch

from hpcfl.algorithms.prototypes import describe_classes, gather_prototypes
from hpcfl.wire.uplink import Uploads
from tests.support.feature_methods import CLIENTS, SIZE, features_of, labels_of, usual


def test_a_client_sends_the_mean_feature_of_each_class_that_it_has_and_of_no_other():
    found, _ = usual("fedgh")
    sent = {}
    for group in found.states[1].groups:
        sent |= describe_classes(group, found.world.client_site(group, found.world.plan[0], 1)).pieces["prototypes"].trees
    assert sent.keys() == set(range(CLIENTS))
    for client, message in sent.items():
        z, y = features_of(found, client, 1), labels_of(found, client)
        assert message["classes"].tolist() == np.unique(y).tolist() and message["classes"].dtype == torch.int32
        assert message["means"].dtype == torch.float32 and message["means"].shape == (len(np.unique(y)), SIZE)
        np.testing.assert_allclose(message["means"].numpy(), np.stack([z[y == label].mean(0) for label in np.unique(y)]), rtol=1e-5, atol=1e-6)


def test_the_server_reads_prototypes_client_after_client_in_whatever_order_they_came():
    uploads = Uploads({client: {"means": torch.full((count, 2), float(client)), "classes": torch.arange(count, dtype=torch.int32)}
                       for client, count in ((2, 1), (0, 3))})
    means, classes = gather_prototypes({"prototypes": uploads}, torch.device("cpu"))
    assert means[:, 0].tolist() == [0.0, 0.0, 0.0, 2.0] and classes.tolist() == [0, 1, 2, 0] and classes.dtype == torch.int64
