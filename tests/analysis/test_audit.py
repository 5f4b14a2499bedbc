"""The audit of a run: what overfitted models give away is found out; its figures, table, picture and refusals."""
import json
import shutil

import pytest

from hpcfl import cli
from hpcfl.analysis import audit
from hpcfl.errors import CheckpointError, JobError
from hpcfl.runs import revisit
from tests.support.tiny_runs import carry_out, tiny


def command(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, arguments)])
    return end.value.code


@pytest.fixture(scope="module")
def found(overfitted, tmp_path_factory):
    return audit.analyse(overfitted, out=tmp_path_factory.mktemp("audit") / "out")


def copy_of(run, folder):
    """A run folder of one's own, without earlier audits."""
    return shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("audit*"))


def test_overfitted_models_are_found_out_by_their_losses(found):
    assert len(found["classifiers"]) == 2
    for row in found["classifiers"]:
        assert row["accuracy_percent"]["members"] == 100 and row["accuracy_percent"]["others"] < 90
        assert row["loss"]["auc"] > 0.65 and row["loss"]["auc_interval"][0] > max(0.55, row["loss"]["unseen_auc"])
        assert row["loss"]["members"] == row["loss"]["others"] > 50


def test_a_clients_model_is_asked_once_about_each_image(overfitted, tmp_path, monkeypatch):
    asked, bind_model = [], audit.bind_model

    def counted(*arguments):
        predict = bind_model(*arguments)
        return lambda x: asked.append(len(x)) or predict(x)
    monkeypatch.setattr(audit, "bind_model", counted)
    monkeypatch.setattr(audit, "train_references", lambda *_: [])
    loss = audit.analyse(overfitted, client=0, out=tmp_path)["classifiers"][0]["loss"]
    control = sum(asked) - loss["members"] - loss["others"]
    assert 0 <= control <= loss["others"]


def test_reference_models_calibrate_the_attack(found):
    for row in found["classifiers"]:
        assert row["calibrated"]["auc_interval"][0] > 0.5 and row["calibrated"]["unseen_auc"] is None
        assert row["calibrated"]["reference_models"] == 4 and row["calibrated"]["reference_epochs"] == 50
        assert row["calibrated"]["reference_images"] == pytest.approx(row["loss"]["members"], rel=0.1)


def test_a_model_that_never_trained_gives_nothing_away(overfitted, tmp_path, monkeypatch):
    world, state = revisit.revisit(overfitted)
    monkeypatch.setattr(audit, "revisit", lambda run: (world, type(state)(state.server, tuple(world.join()), state.received, state.rows)))
    for row in audit.analyse(overfitted, out=tmp_path)["classifiers"]:
        assert abs(row["loss"]["auc"] - row["loss"]["unseen_auc"]) < 0.12 and row["loss"]["tpr_at_1_percent_fpr"] < 0.1


def test_a_run_without_a_generator_leaves_that_part_out_and_says_so(found, overfitted):
    assert "standalone has no generator" in found["generator"]["left_out"]
    assert "Generator left out: standalone has no generator" in audit.render(found)
    assert [path.rpartition("/")[2] for path in found["files"]] == ["audit.json"]


def test_the_command_prints_a_table_and_writes_into_the_runs_figures(overfitted, tmp_path, capsys):
    run = copy_of(overfitted, tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert command("audit", run, "--client", 1) == 0
    text = capsys.readouterr().out
    heading, row = (next(line for line in text.splitlines() if line.startswith(word)) for word in ("client ", "1 "))
    assert "training images of client 1" in text and row.split()[1] == "cnn1" and "\n0 " not in text
    members = row.split()[2]
    assert heading.index("members") + len("members") == row.index(members) + len(members), "numbers end under the end of their heading"
    assert "with fewer than 100 others, the rate without any" in text
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {run / "figures" / "audit.json"} and all(after[path] == before[path] for path in before)


def test_json_has_everything_with_units_in_its_names(generating, tmp_path, capsys):
    assert command("audit", generating, "--samples", 8, "--out", tmp_path / "new" / "out", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["hpcfl_audit", "run", "algorithm", "data", "rounds", "client", "pool_images", "classifiers", "generator", "files"]
    assert printed["files"] == [str(tmp_path / "new" / "out" / name) for name in ("audit.json", "audit-pairs.png")]
    assert json.loads((tmp_path / "new" / "out" / "audit.json").read_text()) == {key: printed[key] for key in printed if key != "files"}
    assert (tmp_path / "new" / "out" / "audit-pairs.png").read_bytes().startswith(b"\x89PNG")
    assert list(printed["generator"]) == ["client", "phase", "space", "samples_per_class", "samples", "members", "attacks", "mnd", "fid",
                                          "samples_nearer_than_any_held_out_percent", "closest_pairs"]


def test_a_generator_of_maps_is_measured_in_maps_alone_and_attacked_by_its_loss(mapping, tmp_path):
    found = audit.analyse(mapping, samples=6, out=tmp_path)
    generator = found["generator"]
    assert generator["space"] == generator["fid"]["space"] == "maps" and list(generator["mnd"]) == ["maps"]
    assert 0 < generator["attacks"]["loss"]["auc"] < 1 and generator["attacks"]["loss"]["unseen_auc"] is not None
    assert "distances are L2 in maps" in audit.render(found) and (tmp_path / "audit-pairs.png").is_file()


def test_without_images_that_nobody_trained_on_calibration_is_left_out_with_the_reason(tmp_path):
    job = tiny("gefl", data={"fraction": 1.0, "partition": "iid", "public_fraction": 0.0, "validation_fraction": 0.0, "test_fraction": 0.0},
               models={"names": ["mlp2"]}, federation={"clients": 2, "rounds": 1, "participation": 1.0}, training={"batch": 64},
               algorithm={"generator": "vtc", "generator_rounds": 1, "generator_epochs": 1, "latent": 4})
    found = audit.analyse(carry_out(job, tmp_path / "run"), samples=4)
    row, generator = found["classifiers"][0], found["generator"]
    assert found["pool_images"] == 0 and row["loss"]["unseen_auc"] is None and generator["attacks"]["nearest"]["unseen_auc"] is None
    assert "nobody trained on 0 images" in row["calibrated"]["left_out"] and "data.fraction below 1" in row["calibrated"]["left_out"]
    assert "data.fraction below 1" in generator["attacks"]["nearest_calibrated"]["left_out"] and generator["mnd"]["pixels"]["real"] is None
    text = audit.render(found)
    assert text.count("calibrated attack left out: nobody trained on 0 images") == 1 and "calibrated by real images left out: too few images of a class" in text


def test_a_run_that_is_not_finished_is_audited_at_its_last_checkpoint(generating, tmp_path):
    run = copy_of(generating, tmp_path)
    (run / "LATEST").write_text("round-000002\n")
    found = audit.analyse(run, samples=3)
    assert found["rounds"] == 2 and found["generator"]["phase"] == "rounds" and len(found["classifiers"]) == 5


def test_the_same_audit_again_gives_the_same_figures(generating, tmp_path):
    first = audit.analyse(generating, client=1, samples=6, out=tmp_path)
    picture = (tmp_path / "audit-pairs.png").read_bytes()
    assert audit.analyse(generating, client=1, samples=6, out=tmp_path) == first and (tmp_path / "audit-pairs.png").read_bytes() == picture


def test_a_picture_of_an_earlier_audit_goes_when_there_is_none_now(generating, overfitted, tmp_path):
    audit.analyse(generating, client=1, samples=3, out=tmp_path)
    assert (tmp_path / "audit-pairs.png").is_file()
    audit.analyse(overfitted, client=1, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.json"]


@pytest.mark.parametrize(("name", "content"), [("audit.json", "{}"), ("audit.json", "my own notes"), ("audit.json", "[1]"), ("audit-pairs.png", "a holiday")])
def test_files_of_somebody_else_are_not_overwritten(name, content, overfitted, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(JobError, match=f"{name}: was not written by hpcfl audit"):
        audit.analyse(overfitted, out=tmp_path)
    assert (tmp_path / name).read_text() == content and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_is_refused(overfitted, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="cannot write the audit: .* name another folder with --out"):
        audit.analyse(overfitted, client=0, out=tmp_path / "file" / "out")


def test_clients_samples_runs_and_checkpoints_that_are_not_there_are_named(overfitted, tmp_path, capsys):
    (tmp_path / "begun").mkdir()
    shutil.copy(overfitted / "job.toml", tmp_path / "begun")
    wrong, none_yet = JobError.exit_code, CheckpointError.exit_code
    for arguments, code, said in [((overfitted, "--client", 2), wrong, "got --client 2, but"), ((overfitted, "--client", -1), wrong, "clients 0 to 1"),
                                  ((overfitted, "--samples", 0), wrong, "got --samples 0"), ((tmp_path,), wrong, "has no job.toml"),
                                  ((tmp_path / "begun",), none_yet, "has no checkpoint yet")]:
        assert command("audit", *arguments) == code
        error = capsys.readouterr().err
        assert error.startswith("hpcfl: ") and said in error and "Traceback" not in error
    assert not (overfitted / "figures" / "audit.json").exists()
