"""The zoo: every entry has the common features, can be stacked and shrunk, costs what is counted by hand, and errors name the way out."""

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from hpcfl.errors import JobError
from hpcfl.models import zoo
from hpcfl.streams import Stream

GREY, COLOUR = (1, 32, 32), (3, 32, 32)
SMALL = ("cnn1", "cnn8_bn", "fedconv", "mlp3", "resnet8", "vit")
WIDTHS = (0.75, 0.5625, 0.42, 0.25)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", zoo.ENTRIES)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_entry_maps_images_to_the_common_features_and_to_logits(name, norm):
    with torch.device("meta"):
        model = zoo.build(name, COLOUR, 7, 48, norm)
        x = torch.empty(2, *COLOUR)
        assert model.features(x).shape == (2, 48)
        assert model(x).shape == (2, 7)
        assert model.header(model.extractor(x)).shape == (2, 7)
        assert model.feature_size == 48


@pytest.mark.parametrize("name", zoo.ENTRIES)
def test_features_are_never_negative_with_the_global_relu(name):
    model = zoo.build(name, (1, 16, 16), 10, 0 if name.startswith("resnet") else 24).eval()
    z = model.features(torch.randn(4, 1, 16, 16))
    assert z.min() >= 0 and z.max() > 0


@pytest.mark.parametrize("name", SMALL)
def test_without_the_global_relu_every_model_has_signed_features(name):
    own = zoo.build(name, GREY, 10, 0).feature_size
    for features in (own, 32):
        assert zoo.build(name, GREY, 10, features, feature_relu=False).eval().features(torch.randn(8, *GREY)).min() < 0


@pytest.mark.parametrize("name", [*SMALL, "cnn10_svhn"])
def test_training_stacked_clients_by_vmap_equals_training_each(name):
    models = [zoo.build(name, GREY, 10) for _ in range(2)]
    x = torch.randn(2, 4, *GREY)
    state = tuple({path: leaf.detach().clone() for path, leaf in part.items()} for part in stack_module_state(models))
    together = vmap(lambda parameters_, buffers, batch: functional_call(models[0], (parameters_, buffers), (batch,)))(*state, x)
    each = torch.stack([model(batch) for model, batch in zip(models, x, strict=True)])
    torch.testing.assert_close(together, each, rtol=1e-4, atol=1e-4)
    for path, leaf in models[1].named_buffers():
        torch.testing.assert_close(state[1][path][1], leaf, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_modules_draw_no_random_numbers(name):
    model = zoo.build(name, GREY, 10).train()
    before = torch.get_rng_state()
    model(torch.zeros(2, *GREY))
    assert torch.equal(before, torch.get_rng_state())


def test_the_same_stream_builds_the_same_bits():
    def build():
        with Stream(3, "model").seeding():
            return zoo.build("cnn4", GREY, 10).state_dict()
    one, other = build(), build()
    assert all(torch.equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("name", ["cnn8_bn", "w1", "fedconv", "resnet18", "mobilenet_v2", "googlenet", "mlp4", "vit"])
def test_width_shrinks_hidden_layers_and_keeps_images_features_and_classes(name):
    with torch.device("meta"):
        full, half = zoo.build(name, COLOUR, 10, 48), zoo.build(f"{name}@0.5", COLOUR, 10, 48)
    assert parameters(half) < 0.55 * parameters(full)
    assert (half.feature_size, half.head.out_features) == (48, 10)
    assert full.state_dict().keys() == half.state_dict().keys()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", zoo.ENTRIES)
def test_every_entry_can_be_built_at_every_width_of_the_paper(name, shape):
    with torch.device("meta"):
        built = [zoo.build(f"{name}@{width}", shape, 10, 0) for width in (1, *WIDTHS)]
        assert all(model(torch.empty(2, *shape)).shape == (2, 10) for model in built)
    sizes = [parameters(model) for model in built]
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(model.state_dict().keys() == built[0].state_dict().keys() for model in built)


@pytest.mark.parametrize("architecture, wanted", [("cnn5", ("cnn5", 1.0)), ("fedconv@0.5625", ("fedconv", 0.5625)), ("vit@1", ("vit", 1.0))])
def test_a_name_is_split_into_the_full_size_model_and_its_width(architecture, wanted):
    assert zoo.split_name(architecture) == wanted
    assert zoo.find_entry(architecture) == (zoo.ENTRIES[wanted[0]], wanted[1])


@pytest.mark.parametrize("name", ["cnn5", "resnet8", "mlp3"])
def test_a_name_may_carry_its_width(name):
    def layout(*arguments, **options):
        return {path: leaf.shape for path, leaf in zoo.build(*arguments, **options).state_dict().items()}
    whole, narrow = layout(name, GREY, 10), layout(f"{name}@0.75", GREY, 10)
    assert whole == layout(f"{name}@1", GREY, 10) and narrow.keys() == whole.keys() and narrow != whole
    assert zoo.count_flops(f"{name}@0.75", GREY, 10) < zoo.count_flops(name, GREY, 10)


def test_hidden_widths_are_those_of_the_name_and_features_stay():
    model = zoo.build("cnn5@0.75", GREY, 10, 48)
    assert [model.body.get_submodule(f"conv{index}").out_channels for index in (1, 2, 3)] == [12, 24, 48]
    assert (model.feature_size, model.head.out_features, model.body.conv1.in_channels) == (48, 10, 3)


@pytest.mark.parametrize("width", ["0", "1.5", "-0.5", "", "half", "nan", "inf", "0.5@0.5"])
def test_a_width_in_a_name_that_is_no_share_is_refused_with_an_example(width):
    with pytest.raises(JobError, match=rf"'cnn5@{width}' has width '{width}', wanted a number above 0 and at most 1, for example cnn5@0\.75"):
        zoo.find_entry(f"cnn5@{width}")
    with pytest.raises(JobError, match="for example nothing@0.75"):
        zoo.split_name(f"nothing@{width}")


def test_cost_is_two_operations_per_multiply_add_of_the_published_table():
    extractor, header = 27 * 32 * 32, 27 * 16 * 16 * 16 + 10_240          # 27.6 k and 121 k multiply-adds
    assert zoo.count_flops("cnn1", GREY, 10, 0) == 2 * (extractor + header)


def test_memory_of_two_linear_layers_is_that_counted_by_hand():
    weights = (4 + 1) + (3 + 3)                                            # 4 pixels -> 1 -> 3 classes
    images, hidden, scores, labels, mean = 4 * 5 * 4, 4 * 5 * 1, 4 * 5 * 3, 8 * 5, 4       # bytes of a batch of 5; the mean divides by a kept number
    forward = images + hidden + scores + labels + mean                     # the ReLU's output is the head's input: one storage
    assert zoo.count_training_bytes("mlp2", (1, 2, 2), 3, 0, "batch", True, 5, 2) == 4 * weights * (2 + 2) + forward
    assert zoo.count_training_bytes("mlp2", (1, 2, 2), 3, 0, "batch", True, 5, 0) == 4 * weights * 2 + forward


def test_memory_of_a_conv_with_a_norm_is_that_counted_by_hand():
    weights = (9 * 3 + 3) + 2 * 3 + (9 * 3 * 16 + 16) + (16 * 3 + 3)       # extractor, its norm, body, head
    buffers = 2 * 3 * 4 + 8                                                # running mean and variance, batches seen
    image = 4 * (4 + 12 + 12 + 3 + 16 + 3) + 8 * 3 + 8                     # pixels, conv, ReLU, pool, body, scores; places of the maxima, label
    batch = 4 * (3 + 3) + 4                                                # mean and deviation of the norm, the number of labels
    assert zoo.count_training_bytes("cnn1", (1, 2, 2), 3, 0, "batch", True, 7, 1) == 4 * weights * 3 + buffers + 7 * image + batch


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", [*SMALL, "w1", "mobilenet_v2@0.25", "googlenet@0.25"])
def test_what_is_kept_of_a_whole_batch_lies_on_the_line_through_two_and_three_images(name, norm):
    model = zoo.build(name, (1, 16, 16), 10, 24, norm)
    own = 2 * sum(leaf.nbytes for leaf in model.parameters()) + sum(leaf.nbytes for leaf in model.buffers())
    assert zoo.count_training_bytes(name, (1, 16, 16), 10, 24, norm, True, 9, 0) == own + zoo.count_kept_bytes(model, 9)


@pytest.mark.parametrize("name", ["fedconv", "resnet8", "vit"])
def test_memory_grows_with_the_batch_and_shrinks_with_the_width(name):
    def bytes_of(name, batch):
        return zoo.count_training_bytes(name, GREY, 10, 64, "batch", True, batch, 2)
    assert bytes_of(name, 1) < bytes_of(name, 2) < bytes_of(name, 32)
    by_width = [bytes_of(f"{name}@{width}", 32) for width in (1, *WIDTHS)]
    assert by_width == sorted(set(by_width), reverse=True)


def test_measuring_memory_draws_nothing_and_needs_no_gradient_mode():
    before = torch.get_rng_state()
    with torch.no_grad():
        without = zoo.count_training_bytes.__wrapped__("cnn2", GREY, 10, 64, "batch", True, 4, 0)
        assert not torch.is_grad_enabled()
    assert without == zoo.count_training_bytes.__wrapped__("cnn2", GREY, 10, 64, "batch", True, 4, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_image_too_small_names_the_model_and_the_smallest_size():
    with pytest.raises(JobError, match=r"'w1' got images of 13x13 pixels, wanted at least 14x14.*data\.image_size"):
        zoo.build("w1", (1, 13, 13), 10)
    assert zoo.build("w1", (1, 14, 14), 10)(torch.zeros(2, 1, 14, 14)).shape == (2, 10)


def test_unknown_model_names_the_nearest():
    with pytest.raises(JobError, match="did you mean 'googlenet'"):
        zoo.build("google_net", GREY, 10)
    with pytest.raises(JobError, match="did you mean 'googlenet@0.5'"):
        zoo.build("google_net@0.5", GREY, 10)


@pytest.mark.parametrize("wrong", [{"norm": "layer"}, {"features": -1}, {"classes": 0}, {"shape": (28, 28)}])
def test_values_outside_their_range_are_refused(wrong):
    with pytest.raises(JobError):
        zoo.build(**{"name": "cnn1", "shape": GREY, "classes": 10, **wrong})
