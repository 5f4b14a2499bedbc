"""A checkpoint counts when it is whole, belongs to its job and its version, and the newest and the best are kept."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from hpcfl import __version__
from hpcfl.errors import CheckpointError
from hpcfl.runs import checkpoint, revisit
from hpcfl.training.group import Group
from tests.support.faults import files, resumes_to_the_same_end, stopped_at
from tests.support.tiny_runs import carry_out, checkpoint_of, left_half_written, outcome, started, tiny


def of_another(folder: Path, **written: object) -> None:
    """A run folder whose newest checkpoint says something else of itself."""
    path = checkpoint_of(folder, 4) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | written))
    (folder / "STATUS").write_text("running\n")


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_checkpoint_of_another_format_is_refused_with_both_versions(ranks, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[2], folder)
    of_another(folder, hpcfl="7.8.9", format=99, ranks="in words", files=[])
    before = {path: content for path, content in files(folder).items() if path.parent.name != "log" and path.name != "LOCK"}
    with started(tmp_path, "run", whole[1], "--out", folder, ranks=ranks) as job:
        assert job.ends() == 5, job.text()
    assert job.text().count(f"{checkpoint_of(folder, 4)}: written by hpcfl 7.8.9 in checkpoint format 99, this is hpcfl {__version__} with format "
                            f"{checkpoint.CHECKPOINT_FORMAT}; nothing was changed. Resume with the version that wrote it\n") == 1, job.text()
    assert "--may-differ" not in job.text() and before.items() <= files(folder).items() and not left_half_written(folder)


def test_a_checkpoint_of_another_version_is_refused_unless_that_may_be(whole, hpcfl, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[2], folder)
    of_another(folder, hpcfl="7.8.9")
    code, text = hpcfl("run", whole[1], "--out", folder)
    assert code == 5 and f"written by hpcfl 7.8.9 in checkpoint format {checkpoint.CHECKPOINT_FORMAT}, this is hpcfl {__version__} with" in text
    assert "allow it with --may-differ hpcfl\n" in text
    assert revisit.revisit(folder)[1].rows == 4, "to look at it is allowed"
    code, text = hpcfl("run", whole[1], "--out", folder, "--may-differ", "hpcfl")
    assert code == 0 and "resumed after round 4 of 4" in text


def test_a_truncated_checkpoint_is_named_with_an_earlier_one(whole, hpcfl, tmp_path):
    shutil.copytree(whole[2], tmp_path / "run")
    (tmp_path / "run" / "STATUS").write_text("running\n")
    file = checkpoint_of(tmp_path / "run", 4) / "rank-0000.h5"
    os.truncate(file, file.stat().st_size // 2)
    code, text = hpcfl("run", whole[1], "--out", tmp_path / "run")
    assert code == 5 and f"{file}: is damaged or truncated" in text and f"--resume {checkpoint_of(tmp_path / 'run', 3)}" in text


def test_a_gpu_without_memory_for_a_checkpoint_is_not_a_full_disk(whole, hpcfl, tmp_path, monkeypatch):
    def no_memory(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    stopped_at(whole, 1, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Group, "states", no_memory)
        code, text = hpcfl("run", whole[1], "--out", tmp_path / "run")
    assert code == 1 and "CUDA out of memory" in text and "Free space" not in text and "could not be written" not in text
    assert (tmp_path / "run" / "LATEST").read_text() == "round-000001\n" and not left_half_written(tmp_path)
    resumes_to_the_same_end(whole, tmp_path / "run")


@pytest.mark.parametrize(("rounds", "place"), [(4, "round 4 of phase rounds"), (2, "behind its end")])
def test_a_checkpoint_that_lies_elsewhere_in_the_plan_is_refused(rounds, place, tmp_path):
    folder = carry_out(tiny("fedvtc", checkpoint={"every": 1, "keep": 9}), tmp_path / "run")
    changed = tiny("fedvtc", federation={"rounds": rounds}, checkpoint={"every": 1, "keep": 9})
    with pytest.raises(CheckpointError, match=f"its last round, 4, was round 1 of phase finetune; in this job that is {place}"):
        carry_out(changed, folder, may_differ=["federation.rounds"])
    carry_out(changed, tmp_path / "new", resume=checkpoint_of(folder, 2), may_differ=["federation.rounds"])
    assert outcome(tmp_path / "new").manifest["rows"] == rounds + 1


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    folder = carry_out(tiny("standalone", federation={"rounds": 6}, evaluation={"every": 1}, checkpoint={"every": 1, "keep": 100}), tmp_path / "all")
    scores = {path.name: json.loads((path / "manifest.json").read_text())["validation_accuracy"] for path in (folder / "checkpoints").iterdir()}
    best = max(scores, key=lambda name: (scores[name], name))
    folder = carry_out(tiny("standalone", federation={"rounds": 6}, evaluation={"every": 1}, checkpoint={"every": 1, "keep": 2}), tmp_path / "few")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {best, "round-000005", "round-000006"}


def test_a_checkpoint_that_was_not_evaluated_has_no_accuracy(tmp_path):
    folder = carry_out(tiny("standalone", checkpoint={"every": 1, "keep": 100}), tmp_path / "run")
    accuracies = [json.loads((checkpoint_of(folder, rows) / "manifest.json").read_text())["validation_accuracy"] for rows in (1, 2, 3)]
    assert accuracies[0] is None and accuracies[1] is not None and accuracies[2] is not None
