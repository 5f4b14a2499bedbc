"""The audit of a run: what overfitted models and copying generators give away is found out, and its figures, table, picture and refusals."""
import json
import shutil

import numpy as np
import pytest
import torch

from hpcfl import cli
from hpcfl.algorithms.fedvtc import FineTune
from hpcfl.analysis import audit, audit_generator
from hpcfl.analysis.audit_generator import Sampler
from hpcfl.analysis.audit_samples import draw_images, draw_replacements, find_unseen, match_classes, take_by_class
from hpcfl.data.shards import Scale, Shard
from hpcfl.errors import CheckpointError, JobError
from hpcfl.runs import revisit
from hpcfl.streams import Stream
from tests.support.tiny_runs import carry_out, tiny

CHECKPOINTS = {"every": 1, "keep": 9}
STREAM = Stream(0, "test")


def command(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, arguments)])
    return end.value.code


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """Clients that know their few digits by heart."""
    job = tiny("standalone", data={"fraction": 0.1, "partition": "iid", "public_fraction": 0.0}, models={"names": ["mlp2", "cnn1"], "feature_size": 32},
               federation={"clients": 2, "rounds": 2, "participation": 1.0}, training={"batch": 16, "epochs": 60, "lr": 0.2})
    return carry_out(job, tmp_path_factory.mktemp("audit") / "overfitted")


@pytest.fixture(scope="module")
def generating(tmp_path_factory):
    """A run with a generator, and a checkpoint of every round."""
    return carry_out(tiny("fedvtc", checkpoint=CHECKPOINTS), tmp_path_factory.mktemp("audit") / "generating")


@pytest.fixture(scope="module")
def mapping(tmp_path_factory):
    """A run whose generator makes maps of a common extractor and knows a loss of single images."""
    job = tiny("gefl_f", models={"names": ["cnn2_bn", "cnn1"]}, federation={"participation": 1.0, "rounds": 1}, data={"partition": "iid"},
               algorithm={"generator": "vtc", "warmup_rounds": 1, "generator_rounds": 1, "generator_epochs": 1, "latent": 4})
    return carry_out(job, tmp_path_factory.mktemp("audit") / "mapping")


@pytest.fixture(scope="module")
def found(overfitted, tmp_path_factory):
    return audit.analyse(overfitted, out=tmp_path_factory.mktemp("audit") / "out")


def copy_of(run, folder):
    """A run folder of one's own, without earlier audits."""
    return shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("audit*"))


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


def test_the_pool_holds_nothing_that_anybody_trained_on(generating):
    world, _ = revisit.revisit(generating)
    pool, trained = find_unseen(world), [*world.split.train, world.split.public]
    rest = world.corpus.train_images(np.setdiff1d(np.arange(len(world.corpus.train_labels)), np.concatenate(trained)))
    assert len(pool) > 1000 and sorted(image.numpy().tobytes() for image in pool.images) == sorted(image.tobytes() for image in rest)


def test_overfitted_models_are_found_out_by_their_losses(found):
    assert len(found["classifiers"]) == 2
    for row in found["classifiers"]:
        assert row["accuracy_percent"]["members"] == 100 and row["accuracy_percent"]["others"] < 90
        assert row["loss"]["auc"] > 0.65 and row["loss"]["auc_interval"][0] > max(0.55, row["loss"]["unseen_auc"])
        assert row["loss"]["members"] == row["loss"]["others"] > 50


def test_a_clients_model_is_asked_once_about_each_image(overfitted, tmp_path, monkeypatch):
    asked, model_of = [], audit.model_of

    def counted(*arguments):
        predict = model_of(*arguments)
        return lambda x: asked.append(len(x)) or predict(x)
    monkeypatch.setattr(audit, "model_of", counted)
    monkeypatch.setattr(audit, "reference_models", lambda *_: [])
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


def test_a_generator_is_measured_in_pixels_and_in_the_scattering_map(generating, tmp_path):
    generator = audit.analyse(generating, samples=12, out=tmp_path)["generator"]
    assert (generator["phase"], generator["space"], generator["samples"]) == ("finetune", "pixels", 120)
    assert list(generator["mnd"]) == ["pixels", "scattering"] and generator["fid"]["space"] == "scattering"
    for ratios in generator["mnd"].values():
        assert 0 < ratios["samples"]["ratio_mean"] < ratios["real"]["ratio_mean"] < 1.5, "a hardly trained generator draws nothing like a training image"
    assert 0 < generator["fid"]["held_out"] < generator["fid"]["samples"] and 60 < generator["fid"]["images"] <= 120
    for attack in ("nearest", "nearest_calibrated"):
        low, high = generator["attacks"][attack]["auc_interval"]
        assert low < 0.62 and high > 0.38
    assert "no loss of single images" in generator["attacks"]["loss"]["left_out"]


def copying(self, group, message, site, per_class):
    """The client's training images, over and over, in the place of samples."""
    shard = site.holdings[group.clients[0]].train
    images = self.problem.scale.to_unit(shard.pixels())
    has = torch.bincount(shard.labels, minlength=self.problem.classes) > 0
    rows = [images[shard.labels == y] if has[y] else images[:1] for y in range(self.problem.classes)]
    return torch.stack([row[torch.arange(per_class) % len(row)] for row in rows]), has


def test_a_generator_that_copies_a_clients_images_is_found_out(generating, tmp_path, monkeypatch):
    monkeypatch.setattr(FineTune, "draw", copying)
    generator = audit.analyse(generating, client=0, samples=36, out=tmp_path)["generator"]
    assert generator["attacks"]["nearest"]["auc"] > 0.99 and generator["attacks"]["nearest"]["tpr_at_1_percent_fpr"] > 0.9
    assert generator["attacks"]["nearest_calibrated"]["auc"] > 0.99 and generator["attacks"]["nearest"]["unseen_auc"] < 0.7
    assert generator["samples_nearer_than_any_held_out_percent"] == 100
    assert all(ratios["samples"]["ratio_mean"] > 1e4 > 2 > ratios["real"]["ratio_mean"] for ratios in generator["mnd"].values())
    assert generator["fid"]["samples"] < generator["fid"]["held_out"]
    assert all(pair["l2_distance"] == 0 for pair in generator["closest_pairs"]["samples"])


def test_closest_pairs_name_training_images_of_the_audited_client(generating, tmp_path):
    pairs = audit.analyse(generating, client=2, samples=5, out=tmp_path)["generator"]["closest_pairs"]
    world, _ = revisit.revisit(generating)
    for side in pairs.values():
        assert len(side) > 1 and [pair["l2_distance"] for pair in side] == sorted(pair["l2_distance"] for pair in side)
        for pair in side:
            assert pair["training_index"] in world.split.train[2] and world.corpus.train_labels[pair["training_index"]] == pair["class"]


def test_a_generator_of_maps_is_measured_in_maps_alone_and_attacked_by_its_loss(mapping, tmp_path):
    found = audit.analyse(mapping, samples=6, out=tmp_path)
    generator = found["generator"]
    assert generator["space"] == generator["fid"]["space"] == "maps" and list(generator["mnd"]) == ["maps"]
    assert 0 < generator["attacks"]["loss"]["auc"] < 1 and generator["attacks"]["loss"]["unseen_auc"] is not None
    assert "distances are L2 in maps" in audit.render(found) and (tmp_path / "audit-pairs.png").is_file()


def test_losses_are_those_of_the_step_that_has_them(mapping):
    world, state = revisit.revisit(mapping)
    drawing, judging = (Sampler.find(world, state, 1, verb) for verb in ("draw", "generator_losses"))
    shard = world.holdings[1].train
    assert drawing.group.clients == (1,) and type(drawing.step) is not type(judging.step)
    costs = judging.losses(shard)
    assert costs.shape == (len(shard),) and costs.dtype == torch.float64 and bool(torch.isfinite(costs).all())
    assert drawing.seen(shard).shape[1:] == drawing.draw(1)[0].shape[2:]


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


def test_the_frechet_distance_takes_samples_in_the_members_class_mix():
    labels = torch.arange(3).repeat_interleave(10)
    features = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)) + 50 * labels[:, None]
    members = torch.tensor([0] * 40 + [2] * 20)
    train = torch.randn(60, 2, generator=torch.Generator().manual_seed(1)) + 50 * members[:, None]
    found = audit_generator._fid(train, features, features, members, labels)
    assert found["images"] == 15 and found["samples"] == found["held_out"] < 20, "10 of class 0, 5 of class 2, none of class 1"
    assert "take more --samples" in audit_generator._fid(train, features[:1], features[:1], members, labels[:1])["left_out"]
