"""Where clients' states lie, and how many of them are at work at once, changes no result; memory, files and sums are as promised."""
import gc
import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from hpcfl.doctor.estimate import count_model_bytes, measure_load
from hpcfl.errors import EnvironmentFault
from hpcfl.federation.loop import regroup
from hpcfl.federation.residency import RESIDENCIES, Disk, Host
from hpcfl.federation.state import begin
from hpcfl.files.scratch import Scratch
from hpcfl.runs import checkpoint, examination
from hpcfl.runs.examination import Examination
from hpcfl.runs.launch import revisit
from hpcfl.settings.job import Residency
from hpcfl.training.group import Group
from hpcfl.wire.communicator import Communicator, connect
from tests.runs.test_whole_runs import agree, alone
from tests.support import in_memory
from tests.support.tiny_runs import CASES, apart, carry_out, checkpoint_of, deterministic, of_one_precision, outcome, started, tiny, write_job

CPU = torch.device("cpu")
PIECES = [("host", 2), ("device", 1), ("disk", 0)]
FOLLOWED = ["fedavg", "fedvtc", "gefl_f", "fedconv"]


def lying(job, where: str, chunk: int = 0, folder: object = ""):
    """The job with its clients' states somewhere."""
    return replace(job, residency=Residency(where, chunk, str(folder)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs with all states on the device and all clients of one architecture in one Group, by case; each is made once."""
    made = {}

    def of(case: str, exact: bool = True):
        if (case, exact) not in made:
            job = tiny(case, run={"deterministic": exact}, checkpoint={"every": 1, "keep": 100})
            made[case, exact] = carry_out(job, tmp_path_factory.mktemp("whole") / "run")
        return made[case, exact]
    return of


def same(one, other) -> None:
    found = apart(outcome(one), outcome(other))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("case", CASES)
def test_clients_put_on_disk_one_by_one_end_with_the_same_bits(case, whole, tmp_path):
    job = deterministic(tiny(case))
    same(carry_out(lying(job, "disk", 1), tmp_path / "run"), whole(case))


@pytest.mark.parametrize("where, chunk", PIECES)
@pytest.mark.parametrize("case", [*FOLLOWED, "fedrolex, clients change their size"])
def test_neither_residency_nor_chunk_changes_a_bit(case, where, chunk, whole, tmp_path):
    job = deterministic(tiny(case))
    same(carry_out(lying(job, where, chunk), tmp_path / "run"), whole(case))


@pytest.mark.parametrize("case", ["fedproto", "fedvtc, sums"])                                      # sums over clients of several architectures
def test_sums_that_are_reduced_early_do_not_depend_on_the_pieces_either(case, whole, tmp_path):
    same(carry_out(lying(tiny(case), "disk", 1), tmp_path / "run"), whole(case, exact=False))


@pytest.mark.parametrize("case", FOLLOWED)
@pytest.mark.parametrize("first, then", [(("device", 0), ("disk", 1)), (("disk", 2), ("device", 0)), (("disk", 1), ("host", 3))])
def test_a_run_is_resumed_with_another_residency_and_chunk(case, first, then, whole, tmp_path):
    job = deterministic(tiny(case, checkpoint={"every": 2, "keep": 100}))
    before = carry_out(lying(job, *first), tmp_path / "first")
    resumed = carry_out(lying(job, *then), tmp_path / "then", resume=checkpoint_of(before, 2))
    same(resumed, whole(case))
    assert json.loads((checkpoint_of(resumed, outcome(resumed).manifest["rows"]) / "manifest.json").read_text())["job"]["residency"]["location"] == then[0]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("case", FOLLOWED)
def test_ranks_with_states_on_disk_agree_with_one_that_has_them_on_the_device(case, tmp_path, monkeypatch):
    of_one_precision(monkeypatch, case)
    comm, exact = connect(), connect(deterministic=True)
    job = tiny(case, checkpoint={"every": 2, "keep": 100})
    alone(comm, deterministic(job), tmp_path / "alone")
    carry_out(lying(deterministic(job), "disk", 1), tmp_path / "exact", exact)
    carry_out(lying(job, "disk", 1), tmp_path / "usual", comm)
    agree(comm, tmp_path / "exact", tmp_path / "alone")
    agree(comm, tmp_path / "usual", tmp_path / "alone", tolerance=1e-5)
    carry_out(lying(deterministic(job), "host", 2), tmp_path / "from one to ranks", exact, resume=checkpoint_of(tmp_path / "alone", 2))
    agree(comm, tmp_path / "from one to ranks", tmp_path / "alone")


def test_a_group_has_at_most_a_chunk_of_clients_of_one_architecture_in_every_round():
    world = in_memory.world(in_memory.job("fedrolex", federation={"clients": 7}, models={"size_schedule": "rotate"},
                                           residency={"chunk": 2, "location": "disk"}))
    state = begin(world)
    for row in range(3):
        state = regroup(world, state, row)
        assert sorted(client for group in state.groups for client in group.clients) == list(range(7))
        assert {client: group.architecture for group in state.groups for client in group.clients} == {k: world.problem.architecture(k, row) for k in range(7)}
        assert all(len(group.clients) <= 2 and group.clients == group.fetch().clients for group in state.groups)
        assert [(group.architecture, group.clients) for group in state.groups] == sorted((group.architecture, group.clients) for group in state.groups)


# memory

def bytes_of_tensors() -> int:
    """What the tensors that Python holds take together, shared memory once."""
    found = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in gc.get_objects() if type(leaf) is torch.Tensor}
    return sum(found.values())


@contextmanager
def watched(monkeypatch) -> Iterator[list[int]]:
    """Bytes of tensors whenever a group was at work, was evaluated or went into a checkpoint."""
    seen: list[int] = []

    def before(function):
        def looked(*arguments):
            seen.append(bytes_of_tensors())
            return function(*arguments)
        return looked

    def clients(state, written=checkpoint._iterate_clients):
        for each in written(state):
            seen.append(bytes_of_tensors())
            yield each
    with monkeypatch.context() as patch:
        patch.setattr(Group, "updated", before(Group.with_rows))
        patch.setattr(examination, "bind", before(examination.bind))
        patch.setattr(checkpoint, "_iterate_clients", clients)
        yield seen


def wide(clients: int, where: str):
    """FedAvg of clients of two architectures whose states are larger than anything else."""
    return lying(tiny("fedavg", federation={"clients": clients, "participation": 1.0}, data={"fraction": 0.5, "partition": "iid"},
                      models={"names": ["mlp2", "mlp3"]}, evaluation={"every": 1}, checkpoint={"every": 1, "keep": 100}), where, 1)


def most(job, out, monkeypatch, **how) -> int:
    """The most bytes that tensors of the run took."""
    gc.collect()
    gc.freeze()                                                    # what was there before is not looked at
    try:
        with watched(monkeypatch) as seen:
            carry_out(job, out, **how)
    finally:
        gc.unfreeze()
    return max(seen)


def test_on_disk_the_states_of_a_few_clients_are_in_memory_however_many_there_are(tmp_path, monkeypatch):
    carry_out(wide(4, "disk"), tmp_path / "first")                                                  # what is made once in a process
    state = sum(leaf.nbytes for leaf in outcome(tmp_path / "first").clients[0].values())
    few, many = (most(wide(clients, "disk"), tmp_path / f"disk {clients}", monkeypatch) for clients in (4, 24))
    assert many - few < 2 * state, f"{(many - few) / state:.1f} states more"
    few, many = (most(wide(clients, "device"), tmp_path / f"device {clients}", monkeypatch) for clients in (4, 24))
    assert many - few > 20 * state, "the comparison cannot fail"


def test_neither_does_a_run_that_is_resumed_hold_more(tmp_path, monkeypatch):
    peaks = []
    for clients in (4, 24):
        folder = carry_out(wide(clients, "device"), tmp_path / f"{clients}")
        state = sum(leaf.nbytes for leaf in outcome(folder).clients[0].values())
        peaks.append(most(wide(clients, "disk"), tmp_path / f"resumed {clients}", monkeypatch, resume=checkpoint_of(folder, 1)))
    assert peaks[1] - peaks[0] < 2 * state


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_takes_twice_the_states_on_disk_those_before_and_after_a_step(resumed, tmp_path, monkeypatch):
    first, used, write = carry_out(wide(6, "device"), tmp_path / "first"), [], Scratch.write

    def written(self, leaf):
        there = write(self, leaf)
        used.append(os.fstat(self._file.fileno()).st_size)
        return there
    monkeypatch.setattr(Scratch, "write", written)
    carry_out(wide(6, "disk"), tmp_path / "run", resume=checkpoint_of(first, 1) if resumed else "auto")
    states = sum(leaf.nbytes for own in outcome(first).clients.values() for path, leaf in own.items() if not path.startswith("received/"))
    assert states < used[-1] <= 2 * states


# early reduction

@pytest.mark.parametrize("exact", [False, True])
def test_what_is_summed_is_kept_once_unless_its_order_matters(exact, monkeypatch):
    world, brought = in_memory.world(in_memory.job("fedavg", federation={"clients": 6}, residency={"chunk": 1}, models={"names": ["mlp2"]})), []
    world.comm = Communicator(in_memory.Alone(), deterministic=exact)
    combine = Communicator.combine
    monkeypatch.setattr(Communicator, "combine", lambda self, statistics: brought.append(statistics) or combine(self, statistics))
    followed = in_memory.run(world)
    for statistics, account in zip(brought, followed.accounts, strict=True):
        sums = statistics.pieces["mlp2"]
        assert (len(sums.contributions), len(sums.partial)) == ((6, 0) if exact else (0, 1))
        assert account["up"] == sums.simulated_bytes() and len(set(account["up"].values())) == 1
    model = sum(leaf.nbytes for path, leaf in followed.state(0).items() if leaf.is_floating_point())
    assert set(account["up"].values()) == {model + 8}


def test_what_a_rank_needs_follows_from_where_the_states_lie():
    def needed(**residency) -> int:
        return measure_load(in_memory.world(in_memory.job("fedavg", federation={"clients": 12}, models={"names": ["mlp2"]}, residency=residency))).needed_bytes
    one = count_model_bytes(in_memory.world(in_memory.job("fedavg")), "mlp2")
    assert needed() - needed(location="disk", chunk=1) == (2 * 12 - 3) * one
    assert needed() == needed(location="host", chunk=1), "on a CPU the host's memory is the device's"


# where states lie

@pytest.mark.parametrize("kind", [Host, Disk])
def test_what_was_put_away_comes_back_as_it_was_in_memory_of_its_own(kind, tmp_path):
    state = {"model/weight": torch.randn(2, 4, 5).transpose(1, 2), "model/steps": torch.tensor([3, 4]), "model/flags": torch.tensor([[True], [False]]),
             "generator/none": torch.zeros(2, 0, 3), "generator/half": torch.randn(2, 3).bfloat16()}
    lot, group = kind(CPU, str(tmp_path)), Group("mlp2", (3, 7), dict(state))
    parked = lot.park(group)
    group.state["model/steps"].zero_()                                                              # what is put away is put away
    back = parked.fetch()
    assert (parked.architecture, parked.clients) == (back.architecture, back.clients) == ("mlp2", (3, 7)) and back.state.keys() == state.keys()
    assert back.state["model/steps"].tolist() == [3, 4]
    assert all(back.state[path].dtype == leaf.dtype and torch.equal(back.state[path], leaf) for path, leaf in state.items() if path != "model/steps")
    back.state["model/weight"].zero_()
    assert torch.equal(parked.fetch().state["model/weight"], state["model/weight"])


@pytest.mark.parametrize("kind", [Host, Disk])
def test_a_leaf_that_did_not_change_is_not_put_away_again(kind, tmp_path):
    lot = kind(CPU, str(tmp_path))
    before = lot.park(Group("mlp2", (0,), {"model/body": torch.ones(1, 3), "model/head": torch.ones(1, 2), "generator/body": torch.ones(1, 4)}))
    group = before.fetch()
    after = lot.park(replace(group, state=group.state | {"model/head": torch.zeros(1, 2)}))
    assert after.leaves["model/body"] is before.leaves["model/body"] and after.leaves["model/head"] is not before.leaves["model/head"]
    assert before.fetch().state["model/head"].tolist() == [[1, 1]] and after.fetch().state["model/head"].tolist() == [[0, 0]]
    assert set(after.part("model")) == {"body", "head"}


def test_groups_on_the_device_are_what_they_are():
    group = Group("mlp2", (0,), {"model/x": torch.ones(1, 2)})
    assert RESIDENCIES["device"](CPU, "").park(group) is group and group.fetch() is group


def test_models_that_did_not_change_are_not_evaluated_again(tmp_path, monkeypatch):
    """GeFL's clients train a generator first; their own models, put away meanwhile, are those of the evaluation before."""
    evaluated, asked = [], Examination._ask
    monkeypatch.setattr(Examination, "_asked", lambda self, group, known: evaluated.extend(group.clients) or asked(self, group, known))
    job = tiny("gefl", algorithm={"generator_rounds": 3, "generator_epochs": 1, "latent": 4}, evaluation={"every": 1},
               federation={"participation": 1.0, "rounds": 1})
    counts = []
    for where in ("device", "disk"):
        evaluated.clear()
        carry_out(lying(job, where, 2), tmp_path / where)
        counts.append(len(evaluated))
    assert counts[0] == counts[1] < 5 * 4


def test_space_on_disk_is_used_again(tmp_path):
    scratch = Scratch(str(tmp_path))
    kept, ends = scratch.write(torch.arange(1000)), []
    for number in range(20):
        pair = scratch.write(torch.full((500,), number)), scratch.write(torch.ones(3))
        assert scratch.read(pair[0]).tolist() == [number] * 500
        ends.append(os.fstat(scratch._file.fileno()).st_size)
    assert torch.equal(scratch.read(kept), torch.arange(1000))
    assert ends[-1] == ends[1] <= 8000 + 2 * (4000 + 12), "more than what lives at once"


# what is left, and what goes wrong

def open_files() -> set[str]:
    return {os.readlink(f"/proc/self/fd/{handle}") for handle in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{handle}")}


def test_after_a_run_or_a_failure_nothing_is_left_on_disk(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    job = lying(tiny("standalone"), "disk", 1, tmp_path / "scratch")
    here = str(tmp_path / "scratch")
    carry_out(job, tmp_path / "run")
    monkeypatch.setattr(examination, "bind", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        carry_out(job, tmp_path / "failed")
    monkeypatch.undo()
    gc.collect()
    assert not os.listdir(here) and not [name for name in open_files() if name.startswith(here)]


def test_a_killed_run_leaves_nothing_on_disk_and_resumes(tmp_path, whole):
    (tmp_path / "scratch").mkdir()
    job = lying(tiny("standalone", run={"deterministic": True}, checkpoint={"every": 1, "keep": 100}), "disk", 1, tmp_path / "scratch")
    fault = ("import time\nfrom pathlib import Path\nfrom hpcfl.algorithms.standalone import Standalone\ntrain = Standalone.train\n"
             "def slow(self, group, message, site):\n    if site.round == 1:\n        Path('there').touch()\n        time.sleep(100)\n"
             "    return train(self, group, message, site)\nStandalone.train = slow\n")
    with started(tmp_path / "killed", "run", write_job(tmp_path, job), "--out", tmp_path / "run", fault=fault) as run:
        run.reaches("there")
        names = [os.readlink(f"/proc/{run.process.pid}/fd/{handle}") for handle in os.listdir(f"/proc/{run.process.pid}/fd")]
        assert [name for name in names if name.startswith(str(tmp_path / "scratch"))], "nothing was on disk"
    time.sleep(0.1)
    assert os.listdir(tmp_path / "scratch") == []
    same(carry_out(job, tmp_path / "run"), whole("standalone"))


def test_a_folder_that_takes_no_file_is_an_error_before_anything_is_written(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(EnvironmentFault, match=f"residency.folder: .* in {folder}, .*residency.location = 'host'") as refused:
            carry_out(lying(tiny("standalone"), "disk", 1, folder), tmp_path / "run")
        assert refused.value.exit_code == 3 and not (tmp_path / "run" / "job.toml").exists()


def test_a_full_disk_says_so_and_the_checkpoint_before_it_stays(tmp_path, whole, monkeypatch):
    job = tiny("standalone", run={"deterministic": True}, checkpoint={"every": 1, "keep": 100})
    save, limits = checkpoint.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_and_leave_little(folder, world, state, *rest):
        save(folder, world, state, *rest)
        if state.rows == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    monkeypatch.setattr(checkpoint, "save", save_and_leave_little)
    try:
        with pytest.raises(EnvironmentFault, match=r"client states .* cannot be kept in a file in .*, with \d+ bytes there: File too large; free space"):
            carry_out(lying(job, "disk", 1, tmp_path), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    same(carry_out(lying(job, "host"), tmp_path / "run"), whole("standalone"))


def test_the_folder_of_a_run_need_not_exist_where_its_states_are_looked_at(tmp_path):
    (tmp_path / "scratch").mkdir()
    folder = carry_out(lying(tiny("fedavg"), "disk", 2, tmp_path / "scratch"), tmp_path / "run")
    (tmp_path / "scratch").rmdir()
    _, state = revisit(folder)
    held = {client: own for group in state.groups for client, own in group.fetch().states().items()}
    assert all(torch.equal(leaf, held[client][path]) for client, own in outcome(folder).clients.items()
               for path, leaf in own.items() if not path.startswith("received/"))
