"""Finished runs that several files of audit tests look into; they are carried out once."""
import pytest

from tests.support.tiny_runs import carry_out, tiny

CHECKPOINTS = {"every": 1, "keep": 9}


@pytest.fixture(scope="session")
def overfitted(tmp_path_factory):
    """Clients that know their few digits by heart."""
    job = tiny("standalone", data={"fraction": 0.1, "partition": "iid", "public_fraction": 0.0}, models={"names": ["mlp2", "cnn1"], "feature_size": 32},
               federation={"clients": 2, "rounds": 2, "participation": 1.0}, training={"batch": 16, "epochs": 60, "lr": 0.2})
    return carry_out(job, tmp_path_factory.mktemp("audit") / "overfitted")


@pytest.fixture(scope="session")
def generating(tmp_path_factory):
    """A run with a generator, and a checkpoint of every round."""
    return carry_out(tiny("fedvtc", checkpoint=CHECKPOINTS), tmp_path_factory.mktemp("audit") / "generating")


@pytest.fixture(scope="session")
def mapping(tmp_path_factory):
    """A run whose generator makes maps of a common extractor and knows a loss of single images."""
    job = tiny("gefl_f", models={"names": ["cnn2_bn", "cnn1"]}, federation={"participation": 1.0, "rounds": 1}, data={"partition": "iid"},
               algorithm={"generator": "vtc", "warmup_rounds": 1, "generator_rounds": 1, "generator_epochs": 1, "latent": 4})
    return carry_out(job, tmp_path_factory.mktemp("audit") / "mapping")
