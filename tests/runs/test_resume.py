"""A resumed run is the uninterrupted one; what does not belong together is refused, and nothing is overwritten."""
import fcntl
import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpcfl.errors import CheckpointError, JobError
from hpcfl.federation.state import schedule
from hpcfl.federation.world import World
from hpcfl.files import metrics
from hpcfl.report import summary
from hpcfl.report.recording import read
from hpcfl.runs.revisit import revisit
from hpcfl.runs.simulation import Simulation
from hpcfl.settings.job import RENAMED
from hpcfl.wire.communicator import Alone, Communicator
from tests.support.tiny_runs import CASES, apart, carry_out, checkpoint_of, left_half_written, outcome, tiny

ALL_CHECKPOINTS = {"every": 1, "keep": 100}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the logs, which may grow."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "log"}


def cut_off(source: Path, rows: int, target: Path) -> Path:
    """What is left of a run that was killed some time after its checkpoint at `rows`: later rounds are in the record already."""
    shutil.copytree(source, target)
    for later in (target / "checkpoints").iterdir():
        if later.name > checkpoint_of(target, rows).name:
            shutil.rmtree(later)
    (target / "LATEST").write_text(f"{checkpoint_of(target, rows).name}\n")
    (target / "STATUS").write_text("running\n")
    return target


def as_written_before(folder: Path) -> None:
    """What an earlier version left: settings under the names that they had, and without one that did not exist."""
    old = {new: name for name, new in RENAMED.items()}

    def before(tables):
        found: dict[str, dict[str, object]] = {}
        for section, key, value in ((section, key, value) for section, table in tables.items() for key, value in table.items()):
            earlier, name = old.get(f"{section}.{key}", f"{section}.{key}").split(".")
            found.setdefault(earlier, {})[name] = value
        del found["timeouts"]["heartbeat"]
        return found
    text = "".join(f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
                   for section, table in before(tomllib.loads((folder / "job.toml").read_text())).items())
    (folder / "job.toml").write_text(text)
    for path in folder.glob("checkpoints/*/manifest.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"job": before(manifest["job"])}))
    with h5py.File(folder / "metrics.h5", "r+") as file:
        file.attrs["job"] = text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nobody interrupted, by case; each is made once."""
    made: dict[str, Path] = {}

    def of(case: str) -> Path:
        if case not in made:
            made[case] = carry_out(tiny(case, checkpoint=ALL_CHECKPOINTS), tmp_path_factory.mktemp("whole") / "run")
        return made[case]
    return of


@pytest.fixture
def stopped(whole, tmp_path):
    """A run of two rounds of three, and its job."""
    return cut_off(whole("standalone"), 2, tmp_path / "run"), tiny("standalone", checkpoint=ALL_CHECKPOINTS)


@pytest.mark.parametrize("case", CASES)
def test_resumed_in_any_phase_a_run_ends_as_the_uninterrupted_one(case, whole, tmp_path):
    job = tiny(case, checkpoint=ALL_CHECKPOINTS)
    places = schedule(World(job, Communicator(Alone()), torch.device("cpu")))
    first_of_phase = [place.row + 1 for place in places if place.round == 0 and place.row + 1 < len(places)]
    for rows in sorted({*first_of_phase, len(places) - 1}):
        resumed = carry_out(job, cut_off(whole(case), rows, tmp_path / str(rows)))
        found = apart(outcome(resumed), outcome(whole(case)))
        assert not found, "\n".join([f"resumed after round {rows}:", *found])
        assert (resumed / "STATUS").read_text() == "done\n" and not left_half_written(resumed)


def test_a_resumed_run_says_so_and_drops_the_rounds_behind_its_checkpoint(whole, tmp_path, capsys):
    folder = cut_off(whole("fedavg"), 1, tmp_path / "run")
    assert len(outcome(folder).metrics["rounds/round"]) == 3
    carry_out(tiny("fedavg", checkpoint=ALL_CHECKPOINTS), folder)
    assert "resumed after round 1 of 3" in capsys.readouterr().out
    metrics = outcome(folder).metrics
    assert metrics["rounds/round"].tolist() == [0, 1, 2] and metrics["evaluation/at"].tolist() == outcome(whole("fedavg")).metrics["evaluation/at"].tolist()


def test_one_checkpoint_of_another_run_is_resumed_in_a_new_folder_and_left_alone(stopped, whole, tmp_path):
    folder, job = stopped
    before = contents(folder)
    carry_out(job, tmp_path / "new", resume=checkpoint_of(folder, 1))
    assert contents(folder) == before and not apart(outcome(tmp_path / "new"), outcome(whole("standalone")))


def test_a_run_that_went_back_to_an_earlier_checkpoint_and_died_goes_on_from_there(stopped, whole, monkeypatch):
    folder, job = stopped
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Simulation, "run", lambda self: (_ for _ in ()).throw(InterruptedError))
        carry_out(job, folder, resume=checkpoint_of(folder, 1))
    assert (folder / "LATEST").read_text() == "round-000001\n"
    carry_out(job, folder)
    assert not apart(outcome(folder), outcome(whole("standalone")))


def test_a_changed_job_is_refused_by_name_and_nothing_is_touched(stopped):
    folder, _ = stopped
    before = contents(folder)
    changed = tiny("standalone", training={"lr": 0.01}, federation={"rounds": 4}, checkpoint={"every": 2, "keep": 5})
    with pytest.raises(CheckpointError) as refused:
        carry_out(changed, folder)
    assert refused.value.exit_code == 5
    assert "differs in federation.rounds, training.lr; nothing was changed" in str(refused.value)
    assert "--may-differ federation.rounds --may-differ training.lr" in str(refused.value)
    assert contents(folder) == before


def test_what_may_differ_may_differ(stopped):
    folder, _ = stopped
    carry_out(tiny("standalone", federation={"rounds": 4}, checkpoint=ALL_CHECKPOINTS), folder, may_differ=["federation.rounds"])
    assert outcome(folder).manifest["rows"] == 4 and 'rounds = 4' in (folder / "job.toml").read_text()


def test_settings_that_no_result_depends_on_differ_freely(stopped, whole):
    folder, _ = stopped
    carry_out(tiny("standalone", checkpoint={"every": 2, "keep": 1}, run={"name": "renamed"}, evaluation={"batch": 77}), folder)
    assert not apart(outcome(folder), outcome(whole("standalone")))


@pytest.mark.parametrize("named", [True, False], ids=["in its folder", "found by its job"])
def test_a_run_begun_when_settings_had_other_names_goes_on(named, stopped, whole, tmp_path, monkeypatch):
    folder, job = stopped
    as_written_before(folder)
    monkeypatch.chdir(tmp_path)
    there = Path("runs", job.run.name, f"20260101T000000Z-{'0' * 8}")
    if not named:
        there.parent.mkdir(parents=True)
        folder.rename(there)
    assert carry_out(job, folder if named else None) == (folder if named else there)
    assert not apart(outcome(folder if named else there), outcome(whole("standalone")))


def test_a_run_finished_when_settings_had_other_names_is_done_and_can_be_looked_at(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole("standalone"), folder)
    as_written_before(folder)
    carry_out(tiny("standalone", checkpoint=ALL_CHECKPOINTS), folder)
    assert "already done" in capsys.readouterr().out
    assert revisit(folder)[0].job == tiny("standalone", checkpoint=ALL_CHECKPOINTS)
    assert read(folder).job == read(whole("standalone")).job


def test_what_may_differ_goes_by_its_new_name(stopped):
    folder, job = stopped
    with pytest.raises(JobError, match="--may-differ: data.size is called data.image_size"):
        carry_out(job, folder, may_differ=["data.size"])


def test_other_data_under_the_same_name_are_refused(stopped):
    folder, job = stopped
    path = checkpoint_of(folder, 2) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="data set 'digits' of SHA-256 000000000000.*resume with the data it was made with"):
        carry_out(job, folder)


def test_a_finished_run_says_so_and_changes_nothing(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole("standalone"), folder)
    before = contents(folder)
    carry_out(tiny("standalone", checkpoint=ALL_CHECKPOINTS), folder)
    assert f"{folder}: already done; choose another --out to run it again" in capsys.readouterr().out and contents(folder) == before


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_in_use_is_refused(resume, stopped, tmp_path):
    folder, job = stopped
    folder = folder if resume == "auto" else tmp_path / "in use"
    folder.mkdir(exist_ok=True)
    with (folder / "LOCK").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        before = contents(folder)
        with pytest.raises(JobError, match="another run is at work in this folder|holds a run already") as refused:
            carry_out(job, folder, resume=resume)
        assert refused.value.exit_code == 2 and contents(folder) == before


def test_never_does_not_enter_a_folder_with_anything_in_it(stopped, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thoughts.txt").write_text("keep me")
    for folder in (stopped[0], tmp_path / "notes"):
        before = contents(folder)
        with pytest.raises(JobError, match="nothing is overwritten; choose another --out"):
            carry_out(stopped[1], folder, resume="never")
        assert contents(folder) == before


def test_the_record_of_a_finished_run_without_its_checkpoints_is_not_overwritten(stopped):
    folder, job = stopped
    (folder / "LATEST").unlink()
    shutil.rmtree(folder / "checkpoints")
    (folder / "STATUS").write_text("done\n")
    (folder / "job.toml").write_text("another job")
    before = contents(folder)
    with pytest.raises(JobError, match="holds a run already and nothing is overwritten"):
        carry_out(job, folder)
    assert contents(folder) == before


def test_a_place_without_a_checkpoint_is_said(stopped, tmp_path):
    with pytest.raises(JobError, match=f"--resume {tmp_path}: no checkpoint there; wanted a run folder with LATEST or a folder with manifest.json"):
        carry_out(stopped[1], tmp_path / "new", resume=tmp_path)
    assert not (tmp_path / "new").exists()


def test_without_a_folder_the_newest_unfinished_run_of_the_same_job_goes_on(stopped, whole, tmp_path, monkeypatch):
    folder, job = stopped
    monkeypatch.chdir(tmp_path)
    home = Path("runs", "tiny", f"20260101T000000Z-{job.digest()}")
    shutil.copytree(folder, home)
    assert carry_out(job, None) == home and not apart(outcome(home), outcome(whole("standalone")))
    other = carry_out(job, None)
    assert other != home and other.parent == home.parent and other.name.endswith(job.digest()), "a finished run was entered again"


@pytest.mark.parametrize("file", ["rank-0000.h5", "server.h5", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_checkpoint_is_named_with_an_earlier_one_that_works(file, damage, stopped, whole, tmp_path):
    folder, job = stopped
    path, earlier = checkpoint_of(folder, 2) / file, checkpoint_of(folder, 1)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:len(content) // 2] if damage == "truncated" else bytes([content[0] ^ 255]) + content[1:])
    before = contents(folder)
    with pytest.raises(CheckpointError) as refused:
        carry_out(job, folder)
    assert refused.value.exit_code == 5 and str(path) in str(refused.value) and f"--resume {earlier}" in str(refused.value)
    assert contents(folder) == before
    carry_out(job, folder, resume=earlier)
    assert not apart(outcome(folder), outcome(whole("standalone")))


def test_without_an_earlier_checkpoint_the_way_out_is_another_folder(stopped):
    folder, job = stopped
    shutil.rmtree(checkpoint_of(folder, 1))
    (checkpoint_of(folder, 2) / "server.h5").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no earlier checkpoint is left; start again with --resume never and another --out"):
        carry_out(job, folder)
    assert (carry_out(job, folder.parent / "again", resume="never") / "STATUS").read_text() == "done\n"


def test_a_way_out_that_there_is_not_is_not_named(stopped):
    """--resume auto is named where it would go on, and nowhere else."""
    folder, job = stopped
    with pytest.raises(JobError, match="choose another --out, or --resume auto to go on with it"):
        carry_out(job, folder, resume="never")
    carry_out(job, folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "LATEST").unlink()
    for resume in ("never", "auto"):
        with pytest.raises(JobError, match="choose another --out$"):
            carry_out(job, folder, resume=resume)


@pytest.mark.parametrize("damage", ["cut", "emptied", "gone", "no HDF5", "of another run", "a bit"])
def test_a_whole_checkpoint_goes_on_whatever_became_of_the_record(damage, stopped, whole, capsys):
    folder, job = stopped
    path, content = folder / "metrics.h5", (folder / "metrics.h5").read_bytes()
    path.unlink()
    if damage == "of another run":
        other = carry_out(tiny("standalone", federation={"clients": 3}), folder.parent / "other")
        shutil.copy(other / "metrics.h5", path)
    elif damage == "a bit":
        with h5py.File(whole("standalone") / "metrics.h5") as file:
            place = file["train/loss"].id.get_chunk_info(0).byte_offset
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1:])
    elif damage != "gone":
        path.write_bytes({"cut": content[:1000], "emptied": b"", "no HDF5": b"nothing of the kind"}[damage])
    left = path.read_bytes() if path.exists() else None
    carry_out(job, folder)
    assert "the figures of rounds 1 to 2 are lost, what was learned in them is not" in capsys.readouterr().err
    assert left is None or (folder / "metrics.h5.damaged").read_bytes() == left
    resumed, undisturbed_run = outcome(folder), outcome(whole("standalone"))
    assert not apart(replace(resumed, metrics={}), replace(undisturbed_run, metrics={}))
    assert resumed.metrics["rounds/round"].tolist() == [0, 1, 2] and resumed.metrics["evaluation/at"].tolist() == [2]
    assert resumed.metrics["train/loss"][2].tobytes() == undisturbed_run.metrics["train/loss"][2].tobytes()
    found = summary.summarise(folder)
    assert found["status"] == "done: without the figures of rounds 1 to 2, which were lost" and found["rounds"] == 3
    assert found["accuracy"]["generalization"] == summary.summarise(whole("standalone"))["accuracy"]["generalization"]


def test_what_the_report_says_of_a_damaged_record_works(stopped):
    folder, job = stopped
    (folder / "metrics.h5").write_bytes((folder / "metrics.h5").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="otherwise resume it: it sets that file aside and goes on from its last checkpoint, without these figures"):
        summary.summarise(folder)
    carry_out(job, folder)
    assert summary.summarise(folder)["rounds"] == 3
    (folder / "metrics.h5").write_bytes(b"")
    with pytest.raises(CheckpointError, match="the run is done and its checkpoints hold its models, but the figures are lost: repeat it with another --out"):
        summary.summarise(folder)
    assert revisit(folder)[1].rows == 3
    assert summary.summarise(carry_out(job, folder.parent / "repeated"))["rounds"] == 3


def test_the_damaged_record_of_another_folder_is_left_where_it_is(stopped, tmp_path):
    folder, job = stopped
    (folder / "metrics.h5").write_bytes(b"")
    before = contents(folder)
    carry_out(job, tmp_path / "new", resume=folder)
    assert contents(folder) == before and outcome(tmp_path / "new").metrics["rounds/round"].tolist() == [0, 1, 2]


def test_a_refusal_sets_nothing_aside(stopped):
    folder, _ = stopped
    (folder / "metrics.h5").write_bytes(b"")
    before = contents(folder)
    with pytest.raises(CheckpointError, match="its last round, 2, was round 2 of phase rounds; in this job that is behind its end"):
        carry_out(tiny("standalone", federation={"rounds": 1}, checkpoint=ALL_CHECKPOINTS), folder, may_differ=["federation.rounds"])
    assert contents(folder) == before


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"round-0", b"../../elsewhere\n"])
def test_what_latest_says_wrong_hides_no_checkpoint(text, stopped, whole):
    folder, job = stopped
    (folder / "LATEST").write_bytes(text)
    carry_out(job, folder)
    assert not apart(outcome(folder), outcome(whole("standalone")))


@pytest.mark.parametrize("file", ["STATUS", "job.toml", "environment.json", "LOCK"])
def test_what_else_lies_in_a_run_folder_may_be_damaged_too(file, stopped, whole):
    folder, job = stopped
    (folder / file).write_bytes(b"\xff\x00\xfe")
    carry_out(job, folder)
    assert not apart(outcome(folder), outcome(whole("standalone"))) and (folder / "STATUS").read_text() == "done\n"


@pytest.mark.parametrize("first", [True, False])
def test_evaluation_personal_may_differ(first, tmp_path):
    folder = carry_out(tiny("standalone", evaluation={"personal": first, "every": 1}, checkpoint=ALL_CHECKPOINTS), tmp_path / "whole")
    cut_off(folder, 2, tmp_path / "run")
    job = tiny("standalone", evaluation={"personal": not first, "every": 1}, checkpoint=ALL_CHECKPOINTS)
    carry_out(job, tmp_path / "run", may_differ=["evaluation.personal"])
    counts = outcome(tmp_path / "run").metrics["evaluation/personal_correct"]
    assert (counts >= 0).all((1, 2)).tolist() == [first, first, not first] and (counts < 0).all((1, 2)).tolist() == [not first, not first, first]
    assert (summary.summarise(tmp_path / "run")["accuracy"]["personal"]["mean"] is None) == first
    carry_out(job, cut_off(tmp_path / "run", 3, tmp_path / "again"))
    assert not apart(outcome(tmp_path / "again"), outcome(tmp_path / "run")), "and it can be resumed from there"


MAY_DIFFER = {                                                     # settings, and what a run that goes on with another value is told
    "run.seed": (3, ""), "data.validation_fraction": (0.3, ""), "data.test_fraction": (0.0, ""), "data.partition": ("iid", ""), "federation.rounds": (5, ""),
    "federation.dropout": (0.5, ""), "evaluation.every": (1, ""), "evaluation.flops": (True, ""), "checkpoint.every": (2, ""),
    "training.optimizer": ("adam", ""),
    "federation.clients": (4, "holds the states of 5 clients, this job has 4; federation.clients must not differ. Choose another --out"),
    "models.feature_size": (16, "What the models are made of must not differ: choose another --out"),
    "data.image_size": (12, "What the models are made of must not differ: choose another --out"),
    "models.names": (["cnn1", "mlp2"], "'body.conv1.bias' of client 0's model is missing, in this job its cnn1 has (16,)")}


@pytest.mark.parametrize("setting", MAY_DIFFER)
def test_whatever_may_differ_works_or_is_refused_with_the_reason(setting, stopped):
    folder, _ = stopped
    (section, key), (value, complaint) = setting.split("."), MAY_DIFFER[setting]
    sections = {"checkpoint": dict(ALL_CHECKPOINTS)}
    sections.setdefault(section, {})[key] = value
    job = tiny("standalone", **sections)
    before = contents(folder)
    if complaint:
        with pytest.raises(CheckpointError) as refused:
            carry_out(job, folder, may_differ=[setting])
        assert complaint in str(refused.value) and contents(folder) == before
    else:
        carry_out(job, folder, may_differ=[setting])
        found = summary.summarise(folder)
        validated = [value for value in found["accuracy"]["validation"]["per_client"] if value is not None]
        assert found["rounds"] == job.federation.rounds and all(0 <= value <= 100 for value in validated)


def in_the_first_layout(folder: Path) -> None:
    """The run folder as an earlier version left it: a plain metrics.h5, manifests that say neither phase nor round."""
    attributes, arrays = metrics.read(folder / "metrics.h5")
    (folder / "metrics.h5").unlink()
    with h5py.File(folder / "metrics.h5", "w") as file:
        file.attrs.update({name: value for name, value in attributes.items() if name != "series"})
        for name, column in arrays.items():
            file[name] = np.array(column, h5py.string_dtype()) if column.dtype == object else column
    for path in folder.glob("checkpoints/*/manifest.json"):
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in ("phase", "round")}))


def test_a_run_folder_of_an_earlier_version_goes_on(stopped, whole):
    folder, job = stopped
    in_the_first_layout(folder)
    assert summary.summarise(folder)["rounds"] == 3
    carry_out(job, folder)
    assert not apart(outcome(folder), outcome(whole("standalone")))


@pytest.mark.parametrize("small", [1 << 20, 0])
def test_a_run_whose_record_grows_by_files_ends_with_one(small, tmp_path, monkeypatch, whole):
    """Killed behind its last checkpoint, before it put the files together."""
    monkeypatch.setattr(metrics, "SMALL_BYTES", small)
    monkeypatch.setattr(metrics, "SHARE", 0.001)
    job = tiny("standalone", checkpoint=ALL_CHECKPOINTS)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Simulation, "_book_last_checkpoint", lambda self: (_ for _ in ()).throw(InterruptedError))
        carry_out(job, tmp_path / "run")
    assert len(metrics.find_beside(tmp_path / "run" / "metrics.h5")) == (0 if small else 2)
    assert summary.summarise(tmp_path / "run")["rounds"] == 3
    carry_out(job, tmp_path / "run")
    assert not apart(outcome(tmp_path / "run"), outcome(whole("standalone"))) and not metrics.find_beside(tmp_path / "run" / "metrics.h5")
