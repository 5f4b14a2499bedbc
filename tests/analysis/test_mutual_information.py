"""Mutual information: known answers of the estimator, models of equal size made of one global model, and the analysis of a run."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hpcfl import tree
from hpcfl.algorithms import CONFIGS
from hpcfl.analysis import mutual_information
from hpcfl.analysis.mutual_information import ceiling, compare, entropy, find_contenders, nearness, prune, sameness
from hpcfl.data.shards import Scale, Shard
from hpcfl.errors import CheckpointError, JobError, NonFiniteError
from hpcfl.federation.world import World
from hpcfl.models import zoo
from hpcfl.models.sizes import Sizes
from hpcfl.runs import checkpoint
from hpcfl.settings.job import Models, load
from hpcfl.training import evaluate
from hpcfl.wire.communicator import Alone, Communicator
from tests.support.tiny_runs import carry_out, tiny

SHAPE, CLASSES = (1, 8, 8), 4


def bits(one, other, **settings):
    """Mutual information of two variables, labels (N,) or points (N, ...)."""
    return mutual_information.information(*(each if each.dim() == 2 and len(each) == each.shape[1] else near(each)
                                          for each in (one, other)), **settings)["bits"]


def near(variable):
    return nearness(variable) if variable.is_floating_point() else sameness(variable)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(count, rho, dimensions=1, seed=0):
    x = drawn(count, dimensions, seed=seed)
    return x, rho * x + math.sqrt(1 - rho ** 2) * drawn(count, dimensions, seed=seed + 1000)


def channel(count, classes, error):
    """Labels (n,) and what a symmetric channel makes of them, in exact proportions: each wrong class equally often."""
    joint = torch.full((classes, classes), error / (classes - 1)).fill_diagonal_(1 - error) / classes
    counts = (joint * count).round().long().flatten()
    pairs = torch.arange(classes ** 2).repeat_interleave(counts)
    return pairs // classes, pairs % classes


def channel_bits(classes, error):
    return math.log2(classes) + (1 - error) * math.log2(1 - error) + error * math.log2(error / (classes - 1))


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_an_output_that_is_the_label_has_all_its_bits(classes):
    labels = torch.arange(300) % classes
    assert bits(labels, torch.eye(classes)[labels]) == pytest.approx(math.log2(classes), abs=1e-9)


def test_an_output_that_is_the_label_of_unequal_classes_has_their_entropy():
    labels = torch.tensor([0] * 90 + [1] * 7 + [2] * 53)
    assert bits(labels, torch.eye(3)[labels]) == pytest.approx(entropy(labels), abs=1e-9)


def test_the_entropy_of_labels_is_shannons():
    assert entropy(torch.tensor([0, 0, 1, 2])) == pytest.approx(1.5)


def test_points_that_say_nothing_of_the_labels_have_no_bits():
    assert abs(bits(torch.arange(1000) % 10, drawn(1000, 10))) < 0.05


def test_an_output_that_is_always_the_same_has_no_bits():
    assert bits(torch.arange(200) % 4, torch.full((200, 6), 0.1)) == pytest.approx(0, abs=1e-9)
    assert bits(drawn(200, 5), torch.full((200, 6), 0.1)) == pytest.approx(0, abs=1e-9)


def test_points_independent_of_points_of_other_dimension_have_no_bits():
    found = [bits(drawn(600, 100, seed=seed), drawn(600, 3, seed=seed + 50)) for seed in range(10)]
    assert abs(sum(found) / 10) < 0.06


@pytest.mark.parametrize("classes, error", [(2, 0.1), (4, 0.3), (5, 0.6)])
def test_a_noisy_channel_onto_separate_points_equals_the_discrete_formula(classes, error):
    sent, received = channel(1200, classes, error)
    assert bits(sent, 7 * torch.eye(classes)[received]) == pytest.approx(channel_bits(classes, error), abs=1e-9)
    assert bits(sent, received) == pytest.approx(channel_bits(classes, error), abs=1e-9)


def test_a_noisy_channel_onto_clouds_is_close_to_the_discrete_formula():
    sent, received = channel(1200, 4, 0.3)
    assert bits(sent, 20 * torch.eye(4)[received] + drawn(1200, 4)) == pytest.approx(channel_bits(4, 0.3), abs=0.08)


@pytest.mark.parametrize("spread", [2, 3, 4])
def test_clouds_that_overlap_have_the_bits_that_bayes_rule_leaves(spread):
    labels = torch.arange(2000) % 10
    centres = spread * torch.eye(10)
    points = centres[labels] + drawn(2000, 10)
    posterior = torch.log_softmax(-(points[:, None] - centres).square().sum(2) / 2, dim=1)
    truth = math.log2(10) + float(posterior[torch.arange(2000), labels].mean()) / math.log(2)
    assert bits(labels, points) == pytest.approx(truth, rel=0.08)


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
def test_two_correlated_gaussians_have_the_closed_form(rho):
    found = [bits(*correlated(800, rho, seed=seed)) for seed in range(4)]
    assert sum(found) / 4 == pytest.approx(-math.log2(1 - rho ** 2) / 2, abs=0.15)


def test_several_pairs_of_gaussians_have_the_sum_of_their_bits():
    found = [bits(*correlated(800, 0.6, dimensions=2, seed=seed)) for seed in range(4)]
    assert sum(found) / 4 == pytest.approx(-math.log2(1 - 0.36), abs=0.1)


def test_points_about_themselves_reach_the_ceiling_and_nothing_exceeds_it():
    points = drawn(500, 6)
    assert bits(points, points) == pytest.approx(ceiling(500), abs=1e-9)
    assert bits(points, points + 0.05 * drawn(500, 6, seed=1)) < ceiling(500)


def test_samples_in_another_order_have_the_same_bits():
    labels, (x, t), order = torch.arange(300) % 5, correlated(300, 0.8, 4), torch.randperm(300, generator=torch.Generator().manual_seed(3))
    assert bits(x[order], t[order]) == pytest.approx(bits(x, t), abs=1e-12)
    assert bits(labels[order], t[order]) == pytest.approx(bits(labels, t), abs=1e-12)


def test_bits_do_not_depend_on_which_variable_comes_first():
    x, t = correlated(300, 0.8, 4)
    assert bits(x, t) == pytest.approx(bits(t, x), abs=1e-12)


def test_points_shifted_turned_and_scaled_have_the_same_bits():
    labels, (x, t) = torch.arange(300) % 5, correlated(300, 0.8, 4)
    turned = 250 * t.double() @ torch.linalg.qr(drawn(4, 4, seed=9).double())[0] + 7
    assert bits(x, turned) == pytest.approx(bits(x, t), abs=1e-12)
    assert bits(labels, turned) == pytest.approx(bits(labels, t), abs=1e-12)


def test_the_names_of_the_classes_do_not_matter():
    labels, points = torch.arange(300) % 3, drawn(300, 4)
    assert bits(labels, points) == bits(17 - 5 * labels, points)


def test_noise_on_an_output_takes_bits_away():
    labels = torch.arange(600) % 6
    found = [bits(labels, 4 * torch.eye(6)[labels] + noise * drawn(600, 6)) for noise in (0.5, 1, 2, 4, 16)]
    assert found == sorted(found, reverse=True) and found[0] > 2.5 and found[-1] < 0.15


def test_the_error_is_about_what_repetitions_differ_by():
    labels, centres = torch.arange(400) % 4, 2 * torch.eye(4)
    found = [mutual_information.information(sameness(labels), nearness(centres[labels] + drawn(400, 4, seed=seed))) for seed in range(30)]
    spread = torch.tensor([each["bits"] for each in found]).std()
    assert 0.5 < sum(each["error"] for each in found) / 30 / spread < 2


def test_nearness_counts_what_is_strictly_nearer():
    points = torch.tensor([[0.0], [1.0], [1.0], [3.0]])
    assert nearness(points).tolist() == [[0, 1, 1, 3], [2, 0, 0, 3], [2, 0, 0, 3], [3, 1, 1, 0]]


def test_equal_points_far_from_zero_are_at_no_distance():
    points = (drawn(40, 30) + 1e4).repeat(5, 1)
    assert bool(((nearness(points) == 0).sum(1) == 5).all())


@pytest.mark.parametrize("labels", [[0] * 20 + [1] * 3, [0, 0, 0]])
def test_a_class_of_too_few_images_is_refused(labels):
    labels = torch.tensor(labels)
    with pytest.raises(JobError, match="take more images"):
        bits(labels, drawn(len(labels), 2))


def built(name):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return zoo.build(name, SHAPE, CLASSES, features=8)


def images(count=80):
    return Shard(drawn(count, *SHAPE), torch.arange(count) % CLASSES, Scale())


def problem(*sizes, name="cnn5"):
    """What `contenders` reads of a Problem: clients of these size classes, and models."""
    models = Models(names=(name,), sizes=sizes)
    return SimpleNamespace(sizes=Sizes(models, len(sizes), 0, lambda architecture: 0), structure=built,
                           common_base=lambda: name, job=SimpleNamespace(algorithm_name="fedavg"))


def parameters(module, state):
    return sum(int(state[path].count_nonzero()) for path, _ in module.named_parameters())


@pytest.mark.parametrize("name", ["cnn5_bn", "resnet8", "mlp3"])
def test_a_pruned_model_has_as_many_parameters_as_the_small_one_and_they_are_the_largest(name):
    full, small = built(name), built(f"{name}@0.5")
    whole = {path: drawn(*leaf.shape) if leaf.is_floating_point() else leaf for path, leaf in full.state_dict().items()}
    pruned = prune(whole, full, small)
    assert parameters(full, pruned) == sum(parameter.numel() for parameter in small.parameters())
    weights = [path for path, parameter in full.named_parameters() if parameter.dim() > 1]
    kept = min(float(pruned[path][pruned[path] != 0].abs().min()) for path in weights if pruned[path].count_nonzero())
    dropped = max(float(whole[path][pruned[path] == 0].abs().max()) for path in weights if bool((pruned[path] == 0).any()))
    assert kept >= dropped
    assert tree.equal({path: leaf for path, leaf in whole.items() if path not in weights}, {path: leaf for path, leaf in pruned.items() if path not in weights})


def test_pruning_keeps_the_model_it_was_given():
    full = built("cnn5")
    before = tree.clone(full.state_dict())
    prune(full.state_dict(), full, built("cnn5@0.5"))
    assert tree.equal(before, full.state_dict())


def test_a_size_of_which_biases_alone_would_be_too_many_is_refused():
    full, small = nn.Linear(2, 50), nn.Linear(2, 5)
    with pytest.raises(JobError, match="50 biases and norms"):
        prune(full.state_dict(), full, small)


def test_each_smaller_architecture_has_its_models_of_equal_size():
    whole, small = (built(name).state_dict() for name in ("cnn5", "cnn5@0.75"))
    found = find_contenders(tree.join(**{"global": whole, "small/cnn5@0.75": small}), problem(0, 1, 1))
    assert list(found) == ["full", "convolved cnn5@0.75", "pruned to cnn5@0.75", "sliced cnn5@0.75"]
    rows = compare(found, built, images())
    assert len({row["parameters"] for row in rows[1:]}) == 1 and rows[0]["parameters"] > rows[1]["parameters"]


def test_without_filters_the_convolved_model_is_left_out():
    found = find_contenders(tree.join(**{"global": built("cnn5").state_dict()}), problem(0, 1, 2))
    assert list(found) == ["full", "pruned to cnn5@0.5625", "sliced cnn5@0.5625", "pruned to cnn5@0.75", "sliced cnn5@0.75"]


def test_a_sliced_model_has_the_leading_channels():
    whole = built("cnn5").state_dict()
    sliced = find_contenders(tree.join(**{"global": whole}), problem(1))["sliced cnn5@0.75"][1]
    assert torch.equal(sliced["body.conv1.weight"], whole["body.conv1.weight"][:12])
    assert torch.equal(sliced["body.conv2.weight"], whole["body.conv2.weight"][:24, :12])


def test_a_server_without_a_global_model_is_refused():
    with pytest.raises(JobError, match="'fedavg' keeps no global model"):
        find_contenders({"model/weight": torch.zeros(3)}, problem(0, 1))


class Reader(nn.Module):
    """Reads the label out of the image, or its noise, as the weight says."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def features(self, x):
        """(B, 1, 8, 8) -> (B, 8)."""
        return x[:, 0, 1] * self.weight[1]

    def forward(self, x):
        """(B, 1, 8, 8) -> (B, 4)."""
        return x[:, 0, 0, :CLASSES] * self.weight[0] + self.features(x)[:, :CLASSES]


def marked():
    """Images whose first row is their label and whose second is noise."""
    pixels, labels = torch.zeros(200, *SHAPE), torch.arange(200) % CLASSES
    pixels[:, 0, 0, :CLASSES], pixels[:, 0, 1] = torch.eye(CLASSES)[labels], drawn(200, 8)
    return Shard(pixels, labels, Scale())


def test_a_model_that_reads_labels_has_their_bits_and_one_that_reads_noise_those_of_the_image():
    weights = {"labels": [1.0, 0.0], "noise": [0.0, 1.0], "nothing": [0.0, 0.0]}
    rows = compare({name: ("any", {"weight": torch.tensor(pair)}) for name, pair in weights.items()}, lambda architecture: Reader(), marked())
    labels, noise, nothing = rows
    assert labels["labels"]["bits"] == pytest.approx(2, abs=1e-6) and labels["accuracy"] == 100 and labels["parameters"] == 1
    assert abs(noise["labels"]["bits"]) < 0.2 and noise["images"]["bits"] > labels["images"]["bits"] > 0
    assert nothing["labels"]["bits"] == nothing["images"]["bits"] == pytest.approx(0, abs=1e-9) and nothing["parameters"] == 0


def test_features_may_say_something_else_than_logits():
    model = {"reader": ("any", {"weight": torch.tensor([9.0, 0.1])})}
    on_logits, on_features = (compare(model, lambda architecture: Reader(), marked(), output)[0] for output in ("logits", "features"))
    assert on_logits["labels"]["bits"] > 1.8 and abs(on_features["labels"]["bits"]) < 0.2
    assert on_logits["accuracy"] == on_features["accuracy"] == 100


@pytest.mark.parametrize("output, times", [("logits", 1), ("features", 2)])
def test_a_model_is_asked_once_for_each_thing_that_is_wanted_of_it(output, times, monkeypatch):
    asked, in_batches = [], evaluate.apply_in_batches
    monkeypatch.setattr(evaluate, "apply_in_batches", lambda *arguments: asked.append(1) or in_batches(*arguments))
    compare({"both": ("any", {"weight": torch.tensor([1.0, 0.0])})}, lambda architecture: Reader(), marked(), output)
    assert len(asked) == times


def test_an_output_that_does_not_exist_is_refused():
    with pytest.raises(JobError, match="'maps'; wanted one of logits, features"):
        compare({}, built, images(), "maps")


def test_a_model_that_gives_no_numbers_is_named():
    with pytest.raises(NonFiniteError, match="model 'broken'"):
        compare({"broken": ("any", {"weight": torch.tensor([math.nan, 1.0])})}, lambda architecture: Reader(), marked())


def tiny_run(name, folder, **settings):
    return carry_out(tiny(name, models={"names": ["cnn5"], "sizes": [0, 1]}, data={"fraction": 0.5}, **settings), folder / name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a global model and two sizes."""
    return tiny_run("heterofl", tmp_path_factory.mktemp("information"))


@pytest.fixture(scope="module")
def convolving(tmp_path_factory):
    """The same of a method whose server has filters."""
    quick = {"server_epochs": 2, "filter_epochs": 1, "first_epochs": 1, "server_finetune": 0, "aggregation_epochs": 1}
    return tiny_run("fedconv", tmp_path_factory.mktemp("information"), algorithm=quick)


def test_a_run_with_filters_is_compared_with_what_they_make_of_the_global_model(convolving):
    before = {path: path.read_bytes() for path in convolving.rglob("*") if path.is_file()}
    found = mutual_information.analyse(convolving, images=120)
    assert [row["model"] for row in found["models"]] == ["full", "convolved cnn5@0.75", "pruned to cnn5@0.75", "sliced cnn5@0.75"]
    assert len({row["parameters"] for row in found["models"][1:]}) == 1
    assert before == {path: path.read_bytes() for path in convolving.rglob("*") if path.is_file()}


def test_the_models_compared_are_those_that_the_next_round_begins_with(convolving):
    world = World(load(convolving / "job.toml", CONFIGS), Communicator(Alone()), torch.device("cpu"))
    state = checkpoint.load(convolving, world)
    opened = mutual_information.open_round(world, state)
    whole, small = tree.part(opened.server, "global"), tree.part(opened.server, "small/cnn5@0.75")
    compress = world.plan[0].steps[0]
    filtered = compress.filtered("cnn5", "cnn5@0.75")
    made = evaluate.bind(filtered, filtered.derive_state(whole) | tree.part(opened.server, "filters/cnn5@0.75"), "weights")()
    assert made.keys() == small.keys()
    assert all(torch.equal(made[path], small[path]) for path, _ in compress.problem.structure("cnn5@0.75").named_parameters())
    assert not tree.equal(whole, tree.part(state.server, "global")) and opened.rows == state.rows


def test_a_run_is_analysed_on_its_official_test_images(run):
    found = mutual_information.analyse(run, images=150)
    assert found["images"] == 150 and found["rounds"] == 3 and found["output"] == "logits"
    assert [row["model"] for row in found["models"]] == ["full", "pruned to cnn5@0.75", "sliced cnn5@0.75"]
    assert 3.2 < found["label_bits"] <= math.log2(10) and found["ceiling_bits"] == ceiling(150)
    assert all(0 < row["images"]["bits"] < found["ceiling_bits"] and row["labels"]["bits"] < found["label_bits"] + 0.2 for row in found["models"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_same_run_analysed_again_gives_the_same_figures(run):
    assert mutual_information.analyse(run, images=120) == mutual_information.analyse(run, images=120)


def test_more_images_than_there_are_means_all(run):
    assert mutual_information.analyse(run, images=10 ** 6, output="features")["images"] == 360


def test_the_table_has_a_line_for_each_model(run):
    found = mutual_information.analyse(run, images=150)
    lines = mutual_information.render(found).splitlines()
    assert len(lines) == 2 + len(found["models"]) and "logits on 150 test images after 3 rounds" in lines[0]
    assert lines[-1].startswith("sliced cnn5@0.75") and f"{found['models'][-1]['labels']['bits']:.2f} ± " in lines[-1]


def test_no_images_are_refused(run):
    with pytest.raises(JobError, match="got 0 images"):
        mutual_information.analyse(run, images=0)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(JobError, match="has no job.toml"):
        mutual_information.analyse(tmp_path)


def test_a_run_without_a_checkpoint_is_refused(run, tmp_path):
    (tmp_path / "job.toml").write_text((run / "job.toml").read_text())
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        mutual_information.analyse(tmp_path)
