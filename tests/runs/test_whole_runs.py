"""Whole runs give the same results on any number of ranks, wherever they are resumed, and whatever the official test set holds."""
import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcfl.algorithms import PLANS
from hpcfl.data import store
from hpcfl.data.embedded import load_digits
from hpcfl.federation.world import World
from hpcfl.runs.run_folder import is_finished
from hpcfl.wire.communicator import Alone, Communicator, connect
from tests.support.tiny_runs import CASES, apart, carry_out, checkpoint_of, deterministic, of_one_precision, outcome, started, tiny, write_job
from tests.support.verdict import mpi_assert


def agree(comm, one: Path, other: Path, tolerance=None):
    """Fails on every rank where rank 0 finds the two run folders apart."""
    found = apart(outcome(one), outcome(other), tolerance) if comm.is_server else []
    mpi_assert(comm, not found, "\n".join([f"{one.name} and {other.name}:", *found]))


def alone(comm, job, out, **how):
    """The job in rank 0 alone; the others sleep meanwhile, where a barrier would keep their cores busy."""
    finished = Path(comm.share(f"{out} finished"))
    if comm.is_server:
        try:
            carry_out(job, out, Communicator(Alone(), deterministic=job.run.deterministic), **how)
        finally:
            finished.touch()
    while not finished.exists():
        time.sleep(0.02)


@pytest.fixture(scope="session")
def undisturbed_runs(tmp_path_factory) -> Path:
    """Where runs of one process lie that several tests compare with, and in tests/run several suites: on any number of ranks they are the same."""
    return Path(os.environ.get("HPCFL_TEST_RUNS") or tmp_path_factory.mktemp("undisturbed"))


def alone_once(comm, job, folder: Path) -> Path:
    """The run of a job in one process, from `folder` where it is already there."""
    out = Path(comm.share(folder / f"{job.algorithm_name}-{hashlib.sha256(job.to_toml().encode()).hexdigest()[:16]}"))
    if comm.share(not is_finished(out) if comm.is_server else None):
        alone(comm, job, out)
    return out


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("case", CASES)
def test_neither_ranks_nor_interruptions_change_the_results(case, undisturbed_runs, tmp_path, monkeypatch):
    of_one_precision(monkeypatch, case)
    comm, exact = connect(), connect(deterministic=True)
    total = sum(phase.rounds for phase in World(tiny(case), comm, torch.device("cpu")).plan)
    rows = min(comm.size, total - 1)                               # interrupted after another round on 2, 3 and 4 ranks
    job = tiny(case, checkpoint={"every": rows, "keep": 100})
    whole = alone_once(comm, deterministic(tiny(case, checkpoint={"every": 1, "keep": 100})), undisturbed_runs)
    carry_out(deterministic(job), tmp_path / "exact", exact)
    carry_out(job, tmp_path / "usual", comm)
    agree(comm, tmp_path / "exact", whole)
    agree(comm, tmp_path / "usual", whole, tolerance=1e-5)

    alone(comm, deterministic(job), tmp_path / "from ranks to one", resume=checkpoint_of(tmp_path / "exact", rows))
    carry_out(deterministic(job), tmp_path / "from one to ranks", exact, resume=checkpoint_of(whole, rows))
    carry_out(job, tmp_path / "usual resumed", comm, resume=checkpoint_of(tmp_path / "usual", rows))
    agree(comm, tmp_path / "from ranks to one", whole)
    agree(comm, tmp_path / "from one to ranks", whole)
    agree(comm, tmp_path / "usual resumed", tmp_path / "usual")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("case", CASES)
def test_neither_idle_ranks_nor_a_dedicated_server_change_the_results(case, undisturbed_runs, tmp_path, monkeypatch):
    of_one_precision(monkeypatch, case)
    comm, exact = connect(), connect(deterministic=True)
    job = tiny(case, federation={"clients": 3 if comm.size == 4 else 1})                            # always a rank without a client
    whole = alone_once(comm, deterministic(job), undisturbed_runs)
    carry_out(deterministic(job), tmp_path / "exact", exact)
    agree(comm, tmp_path / "exact", whole)
    carry_out(replace(job, federation=replace(job.federation, server_rank="dedicated")), tmp_path / "dedicated", comm)
    agree(comm, tmp_path / "dedicated", whole, tolerance=1e-5)


@pytest.mark.mpi(min_size=2)
def test_clients_that_have_not_trained_yet_may_change_ranks(tmp_path):
    """Of the clients that come to share a Group on resuming, one has optimiser state and the others have none."""
    comm, exact = connect(), connect(deterministic=True)
    job = deterministic(tiny("fedvtc, common latent", federation={"participation": 0.2}, checkpoint={"every": 2, "keep": 100}))
    carry_out(job, tmp_path / "ranks", exact)
    alone(comm, job, tmp_path / "resumed", resume=checkpoint_of(tmp_path / "ranks", 2))
    agree(comm, tmp_path / "resumed", tmp_path / "ranks")


def test_mpirun_with_its_own_numbers_of_threads_agrees_with_one_process(tmp_path):
    job = tiny("fedproto", run={"threads": 0})
    path = write_job(tmp_path, job)
    with started(tmp_path / "alone", "run", path, "--out", tmp_path / "one") as one:
        assert one.ends() == 0, one.text()
    with started(tmp_path / "ranks", "run", path, "--out", tmp_path / "three", ranks=3) as three:
        assert three.ends() == 0, three.text()
    assert not apart(outcome(tmp_path / "one"), outcome(tmp_path / "three"), tolerance=1e-5)
    assert "3 rank(s)" in three.text() and three.text().count("  clients ") == 2, three.text()


@pytest.mark.parametrize("name", PLANS)
def test_a_poisoned_official_test_set_changes_no_state(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "data"))
    data, generator = load_digits(), np.random.default_rng(0)
    training = {"x_train": data.train_images, "y_train": data.train_labels}
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "clean.npz", **training, x_test=data.test_images, y_test=data.test_labels)
    np.savez(tmp_path / "poisoned.npz", **training, x_test=generator.integers(0, 256, data.test_images.shape, dtype=np.uint8),
             y_test=generator.permutation(data.test_labels))
    for kind in ("clean", "poisoned"):
        store.import_npz(kind, tmp_path / f"{kind}.npz")
        carry_out(tiny(name, data={"name": kind, "normalization": "standard"}, checkpoint={"every": 1, "keep": 1}), tmp_path / kind)
    clean, poisoned = outcome(tmp_path / "clean"), outcome(tmp_path / "poisoned")
    differing = [line.split("'")[1] for line in apart(clean, poisoned)]
    assert "evaluation/generalization_correct" in differing, "the poison was not even seen"
    assert not [name for name in differing if not name.startswith(("evaluation/generalization", "evaluation/global_correct", "samples/real"))]
    assert sorted(path.name for path in (tmp_path / "clean" / "checkpoints").iterdir()) \
        == sorted(path.name for path in (tmp_path / "poisoned" / "checkpoints").iterdir()), "the test set chose which checkpoint is the best"
